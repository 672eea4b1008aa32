//! What a conversion is asked for: the target's format and what to do where the format cannot say something.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};

/// How a checkpoint is written out.
///
/// # Examples
/// ```
/// use reweft::write::{ConvertOptions, Shared, TargetFormat};
///
/// let options = ConvertOptions { shared: Shared::Duplicate, ..ConvertOptions::default() };
/// assert_eq!(options.format_of("net.safetensors".as_ref())?, TargetFormat::Safetensors);
/// # Ok::<(), reweft::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// The format to write; `None` goes by the output's extension.
    pub format: Option<TargetFormat>,
    /// What to do with tensors that share bytes, where the format cannot say so.
    pub shared: Shared,
    /// Most bytes of tensors in one file; safetensors alone has a layout for several. `None` writes one file, and so does
    /// a number that all tensors fit. A larger tensor has a file of its own.
    pub max_shard_nbytes: Option<u64>,
    /// Whether file and folder are synced, so that the file survives a power cut that follows. Without it the call is
    /// still all or nothing for everybody who looks, but after a power cut the new file may be empty or absent.
    pub sync: bool,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self { format: None, shared: Shared::default(), max_shard_nbytes: None, sync: true }
    }
}

impl ConvertOptions {
    /// Refuses options that the format has no use for.
    pub(super) fn check(&self, format: TargetFormat) -> Result<()> {
        let what = match self.max_shard_nbytes {
            Some(0) => "a shard takes at least one byte".to_owned(),
            Some(_) if format != TargetFormat::Safetensors => format!("{} is written as one file", format.name()),
            _ => return Ok(()),
        };
        Err(Error::new(ErrorKind::Usage, what))
    }

    /// The format that `out` gets.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if no format was chosen and the extension stands for none.
    pub fn format_of(&self, out: &Path) -> Result<TargetFormat> {
        if let Some(format) = self.format {
            return Ok(format);
        }
        let extension = out.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        TargetFormat::from_extension(extension).ok_or_else(|| {
            let known: Vec<_> = TargetFormat::ALL.iter().flat_map(|format| format.extensions()).collect();
            let known = known.iter().map(|extension| format!(".{extension}")).collect::<Vec<_>>().join(", ");
            Error::new(ErrorKind::Usage, format!("the extension {extension:?} stands for no format"))
                .in_file(out)
                .with_hint(format!("known are {known}; or choose the format"))
        })
    }
}

/// Reads a number of bytes as people write it: `5GB` (decimal), `5GiB` (binary), `500 MB`, `1.5G`, `4096`.
///
/// # Errors
/// [`ErrorKind::Usage`].
///
/// # Examples
/// ```
/// assert_eq!(reweft::write::parse_nbytes("1.5GB")?, 1_500_000_000);
/// assert!(reweft::write::parse_nbytes("5 apples").is_err());
/// # Ok::<(), reweft::Error>(())
/// ```
pub fn parse_nbytes(text: &str) -> Result<u64> {
    text.trim().parse::<bytesize::ByteSize>().map(|size| size.as_u64()).map_err(|_| {
        let error = Error::new(ErrorKind::Usage, format!("{text:?} is no number of bytes"));
        error.with_hint("write 5GB for 5,000,000,000 bytes, 5GiB for 5 * 2^30")
    })
}

/// The file formats that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TargetFormat {
    /// safetensors.
    Safetensors,
    /// The zip archive that `torch.save` writes: a dict from keys to tensors that `torch.load` reads with
    /// `weights_only=True`. Shared storages and strides are kept.
    Torch,
    /// The zip archive that `numpy.savez` writes: an array for each key, for `numpy.load`.
    Numpy,
}

impl TargetFormat {
    /// Every format, in the order in which messages list them.
    pub const ALL: &'static [Self] = &[Self::Safetensors, Self::Torch, Self::Numpy];

    /// The name by which a user chooses it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Torch => "pt",
            Self::Numpy => "npz",
        }
    }

    /// File extensions that stand for it.
    pub const fn extensions(self) -> &'static [&'static str] {
        match self {
            Self::Safetensors => &["safetensors"],
            Self::Torch => &["pt", "pth", "bin"],
            Self::Numpy => &["npz"],
        }
    }

    /// Finds a format by a file's extension, without its dot.
    pub fn from_extension(extension: &str) -> Option<Self> {
        let matches = |known: &&str| known.eq_ignore_ascii_case(extension);
        Self::ALL.iter().copied().find(|format| format.extensions().iter().any(matches))
    }

    /// Finds a format by its name.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`], with the names there are.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|format| format.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|format| format!("{:?}", format.name())).collect();
            Error::new(ErrorKind::Usage, format!("format is {name:?}, wanted {}", known.join(" or ")))
        })
    }
}

/// What to do with tensors that share bytes, where the format cannot say so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shared {
    /// Refuse, and name the keys.
    #[default]
    Error,
    /// Write the bytes once for each key.
    Duplicate,
    /// Write only the first key of tensors that are the same; refuse those that merely overlap.
    DropAliases,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn format_by_extension_name_and_choice() {
        let options = ConvertOptions::default();
        for name in ["a.safetensors", "a.b.SafeTensors"] {
            assert_eq!(options.format_of(Path::new(name)).unwrap(), TargetFormat::Safetensors, "{name}");
        }
        for name in ["a.pt", "a.pth", "a.bin"] {
            assert_eq!(options.format_of(Path::new(name)).unwrap(), TargetFormat::Torch, "{name}");
        }
        assert_eq!(options.format_of(Path::new("a.npz")).unwrap(), TargetFormat::Numpy);
        for name in ["a", "safetensors", ".safetensors", "a.safetensors.tmp", "a."] {
            let error = options.format_of(Path::new(name)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{name}");
            assert!(error.hint().unwrap().contains(".safetensors"), "{name}");
        }
        let chosen = ConvertOptions { format: Some(TargetFormat::Safetensors), ..options };
        assert!(chosen.format_of(Path::new("a")).is_ok());
        for format in TargetFormat::ALL {
            assert_eq!(TargetFormat::from_name(format.name()).unwrap(), *format);
        }
        assert!(TargetFormat::from_name("gguf").is_err());
    }
}
