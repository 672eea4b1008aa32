//! Whether this host can run a program that was compiled on another one, asked before any of its code is loaded.
//!
//! The compiler builds for the processor that it runs on (`-march=native`), whatever instruction set the package's metadata
//! states: an instruction that is absent ends the process with SIGILL. So `trace` records what the processor had, and
//! all of it must be here.

use reweft::artifact::manifest::{Manifest, Target};
use reweft::{Artifact, Error, ErrorKind, Result};
use serde::Deserialize;

/// The first version of torch whose programs and whose libtorch are tested, and the last major version.
const OLDEST: Version = Version { major: 2, minor: 13 };

/// Instruction sets that compilers use by themselves, and whether this processor and its system have them. What is only
/// ever asked for by name in a source (AES, SHA, random numbers, transactions) is left out: no program here needs it.
#[cfg(target_arch = "x86_64")]
macro_rules! features {
    ($($name:tt)*) => { &[$(($name, std::arch::is_x86_feature_detected!($name))),*] };
}

#[cfg(target_arch = "x86_64")]
fn features() -> &'static [(&'static str, bool)] {
    static FEATURES: std::sync::LazyLock<Vec<(&str, bool)>> = std::sync::LazyLock::new(|| {
        let features: &[(&str, bool)] = features! {
            "sse3" "ssse3" "sse4.1" "sse4.2" "sse4a" "popcnt" "lzcnt" "bmi1" "bmi2" "tbm" "movbe" "avx" "f16c" "fma" "avx2"
            "gfni" "avxvnni" "avxvnniint8" "avxvnniint16" "avxifma" "avxneconvert" "avx512f" "avx512cd" "avx512bw" "avx512dq"
            "avx512vl" "avx512ifma" "avx512vbmi" "avx512vbmi2" "avx512vnni" "avx512bitalg" "avx512vpopcntdq" "avx512bf16"
            "avx512fp16"
        };
        features.to_vec()
    });
    &FEATURES
}

/// Other processors are told apart by the machine alone.
#[cfg(not(target_arch = "x86_64"))]
fn features() -> &'static [(&'static str, bool)] {
    &[]
}

/// Words of `AOTI_CPU_ISA` with the features that torch's kernels for it use.
const WORDS: &[(&str, &[&str])] = &[
    ("AVX2", &["avx2", "fma", "f16c"]),
    ("AVX512", &["avx512f", "avx512dq", "avx512vl", "avx512bw", "fma"]),
    ("AVX512_VNNI", &["avx512vnni"]),
    ("ASIMD", &[]),
    ("NEON", &[]),
    ("INVALID_VEC_ISA", &[]),
];

/// Machines under the names that Python's `platform.machine()` gives them elsewhere.
const MACHINES: &[(&str, &str)] = &[("arm64", "aarch64"), ("AMD64", "x86_64")];
/// Systems under the names of Python's `sys.platform`, with Rust's.
const PLATFORMS: &[(&str, &str)] = &[("darwin", "macos"), ("win32", "windows")];

/// What this host is, as `trace` records it: what it compiles now runs where all of this is.
pub fn host() -> Target {
    let features = features().iter().filter(|(_, here)| *here).map(|(name, _)| (*name).to_owned());
    Target { machine: std::env::consts::ARCH.to_owned(), features: features.collect() }
}

/// The package's `*.wrapper_metadata.json`, as far as it matters.
#[derive(Debug, Default, Deserialize)]
struct Metadata {
    #[serde(rename = "AOTI_PLATFORM")]
    platform: Option<String>,
    #[serde(rename = "AOTI_MACHINE")]
    machine: Option<String>,
    #[serde(rename = "AOTI_CPU_ISA")]
    isa: Option<String>,
}

/// Checks system, machine and processor. Gives what could not be told.
///
/// # Errors
/// [`ErrorKind::Unsupported`] with what was found and wanted; [`ErrorKind::Format`] for damaged metadata.
pub(crate) fn check(artifact: &Artifact, manifest: &Manifest) -> Result<Vec<String>> {
    let metadata = metadata(artifact)?;
    let here = host();
    if let Some(platform) = metadata.platform.as_deref().map(|name| renamed(name, PLATFORMS))
        && platform != std::env::consts::OS
    {
        return Err(cannot(&format!("compiled for {platform}, this is {}", std::env::consts::OS)));
    }
    let (wanted, notices) = match manifest.target() {
        Some(target) => (target.clone(), Vec::new()),
        None => stated(&metadata),
    };
    check_target(&wanted, &here)?;
    Ok(notices)
}

/// Checks the versions of torch that compiled the program and that will run it. Gives a notice if they differ.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if one is older than the oldest that is tested.
pub(crate) fn check_torch(compiled: &str, running: Option<u64>) -> Result<Option<String>> {
    let running = running.map(Version::from_abi);
    if let Some(running) = running.filter(|version| *version < OLDEST) {
        return Err(too_old(&format!("the libtorch here is {running}")));
    }
    let Some(compiled) = Version::parse(compiled) else {
        return Ok(Some(format!("the program was compiled by torch {compiled:?}, a version that is not known")));
    };
    if compiled < OLDEST {
        return Err(too_old(&format!("the program was compiled by torch {compiled}")));
    }
    let differs = running.filter(|running| *running != compiled);
    Ok(differs.map(|running| {
        format!("the program was compiled by torch {compiled} and runs on {running}; trace it again to be sure")
    }))
}

