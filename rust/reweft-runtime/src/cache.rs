//! Where compiled libraries are unpacked: a folder of the user's, named by content and bounded in size.
//!
//! The dynamic loader wants a library as a file. One that is written for each loading costs its bytes each time, and its
//! pages are shared with no other process; so it is written once and found again by the hash of its bytes. Whoever can
//! write to the folder decides what code runs, hence the checks of [`LibraryCache::check`] and the comparison of every byte
//! with the package. Where there is no folder that passes, a temporary file serves, which nobody else sees.

use std::collections::HashMap;
use std::fs::{DirBuilder, File, FileTimes, Metadata, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use reweft::write::parse_nbytes;
use reweft::{Error, ErrorKind, Result};
use rustix::fs::{OFlags, StatVfsMountFlags};

use crate::library::Library;
use crate::torch::Torch;

/// Names the folder; without it, `reweft` in the user's folder for caches.
const FOLDER_VARIABLE: &str = "REWEFT_CACHE_DIR";
/// Says how large the cache may become (`500MB`); 0 switches it off.
const SIZE_VARIABLE: &str = "REWEFT_CACHE_SIZE";
/// Bytes of all libraries together, unless [`SIZE_VARIABLE`] says otherwise.
const DEFAULT_MAX_NBYTES: u64 = 1 << 30;
/// Below the folder, so that other caches can lie beside.
const LIBRARIES: &str = "libraries";
/// Held shared while a library is placed and opened, exclusively while libraries are removed.
const LOCK: &str = ".lock";
const EXTENSION: &str = ".so";
/// Begins the names of files that are being written.
const TEMPORARY: &str = ".reweft-";
/// Only the owner, who has no reason to write.
const MODE: u32 = 0o500;
/// What to do where neither cache nor temporary files can be executed.
const EXECUTION: &str =
    "the file system is mounted noexec: let TMPDIR or REWEFT_CACHE_DIR name a folder of another one";
/// Bytes compared in one step.
const STEP_NBYTES: usize = 1 << 16;

/// Libraries that this process has opened, by the hash of their bytes. The loader never unloads them, so neither does this.
static OPENED: Mutex<Option<HashMap<blake3::Hash, Library>>> = Mutex::new(None);

/// The user's cache of compiled libraries. Processes may use it at the same time.
///
/// ```
/// use reweft_runtime::LibraryCache;
/// if let Some(cache) = LibraryCache::user()? {
///     let nbytes: u64 = cache.list()?.iter().map(|entry| entry.nbytes).sum();
///     println!("{}: {nbytes} of {} bytes", cache.folder().display(), cache.max_nbytes());
/// }
/// # Ok::<(), reweft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LibraryCache {
    root: PathBuf,
    folder: PathBuf,
    max_nbytes: u64,
}

/// A library in the cache.
#[derive(Clone, Debug)]
pub struct CacheEntry {
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub nbytes: u64,
    /// When a process opened it last.
    pub used: SystemTime,
}

/// A library that stays where it is until this is dropped.
struct Placed {
    path: PathBuf,
    is_new: bool,
    lock: File,
}

impl LibraryCache {
    /// The cache that `REWEFT_CACHE_DIR` names, or `reweft` in `XDG_CACHE_HOME` or `~/.cache`. `None` if there is no such
    /// folder or `REWEFT_CACHE_SIZE` is 0. Touches no file.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if `REWEFT_CACHE_SIZE` is no number of bytes.
    pub fn user() -> Result<Option<Self>> {
        let max_nbytes = match std::env::var(SIZE_VARIABLE) {
            Ok(text) if !text.is_empty() => parse_nbytes(&text)
                .map_err(|error| Error::new(ErrorKind::Usage, format!("{SIZE_VARIABLE}: {}", error.message())))?,
            _ => DEFAULT_MAX_NBYTES,
        };
        let root = user_folder().filter(|_| max_nbytes > 0);
        Ok(root.map(|root| Self::new(&root, max_nbytes)))
    }

    /// A cache below `root`, which need not exist.
    pub fn new(root: &Path, max_nbytes: u64) -> Self {
        let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
        Self { folder: root.join(LIBRARIES), root, max_nbytes }
    }

