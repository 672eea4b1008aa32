//! Copying between files: by sharing blocks, by the kernel, or through memory where neither works.

use std::fs::File;

use rustix::io::Errno;

use super::AtomicFile;
use crate::error::{Error, Result};
use crate::source::{Source, slice, to_usize};

/// Bytes asked of the kernel at a time, so that progress can be told and an abort is not waited for.
const KERNEL_NBYTES: u64 = 64 << 20;
/// Bytes that pass through memory at a time.
const CHUNK_NBYTES: u64 = 1 << 20;

/// Makes `out` a copy of a whole file by sharing its blocks; false where the file system cannot.
pub(super) fn clone_whole(source: &Source, out: &AtomicFile) -> bool {
    source.file().is_some_and(|file| rustix::fs::ioctl_ficlone(out.as_file(), file).is_ok())
}

/// Copies a range, by the kernel where it can. Offsets are explicit, because other threads may use the same open files.
///
/// `moved` is told the bytes of each step; its error ends the copy.
///
/// # Errors
/// Read errors, [`ErrorKind::Format`](crate::ErrorKind::Format) for a file that became shorter, and
/// [`ErrorKind::Io`](crate::ErrorKind::Io).
pub(super) fn copy_range(
    source: &Source,
    from: u64,
    out: &AtomicFile,
    to: u64,
    nbytes: u64,
    moved: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    let done = match source.file() {
        Some(file) => copy_by_kernel(file, from, out, to, nbytes, moved)?,
        None => 0,
    };
    copy_through_memory(source, from + done, out, to + done, nbytes - done, moved)
}

/// Gives how many bytes were copied before the kernel said that it does not do this pair of files: none or all.
fn copy_by_kernel(
    file: &File,
    from: u64,
    out: &AtomicFile,
    to: u64,
    nbytes: u64,
    moved: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<u64> {
    let (mut read_at, mut write_at) = (from, to);
    while read_at - from < nbytes {
        let step = KERNEL_NBYTES.min(nbytes - (read_at - from));
        match rustix::fs::copy_file_range(file, Some(&mut read_at), out.as_file(), Some(&mut write_at), to_usize(step)?)
        {
            Ok(0) => {
                let what = format!("the file ends at {read_at:#x} now, and was longer when it was opened");
                return Err(Error::format(what).at(read_at));
            }
            // Fewer than asked for is no end: the rest is asked for again.
            Ok(count) => moved(count as u64)?,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => break,
            Err(error) => return Err(out.failed("copy_file_range", error.into())),
        }
    }
    Ok(read_at - from)
}

fn copy_through_memory(
    source: &Source,
    mut from: u64,
    out: &AtomicFile,
    mut to: u64,
    nbytes: u64,
    moved: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    let end = from + nbytes;
    let mut buffer = Vec::new();
    while from < end {
        let step = CHUNK_NBYTES.min(end - from);
        let chunk = if let Some(bytes) = source.as_slice() {
            slice(bytes, from, step)?
        } else {
            buffer.resize(to_usize(step)?, 0);
            source.read_exact_at(from, &mut buffer)?;
            &buffer
        };
        out.write_at(chunk, to)?;
        moved(step)?;
        (from, to) = (from + step, to + step);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{self, Access};
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    #[test]
    fn files_maps_and_memory_copy_alike() {
        let bytes: Vec<u8> = (0..=255).cycle().take(3 << 20).collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in");
        std::fs::write(&path, &bytes).unwrap();
        let sources: [Source; 3] = [
            source::open(&path, Access::Read).unwrap(),
            source::open(&path, Access::Map).unwrap(),
            Arc::new(bytes.clone()),
        ];
        for source in sources {
            let out = AtomicFile::create(&folder.path().join("out")).unwrap();
            let mut sum = 0;
            let mut moved = |count| {
                sum += count;
                Ok(())
            };
            copy_range(&source, 5, &out, 7, 2 << 20, &mut moved).unwrap();
            let mut found = vec![1; (2 << 20) + 7];
            out.as_file().read_exact_at(&mut found, 0).unwrap();
            assert_eq!((&found[..7], &found[7..], sum), (&[0; 7][..], &bytes[5..(2 << 20) + 5], 2 << 20));
            assert!(copy_range(&source, 3 << 20, &out, 0, 1, &mut |_| Ok(())).is_err(), "behind the end");
            let stop = copy_range(&source, 0, &out, 0, 1, &mut |_| Err(Error::format("stop"))).unwrap_err();
            assert_eq!(stop.message(), "stop");
        }
    }
}
