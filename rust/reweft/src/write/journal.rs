//! In-place rewrites: what is to be written goes into a journal beside the file first.
//!
//! The journal holds new bytes (redo), because then one rule says it all: a journal under its own name is complete, was on
//! the disk before the file was touched, and makes the file the new one, however often it is applied. Without it the file
//! is the old one.
//!
//! ```text
//! magic, inode, length of the file
//! place, length, CRC-32     of each range, then its bytes
//! all ones, count           end the list
//! BLAKE3 of the file's end  with the ranges as zeros: directory and names, which do not change
//! BLAKE3 of all before but the ranges' bytes
//! ```

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tempfile::NamedTempFile;

use super::atomic::{PRIVATE, keep_owner, sync_folder, temporary};
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

const MAGIC: [u8; 16] = *b"reweft-journal\n\x03";
/// Ends the list of ranges.
const END: u64 = u64::MAX;
/// Bytes at the end of the file that tell whose journal it is.
const TAIL_NBYTES: u64 = 64 << 10;
/// Bytes of a journal that are read or written at a time. Whole blocks at places of whole blocks: 13 MB took 34 ms to write
/// and sync, and 47 ms in pieces of 64 KiB between other things, on ext4.
const BLOCK_NBYTES: usize = 1 << 20;

/// A file that nobody else writes to or has mapped, as far as they lock it as we do.
#[derive(Debug)]
pub(super) struct Locked {
    file: File,
    /// The file itself, where the caller's path was a symbolic link.
    path: PathBuf,
}

impl Locked {
    /// Opens and locks a file for writing.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if another process holds a lock, [`ErrorKind::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |doing: &str, error| Error::io(doing, error).in_file(path);
        let real = path.canonicalize().map_err(|error| failed("open", error))?;
        let file =
            File::options().read(true).write(true).open(&real).map_err(|error| failed("open for writing", error))?;
        let found = file.metadata().map_err(|error| failed("stat", error))?;
        if found.nlink() > 1 {
            // The journal goes by the name, and whoever opens the file under another one would not find it.
            let what = format!("the file has {} names (hard links), and would change under all of them", found.nlink());
            let error = Error::new(ErrorKind::Usage, what).in_file(path);
            return Err(error.with_hint("write a copy: -o with the same name leaves the other names the old file"));
        }
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { file, path: real }),
            Err(Errno::WOULDBLOCK) => {
                let error = Error::new(ErrorKind::Usage, "a process has the file mapped, or rewrites it").in_file(path);
                Err(error.with_hint(
                    "write a copy: -o with the same name replaces the file and leaves its readers the old one",
                ))
            }
            Err(error) => Err(failed("flock", error.into())),
        }
    }

    /// Refuses a file that is not the one that was read.
    ///
    /// # Errors
    /// [`ErrorKind::Format`] if it was replaced or changed since.
    pub fn check_is(&self, source: &Source) -> Result<()> {
        let stat = |file: &File| file.metadata().map_err(|error| Error::io("stat", error).in_file(&self.path));
        let Some(file) = source.file() else {
            return Err(Error::new(ErrorKind::Usage, "only a file can be rewritten in place").in_file(&self.path));
        };
        let (found, read) = (stat(&self.file)?, stat(file)?);
        if (found.dev(), found.ino(), found.len()) == (read.dev(), read.ino(), source.len()) {
            return Ok(());
        }
        Err(Error::format("the file was replaced after it was opened").in_file(&self.path))
    }

    /// A temporary file beside this one, for those alone who may read this one.
    fn temporary(&self) -> Result<NamedTempFile> {
        let failed = |doing: &str, error| Error::io(doing, error).in_file(&self.path);
        let found = self.file.metadata().map_err(|error| failed("stat", error))?;
        let file = temporary(&self.path, PRIVATE)?;
        keep_owner(&found, file.as_file());
        file.as_file().set_permissions(found.permissions()).map_err(|error| failed("chmod the journal", error))?;
        Ok(file)
    }

    fn inode(&self) -> Result<(u64, u64)> {
        let found = self.file.metadata().map_err(|error| Error::io("stat", error).in_file(&self.path))?;
        Ok((found.ino(), found.len()))
    }

    /// Hash of the end of the file, with ranges that are rewritten as zeros.
    fn tail_hash(&self, ranges: &[Range<u64>]) -> Result<[u8; 32]> {
        let (_, length) = self.inode()?;
        let start = length.saturating_sub(TAIL_NBYTES);
        let mut tail = vec![0; usize::try_from(length - start).unwrap_or(0)];
        self.file.read_exact_at(&mut tail, start).map_err(|error| Error::io("read", error).in_file(&self.path))?;
        for range in ranges {
            let place = |at: u64| usize::try_from(at.saturating_sub(start)).unwrap_or(usize::MAX).min(tail.len());
            let (first, end) = (place(range.start), place(range.end));
            tail[first..end].fill(0);
        }
        Ok(*blake3::hash(&tail).as_bytes())
    }
}

