//! `run`: one call of a compiled program, without Python. The only command that runs native code from a file.

#![allow(unsafe_code)]

use std::io::Write;
use std::path::Path;

use reweft::npy::Array;
use reweft::{Error, ErrorKind, tensor};
use reweft_runtime::{Model, ModelOptions, find_libtorch};
use serde::Serialize;

use crate::args::Run;
use crate::output;

/// What was done, as JSON.
#[derive(Serialize)]
struct Report<'a> {
    outputs: Vec<OutputView<'a>>,
    /// Slots that `--weights` filled.
    slots: Option<usize>,
    notices: Vec<String>,
}

#[derive(Serialize)]
struct OutputView<'a> {
    file: &'a Path,
    dtype: &'static str,
    shape: &'a [u64],
}

pub fn run(command: &Run, out: &mut dyn Write) -> anyhow::Result<bool> {
    let inputs = command.input.iter().map(|path| Array::read(path)).collect::<reweft::Result<Vec<_>>>()?;
    let options =
        ModelOptions { libtorch: Some(find_libtorch(command.libtorch.as_deref())?), ..ModelOptions::default() };
    // SAFETY: the help and the documentation of this command say that it runs native code from the package and from
    // libtorch; which files these are was decided by whoever typed it.
    let model = unsafe { Model::open(&command.artifact, &options)? };
    let mut notices = model.notices().to_vec();
    let mut slots = None;
    if let Some(weights) = &command.weights {
        let report = model.refit(&command.keys.open(weights)?, reweft::plan::Allow::from(&command.allow))?;
        notices.extend(report.notices);
        slots = Some(report.slots);
    }
    let outputs = model.run_arrays(&inputs)?;
    let arrays = matched(&outputs, command)?;
    for (array, path) in arrays.iter().zip(&command.output) {
        array.write(path)?;
    }
    let views = arrays.iter().zip(&command.output);
    let views = views.map(|(array, file)| OutputView { file, dtype: array.dtype.name(), shape: &array.shape });
    if command.json {
        output::json(out, &Report { outputs: views.collect(), slots, notices })?;
        return Ok(true);
    }
    output::notices(&notices);
    for (view, array) in views.zip(&arrays) {
        writeln!(out, "{}: {}", view.file.display(), tensor::describe(array.dtype, &array.shape))?;
    }
    Ok(true)
}

/// The outputs that there are, which must be as many as there are files for.
fn matched<'a>(outputs: &'a [Option<Array>], command: &Run) -> reweft::Result<Vec<&'a Array>> {
    let arrays: Vec<&Array> = outputs.iter().flatten().collect();
    if arrays.len() == command.output.len() {
        return Ok(arrays);
    }
    let list: Vec<String> = arrays.iter().map(|array| tensor::describe(array.dtype, &array.shape)).collect();
    let (made, named) = (arrays.len(), command.output.len());
    let what = format!("the program returned {made} tensors ({}), --output names {named} files", list.join(", "));
    Err(Error::new(ErrorKind::Usage, what)
        .in_file(&command.artifact)
        .with_hint("repeat --output once for each, in order"))
}
