//! What passes between a build script and cargo: folders from the environment, directives on standard output, and
//! files that stay untouched while their bytes do.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};

use reweft::{Error, ErrorKind, Result};

/// Bytes compared at a time.
const CHUNK_NBYTES: u64 = 1 << 20;

/// What a builder says about its output.
#[derive(Clone, Debug, Default)]
pub struct Target {
    pub out_dir: Option<PathBuf>,
    pub rustc_env: Option<String>,
}

impl Target {
    /// Resolves the folders and checks the names; reads and writes nothing.
    pub fn script<'a>(&self, name: &str, said: &'a mut dyn Write) -> Result<Script<'a>> {
        let base = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_default();
        let out_dir = out_dir(self.out_dir.clone().or_else(|| env::var_os("OUT_DIR").map(PathBuf::from)))?;
        if Path::new(name).components().ne([Component::Normal(name.as_ref())]) {
            return Err(Error::new(ErrorKind::Usage, format!("output {name:?} is not the name of a file"))
                .with_hint("outputs are files in OUT_DIR itself, for example \"model.safetensors\""));
        }
        if let Some(variable) = &self.rustc_env
            && (variable.is_empty() || variable.contains(['=', '\n', '\r', '\0']))
        {
            return Err(Error::new(ErrorKind::Usage, format!("{variable:?} cannot name an environment variable")));
        }
        let out_dir = base.join(out_dir);
        let out = out_dir.join(name);
        Ok(Script { base, out_dir, out, rustc_env: self.rustc_env.clone(), said })
    }
}

/// The folder that cargo, or the caller in cargo's place, gave.
fn out_dir(given: Option<PathBuf>) -> Result<PathBuf> {
    given.ok_or_else(|| {
        Error::new(ErrorKind::Usage, "OUT_DIR is not set, so there is no folder to write to")
            .with_hint("cargo sets it for build scripts: call this from build.rs, or give a folder with out_dir()")
    })
}

/// One call of a builder: where things are, and where directives go.
pub struct Script<'a> {
    base: PathBuf,
    out_dir: PathBuf,
    out: PathBuf,
    rustc_env: Option<String>,
    said: &'a mut dyn Write,
}

impl Script<'_> {
    /// Resolves a source and has cargo watch it.
    pub fn watch(&mut self, path: &Path) -> Result<PathBuf> {
        let path = self.base.join(path);
        let text = directive_text(&path)?;
        let real = path.canonicalize().ok();
        if real.is_some() && real == self.out.canonicalize().ok() {
            return Err(Error::new(ErrorKind::Usage, "the output would replace its own source").in_file(&self.out));
        }
        // Cargo compares with the time at which the script began, so a file that the script made would look changed.
        if !real.zip(self.out_dir.canonicalize().ok()).is_some_and(|(path, folder)| path.starts_with(folder)) {
            self.say("rerun-if-changed", text)?;
        }
        Ok(path)
    }

    /// Passes notices on as warnings of the build.
    pub fn warn<'n>(&mut self, notices: impl IntoIterator<Item = &'n String>) -> Result<()> {
        notices.into_iter().try_for_each(|notice| self.say("warning", notice))
    }

    /// Lets `write` make the output under another name, and moves it to its place unless the same bytes are there.
    pub fn output(&mut self, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let folder = tempfile::Builder::new().prefix(".reweft-").tempdir_in(&self.out_dir);
        let folder = folder.map_err(|error| Error::io("create", error).in_file(&self.out_dir))?;
        let made = folder.path().join("output");
        write(&made)?;
        if !same_bytes(&made, &self.out).map_err(|error| Error::io("compare", error).in_file(&self.out))? {
            fs::rename(&made, &self.out).map_err(|error| Error::io("rename", error).in_file(&self.out))?;
            let synced = File::open(&self.out_dir).and_then(|folder| folder.sync_all());
            synced.map_err(|error| Error::io("fsync folder", error).in_file(&self.out_dir))?;
        }
        if let Some(variable) = self.rustc_env.clone() {
            let value = format!("{variable}={}", directive_text(&self.out)?);
            self.say("rustc-env", &value)?;
        }
        Ok(self.out.clone())
    }

    /// Prints one directive. Each stays on its line, because cargo obeys whatever begins one: a notice may quote a name
    /// that a stranger chose.
    fn say(&mut self, directive: &str, value: &str) -> Result<()> {
        let value = value.replace(['\n', '\r'], " ");
        writeln!(self.said, "cargo::{directive}={value}").map_err(|error| Error::io("write directives", error))
    }
}