/// Where the journal of a file is, named after it.
fn journal_path(file: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(file.file_name().unwrap_or_default());
    name.push(".reweft-journal");
    file.with_file_name(name)
}

/// A journal that is being written, under a temporary name.
pub(super) struct Journal<'a> {
    locked: &'a Locked,
    out: NamedTempFile,
    /// What is not written yet; less than a block.
    block: Vec<u8>,
    /// Of all but the ranges' bytes, which have a CRC.
    hasher: blake3::Hasher,
    ranges: Vec<Range<u64>>,
}

impl<'a> Journal<'a> {
    /// Begins a journal of a locked file.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn begin(locked: &'a Locked) -> Result<Self> {
        let (out, block) = (locked.temporary()?, Vec::with_capacity(BLOCK_NBYTES));
        let mut journal = Self { locked, out, block, hasher: blake3::Hasher::new(), ranges: Vec::new() };
        let (inode, length) = locked.inode()?;
        journal.put(&MAGIC)?;
        journal.put(&inode.to_le_bytes())?;
        journal.put(&length.to_le_bytes())?;
        Ok(journal)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.put_unhashed(bytes)
    }

    fn put_unhashed(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK_NBYTES - self.block.len()));
            self.block.extend_from_slice(now);
            if self.block.len() == BLOCK_NBYTES {
                self.flush()?;
            }
            bytes = later;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let written = self.out.write_all(&self.block);
        written.map_err(|error| Error::io("write the journal", error).in_file(&self.locked.path))?;
        self.block.clear();
        Ok(())
    }

    /// Whether nothing is to be written.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Adds bytes, with their CRC-32 and their place in the file.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn add(&mut self, at: u64, bytes: &[u8], crc: u32) -> Result<()> {
        self.ranges.push(at..at + bytes.len() as u64);
        self.put(&at.to_le_bytes())?;
        self.put(&(bytes.len() as u64).to_le_bytes())?;
        self.put(&crc.to_le_bytes())?;
        self.put_unhashed(bytes)
    }

    /// Gives the journal its name; from then on the file counts as rewritten.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; there is no journal then.
    pub fn commit(mut self) -> Result<Committed> {
        let tail = self.locked.tail_hash(&self.ranges)?;
        let count = self.ranges.len() as u64;
        self.put(&END.to_le_bytes())?;
        self.put(&count.to_le_bytes())?;
        self.put(&tail)?;
        let hash = self.hasher.finalize();
        self.put_unhashed(hash.as_bytes())?;
        self.flush()?;
        let path = journal_path(&self.locked.path);
        let failed = |doing: &str, error| Error::io(doing, error).in_file(&self.locked.path);
        self.out.as_file().sync_all().map_err(|error| failed("fsync the journal", error))?;
        // Another process could have left one here only while it held the lock.
        self.out.persist(&path).map_err(|error| failed("rename the journal", error.error))?;
        if let Err(error) = sync_folder(&path) {
            // It may not be on the disk, and the file is untouched: take it back.
            let _ = fs::remove_file(&path);
            return Err(error.in_file(&self.locked.path));
        }
        Ok(Committed { path })
    }
}

/// A journal that is complete and on the disk.
pub(super) struct Committed {
    path: PathBuf,
}

impl Committed {
    /// Writes what it says, waits for the disk, and removes it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; the journal stays, and whoever opens the file next goes on.
    pub fn apply(self, locked: &Locked) -> Result<()> {
        let unfinished =
            |error: Error| error.with_hint("the rewrite is finished when the file is opened the next time");
        let failed = |doing: &str, error| unfinished(Error::io(doing, error).in_file(&locked.path));
        let journal = File::open(&self.path).map_err(|error| failed("open the journal", error))?;
        let mut write = |at: u64, bytes: &[u8]| {
            locked.file.write_all_at(bytes, at).map_err(|error| Error::io("write", error).in_file(&locked.path))
        };
        // Of its hashes none are compared here: it was written by us just now, or checked.
        read_ranges(&journal, false, &mut write).map_err(unfinished)?;
        locked.file.sync_data().map_err(|error| failed("fdatasync", error))?;
        fs::remove_file(&self.path).map_err(|error| failed("remove the journal", error))?;
        close_aside(journal);
        let hint =
            "the file is rewritten and on the disk; after a power cut it may be rewritten once more, to the same";
        sync_folder(&locked.path).map_err(|error| error.with_hint(hint))
    }

