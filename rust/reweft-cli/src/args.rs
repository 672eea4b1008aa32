//! What can be typed. Doc comments are the help texts.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use reweft::write::{ConvertOptions, TargetFormat, parse_nbytes};
use reweft::{Checkpoint, Dtype, Error, ErrorKind, KeyMap, OpenOptions, Rule};

/// Put new weights into compiled models: exactly, all or nothing, without recompiling.
///
/// Exit status: 0 done, 1 a check found differences, 2 error. Nothing in a file is ever executed, but by `run`.
#[derive(Debug, Parser)]
#[command(name = "reweft", version)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Inspect(Inspect),
    Explain(Explain),
    Config(Config),
    Convert(Convert),
    Extract(Extract),
    Plan(Plan),
    Refit(Refit),
    Verify(Verify),
    Strip(Strip),
    Diff(Diff),
    Run(Run),
    Cache(Cache),
}

/// Lists what is in a checkpoint or a compiled package. Reads metadata only.
///
/// For a checkpoint: keys, dtypes, shapes, strides, bytes, shared storages, what is no tensor, what is unknown.
/// For a package: its slots, other names of tied weights, and weights that cannot be replaced, with the reason.
#[derive(Debug, clap::Args)]
pub struct Inspect {
    /// A .pt or safetensors checkpoint, or a .pt2 package; told apart by content.
    pub file: PathBuf,
    #[command(flatten)]
    pub keys: Keys,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub json: bool,
}

/// Shows where a slot of a compiled package comes from, as a formula over keys.
///
/// In a package that was compiled with freezing, slots hold what the compiler made of weights. Given the name of a weight,
/// shows every slot that is made of it. Reads metadata only.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  reweft explain net.pt2 _frozen_param7
  reweft explain net.pt2 layer1.0.bn1.weight")]
pub struct Explain {
    /// The compiled package.
    pub artifact: PathBuf,
    /// The name of a slot or of a weight.
    pub slot: String,
    /// Print JSON: the steps of each recipe.
    #[arg(long)]
    pub json: bool,
}

/// Prints what a checkpoint holds beside its tensors, as JSON.
///
/// Nothing is imported. Ints have all their digits. What JSON has no form for is an object with one name that begins
/// with `$`: `{"$float": "inf"}`, `{"$bytes": "00ff"}` (hexadecimal), `{"$complex": [0.0, 1.0]}`; instances of classes
/// that are not known have `$class`. Tuples and sets are arrays; dtypes, devices, paths and dates are texts. Keys are
/// texts or ints. Anything else is an error that names its path.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  reweft config weights_with_config.pt --key my_config > my_config.json")]
pub struct Config {
    /// A .pt file or a pickle.
    pub file: PathBuf,
    /// Dotted path of the config, through dicts, lists and attributes. Without it, the file must hold no tensor.
    #[arg(long, value_name = "KEY", visible_alias = "top-level-key")]
    pub key: Option<String>,
}

/// Writes a checkpoint in another format, or under other keys.
///
/// Checks every CRC. The output appears whole or not at all, whatever goes wrong.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  reweft convert epoch3.pt net.safetensors --top-level-key model_state_dict --remap '^module\\.='
  reweft convert net.pt net-half.safetensors --dtype bfloat16
  reweft convert tied.pt net.safetensors --shared drop-aliases
  reweft convert model.safetensors model.pt
  reweft convert model.pt model.safetensors --max-shard-size 5GB")]
pub struct Convert {
    /// The checkpoint.
    pub input: PathBuf,
    #[command(flatten)]
    pub target: Target,
}

/// Reads the weights back out of a compiled package or another artifact, under the names of their slots.
///
/// Tied weights stay tied where the format can say so (.pt).
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  reweft extract net.pt2 net.pt
  reweft extract net.pt2 net.safetensors --shared drop-aliases")]
pub struct Extract {
    /// The compiled package, exported program or TorchScript archive.
    pub artifact: PathBuf,
    #[command(flatten)]
    pub target: Target,
}

