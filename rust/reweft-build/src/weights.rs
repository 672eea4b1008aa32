//! A checkpoint, converted or selected into a safetensors file.

use std::io::Write;
use std::path::PathBuf;

use reweft::write::{ConvertOptions, Shared, convert};
use reweft::{Dtype, Limits, Result};

use crate::keys::Keys;
use crate::script::Target;

/// Writes tensors of a checkpoint to a safetensors file in `OUT_DIR`.
///
/// # Examples
/// ```
/// # fn main() -> reweft_build::Result<()> {
/// # let out_dir = tempfile::tempdir().unwrap();
/// let out = reweft_build::Weights::new("../../fixtures/checkpoints/training.pt")
///     .top_level_key("model_state_dict")
///     .select(r"^module\.0\.")
///     .remap(r"^module\.0\.", "linear.")
/// #   .out_dir(out_dir.path())
///     .convert("linear.safetensors")?;
/// let checkpoint = reweft::Checkpoint::open(&out, &reweft::OpenOptions::default())?;
/// assert_eq!(checkpoint.keys().collect::<Vec<_>>(), ["linear.weight", "linear.bias"]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "`convert` writes the file"]
pub struct Weights {
    keys: Keys,
    dtype: Option<Dtype>,
    shared: Shared,
    target: Target,
}

impl Weights {
    /// Names the checkpoint: a `.pt` or safetensors file, relative to `CARGO_MANIFEST_DIR`. Reads nothing.
    pub fn new(checkpoint: impl Into<PathBuf>) -> Self {
        Self { keys: Keys::new(checkpoint.into()), dtype: None, shared: Shared::default(), target: Target::default() }
    }

    /// Sets the dotted path of the container that holds the state_dict; its path is not part of the keys.
    pub fn top_level_key(mut self, key: impl Into<String>) -> Self {
        self.keys.top_level_key = Some(key.into());
        self
    }

    /// Keeps only keys that match this or another selected regex, which sees keys before any [`remap`](Self::remap).
    pub fn select(mut self, pattern: impl Into<String>) -> Self {
        self.keys.select.push(pattern.into());
        self
    }

    /// Adds a rule: every match of the regex `pattern` in a key becomes `replacement`, where `$1` is a group. Rules
    /// apply in order, each to the result of the one before.
    pub fn remap(mut self, pattern: impl Into<String>, replacement: impl Into<String>) -> Self {
        self.keys.rules.push((pattern.into(), replacement.into()));
        self
    }

    /// Takes a key map from a TOML file, relative to `CARGO_MANIFEST_DIR`, which cargo then watches too: see
    /// [`reweft::KeyMap::from_toml`]. Its rules come before those of [`remap`](Self::remap).
    pub fn keys(mut self, file: impl Into<PathBuf>) -> Self {
        self.keys.file = Some(file.into());
        self
    }

    /// Converts float tensors to this dtype, rounding to nearest even; a warning of the build names the others.
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Says what to do with tensors that share bytes, which safetensors cannot say. The default is an error.
    pub fn shared(mut self, shared: Shared) -> Self {
        self.shared = shared;
        self
    }

