//! A package with the weights of a checkpoint.

use std::io::Write;
use std::path::PathBuf;

use reweft::plan::{Allow, plan};
use reweft::source::Access;
use reweft::{Artifact, Limits, Result, write};

use crate::keys::Keys;
use crate::script::Target;

/// Writes a copy of a compiled package that holds a checkpoint's weights to `OUT_DIR`.
///
/// # Examples
/// ```
/// # fn main() -> reweft_build::Result<()> {
/// # let out_dir = tempfile::tempdir().unwrap();
/// reweft_build::Refit::new("../../fixtures/packages/plain.pt2", "../../fixtures/checkpoints/fc.pt")
///     .remap(r"^module\.", "")
/// #   .out_dir(out_dir.path())
///     .write("net.pt2")?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "`write` writes the package"]
pub struct Refit {
    package: PathBuf,
    keys: Keys,
    allow: Allow,
    target: Target,
}

impl Refit {
    /// Names the package and the checkpoint, relative to `CARGO_MANIFEST_DIR`. Reads nothing.
    pub fn new(package: impl Into<PathBuf>, checkpoint: impl Into<PathBuf>) -> Self {
        Self {
            package: package.into(),
            keys: Keys::new(checkpoint.into()),
            allow: Allow::default(),
            target: Target::default(),
        }
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

    /// Says which differences between package and checkpoint are meant. The default is none.
    pub fn allow(mut self, allow: Allow) -> Self {
        self.allow = allow;
        self
    }

    /// Sets what reading may cost, for both files.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.keys.limits = limits;
        self
    }

    /// Has cargo set the environment variable `name` to the output's path while it compiles the crate.
    pub fn rustc_env(mut self, name: impl Into<String>) -> Self {
        self.target.rustc_env = Some(name.into());
        self
    }

    /// Writes to another folder than `OUT_DIR`; it must exist. For tests, and for use outside of build scripts.
    pub fn out_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.target.out_dir = Some(folder.into());
        self
    }

    /// Writes the file `name` in `OUT_DIR` and gives its path; prints directives for cargo.
    ///
    /// Costs what [`reweft::write::refit`] costs: the package is written once, and CRCs are compared. A file that holds
    /// the same bytes already keeps its modification time.
    ///
    /// # Errors
    /// [`ErrorKind::Mismatch`](crate::ErrorKind::Mismatch), listing every difference that [`allow`](Self::allow) does
    /// not settle, if package and checkpoint do not fit. [`ErrorKind::Usage`](crate::ErrorKind::Usage) outside of a
    /// build script, for a malformed pattern, or for a name that is no plain file name or that of a file that is read.
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) for an absent top-level key or a selection that matches
    /// nothing, [`ErrorKind::KeyCollision`](crate::ErrorKind::KeyCollision) for two keys on one name,
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for a package of another kind,
    /// [`ErrorKind::Format`](crate::ErrorKind::Format) for a damaged file,
    /// [`ErrorKind::Limit`](crate::ErrorKind::Limit), [`ErrorKind::Io`](crate::ErrorKind::Io). The output is then as
    /// it was.
    pub fn write(&self, name: &str) -> Result<PathBuf> {
        self.write_saying(name, &mut std::io::stdout().lock())
    }

    fn write_saying(&self, name: &str, said: &mut dyn Write) -> Result<PathBuf> {
        let mut script = self.target.script(name, said)?;
        // Both are watched before one can fail, so that mending either is seen.
        let (package, path) = (script.watch(&self.package)?, script.watch(&self.keys.path)?);
        let file = self.keys.file.as_deref().map(|file| script.watch(file)).transpose()?;
        let artifact = Artifact::open(&package, Access::Read, &self.keys.limits)?;
        let checkpoint = self.keys.open(&path, file.as_deref())?;
        let plan = plan(&artifact, &checkpoint, self.allow)?;
        // Findings that do not block were allowed by name, or change nothing; only the checkpoint's notices are news.
        script.warn(checkpoint.notices())?;
        script.output(|made| write::refit(&plan, &artifact, &checkpoint, made, &mut |_, _| ()).map(drop))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reweft::ErrorKind;
    use std::fs;
    use std::path::Path;

    const PACKAGE: &str = "../../fixtures/packages/plain.pt2";
    const CHECKPOINT: &str = "../../fixtures/checkpoints/fc.pt";

    fn written(refit: &Refit) -> Result<(PathBuf, String)> {
        let mut said = Vec::new();
        let out = refit.write_saying("net.pt2", &mut said)?;
        Ok((out, String::from_utf8(said).unwrap()))
    }

    #[test]
    fn both_files_are_watched_and_the_package_holds_the_weights() {
        let folder = tempfile::tempdir().unwrap();
        let (out, said) = written(&Refit::new(PACKAGE, CHECKPOINT).out_dir(folder.path())).unwrap();
        let base = Path::new(env!("CARGO_MANIFEST_DIR"));
        let watched =
            [PACKAGE, CHECKPOINT].map(|path| format!("cargo::rerun-if-changed={}\n", base.join(path).display()));
        assert_eq!(said, watched.concat());
        let artifact = Artifact::open(&out, Access::Read, &Limits::default()).unwrap();
        let weight = artifact.read_slot(artifact.slot("fc.weight").unwrap()).unwrap();
        assert_eq!(weight, 1_f32.to_le_bytes().repeat(6));
        // Once more, from the package in the folder: it must not be replaced while it is read.
        let error = written(&Refit::new(&out, CHECKPOINT).out_dir(folder.path())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
    }

    #[test]
    fn same_weights_leave_the_output_alone() {
        let folder = tempfile::tempdir().unwrap();
        let refit = Refit::new(PACKAGE, CHECKPOINT).out_dir(folder.path());
        let modified = || fs::metadata(written(&refit).unwrap().0).unwrap().modified().unwrap();
        assert_eq!(modified(), modified());
    }

    #[test]
    fn weights_that_do_not_fit_are_refused_unless_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let refit = Refit::new(PACKAGE, CHECKPOINT).select("weight").out_dir(folder.path());
        assert_eq!(written(&refit).unwrap_err().kind(), ErrorKind::Mismatch);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        written(&refit.allow(Allow { missing: true, ..Allow::default() })).unwrap();
    }
}