/// What is written, and how.
#[derive(Debug, clap::Args)]
pub struct Target {
    /// The file to write. With --max-shard-size, NAME.safetensors stands for NAME-00001-of-00002.safetensors and so on,
    /// and NAME.safetensors.index.json.
    pub output: PathBuf,
    #[command(flatten)]
    pub keys: Keys,
    /// Convert float tensors to this dtype (float32, bf16, f16 ...), rounding to nearest even as torch does;
    /// the others stay, and a note names them.
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<String>,
    /// The format to write [default: the one that OUTPUT's extension stands for].
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// What to do with tensors that share bytes, where the format cannot say so.
    #[arg(long, value_enum, default_value_t = Shared::Error)]
    pub shared: Shared,
    /// Write several files with an index, each with at most so many bytes of tensors: 5GB, 500MiB, ...
    #[arg(long, value_name = "SIZE", value_parser = parse_nbytes)]
    pub max_shard_size: Option<u64>,
    /// Do not wait for the disk. After a power cut the output may be empty or absent.
    #[arg(long)]
    pub no_sync: bool,
    /// Print a JSON report.
    #[arg(long)]
    pub json: bool,
}

impl Target {
    /// Gives a checkpoint's floats the dtype that was asked for.
    pub fn cast(&self, checkpoint: Checkpoint) -> reweft::Result<Checkpoint> {
        let Some(name) = &self.dtype else { return Ok(checkpoint) };
        let dtype = Dtype::from_name(name).ok_or_else(|| Error::new(ErrorKind::Usage, format!("no dtype {name:?}")))?;
        checkpoint.cast(dtype)
    }

    /// The engine's options.
    pub fn options(&self) -> ConvertOptions {
        ConvertOptions {
            format: self.format.map(Into::into),
            shared: self.shared.into(),
            max_shard_nbytes: self.max_shard_size,
            sync: !self.no_sync,
        }
    }
}