    /// The folder of the libraries.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Bytes that all libraries together may have.
    pub fn max_nbytes(&self) -> u64 {
        self.max_nbytes
    }

    /// Checks that nobody but this user and root can put a file into the folder, or another folder in its place. What does
    /// not exist yet is not looked at.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] with the folder and what is wrong with it; [`ErrorKind::Io`] if it cannot be looked at.
    pub fn check(&self) -> Result<()> {
        check_private(&self.root)?;
        check_own(&self.folder)
    }

    /// The libraries, the one used last first. Other files in the folder are not among them.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the folder cannot be read; if it does not exist, there are none.
    pub fn list(&self) -> Result<Vec<CacheEntry>> {
        let mut entries: Vec<CacheEntry> = self.files(is_library)?;
        entries.sort_by(|a, b| b.used.cmp(&a.used).then_with(|| a.path.cmp(&b.path)));
        Ok(entries)
    }

    /// Removes all libraries; gives how many they were, and their bytes. Waits for processes that are opening one. Those
    /// that have opened one keep it.
    ///
    /// # Errors
    /// As [`check`](Self::check), and [`ErrorKind::Io`] if a file cannot be removed.
    pub fn clear(&self) -> Result<(usize, u64)> {
        self.check()?;
        if metadata(&self.folder)?.is_none() {
            return Ok((0, 0));
        }
        let lock = self.lock_file()?;
        lock.lock().map_err(|error| self.failed("lock", error))?;
        let entries = self.list()?;
        for entry in entries.iter().chain(&self.files(is_temporary)?) {
            remove(&entry.path)?;
        }
        Ok((entries.len(), entries.iter().map(|entry| entry.nbytes).sum()))
    }

    /// Puts a library into the folder, unless it is there with these very bytes.
    fn place(&self, hash: blake3::Hash, bytes: &[u8]) -> Result<Placed> {
        if bytes.len() as u64 > self.max_nbytes {
            return Err(refused(&self.folder, "is bounded to less than the library has"));
        }
        let folders = DirBuilder::new().recursive(true).mode(0o700).create(&self.folder);
        folders.map_err(|error| self.failed("create", error))?;
        self.check()?;
        if is_noexec(&self.folder) {
            // The loader would fail, and leave the part mapped that it had mapped by then.
            return Err(refused(&self.folder, "is on a file system that is mounted noexec"));
        }
        let lock = self.lock_file()?;
        lock.lock_shared().map_err(|error| self.failed("lock", error))?;
        let path = self.folder.join(format!("{}{EXTENSION}", hash.to_hex()));
        let is_new = !is_there(&path, bytes);
        if is_new {
            self.write(&path, bytes).map_err(|error| self.failed("write a library to", error))?;
        }
        Ok(Placed { path, is_new, lock })
    }

    /// Writes a file whole. Two processes that do so at once write the same, so either may be the last.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(&self.folder)?;
        file.write_all(bytes)?;
        file.as_file().set_permissions(Permissions::from_mode(MODE))?;
        // Not synced: what a power cut leaves differs from the package and is replaced.
        file.persist(path)?;
        Ok(())
    }

    /// Removes what was used longest ago, until the rest fits, and what a killed process left. Does nothing while another
    /// process is opening a library: the next one that adds to the folder will do it.
    fn evict(&self, keep: &Path) -> Result<()> {
        let lock = self.lock_file()?;
        if lock.try_lock().is_err() {
            return Ok(());
        }
        for left in self.files(is_temporary)? {
            remove(&left.path)?;
        }
        let entries = self.list()?;
        let mut total: u64 = entries.iter().map(|entry| entry.nbytes).sum();
        for oldest in entries.iter().rev().filter(|entry| entry.path != keep) {
            if total <= self.max_nbytes {
                break;
            }
            remove(&oldest.path)?;
            total -= oldest.nbytes;
        }
        Ok(())
    }

    fn files(&self, wanted: fn(&str) -> bool) -> Result<Vec<CacheEntry>> {
        let folder = match std::fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            folder => folder.map_err(|error| self.failed("list", error))?,
        };
        let mut files = Vec::new();
        for entry in folder {
            let entry = entry.map_err(|error| self.failed("list", error))?;
            // A file that another process has just removed is not there.
            let Ok(found) = entry.metadata() else { continue };
            if found.is_file() && entry.file_name().to_str().is_some_and(wanted) {
                let used = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                files.push(CacheEntry { path: entry.path(), nbytes: found.len(), used });
            }
        }
        Ok(files)
    }

    fn lock_file(&self) -> Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(self.folder.join(LOCK));
        file.map_err(|error| self.failed("lock", error))
    }

    #[cold]
    fn failed(&self, doing: &str, error: io::Error) -> Error {
        Error::io(&format!("{doing} the cache of libraries"), error).in_file(&self.folder)
    }
}

