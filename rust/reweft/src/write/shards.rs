//! Writing safetensors in several files with an index, as the Hugging Face libraries lay them out:
//! `net-00001-of-00003.safetensors` and so on, and `net.safetensors.index.json`.
//!
//! No system call puts several files into place at once. The order is: all files are written under temporary names,
//! every CRC compared, and synced; if a file of an earlier set has to be replaced, that set's index is removed, so that
//! nobody reads new files by it; then the files take their names; last the index does. So whoever goes by the index sees
//! the old set, the new set, or none, and never a mix.

use std::fs;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde::Serialize;

use super::safetensors::Prepared;
use super::transfer::Transfers;
use super::{AtomicFile, ConvertOptions, Progress, sharing};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::TensorInfo;

/// What every file that is written is called, by the name of the one file that it would be without shards.
struct Names {
    folder: PathBuf,
    /// Without the extension.
    stem: String,
}

impl Names {
    fn of(out: &Path) -> Result<Self> {
        let name = out.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Error::new(ErrorKind::Usage, "an index names files in UTF-8").in_file(out))?;
        let stem = name.strip_suffix(".safetensors").unwrap_or(name).to_owned();
        Ok(Self { folder: out.parent().unwrap_or(Path::new("")).to_owned(), stem })
    }

    /// The file of that number, from 1.
    fn shard(&self, number: usize, count: usize) -> String {
        format!("{}-{number:05}-of-{count:05}.safetensors", self.stem)
    }

    fn index(&self) -> PathBuf {
        self.folder.join(format!("{}.safetensors.index.json", self.stem))
    }
}

#[derive(Serialize)]
struct Index<'a> {
    metadata: Metadata,
    weight_map: IndexMap<&'a str, &'a str>,
}

#[derive(Serialize)]
struct Metadata {
    total_size: u64,
}