    /// Compares hashes and file.
    fn check(&self, locked: &Locked) -> Result<()> {
        let refused = |what: &str, hint: &str| {
            let what = format!("an in-place rewrite was cut short, and its journal {what}");
            let hint = format!("{hint} {}", self.path.display());
            Error::format(what).in_file(&locked.path).with_hint(hint)
        };
        let failed = |error| Error::io("read the journal", error).in_file(&self.path);
        let journal = File::open(&self.path).map_err(failed)?;
        let found = match read_ranges(&journal, true, &mut |_, _| Ok(())) {
            Err(error) if error.kind() == ErrorKind::Format => {
                return Err(refused("is damaged", "restore the file; then remove"));
            }
            found => found.map_err(|error| error.in_file(&self.path))?,
        };
        let fits = found.ranges.iter().all(|range| range.end <= found.length);
        if (found.inode, found.length) != locked.inode()? || !fits || locked.tail_hash(&found.ranges)? != found.tail {
            let hint = "if this file is the one that you want, remove";
            return Err(refused("is of another file that had this name", hint));
        }
        Ok(())
    }
}

/// What a journal says of itself.
struct Contents {
    inode: u64,
    length: u64,
    ranges: Vec<Range<u64>>,
    tail: [u8; 32],
}

/// Hands over each range of a journal, long ones in pieces, and compares all hashes on the way if `checked`.
///
/// # Errors
/// [`ErrorKind::Format`] for one that is cut short or damaged, [`ErrorKind::Unsupported`] for one of another version,
/// [`ErrorKind::Io`]; what `take` gives.
fn read_ranges(journal: &File, checked: bool, take: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<Contents> {
    let damaged = || Error::format("the journal of an in-place rewrite is damaged");
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => damaged(),
        _ => Error::io("read the journal", error),
    };
    let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    let mut journal = BufReader::with_capacity(BLOCK_NBYTES, journal);
    let mut hasher = blake3::Hasher::new();
    let mut head = [0; 32];
    journal.read_exact(&mut head).map_err(failed)?;
    hasher.update(&head);
    if head[..16] != MAGIC {
        return Err(Error::new(ErrorKind::Unsupported, "the journal of an in-place rewrite is of another version"));
    }
    let (inode, length) = (number(&head[16..24]), number(&head[24..]));
    let mut ranges = Vec::new();
    loop {
        // Place and length of a range; at the end the marker and the count.
        let mut place = [0; 16];
        journal.read_exact(&mut place).map_err(failed)?;
        hasher.update(&place);
        let (mut at, mut left) = (number(&place[..8]), number(&place[8..]));
        if at == END {
            let (mut tail, mut whole) = ([0; 32], [0; 32]);
            journal.read_exact(&mut tail).and_then(|()| journal.read_exact(&mut whole)).map_err(failed)?;
            let rest = journal.read(&mut [0]).map_err(failed)?;
            let is_same = *hasher.update(&tail).finalize().as_bytes() == whole;
            let is_whole = rest == 0 && left == ranges.len() as u64 && is_same;
            return if is_whole { Ok(Contents { inode, length, ranges, tail }) } else { Err(damaged()) };
        }
        let mut crc = [0; 4];
        journal.read_exact(&mut crc).map_err(failed)?;
        hasher.update(&crc);
        ranges.push(at..at.saturating_add(left));
        let mut bytes = crc32fast::Hasher::new();
        while left > 0 {
            // From the reader's own buffer: to read them out of it would copy them once more.
            let chunk = match journal.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                found => found.map_err(failed)?,
            };
            if chunk.is_empty() {
                return Err(damaged());
            }
            let chunk = &chunk[..chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX))];
            if checked {
                bytes.update(chunk);
            }
            take(at, chunk)?;
            let nbytes = chunk.len();
            journal.consume(nbytes);
            at = at.saturating_add(nbytes as u64);
            left -= nbytes as u64;
        }
        if checked && bytes.finalize().to_le_bytes() != crc {
            return Err(damaged());
        }
    }
}

/// Closes a file that has no name any more. Freeing its blocks takes as long as writing some of them, and nobody has to
/// wait for it: the system does the same for a process that dies.
fn close_aside(file: File) {
    // Without a thread it is closed here.
    let _ = std::thread::Builder::new().name("reweft-close".into()).spawn(move || drop(file));
}

/// Finishes an in-place rewrite of a file that was cut short, if there was one. Costs a look for the journal.
///
/// # Errors
/// [`ErrorKind::Usage`] while another process rewrites the file, [`ErrorKind::Format`] for a journal that is damaged or of
/// another file, [`ErrorKind::Io`].
pub fn recover(path: &Path) -> Result<()> {
    // What is not there has no journal; whoever opens it says so.
    let Ok(real) = path.canonicalize() else { return Ok(()) };
    let journal = journal_path(&real);
    if !journal.exists() {
        return Ok(());
    }
    let locked = Locked::open(&real)?;
    // The process that held the lock before may have finished.
    if !journal.exists() {
        return Ok(());
    }
    let committed = Committed { path: journal };
    committed.check(&locked)?;
    committed.apply(&locked)
}
