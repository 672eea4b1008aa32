//! Running a model on arrays in memory, and finding a libtorch to run it on: what a process without Python needs.

use std::path::{Path, PathBuf};

use reweft::artifact::manifest::Expected;
use reweft::npy::Array;
use reweft::{Error, ErrorKind, Result, convert, tensor};

use crate::model::Model;
use crate::tensor::Tensor;
use crate::torch::Torch;

/// The file that this crate opens.
const LIBTORCH: &str = "libtorch_cpu.so";
/// Names a libtorch for commands.
const LIBTORCH_VARIABLE: &str = "REWEFT_LIBTORCH";
/// Folders of virtual and conda environments that are active.
const ENVIRONMENTS: &[&str] = &["VIRTUAL_ENV", "CONDA_PREFIX"];

impl Model {
    /// Runs the program on arrays, in call order, and copies what it returns. An absent output is `None`.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_arrays(&self, inputs: &[Array]) -> Result<Vec<Option<Array>>> {
        let signed = |size: &u64| i64::try_from(*size).unwrap_or(i64::MAX);
        let shapes: Vec<Vec<i64>> = inputs.iter().map(|array| array.shape.iter().map(signed).collect()).collect();
        // Shapes that are wrong are refused by the call, which says more.
        let expected = self.signature().expect(&shapes).unwrap_or_default();
        let strides = |expected: &Expected| expected.strides.iter().map(|stride| stride.unsigned_abs()).collect();
        let mut wanted = expected.iter().map(strides);
        let tensor = |array: &Array| lay_out(self.torch(), array, &wanted.next().unwrap_or_else(Vec::new));
        let outputs = self.run(inputs.iter().map(tensor).collect::<Result<_>>()?)?;
        outputs.into_iter().map(|output| output.as_ref().map(gather).transpose()).collect()
    }
}

/// A tensor with the strides that the program was compiled for, if the number of dimensions is right; whether shape and
/// dtype are is checked by the call.
fn lay_out(torch: &Torch, array: &Array, strides: &[u64]) -> Result<Tensor> {
    let signed = |sizes: &[u64]| -> Option<Vec<i64>> { sizes.iter().map(|size| i64::try_from(*size).ok()).collect() };
    let out_of_range = || Error::new(ErrorKind::Usage, format!("array of shape {:?}", array.shape));
    let shape = signed(&array.shape).ok_or_else(out_of_range)?;
    let dense = strides.len() == array.shape.len() && tensor::is_dense(&array.shape, strides);
    let plain = tensor::contiguous(&array.shape);
    if !dense || tensor::same_layout(&array.shape, strides, &plain) {
        return Ok(Tensor::from_bytes(torch, &array.bytes, &shape, array.dtype)?);
    }
    let itemsize = reweft::source::to_usize(array.dtype.itemsize().unwrap_or(1))?;
    let mut bytes = vec![0; array.bytes.len()];
    convert::relayout(itemsize, &array.shape, &array.bytes, &plain, &mut bytes, strides)?;
    let strides = signed(strides).ok_or_else(out_of_range)?;
    Ok(Tensor::with_strides(torch, &bytes, &shape, &strides, array.dtype)?)
}

/// Copies a tensor of the host into row-major order.
fn gather(tensor: &Tensor) -> Result<Array> {
    let unsigned = |sizes: &[i64]| -> Vec<u64> { sizes.iter().map(|size| size.unsigned_abs()).collect() };
    let (dtype, shape) = (tensor.dtype()?, unsigned(&tensor.shape()?));
    if !tensor::is_dense(&shape, &unsigned(&tensor.strides()?)) {
        // What lies in gaps is nobody's. libtorch's copy has none.
        return gather(&tensor.try_compact()?);
    }
    let strides = unsigned(&tensor.strides()?);
    // SAFETY: a program returns initialised elements, this tensor has no gaps, and nobody writes to it.
    let bytes = unsafe { tensor.extent()? };
    let itemsize = reweft::source::to_usize(dtype.itemsize().unwrap_or(1))?;
    let bytes = convert::to_contiguous(itemsize, &shape, &strides, bytes)?.into_owned();
    Ok(Array { dtype, shape, bytes })
}

/// Finds the `libtorch_cpu.so` to run on: the one given, as a file or as the folder of a torch; else the one that
/// `REWEFT_LIBTORCH` names likewise; else that of the active Python environment (`VIRTUAL_ENV`, `CONDA_PREFIX`), in which
/// no Python is run. Opens nothing.
///
/// # Errors
/// [`ErrorKind::Run`] with the places that were looked at.
pub fn find_libtorch(given: Option<&Path>) -> Result<PathBuf> {
    let named = std::env::var_os(LIBTORCH_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    let mut places = Vec::new();
    if let Some(path) = given.map(Path::to_owned).or(named) {
        places = if path.is_dir() {
            [".", "lib", "torch/lib"].map(|below| path.join(below).join(LIBTORCH)).into()
        } else {
            vec![path]
        };
    } else {
        for root in ENVIRONMENTS.iter().filter_map(std::env::var_os).filter(|root| !root.is_empty()) {
            places.extend(in_environment(Path::new(&root)));
        }
    }
    match places.iter().find(|place| place.is_file()) {
        Some(place) => std::path::absolute(place).map_err(|error| Error::io("look at", error).in_file(place)),
        None => Err(not_found(&places)),
    }
}

#[cold]
fn not_found(places: &[PathBuf]) -> Error {
    let list: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
    let what = if list.is_empty() {
        "no Python environment is active".to_owned()
    } else {
        format!("not at {}", list.join(", "))
    };
    Error::new(ErrorKind::Run, format!("no libtorch found: {what}")).with_hint(format!(
        "--libtorch or {LIBTORCH_VARIABLE} names {LIBTORCH}, which lies in torch/lib of a Python's packages"
    ))
}

/// Where pip puts a libtorch, for every Python of the environment, newest first.
fn in_environment(root: &Path) -> Vec<PathBuf> {
    let lib = root.join("lib");
    let names =
        std::fs::read_dir(&lib).map(|entries| entries.filter_map(|entry| Some(entry.ok()?.file_name())).collect());
    let mut names: Vec<_> = names.unwrap_or_else(|_| Vec::new());
    names.retain(|name| name.to_str().is_some_and(|name| name.starts_with("python3")));
    names.sort();
    let place = |name| lib.join(name).join("site-packages/torch/lib").join(LIBTORCH);
    names.into_iter().rev().map(place).collect()
}