/// Opens a library of these bytes: the one that the process has, or a file of the user's cache, or a temporary file.
///
/// # Errors
/// [`ErrorKind::Run`] if the loader refuses it, [`ErrorKind::Usage`] as [`LibraryCache::user`], [`ErrorKind::Io`] if it can be
/// written nowhere.
///
/// # Safety
/// As [`Library::open`].
pub(crate) unsafe fn open_library(torch: &Torch, bytes: &[u8]) -> Result<Library> {
    let hash = blake3::hash(bytes);
    // Held while loading, so that two threads do not load one library twice.
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let opened = opened.get_or_insert_default();
    if let Some(library) = opened.get(&hash) {
        return Ok(library.clone());
    }
    let cache = LibraryCache::user()?;
    // SAFETY: passed on to the caller.
    let cached = cache.and_then(|cache| unsafe { open_cached(torch, &cache, hash, bytes) });
    let library = match cached {
        Some(library) => library,
        // SAFETY: passed on to the caller.
        None => unsafe { open_temporary(torch, bytes)? },
    };
    opened.insert(hash, library.clone());
    Ok(library)
}

/// Opens a library in the cache; `None` if the folder is not safe or cannot be written, or the loader does not map files
/// from there.
///
/// # Safety
/// As [`Library::open`].
unsafe fn open_cached(torch: &Torch, cache: &LibraryCache, hash: blake3::Hash, bytes: &[u8]) -> Option<Library> {
    let placed = cache.place(hash, bytes).ok()?;
    // SAFETY: the caller vouches for the bytes, which are those of the file; only this user can write to the folder, and
    // nothing here writes to a file that is there.
    let library = unsafe { Library::open(torch, &placed.path) }.ok()?;
    let Placed { path, is_new, lock } = placed;
    drop(lock);
    if is_new {
        // The library is open; that others could not be removed can wait.
        let _ = cache.evict(&path);
    }
    Some(library)
}

/// Opens a library from a temporary file, whose name is gone when this returns.
///
/// # Safety
/// As [`Library::open`].
unsafe fn open_temporary(torch: &Torch, bytes: &[u8]) -> Result<Library> {
    let failed = |error| Error::io("unpack the library to a temporary file", error);
    let mut file = tempfile::Builder::new().prefix("reweft-").suffix(EXTENSION).tempfile().map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    // The loader knows libraries by name; this one is never used twice, because the file is made anew for each. A file in
    // memory would do too, but for its name: `/proc/self/fd/N` is used again, and the loader would give the library before.
    let path = file.into_temp_path();
    // SAFETY: the caller vouches for the bytes; the file is private to this user.
    unsafe { Library::open(torch, &path) }.map_err(|error| {
        let error = Error::from(error);
        if is_noexec(&path) { error.with_hint(EXECUTION) } else { error }
    })
}

/// Whether the loader may not map files from there.
fn is_noexec(path: &Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|found| found.f_flag.contains(StatVfsMountFlags::NOEXEC))
}

/// The user's folder for caches of reweft: the one that `REWEFT_CACHE_DIR` names, or `reweft` in `XDG_CACHE_HOME` or
/// `~/.cache`. `None` if there is no home folder. Touches no file.
pub fn user_folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // The XDG specification has relative paths ignored.
    let base = || variable("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    let home = || variable("HOME").filter(|path| path.is_absolute()).map(|home| home.join(".cache"));
    variable(FOLDER_VARIABLE).or_else(|| base().or_else(home).map(|base| base.join("reweft")))
}