fn metadata(artifact: &Artifact) -> Result<Metadata> {
    let Some((archive, Some(name))) = artifact.package().map(|(archive, model)| (archive, model.metadata.as_ref()))
    else {
        return Ok(Metadata::default());
    };
    serde_json::from_slice(&archive.read(name)?).map_err(|error| Error::format(error.to_string()).in_record(name))
}

/// What the package's own metadata says of its target, for packages whose manifest says nothing.
fn stated(metadata: &Metadata) -> (Target, Vec<String>) {
    let machine = metadata.machine.as_deref().map_or(std::env::consts::ARCH, |name| renamed(name, MACHINES));
    let (mut features, mut notices) = (Vec::new(), Vec::new());
    for word in metadata.isa.as_deref().unwrap_or_default().split_whitespace() {
        match WORDS.iter().find(|(known, _)| *known == word) {
            Some((_, names)) => features.extend(names.iter().map(|name| (*name).to_owned())),
            None => {
                notices
                    .push(format!("the program was compiled for {word}, and nothing tells whether this host has it"));
            }
        }
    }
    (Target { machine: machine.to_owned(), features }, notices)
}

fn check_target(wanted: &Target, here: &Target) -> Result<()> {
    if wanted.machine != here.machine {
        return Err(cannot(&format!("compiled for {}, this is {}", wanted.machine, here.machine)));
    }
    let lacking: Vec<&str> =
        wanted.features.iter().filter(|name| !here.features.contains(name)).map(String::as_str).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let (lacking, has) = (lacking.join(", "), here.features.join(", "));
    Err(cannot(&format!("compiled for a processor with {lacking}, this one has only {has}")))
}

fn renamed<'a>(name: &'a str, names: &[(&str, &'a str)]) -> &'a str {
    names.iter().find(|(known, _)| *known == name).map_or(name, |(_, to)| to)
}

#[cold]
fn cannot(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("the program was {what}"))
        .with_hint("trace the module on this host, or on the oldest of the hosts that are to run it")
}

#[cold]
fn too_old(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{what}, {OLDEST} or later is needed"))
        .with_hint("trace the module again with a newer torch")
}

/// A version of torch, as far as its interface may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    major: u64,
    minor: u64,
}

impl Version {
    /// Reads `2.15.0+cpu`.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let major = parts.next()?.parse().ok()?;
        let digits = parts.next()?.chars().take_while(char::is_ascii_digit).collect::<String>();
        Some(Self { major, minor: digits.parse().ok()? })
    }

    /// Reads what `aoti_torch_abi_version` gives: a byte for each part, the major version in the highest.
    fn from_abi(version: u64) -> Self {
        let [major, minor, ..] = version.to_be_bytes();
        Self { major: major.into(), minor: minor.into() }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(machine: &str, features: &[&str]) -> Target {
        Target { machine: machine.into(), features: features.iter().map(|name| (*name).into()).collect() }
    }

    fn metadata(isa: &str) -> Metadata {
        Metadata { platform: None, machine: Some("x86_64".into()), isa: Some(isa.into()) }
    }

    #[test]
    fn every_feature_must_be_here() {
        let here = target("x86_64", &["avx", "avx2"]);
        assert!(check_target(&target("x86_64", &["avx"]), &here).is_ok());
        assert!(check_target(&target("x86_64", &[]), &here).is_ok());
        let error = check_target(&target("x86_64", &["avx2", "avx512f", "avx10-lie"]), &here).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let message = error.message();
        assert!(message.contains("avx512f, avx10-lie") && message.contains("avx, avx2"), "{message}");
        let error = check_target(&target("aarch64", &["avx"]), &here).unwrap_err();
        assert!(error.message().contains("aarch64") && error.message().contains("x86_64"));
        assert!(check_target(&host(), &host()).is_ok());
    }

    #[test]
    fn words_of_the_metadata_stand_for_features() {
        let (found, notices) = stated(&metadata("AVX512 AVX512_VNNI AMX_TILE"));
        assert!(["avx512f", "avx512vnni"].iter().all(|name| found.features.iter().any(|known| known == name)));
        assert!(notices.len() == 1 && notices[0].contains("AMX_TILE"), "{notices:?}");
        assert_eq!(stated(&metadata("")), (target("x86_64", &[]), Vec::new()));
        assert_eq!(stated(&Metadata::default()).0.machine, std::env::consts::ARCH);
        #[cfg(target_arch = "x86_64")]
        for name in WORDS.iter().flat_map(|(_, names)| *names) {
            assert!(features().iter().any(|(known, _)| known == name), "{name} is never detected");
        }
    }

    #[test]
    fn versions_of_torch_are_compared_by_two_numbers() {
        let abi = |major: u64, minor: u64| Some(major << 56 | minor << 48 | 7 << 40);
        assert_eq!(check_torch("2.15.0+cu132", abi(2, 15)).unwrap(), None);
        assert_eq!(check_torch("2.15.0a0", None).unwrap(), None);
        let notice = check_torch("2.14.1", abi(2, 15)).unwrap().unwrap();
        assert!(notice.contains("2.14") && notice.contains("2.15"));
        assert!(check_torch("nightly", abi(2, 15)).unwrap().unwrap().contains("nightly"));
        for (compiled, running) in [("2.12.1", abi(2, 15)), ("2.15.0", abi(2, 12)), ("1.99", None)] {
            let error = check_torch(compiled, running).unwrap_err();
            assert!(error.kind() == ErrorKind::Unsupported && error.message().contains("2.13"));
        }
    }
}
