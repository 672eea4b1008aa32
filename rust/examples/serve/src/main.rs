//! Runs a saved artifact without Python, gives it the weights of a checkpoint while it lives, and shows that it then
//! computes what an artifact computes that was refitted on disk.
//!
//! `cargo run -p serve -- net.pt2 epoch3.pt input.npy`, where the input's dtype and shape are those that the package was
//! traced with; repeat it for programs of several inputs. libtorch is found as `reweft run` finds it: `REWEFT_LIBTORCH`, or
//! the active environment.
//!
//! Running native code from a package is what the example is about, and takes the one `unsafe` of it.

#![allow(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use reweft::npy::Array;
use reweft::plan::{self, Allow};
use reweft::source::Access;
use reweft::{Artifact, Checkpoint, Error, ErrorKind, Limits, OpenOptions, Result, tensor, write};
use reweft_runtime::{Model, ModelOptions, find_libtorch};

fn main() -> Result<()> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [package, checkpoint, inputs @ ..] = &args[..] else {
        return Err(Error::new(ErrorKind::Usage, "serve PACKAGE CHECKPOINT [INPUT.npy ...]"));
    };
    let inputs = inputs.iter().map(|path| Array::read(path)).collect::<Result<Vec<_>>>()?;
    let checkpoint = Checkpoint::open(checkpoint, &OpenOptions::default())?;

    let model = open(package)?;
    say(&format!("as saved: {}", summary(&model.run_arrays(&inputs)?)))?;
    let started = Instant::now();
    let report = model.refit(&checkpoint, Allow::default())?;
    say(&format!("{} slots refitted live in {:.1?}", report.slots, started.elapsed()))?;
    let live = model.run_arrays(&inputs)?;
    say(&format!("refitted: {}", summary(&live)))?;

    let folder = tempfile::tempdir().map_err(|error| Error::io("make a folder", error))?;
    let refitted = folder.path().join("refitted.pt2");
    let artifact = Artifact::open(package, Access::Read, &Limits::default())?;
    let planned = plan::plan(&artifact, &checkpoint, Allow::default())?;
    write::refit(&planned, &artifact, &checkpoint, &refitted, &mut |_, _| ())?;
    if open(&refitted)?.run_arrays(&inputs)? == live {
        return say("equal to the outputs of an artifact refitted on disk");
    }
    Err(Error::new(ErrorKind::Mismatch, "an artifact refitted on disk computes something else"))
}

fn open(package: &Path) -> Result<Model> {
    let options = ModelOptions { libtorch: Some(find_libtorch(None)?), ..ModelOptions::default() };
    // SAFETY: whoever started the example chose the package and the libtorch, which are programs.
    unsafe { Model::open(package, &options) }
}

/// Dtype, shape and first element of each output.
fn summary(outputs: &[Option<Array>]) -> String {
    let one = |output: &Option<Array>| match output {
        None => "nothing".to_owned(),
        Some(array) => {
            let first = array.bytes.first_chunk().map(|bytes| f32::from_le_bytes(*bytes));
            let first = first.filter(|_| array.dtype == reweft::Dtype::F32);
            format!("{} {first:?}", tensor::describe(array.dtype, &array.shape))
        }
    };
    outputs.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn say(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").map_err(|error| Error::io("write", error))
}