/// What a path itself is, links not followed; `None` if there is nothing.
fn metadata(path: &Path) -> Result<Option<Metadata>> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("look at", error).in_file(path)),
    }
}

/// Whether group or others may write.
fn is_open(found: &Metadata) -> bool {
    found.mode() & 0o022 != 0
}

fn is_ours(found: &Metadata) -> bool {
    found.uid() == rustix::process::geteuid().as_raw()
}

/// Checks that nobody but this user and root can put a file into a folder, or another folder in its place. What does not
/// exist yet is not looked at.
///
/// # Errors
/// [`ErrorKind::Unsupported`] with the folder and what is wrong with it; [`ErrorKind::Io`] if it cannot be looked at.
pub fn check_private(folder: &Path) -> Result<()> {
    check_own(folder)?;
    let nearest = folder.ancestors().skip(1).find(|path| path.exists()).unwrap_or(Path::new("/"));
    let nearest = nearest.canonicalize().map_err(|error| Error::io("look at", error).in_file(nearest))?;
    for above in nearest.ancestors() {
        if let Some(found) = metadata(above)? {
            is_safe_above(&found).map_err(|what| refused(above, what))?;
        }
    }
    Ok(())
}

/// Checks one folder of this user's.
fn check_own(folder: &Path) -> Result<()> {
    match metadata(folder)? {
        Some(found) => is_safe(&found).map_err(|what| refused(folder, what)),
        None => Ok(()),
    }
}

fn is_safe(found: &Metadata) -> Result<(), &'static str> {
    match () {
        () if !found.is_dir() => Err("is no folder"),
        () if !is_ours(found) => Err("belongs to another user"),
        () if is_open(found) => Err("can be written by others"),
        () => Ok(()),
    }
}

/// Whoever can write to a folder above can put another one in the place of ours, unless it has the sticky bit.
fn is_safe_above(found: &Metadata) -> Result<(), &'static str> {
    match () {
        () if found.uid() != 0 && !is_ours(found) => Err("belongs to another user"),
        () if is_open(found) && found.mode() & 0o1000 == 0 => Err("can be written by others"),
        () => Ok(()),
    }
}

#[cold]
fn refused(path: &Path, what: &str) -> Error {
    let error = Error::new(ErrorKind::Unsupported, format!("the folder {what}, so no code is kept there"));
    error.in_file(path).with_hint(format!("{FOLDER_VARIABLE} names another folder"))
}

fn is_library(name: &str) -> bool {
    name.strip_suffix(EXTENSION).is_some_and(|hash| blake3::Hash::from_hex(hash).is_ok())
}

fn is_temporary(name: &str) -> bool {
    name.starts_with(TEMPORARY)
}

/// Whether a file of this user's has these bytes; notes that it was used.
fn is_there(path: &Path, bytes: &[u8]) -> bool {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let Ok(mut file) = OpenOptions::new().read(true).custom_flags(flags).open(path) else { return false };
    let sound = file
        .metadata()
        .is_ok_and(|found| found.is_file() && is_ours(&found) && !is_open(&found) && found.len() == bytes.len() as u64);
    if !(sound && has_bytes(&mut file, bytes).unwrap_or(false)) {
        return false;
    }
    // Fails on a read-only file system, where nothing is evicted either.
    let _ = file.set_times(FileTimes::new().set_modified(SystemTime::now()));
    true
}

