//! Conversion: what is the same for every target format.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde::Serialize;

use super::{ConvertOptions, Progress, TargetFormat, numpy, refuse_same_file, safetensors, shards, sharing, torch};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};

/// What a conversion did.
#[derive(Clone, Debug, Serialize)]
pub struct ConvertReport {
    /// The file to open: what was asked for, or the index of its shards.
    pub out: PathBuf,
    /// All files that were written, `out` last.
    pub files: Vec<PathBuf>,
    /// Tensors in them.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub nbytes: u64,
    /// Keys left out because another key has the same bytes, with that key.
    pub dropped_aliases: IndexMap<String, String>,
    /// What the checkpoint holds that is no tensor and therefore is not in the file.
    pub not_carried: Vec<String>,
    /// What a careful reader should know.
    pub notices: Vec<String>,
}

/// Writes a checkpoint in another format. A safetensors file keeps its `__metadata__`.
///
/// Checks every CRC of what it reads. The kernel copies what can stay as it is; the rest passes through buffers of some
/// 20 MiB in all, so memory does not grow with the model, except that a tensor whose elements are spread over its
/// storage (a transposed one) is held whole. `out` appears whole or not at all, with the permissions that the
/// process's umask leaves a new file. With `max_shard_nbytes` there may be several files and an index, which takes its
/// name last: whoever goes by the index sees the old files, the new ones or none, and never a mix.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for a tensor that cannot be read, or a dtype or key that the format lacks,
/// [`ErrorKind::Mismatch`] for shared tensors that `options` do not settle, [`ErrorKind::Usage`] if `out` is a file that
/// the checkpoint is read from or its extension stands for no format, [`ErrorKind::Format`] for a wrong CRC or a
/// source that changes meanwhile, [`ErrorKind::Limit`], [`ErrorKind::Io`]. `out` is then as it was.
///
/// # Examples
/// ```
/// use reweft::write::{ConvertOptions, convert};
///
/// # let folder = tempfile::tempdir().unwrap();
/// # let out = folder.path().join("fc.safetensors");
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/checkpoints/fc.pt");
/// let checkpoint = reweft::Checkpoint::open(path.as_ref(), &reweft::OpenOptions::default())?;
/// let report = convert(&checkpoint, &out, &ConvertOptions::default(), &mut |_, _| ())?;
/// assert_eq!(report.tensors, checkpoint.len());
/// # Ok::<(), reweft::Error>(())
/// ```
pub fn convert(
    checkpoint: &Checkpoint,
    out: &Path,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<ConvertReport> {
    let format = options.format_of(out)?;
    options.check(format)?;
    refuse_source(checkpoint, out)?;
    checkpoint.check_readable()?;
    let mut tensors: Vec<_> = checkpoint.tensors().collect();
    let dropped_aliases = match format {
        TargetFormat::Torch => IndexMap::new(),
        TargetFormat::Safetensors | TargetFormat::Numpy => {
            sharing::settle(checkpoint, &tensors, options.shared, format)?
        }
    };
    tensors.retain(|(key, _)| !dropped_aliases.contains_key(*key));
    let (mut files, mut more_notices) = (vec![out.to_owned()], Vec::new());
    match (format, options.max_shard_nbytes) {
        (TargetFormat::Safetensors, None) => safetensors::write(checkpoint, &tensors, out, options, progress)?,
        (TargetFormat::Safetensors, Some(most)) => {
            files = shards::write(checkpoint, &tensors, out, most, options, progress)?;
        }
        (TargetFormat::Numpy, _) => numpy::write(checkpoint, &tensors, out, options, progress)?,
        (TargetFormat::Torch, _) => more_notices = torch::write(checkpoint, &tensors, out, options, progress)?,
    }
    Ok(ConvertReport {
        out: files.last().map_or(out, PathBuf::as_path).to_owned(),
        files,
        tensors: tensors.len(),
        nbytes: tensors.iter().map(|(_, info)| info.nbytes()).sum(),
        dropped_aliases,
        not_carried: not_carried(checkpoint, format),
        notices: checkpoint.notices().iter().cloned().chain(more_notices).collect(),
    })
}

/// What is no tensor, and metadata that the format has no place for.
fn not_carried(checkpoint: &Checkpoint, format: TargetFormat) -> Vec<String> {
    let metadata = checkpoint.metadata().filter(|_| format != TargetFormat::Safetensors);
    let metadata = metadata.into_iter().flatten().map(|(name, _)| format!("__metadata__.{name}"));
    checkpoint.values().iter().map(ToString::to_string).chain(metadata).collect()
}

/// Refuses to write over any file that the checkpoint's bytes come from, under whichever name.
pub(super) fn refuse_source(checkpoint: &Checkpoint, out: &Path) -> Result<()> {
    refuse_file_of(checkpoint, out, "the checkpoint that it is made of")
}

/// Refuses to write over any file of a checkpoint, `what` it is.
pub(super) fn refuse_file_of(checkpoint: &Checkpoint, out: &Path, what: &str) -> Result<()> {
    refuse_same_file(out, checkpoint.path(), what)?;
    let Ok(target) = out.metadata() else { return Ok(()) };
    for file in checkpoint.files() {
        let source = file.metadata().map_err(|error| Error::io("stat", error).in_file(checkpoint.path()))?;
        if (source.dev(), source.ino()) == (target.dev(), target.ino()) {
            return Err(Error::new(ErrorKind::Usage, format!("the output would replace {what}")).in_file(out));
        }
    }
    Ok(())
}