/// Shows which slot would take which key, and what speaks against it. Exit status 1 if a refit would be refused.
///
/// Reads metadata, and the bytes of tied keys that the checkpoint stores more than once.
#[derive(Debug, clap::Args)]
pub struct Plan {
    #[command(flatten)]
    pub pair: Pair,
    #[command(flatten)]
    pub allow: Allow,
    /// Print the plan as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Puts a checkpoint's weights into a compiled package, an exported program, a TorchScript archive or a checkpoint: into a
/// copy, or in place.
///
/// Everything is checked before a byte is written. A copy appears whole or not at all; a rewrite in place that is cut short
/// is finished when the file is opened the next time.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  reweft refit net.pt2 epoch3.pt -o net-epoch3.pt2 --top-level-key model_state_dict --remap '^module\\.='
  reweft refit net.pt2 epoch3.pt --in-place")]
#[command(group(clap::ArgGroup::new("target").required(true).args(["output", "in_place"])))]
pub struct Refit {
    #[command(flatten)]
    pub pair: Pair,
    /// The file to write; it may be ARTIFACT itself, which is then replaced by a rename.
    #[arg(short, long)]
    pub output: Option<PathBuf>,
    /// Write into ARTIFACT itself, and there only what differs. Not while a process serves from the file.
    #[arg(long)]
    pub in_place: bool,
    #[command(flatten)]
    pub allow: Allow,
    /// Print a JSON report.
    #[arg(long)]
    pub json: bool,
}

/// Compares a package's weights with a checkpoint, byte for byte. Exit status 1 if they differ.
#[derive(Debug, clap::Args)]
pub struct Verify {
    #[command(flatten)]
    pub pair: Pair,
    #[command(flatten)]
    pub allow: Allow,
    /// Print a JSON report.
    #[arg(long)]
    pub json: bool,
}

/// Writes an artifact without its weights, for whoever ships the program once and weights often.
///
/// Nothing runs or loads what is written; a refit with a key for every slot that was left out makes of it, byte for byte,
/// what it makes of the whole artifact. Slots that no refit can fill keep their bytes, and so do those that no state_dict
/// has, as far as the artifact says which those are.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  reweft strip net.pt2 -o net.stripped
  reweft refit net.stripped epoch3.pt -o net-epoch3.pt2")]
pub struct Strip {
    /// The compiled package (.pt2), exported program, TorchScript archive or checkpoint.
    pub artifact: PathBuf,
    /// The file to write.
    #[arg(short, long)]
    pub output: PathBuf,
    /// Keep the bytes of slots with a name that matches. Repeatable.
    #[arg(long, value_name = "REGEX")]
    pub keep: Vec<String>,
    /// Print a JSON report.
    #[arg(long)]
    pub json: bool,
}

/// Shows what differs between two checkpoints, or a checkpoint and a compiled package. Exit status 1 if anything does.
///
/// Tensors are matched by name and compared by their elements; what changed most stands first. Equal bytes are equal,
/// NaN included. Integers are subtracted exactly, floats as float64, complex numbers by the modulus; the relative
/// difference is over the larger of the two numbers. The options for keys rename A's keys to B's names.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  reweft diff epoch3.pt net.safetensors --top-level-key model_state_dict --remap '^module\\.='")]
pub struct Diff {
    /// A checkpoint or a package; told apart by content.
    pub a: PathBuf,
    /// What to compare it with.
    pub b: PathBuf,
    #[command(flatten)]
    pub keys: Keys,
    /// Dotted path of the dict that holds the weights in B.
    #[arg(long, value_name = "KEY")]
    pub b_top_level_key: Option<String>,
    /// Compare only names that match, after renaming. Repeatable; a name must match one of them.
    #[arg(long, value_name = "REGEX")]
    pub only: Vec<String>,
    /// Compare tensors alone, not what else the files hold.
    #[arg(long)]
    pub no_values: bool,
    /// Print a JSON report.
    #[arg(long)]
    pub json: bool,
}

/// Runs a compiled package once: arrays in, arrays out. **Runs native code from the package**; all else here runs none.
///
/// Needs no Python, and a libtorch: the one that --libtorch names, or `REWEFT_LIBTORCH`, or that of the active environment
/// (`VIRTUAL_ENV`, `CONDA_PREFIX`). Run only packages that you would run as a program. Inputs are refused unless they have
/// the dtype and shape that the program was compiled for.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  reweft run net.pt2 --input x.npy --output y.npy
  reweft run net.pt2 --input x.npy --output y.npy --weights epoch3.pt --top-level-key model_state_dict")]
pub struct Run {
    /// A package that `reweft.torch.save` wrote.
    pub artifact: PathBuf,
    /// An input as numpy.save writes it. Repeatable, in the order of the program's arguments.
    #[arg(long, value_name = "NPY")]
    pub input: Vec<PathBuf>,
    /// The file to write an output to. Repeatable, once for each tensor that the program returns.
    #[arg(long, value_name = "NPY")]
    pub output: Vec<PathBuf>,
    /// Replace the weights by those of a checkpoint first; the package stays as it is.
    #[arg(long, value_name = "CHECKPOINT")]
    pub weights: Option<PathBuf>,
    #[command(flatten)]
    pub keys: Keys,
    #[command(flatten)]
    pub allow: Allow,
    /// The file `libtorch_cpu.so`, or the folder of a torch.
    #[arg(long, value_name = "PATH")]
    pub libtorch: Option<PathBuf>,
    /// Print a JSON report.
    #[arg(long)]
    pub json: bool,
}

/// Shows or empties the cache of compiled libraries.
///
/// Loading a package unpacks its library once, under a name that stands for its bytes: below `REWEFT_CACHE_DIR`, or
/// `reweft` in `XDG_CACHE_HOME` or ~/.cache. What was used longest ago goes when all have more than `REWEFT_CACHE_SIZE` bytes
/// (1GiB unless set; 0 switches the cache off). A folder that others could write to is not used.
#[derive(Debug, clap::Args)]
pub struct Cache {
    /// What to do.
    #[arg(value_enum)]
    pub action: CacheAction,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// What `cache` does.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum CacheAction {
    /// Print the libraries, the one used last first.
    List,
    /// Remove all of them. Processes that run one keep it.
    Clear,
    /// Print the folder, and why it is not used if it is not.
    Path,
}

/// A package and the checkpoint for it.
#[derive(Debug, clap::Args)]
pub struct Pair {
    /// The compiled package (.pt2), exported program, TorchScript archive or checkpoint.
    pub artifact: PathBuf,
    /// The checkpoint (.pt or safetensors).
    pub checkpoint: PathBuf,
    #[command(flatten)]
    pub keys: Keys,
    /// The weights that ARTIFACT was compiled with: what it holds is compared with them, so that a slot whose value the
    /// compiler made of several weights is found even if it kept a name.
    #[arg(long, value_name = "CHECKPOINT")]
    pub original: Option<PathBuf>,
}

/// Which keys of a checkpoint, under which names.
#[derive(Debug, clap::Args)]
pub struct Keys {
    /// Dotted path of the dict that holds the weights, for example `model_state_dict`.
    #[arg(long, value_name = "KEY")]
    pub top_level_key: Option<String>,
    /// A key map as TOML: selection, renaming, and operations on tensors such as permute, cast, split and concat. Its
    /// rules come before those of the other options.
    #[arg(long = "keys", value_name = "FILE")]
    pub from_file: Option<PathBuf>,
    /// Keep only keys that match, before renaming. Repeatable; a key must match one of them.
    #[arg(long, value_name = "REGEX")]
    pub select: Vec<String>,
    /// Keep this key, and what else is selected. Repeatable.
    #[arg(long, value_name = "KEY")]
    pub select_key: Vec<String>,
    /// Drop keys that match, before renaming. Repeatable.
    #[arg(long, value_name = "REGEX")]
    pub drop: Vec<String>,
    /// Drop this key. Repeatable.
    #[arg(long, value_name = "KEY")]
    pub drop_key: Vec<String>,
    /// Take literal text off the front of keys that begin with it, before any --remap. Repeatable.
    #[arg(long, value_name = "TEXT")]
    pub strip_prefix: Vec<String>,
    /// Rename keys; Rust regex syntax, `$1` for groups. Repeatable; applied in order, each to the result before.
    #[arg(long, value_name = "REGEX=REPLACEMENT")]
    pub remap: Vec<String>,
    /// Put literal text before every key, after all else.
    #[arg(long, value_name = "TEXT")]
    pub add_prefix: Option<String>,
}

impl Keys {
    /// Opens a checkpoint and applies selection and rules.
    pub fn open(&self, path: &std::path::Path) -> reweft::Result<Checkpoint> {
        let keys = self.key_map()?;
        let top_level_key = self.top_level_key.clone().or_else(|| keys.top_level_key().map(str::to_owned));
        let checkpoint = Checkpoint::open(path, &OpenOptions { top_level_key, ..OpenOptions::default() })?;
        if keys.is_identity() { Ok(checkpoint) } else { checkpoint.rekey(&keys) }
    }