/// Writes tensors in files of at most `max_nbytes` bytes of tensors each; one larger tensor has a file of its own. Tensors
/// that share bytes go into one file. Gives all files, the index last; what fits one file has no index.
pub(super) fn write(
    checkpoint: &Checkpoint,
    tensors: &[(&str, &TensorInfo)],
    out: &Path,
    max_nbytes: u64,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<Vec<PathBuf>> {
    let names = Names::of(out)?;
    let shards = split(sharing::groups(checkpoint, tensors)?, tensors, max_nbytes);
    let count = shards.len();
    let files: Vec<String> = match count {
        0 | 1 => vec![out.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned()],
        _ => (1..=count).map(|number| names.shard(number, count)).collect(),
    };
    let paths: Vec<PathBuf> = files.iter().map(|file| names.folder.join(file)).collect();
    let index_path = names.index();
    refuse_leftover(if count > 1 { out } else { &index_path }, count > 1)?;
    for path in paths.iter().chain([&index_path]) {
        super::convert::refuse_source(checkpoint, path)?;
    }
    let mut written = Vec::with_capacity(count.max(1));
    let mut weight_map = IndexMap::with_capacity(tensors.len());
    let mut transfers = Transfers::new(checkpoint, tensors.iter().map(|(_, info)| info.nbytes()).sum(), progress)?;
    for (number, path) in paths.iter().enumerate() {
        let members = shards.get(number).into_iter().flatten();
        let members: Vec<_> = members.filter_map(|member| tensors.get(*member)).copied().collect();
        let file = AtomicFile::create(path)?;
        Prepared::of(checkpoint, &members)?.write(&members, &file, &mut transfers)?;
        weight_map.extend(members.iter().map(|(key, _)| (*key, files[number].as_str())));
        written.push(file);
    }
    transfers.finish()?;
    if count <= 1 {
        written.into_iter().try_for_each(|file| file.commit_if(options.sync))?;
        return Ok(paths);
    }
    let total_size = tensors.iter().map(|(_, info)| info.nbytes()).sum();
    // In the order of the checkpoint's keys, whichever file they are in.
    let weight_map = tensors.iter().filter_map(|(key, _)| Some((*key, *weight_map.get(key)?))).collect();
    let index = Index { metadata: Metadata { total_size }, weight_map };
    install(written, &paths, &index, &index_path, options.sync)?;
    Ok(paths.into_iter().chain([index_path]).collect())
}

/// Assigns groups to files in their order. A file ends before the group that would make it too large; a group that is too
/// large by itself has a file of its own, before the one that is being filled.
fn split(groups: Vec<Vec<usize>>, tensors: &[(&str, &TensorInfo)], max_nbytes: u64) -> Vec<Vec<usize>> {
    let nbytes = |group: &[usize]| {
        group.iter().filter_map(|number| tensors.get(*number)).map(|(_, info)| info.nbytes()).sum::<u64>()
    };
    let (mut shards, mut filling, mut filled) = (Vec::new(), Vec::new(), 0);
    for group in groups {
        let more = nbytes(&group);
        if more > max_nbytes {
            shards.push(group);
            continue;
        }
        if filled + more > max_nbytes {
            shards.push(std::mem::take(&mut filling));
            filled = 0;
        }
        filling.extend(group);
        filled += more;
    }
    if !filling.is_empty() {
        shards.push(filling);
    }
    // Keys keep their order within a file, also where a group brought a later one forward.
    for shard in &mut shards {
        shard.sort_unstable();
    }
    shards
}

/// Refuses to leave a file of another layout beside the new ones, which loaders would take in their place.
fn refuse_leftover(path: &Path, sharded: bool) -> Result<()> {
    if fs::symlink_metadata(path).is_err() {
        return Ok(());
    }
    let what = if sharded {
        "this file exists, and loaders would take it before the index of the new shards"
    } else {
        "this index exists, and all tensors fit one file, which has none"
    };
    Err(Error::new(ErrorKind::Usage, what).in_file(path).with_hint("remove it, or write to another name"))
}

/// Puts finished files into place, in the order that the module's documentation states.
fn install(files: Vec<AtomicFile>, paths: &[PathBuf], index: &Index<'_>, index_path: &Path, sync: bool) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(index).map_err(|error| Error::io("write", error.into()))?;
    text.push(b'\n');
    let index_file = AtomicFile::create(index_path)?;
    index_file.write_at(&text, 0)?;
    if sync {
        files.iter().try_for_each(AtomicFile::sync)?;
    }
    if index_path.exists() && paths.iter().any(|path| path.exists()) {
        fs::remove_file(index_path).map_err(|error| Error::io("remove", error).in_file(index_path))?;
        if sync {
            super::atomic::sync_folder(index_path)?;
        }
    }
    for file in files {
        file.commit_unsynced()?;
    }
    // The index is synced, and the folder before it and behind it.
    if sync {
        super::atomic::sync_folder(index_path)?;
    }
    index_file.commit_if(sync)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    #[test]
    fn files_are_filled_in_order_and_large_groups_stand_alone() {
        let infos: Vec<TensorInfo> = [40, 30, 30, 200, 10, 60, 50, 0, 5]
            .iter()
            .map(|nbytes| TensorInfo {
                dtype: Dtype::U8,
                shape: vec![*nbytes],
                strides: vec![1],
                storage: 0,
                storage_offset: 0,
            })
            .collect();
        let tensors: Vec<_> = infos.iter().map(|info| ("key", info)).collect();
        let single = |max| split((0..9).map(|number| vec![number]).collect(), &tensors, max);
        assert_eq!(single(100), [vec![3], vec![0, 1, 2], vec![4, 5], vec![6, 7, 8]]);
        assert_eq!(single(99), [vec![0, 1], vec![3], vec![2, 4], vec![5], vec![6, 7, 8]]);
        assert_eq!(single(1000), [(0..9).collect::<Vec<_>>()]);
        assert_eq!(single(1).len(), 9);
        let grouped = split(vec![vec![0, 5], vec![1], vec![2, 4]], &tensors, 100);
        assert_eq!(grouped, [vec![0, 5], vec![1, 2, 4]]);
        assert!(split(Vec::new(), &tensors, 1).is_empty());
    }
}
