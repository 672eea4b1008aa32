//! Files that must not change while they are read: somebody who writes to one could have changed it after it was checked.

use std::fs::{File, Metadata};
use std::path::Path;

use crate::error::{Error, Result};

/// How files were when a read began.
pub(crate) struct Watch<'a> {
    path: &'a Path,
    before: Vec<(&'a File, Metadata)>,
}

impl<'a> Watch<'a> {
    /// Looks at files that are read under one name.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    pub fn new(path: &'a Path, files: impl Iterator<Item = &'a File>) -> Result<Self> {
        let before = files.map(|file| Ok((file, file.metadata()?))).collect::<std::io::Result<_>>();
        Ok(Self { path, before: before.map_err(|error| Error::io("stat", error).in_file(path))? })
    }

    /// Looks again.
    ///
    /// # Errors
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) for a file that changed meanwhile.
    pub fn check(&self) -> Result<()> {
        for (file, before) in &self.before {
            let after = file.metadata().map_err(|error| Error::io("stat", error).in_file(self.path))?;
            if after.len() != before.len() || after.modified().ok() != before.modified().ok() {
                return Err(Error::format("the file was changed while it was read").in_file(self.path));
            }
        }
        Ok(())
    }
}