    /// The key map that the options say.
    pub fn key_map(&self) -> reweft::Result<KeyMap> {
        let mut keys = self.from_file.as_deref().map(KeyMap::open).transpose()?.unwrap_or_default();
        for pattern in &self.select {
            keys = keys.select(pattern)?;
        }
        for pattern in &self.drop {
            keys = keys.drop(pattern)?;
        }
        keys = self.select_key.iter().fold(keys, |keys, key| keys.select_key(key));
        keys = self.drop_key.iter().fold(keys, |keys, key| keys.drop_key(key));
        keys = self.strip_prefix.iter().fold(keys, |keys, prefix| keys.rule(Rule::strip_prefix(prefix)));
        for rule in &self.remap {
            keys = keys.rule(Rule::parse(rule)?);
        }
        Ok(self.add_prefix.iter().fold(keys, |keys, prefix| keys.rule(Rule::add_prefix(prefix))))
    }
}

/// What is accepted that is an error otherwise.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_field_names, reason = "the names are the options")]
pub struct Allow {
    /// Convert between float dtypes, rounding to nearest even.
    #[arg(long)]
    allow_cast: bool,
    /// Leave slots as they are for which the checkpoint has no key.
    #[arg(long)]
    allow_missing: bool,
    /// Leave out keys for which the package has no slot.
    #[arg(long)]
    allow_unused: bool,
}

impl From<&Allow> for reweft::plan::Allow {
    fn from(allow: &Allow) -> Self {
        Self { cast: allow.allow_cast, missing: allow.allow_missing, unused: allow.allow_unused }
    }
}

/// The choices of `--format`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Format {
    /// safetensors (.safetensors).
    Safetensors,
    /// What torch.save writes (.pt, .pth, .bin); shared storages and strides are kept.
    Pt,
    /// What numpy.savez writes (.npz).
    Npz,
}

impl From<Format> for TargetFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Safetensors => Self::Safetensors,
            Format::Pt => Self::Torch,
            Format::Npz => Self::Numpy,
        }
    }
}

/// The choices of `--shared`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Shared {
    /// Refuse, and name the keys.
    Error,
    /// Write the bytes once for each key.
    Duplicate,
    /// Write only the first key of tensors that are the same.
    DropAliases,
}

impl From<Shared> for reweft::write::Shared {
    fn from(shared: Shared) -> Self {
        match shared {
            Shared::Error => Self::Error,
            Shared::Duplicate => Self::Duplicate,
            Shared::DropAliases => Self::DropAliases,
        }
    }
}