/// A path as cargo can be told it.
fn directive_text(path: &Path) -> Result<&str> {
    path.to_str().filter(|text| !text.contains(['\n', '\r'])).ok_or_else(|| {
        Error::new(ErrorKind::Usage, "cargo reads paths line by line in UTF-8, and this is no such path").in_file(path)
    })
}

/// Whether `old` is a file with the bytes of `new`. Holds two pieces in memory.
fn same_bytes(new: &Path, old: &Path) -> io::Result<bool> {
    let old = match File::open(old) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened?,
    };
    let new = File::open(new)?;
    let (metadata, nbytes) = (old.metadata()?, new.metadata()?.len());
    if !metadata.is_file() || metadata.len() != nbytes {
        return Ok(false);
    }
    let (mut left, mut right) = (Vec::new(), Vec::new());
    loop {
        left.clear();
        right.clear();
        (&new).take(CHUNK_NBYTES).read_to_end(&mut left)?;
        (&old).take(CHUNK_NBYTES).read_to_end(&mut right)?;
        if left != right || left.is_empty() {
            return Ok(left == right);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script<'a>(folder: &Path, said: &'a mut Vec<u8>) -> Script<'a> {
        let target = Target { out_dir: Some(folder.to_owned()), rustc_env: None };
        target.script("out", said).unwrap()
    }

    #[test]
    fn no_folder_is_an_error_that_says_whose_it_is() {
        let error = out_dir(None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.hint().unwrap().contains("build.rs"));
    }

    #[test]
    fn names_that_would_leave_the_folder_or_the_line_are_refused() {
        let target = Target { out_dir: Some("x".into()), rustc_env: None };
        for name in ["", ".", "..", "a/b", "a/", "/a", "../a"] {
            assert_eq!(target.script(name, &mut Vec::new()).err().unwrap().kind(), ErrorKind::Usage, "{name}");
        }
        for variable in ["", "A=B", "A\ncargo::rustc-cfg"] {
            let target = Target { rustc_env: Some(variable.into()), ..target.clone() };
            assert_eq!(target.script("a", &mut Vec::new()).err().unwrap().kind(), ErrorKind::Usage, "{variable}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(script(folder.path(), &mut Vec::new()).watch(Path::new("a\ncargo::x")).is_err());
    }

    #[test]
    fn a_notice_cannot_give_orders() {
        let (folder, mut said) = (tempfile::tempdir().unwrap(), Vec::new());
        script(folder.path(), &mut said).warn(["key\ncargo::rustc-link-arg=x\r".to_owned()].iter()).unwrap();
        assert_eq!(String::from_utf8(said).unwrap(), "cargo::warning=key cargo::rustc-link-arg=x \n");
    }

    #[test]
    fn what_the_script_made_itself_is_not_watched() {
        let (folder, mut said) = (tempfile::tempdir().unwrap(), Vec::new());
        let made = folder.path().join("made");
        fs::write(&made, "x").unwrap();
        assert_eq!(script(folder.path(), &mut said).watch(&made).unwrap(), made);
        assert!(said.is_empty());
        fs::write(folder.path().join("out"), "x").unwrap();
        let error = script(folder.path(), &mut said).watch(&folder.path().join("out")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
    }

    #[test]
    fn only_other_bytes_replace_a_file() {
        let (folder, mut said) = (tempfile::tempdir().unwrap(), Vec::new());
        let mut script = script(folder.path(), &mut said);
        let write = |script: &mut Script<'_>, bytes: &[u8]| {
            let out = script.output(|made| fs::write(made, bytes).map_err(|error| Error::io("write", error))).unwrap();
            std::os::unix::fs::MetadataExt::ino(&fs::metadata(out).unwrap())
        };
        let large = vec![1; 3 << 20];
        let first = write(&mut script, &large);
        assert_eq!(write(&mut script, &large), first);
        let mut other = large.clone();
        *other.last_mut().unwrap() = 2;
        assert_ne!(write(&mut script, &other), first);
        assert_eq!(fs::read(folder.path().join("out")).unwrap(), other);
        let error = script.output(|_| Err(Error::format("damaged"))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Format);
        assert_eq!(fs::read(folder.path().join("out")).unwrap(), other);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