fn has_bytes(file: &mut File, bytes: &[u8]) -> io::Result<bool> {
    let mut found = vec![0; STEP_NBYTES];
    for wanted in bytes.chunks(STEP_NBYTES) {
        let found = &mut found[..wanted.len()];
        file.read_exact(found)?;
        if found != wanted {
            return Ok(false);
        }
    }
    Ok(true)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", error).in_file(path)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    fn cache(root: &tempfile::TempDir, max_nbytes: u64) -> LibraryCache {
        LibraryCache::new(&root.path().join("cache"), max_nbytes)
    }

    fn place(cache: &LibraryCache, bytes: &[u8]) -> Result<Placed> {
        cache.place(blake3::hash(bytes), bytes)
    }

    fn mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn what_is_there_is_used_and_what_differs_replaced() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(&root, 1 << 20);
        let bytes = vec![7; STEP_NBYTES + 3];
        let path = {
            let first = place(&cache, &bytes).unwrap();
            assert!(first.is_new);
            first.path
        };
        let inode = || std::fs::metadata(&path).unwrap().ino();
        let before = inode();
        assert!(!place(&cache, &bytes).unwrap().is_new);
        assert_eq!(inode(), before);
        assert_eq!(std::fs::metadata(&cache.folder).unwrap().mode() & 0o777, 0o700);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, MODE);

        let mut tampered = bytes.clone();
        *tampered.last_mut().unwrap() = 8;
        for other in [&tampered[..], &bytes[1..], b""] {
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, other).unwrap();
            assert!(place(&cache, &bytes).unwrap().is_new);
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
        mode(&path, 0o666);
        assert!(place(&cache, &bytes).unwrap().is_new);
        let elsewhere = root.path().join("elsewhere");
        std::fs::rename(&path, &elsewhere).unwrap();
        symlink(&elsewhere, &path).unwrap();
        assert!(place(&cache, &bytes).unwrap().is_new);
        assert!(std::fs::symlink_metadata(&path).unwrap().is_file());
    }

    #[test]
    fn folders_that_others_could_fill_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(&root, 1 << 20);
        drop(place(&cache, b"x").unwrap());
        let message = || place(&cache, b"x").err().map(|error| error.to_string()).unwrap();
        for folder in [&cache.folder, &cache.root] {
            mode(folder, 0o770);
            assert!(message().contains("written by others"), "{}", message());
            assert!(cache.clear().is_err());
            mode(folder, 0o700);
        }
        mode(root.path(), 0o777);
        assert!(message().contains("written by others"), "{}", message());
        // As /tmp has it.
        mode(root.path(), 0o1777);
        assert!(place(&cache, b"x").is_ok());
        mode(root.path(), 0o700);

        let moved = root.path().join("moved");
        std::fs::rename(&cache.folder, &moved).unwrap();
        symlink(&moved, &cache.folder).unwrap();
        assert!(message().contains("no folder"), "{}", message());
        std::fs::remove_file(&cache.folder).unwrap();
        std::fs::write(&cache.folder, "").unwrap();
        assert!(place(&cache, b"x").is_err());
    }

    #[test]
    fn the_oldest_go_first_and_the_newest_stays() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(&root, 250);
        let paths: Vec<PathBuf> = (0..3_u8).map(|number| place(&cache, &[number; 100]).unwrap().path).collect();
        let age = |path: &Path, seconds| {
            let past = SystemTime::now() - Duration::from_secs(seconds);
            File::open(path).unwrap().set_times(FileTimes::new().set_modified(past)).unwrap();
        };
        for (number, path) in paths.iter().enumerate() {
            age(path, 30 - number as u64);
        }
        // Used again, so it is not the oldest any more.
        drop(place(&cache, &[0; 100]).unwrap());
        let left = cache.folder.join(".reweft-left");
        std::fs::write(&left, "").unwrap();
        let busy = place(&cache, &[2; 100]).unwrap();
        cache.evict(&paths[2]).unwrap();
        assert_eq!(cache.list().unwrap().len(), 3, "another process is opening a library");
        drop(busy);
        cache.evict(&paths[2]).unwrap();
        let kept: Vec<PathBuf> = cache.list().unwrap().into_iter().map(|entry| entry.path).collect();
        assert_eq!(kept, [paths[2].clone(), paths[0].clone()]);
        assert!(!left.exists());
        assert!(place(&cache, &[9; 251]).is_err());
        assert_eq!(cache.clear().unwrap(), (2, 200));
        assert_eq!(cache.list().unwrap().len(), 0);
    }

    #[test]
    fn clearing_leaves_what_is_no_library() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(&root, 1 << 20);
        assert_eq!(cache.clear().unwrap(), (0, 0));
        assert!(!cache.folder.exists());
        drop(place(&cache, b"x").unwrap());
        let other = cache.folder.join("notes.so");
        std::fs::write(&other, "").unwrap();
        assert_eq!(cache.clear().unwrap(), (1, 1));
        assert!(other.exists());
    }
}
