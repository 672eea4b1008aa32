//! Writing: everything goes to a temporary file beside the target, is synced, and takes the target's name at the end. A
//! rewrite in place puts a journal there first.

mod atomic;
mod convert;
mod copy;
mod journal;
mod numpy;
mod options;
mod refit;
mod safetensors;
mod shards;
mod sharing;
mod slabs;
mod strip;
mod torch;
mod transfer;
mod watch;

pub use atomic::AtomicFile;
pub use convert::{ConvertReport, convert};
pub use journal::recover;
pub(crate) use numpy::lead as npy_lead;
pub use options::{ConvertOptions, Shared, TargetFormat, parse_nbytes};
pub use refit::{RefitReport, VerifyReport, refit, refit_in_place, verify};
pub use strip::{StripReport, strip};
pub(crate) use watch::Watch;

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// Told how many bytes are done, of how many; progress bars hang on it.
pub type Progress<'a> = &'a mut (dyn FnMut(u64, u64) + Send);

/// Refuses to write over a file that the write reads from.
fn refuse_same_file(out: &Path, input: &Path, what: &str) -> Result<()> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| PathBuf::from(path));
    if out != input && real(out) != real(input) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Usage, format!("the output would replace {what}")).in_file(out))
}