    /// Sets what reading may cost.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.keys.limits = limits;
        self
    }

    /// Has cargo set the environment variable `name` to the output's path while it compiles the crate, for
    /// `include_bytes!(env!("NAME"))`.
    pub fn rustc_env(mut self, name: impl Into<String>) -> Self {
        self.target.rustc_env = Some(name.into());
        self
    }

    /// Writes to another folder than `OUT_DIR`; it must exist. For tests, and for use outside of build scripts.
    pub fn out_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.target.out_dir = Some(folder.into());
        self
    }

    /// Writes the file `name` in `OUT_DIR`, in the format of its extension, and gives its path; prints directives for cargo.
    ///
    /// Checks the CRCs of all selected bytes; memory does not grow with the model. A file that holds the
    /// same bytes already keeps its modification time.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`](crate::ErrorKind::Usage) outside of a build script, for a malformed pattern, or for a name
    /// that is no plain file name, the checkpoint's own, or has an extension that stands for no format. [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) for an
    /// absent top-level key or a selection that matches nothing,
    /// [`ErrorKind::KeyCollision`](crate::ErrorKind::KeyCollision) for two keys on one name,
    /// [`ErrorKind::Mismatch`](crate::ErrorKind::Mismatch) for shared tensors that [`shared`](Self::shared) does not
    /// settle, [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for what cannot be read or written,
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) for a damaged file,
    /// [`ErrorKind::Limit`](crate::ErrorKind::Limit), [`ErrorKind::Io`](crate::ErrorKind::Io). The output is then as
    /// it was.
    pub fn convert(&self, name: &str) -> Result<PathBuf> {
        self.convert_saying(name, &mut std::io::stdout().lock())
    }

    fn convert_saying(&self, name: &str, said: &mut dyn Write) -> Result<PathBuf> {
        let mut script = self.target.script(name, said)?;
        let path = script.watch(&self.keys.path)?;
        let file = self.keys.file.as_deref().map(|file| script.watch(file)).transpose()?;
        let checkpoint = self.keys.open(&path, file.as_deref())?;
        let checkpoint = if let Some(dtype) = self.dtype { checkpoint.cast(dtype)? } else { checkpoint };
        script.warn(checkpoint.notices())?;
        let format = ConvertOptions::default().format_of(name.as_ref())?;
        let options = ConvertOptions { format: Some(format), shared: self.shared, ..ConvertOptions::default() };
        script.output(|made| convert(&checkpoint, made, &options, &mut |_, _| ()).map(drop))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reweft::{Checkpoint, ErrorKind, OpenOptions};
    use std::fs;
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/checkpoints").join(name)
    }

    fn training(out_dir: &Path) -> Weights {
        Weights::new("../../fixtures/checkpoints/training.pt").top_level_key("model_state_dict").out_dir(out_dir)
    }

    /// The output, and what cargo was told.
    fn converted(weights: &Weights) -> Result<(PathBuf, String)> {
        let mut said = Vec::new();
        let out = weights.convert_saying("out.safetensors", &mut said)?;
        Ok((out, String::from_utf8(said).unwrap()))
    }

    #[test]
    fn cargo_watches_the_source_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (out, said) = converted(&training(folder.path())).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/checkpoints/training.pt");
        assert_eq!(said, format!("cargo::rerun-if-changed={}\n", source.display()));
        assert_eq!(out, folder.path().join("out.safetensors"));
        let (_, again) = converted(&training(folder.path()).rustc_env("WEIGHTS")).unwrap();
        assert_eq!(again, format!("{said}cargo::rustc-env=WEIGHTS={}\n", out.display()));
    }

    #[test]
    fn selection_sees_keys_before_rules_and_bytes_are_the_checkpoints() {
        let folder = tempfile::tempdir().unwrap();
        let weights = training(folder.path()).remap(r"^module\.0\.", "linear.").select(r"^module\.0\.");
        let written = Checkpoint::open(&converted(&weights).unwrap().0, &OpenOptions::default()).unwrap();
        assert_eq!(written.keys().collect::<Vec<_>>(), ["linear.weight", "linear.bias"]);
        let source = Checkpoint::open(&fixture("training.pt"), &OpenOptions::default()).unwrap();
        let expected = source.read("model_state_dict.module.0.weight").unwrap();
        assert_eq!(written.read("linear.weight").unwrap(), expected);
        let error = converted(&weights.select("^linear")).unwrap_err();
        assert!(error.hint().unwrap().contains("before any remap"), "{error}");
    }

    #[test]
    fn unchanged_output_keeps_its_time_and_a_changed_option_writes_it() {
        let folder = tempfile::tempdir().unwrap();
        let (out, _) = converted(&training(folder.path())).unwrap();
        let old = SystemTime::now() - Duration::from_hours(1);
        fs::File::options().append(true).open(&out).unwrap().set_modified(old).unwrap();
        let before = fs::metadata(&out).unwrap().modified().unwrap();
        converted(&training(folder.path())).unwrap();
        assert_eq!(fs::metadata(&out).unwrap().modified().unwrap(), before);
        converted(&training(folder.path()).remap(r"^module\.", "")).unwrap();
        assert_ne!(fs::metadata(&out).unwrap().modified().unwrap(), before);
    }

    #[test]
    fn a_changed_source_changes_the_output() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("model.pt");
        let (target, first) = (tempfile::tempdir().unwrap(), fixture("fc.pt"));
        fs::copy(first, &source).unwrap();
        let weights = Weights::new(&source).out_dir(target.path());
        let before = fs::read(converted(&weights).unwrap().0).unwrap();
        fs::copy(fixture("no_crc.pt"), &source).unwrap();
        let (out, said) = converted(&weights).unwrap();
        assert_ne!(fs::read(out).unwrap(), before);
        assert!(said.contains("\ncargo::warning="), "a missing CRC is said: {said}");
    }

    #[test]
    fn key_map_file_is_watched_and_floats_are_cast() {
        let folder = tempfile::tempdir().unwrap();
        let weights = Weights::new("../../fixtures/checkpoints/training.pt").out_dir(folder.path());
        let weights = weights.keys("../../fixtures/keys/training.toml").dtype(Dtype::BF16);
        let (out, said) = converted(&weights).unwrap();
        assert!(said.contains("training.toml\n"), "{said}");
        let written = Checkpoint::open(&out, &OpenOptions::default()).unwrap();
        let weight = written.get("0.weight").unwrap();
        assert_eq!((weight.dtype, &weight.shape[..]), (Dtype::BF16, &[4, 3][..]));
    }

    #[test]
    fn wrong_key_is_answered_with_the_nearest_and_nothing_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let error = converted(&training(folder.path()).top_level_key("model_state")).unwrap_err();
        assert_eq!((error.kind(), error.hint()), (ErrorKind::NotFound, Some("did you mean \"model_state_dict\"?")));
        assert!(format!("{error:?}").contains("did you mean"), "what `fn main() -> Result` prints");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_does_not_work_out_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let kind = |weights: Weights| converted(&weights).unwrap_err().kind();
        assert_eq!(kind(training(folder.path()).select("(")), ErrorKind::Usage);
        assert_eq!(kind(training(folder.path()).remap("a", "$1")), ErrorKind::Usage);
        assert_eq!(kind(training(folder.path()).remap(r"\.[01]\.", ".")), ErrorKind::KeyCollision);
        assert_eq!(kind(training(&folder.path().join("absent"))), ErrorKind::Io);
        assert_eq!(kind(Weights::new("absent.pt").out_dir(folder.path())), ErrorKind::Io);
        let tied = Weights::new(fixture("state_dict.pt")).select("^tied").out_dir(folder.path());
        assert_eq!(kind(tied.clone()), ErrorKind::Mismatch);
        assert!(converted(&tied.shared(Shared::DropAliases)).is_ok());
    }
}
