//! `cache`: the compiled libraries that loading has unpacked.

use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use reweft_runtime::LibraryCache;
use serde::Serialize;

use crate::args::{Cache, CacheAction};
use crate::output;

/// Why there is no cache at all.
const NONE: &str = "no cache: REWEFT_CACHE_SIZE is 0, or there is no home folder";

pub fn run(command: &Cache, out: &mut dyn Write) -> anyhow::Result<bool> {
    let cache = LibraryCache::user()?;
    if cache.is_none() && !command.json {
        output::notices([&NONE.to_owned()]);
    }
    match command.action {
        CacheAction::List => list(cache.as_ref(), command.json, out)?,
        CacheAction::Clear => clear(cache.as_ref(), command.json, out)?,
        CacheAction::Path => path(cache.as_ref(), command.json, out)?,
    }
    Ok(true)
}

/// A library as JSON.
#[derive(Serialize)]
struct EntryView<'a> {
    file: &'a Path,
    nbytes: u64,
    /// Seconds since it was opened last.
    idle_seconds: u64,
}

fn list(cache: Option<&LibraryCache>, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let entries = cache.map(LibraryCache::list).transpose()?.unwrap_or_default();
    let now = SystemTime::now();
    let idle = |used| now.duration_since(used).unwrap_or_default().as_secs();
    let views = entries.iter();
    let views =
        views.map(|entry| EntryView { file: &entry.path, nbytes: entry.nbytes, idle_seconds: idle(entry.used) });
    let views: Vec<EntryView<'_>> = views.collect();
    if json {
        return output::json(out, &views);
    }
    let row = |view: &EntryView| {
        let name = view.file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        vec![name, output::bytes(view.nbytes), view.idle_seconds.to_string()]
    };
    output::table(
        out,
        &["library", "bytes", "idle seconds"],
        &["bytes", "idle seconds"],
        views.iter().map(row).collect(),
    )?;
    let total: u64 = views.iter().map(|view| view.nbytes).sum();
    let most = cache.map_or(0, LibraryCache::max_nbytes);
    Ok(writeln!(out, "{} libraries, {} of {} bytes", views.len(), output::bytes(total), output::bytes(most))?)
}

#[derive(Serialize)]
struct Cleared {
    libraries: usize,
    nbytes: u64,
}

fn clear(cache: Option<&LibraryCache>, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let (libraries, nbytes) = cache.map(LibraryCache::clear).transpose()?.unwrap_or_default();
    if json {
        return output::json(out, &Cleared { libraries, nbytes });
    }
    Ok(writeln!(out, "{libraries} libraries removed, {} bytes", output::bytes(nbytes))?)
}

#[derive(Serialize)]
struct Place<'a> {
    folder: Option<&'a Path>,
    max_nbytes: u64,
    /// Why it is not used, if it is not.
    refused: Option<String>,
}

fn path(cache: Option<&LibraryCache>, json: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let refused = match cache {
        None => Some(NONE.to_owned()),
        Some(cache) => cache.check().err().map(|error| error.to_string()),
    };
    if json {
        let (folder, max_nbytes) = (cache.map(LibraryCache::folder), cache.map_or(0, LibraryCache::max_nbytes));
        return output::json(out, &Place { folder, max_nbytes, refused });
    }
    let Some(cache) = cache else { return Ok(()) };
    output::notices(&refused);
    Ok(writeln!(out, "{}", cache.folder().display())?)
}
