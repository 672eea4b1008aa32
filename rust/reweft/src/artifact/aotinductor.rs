//! AOTInductor packages: a `.pt2` archive with a compiled library, its sources and its weights.
//!
//! The rows of weights are stated in the packed `*.wrapper.cpp` as `constants_info_[i].field = value;`, in the order
//! of their bytes; folded rows have no bytes. Checked against packages of torch 2.13 and 2.15.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use regex::Regex;

use super::manifest::{self, Manifest};
use super::{Artifact, Slot, SlotKind};
use crate::container::zip::Archive;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::source::Source;
use crate::tensor::{numel, span};

/// Paths inside the archive, below its root folder.
mod paths {
    pub const FORMAT: &str = "archive_format";
    pub const MODELS: &str = "data/aotinductor/";
    pub const LIBRARY_END: &str = ".wrapper.so";
    pub const SOURCE_END: &str = ".wrapper.cpp";
    pub const WEIGHTS_END: &str = ".wrapper_weights.blob";
    pub const METADATA_END: &str = ".wrapper_metadata.json";
    /// Nodes that libtorch runs through a proxy executor.
    pub const EXTERN_NODES_END: &str = ".wrapper.json";
}

/// What `archive_format` says in a package.
const FORMAT: &[u8] = b"pt2";
/// Rows start at multiples of this in a weights record.
const ROW_ALIGNMENT: u64 = 64;

/// Names of the records that matter, with the archive's root folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Records {
    /// The root folder.
    pub root: String,
    /// Name of the model in the package.
    pub model: String,
    /// The compiled library.
    pub library: String,
    /// The generated source that states the rows.
    pub source: String,
    /// Device and instruction set it was compiled for.
    pub metadata: Option<String>,
    /// The weights, if they are outside the library.
    pub weights: Option<String>,
    /// Operators that need a proxy executor at run time.
    pub extern_nodes: Option<String>,
}

/// Whether the archive says it is a `.pt2` package with a compiled model.
pub fn is_package(archive: &Archive) -> bool {
    let Ok(root) = archive.root() else { return false };
    let is_pt2 = archive.read(&format!("{root}/{}", paths::FORMAT)).is_ok_and(|bytes| bytes == FORMAT);
    let models = format!("{root}/{}", paths::MODELS);
    is_pt2 && archive.entries().keys().any(|name| name.starts_with(&models))
}

pub(super) fn read(path: &Path, source: Source, limits: &Limits) -> Result<Artifact> {
    if !Archive::detect(&*source) {
        return Err(Error::new(ErrorKind::Unsupported, "this is no .pt2 package: it is not a zip archive"));
    }
    let archive = Arc::new(Archive::open(source)?);
    if !is_package(&archive) {
        return Err(Error::new(ErrorKind::Unsupported, "this archive is no AOTInductor .pt2 package")
            .with_hint("a checkpoint goes behind the artifact: reweft refit ARTIFACT CHECKPOINT"));
    }
    let records = find_records(&archive)?;
    let rows = read_rows(&archive, &records, limits)?;
    if let Some(weights) = &records.weights {
        check_rows_fill(&rows, archive.entry(weights)?.nbytes).map_err(|error| error.in_record(weights))?;
    }
    let manifest = manifest::read(&archive, &records, limits)?;
    let mut slots: Vec<Slot> = rows.into_iter().map(Row::into_slot).collect();
    if let Some(manifest) = &manifest {
        manifest.label(&mut slots)?;
    }
    let (unused, unrefittable) = manifest.as_ref().map(Manifest::absent).unwrap_or_default();
    Ok(Artifact { path: path.to_owned(), archive, records, slots, unused, unrefittable, manifest })
}

fn find_records(archive: &Archive) -> Result<Records> {
    let root = archive.root()?.to_owned();
    let models = format!("{root}/{}", paths::MODELS);
    let inside: Vec<&str> =
        archive.entries().keys().filter(|name| name.starts_with(&models)).map(String::as_str).collect();
    let find = |end: &str| -> Result<Option<String>> {
        let mut found = inside.iter().filter(|name| name.ends_with(end));
        match (found.next(), found.next()) {
            (Some(_), Some(second)) => Err(Error::new(
                ErrorKind::Unsupported,
                format!("a package with several models is not handled yet; the second is {second:?}"),
            )),
            (first, _) => Ok(first.map(|name| (*name).to_owned())),
        }
    };
    let required = |end: &str| {
        find(end)?.ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("the package has no {end} record"))
                .with_hint("packages that ship sources only (package_cpp_only) are not handled")
        })
    };
    let library = required(paths::LIBRARY_END)?;
    let model = library[models.len()..].split('/').next().unwrap_or_default().to_owned();
    Ok(Records {
        model,
        source: required(paths::SOURCE_END)?,
        metadata: find(paths::METADATA_END)?,
        weights: find(paths::WEIGHTS_END)?,
        extern_nodes: find(paths::EXTERN_NODES_END)?,
        library,
        root,
    })
}

/// One row of weights as the generated source states it.
#[derive(Clone, Debug, Default)]
struct Row {
    constant: String,
    fqn: String,
    kind: Option<SlotKind>,
    dtype: Option<Dtype>,
    shape: Vec<u64>,
    strides: Vec<u64>,
    storage_offset: u64,
    nbytes: u64,
    byte_offset: u64,
    folded: bool,
    layout: String,
}

/// Reads the rows that have bytes.
fn read_rows(archive: &Archive, records: &Records, limits: &Limits) -> Result<Vec<Row>> {
    let nbytes = archive.entry(&records.source)?.nbytes;
    if nbytes > limits.max_metadata_nbytes {
        let limit = limits.max_metadata_nbytes;
        return Err(Error::new(ErrorKind::Limit, format!("source of {nbytes} bytes; max_metadata_nbytes is {limit}"))
            .in_record(&records.source));
    }
    let text = archive.read(&records.source)?;
    parse_rows(&String::from_utf8_lossy(&text)).map_err(|error| error.in_record(&records.source))
}

static ASSIGNMENT: LazyLock<Result<Regex, regex::Error>> =
    LazyLock::new(|| Regex::new(r"(?m)^\s*constants_info_\[(\d+)\]\.(\w+) = (.*);$"));

fn parse_rows(text: &str) -> Result<Vec<Row>> {
    let assignment = ASSIGNMENT.as_ref().map_err(|error| Error::format(error.to_string()))?;
    let mut rows: Vec<Row> = Vec::new();
    for found in assignment.captures_iter(text) {
        let (_, [number, field, value]) = found.extract();
        let number: usize = number.parse().map_err(|_| Error::format("constants_info_ has a number too large"))?;
        if number == rows.len() {
            rows.push(Row::default());
        }
        let Some(row) = rows.get_mut(number) else {
            return Err(Error::format(format!("constants_info_[{number}] does not follow its predecessor")));
        };
        row.set(field, value).map_err(|error| error.of_key(format!("constants_info_[{number}].{field}")))?;
    }
    rows.retain(|row| !row.folded);
    let mut byte_offset = 0_u64;
    for row in &mut rows {
        row.byte_offset = byte_offset;
        byte_offset = byte_offset
            .checked_add(row.nbytes)
            .ok_or_else(|| Error::format("rows take more than 2^64 bytes").of_key(&row.fqn))?;
        row.check().map_err(|error| error.of_key(&row.fqn))?;
    }
    Ok(rows)
}

impl Row {
    fn set(&mut self, field: &str, value: &str) -> Result<()> {
        match field {
            "name" => self.constant = string(value)?,
            "original_fqn" => self.fqn = string(value)?,
            "data_size" => self.nbytes = number(value)?,
            "offset" => self.storage_offset = number(value)?,
            "shape" => self.shape = numbers(value)?,
            "stride" => self.strides = numbers(value)?,
            "from_folded" => self.folded = value == "true",
            "layout" => value.clone_into(&mut self.layout),
            "dtype" => self.dtype = value.strip_prefix("cached_torch_dtype_").and_then(Dtype::from_name),
            "type" => {
                self.kind = match value.rsplit("::").next().map(|name| name.trim_end_matches(')')) {
                    Some("Parameter") => Some(SlotKind::Parameter),
                    Some("Buffer") => Some(SlotKind::Buffer),
                    _ => Some(SlotKind::Constant),
                }
            }
            // device_type and what later versions add say nothing about the bytes
            _ => {}
        }
        Ok(())
    }

    /// The row must be as large as its tensor; opaque (packed) rows have no layout that could be checked.
    fn check(&self) -> Result<()> {
        if self.constant.is_empty() || self.fqn.is_empty() {
            return Err(Error::format("row has no name"));
        }
        if !self.layout.contains("strided") {
            return Err(Error::new(ErrorKind::Unsupported, "row is packed for oneDNN; reweft cannot replace it yet")
                .with_hint("compile with reweft.torch.trace, which does not freeze weights"));
        }
        let Some(dtype) = self.dtype else {
            return Err(Error::new(ErrorKind::Unsupported, "row has a dtype that is not known"));
        };
        let elements = span(&self.shape, &self.strides)
            .filter(|_| self.shape.len() == self.strides.len())
            .and_then(|span| if span == 0 { Some(0) } else { span.checked_add(self.storage_offset) });
        match elements.and_then(|elements| dtype.nbytes(elements)) {
            Some(nbytes) if nbytes <= self.nbytes => Ok(()),
            _ => Err(Error::format(format!("row of {} bytes is too small for its tensor", self.nbytes))),
        }
    }

    fn into_slot(self) -> Slot {
        let dtype = self.dtype.unwrap_or(Dtype::U8);
        let nbytes = numel(&self.shape).and_then(|numel| dtype.nbytes(numel)).unwrap_or(self.nbytes);
        let first = dtype.nbytes(self.storage_offset).unwrap_or(0);
        Slot {
            name: self.fqn,
            aliases: Vec::new(),
            constant: self.constant,
            kind: self.kind.unwrap_or(SlotKind::Constant),
            persistent: true,
            // Without a manifest nothing says which buffers the program writes to, so all of them may be.
            mutated: self.kind != Some(SlotKind::Parameter),
            dtype,
            shape: self.shape,
            strides: self.strides,
            byte_offset: self.byte_offset + if nbytes == 0 { 0 } else { first },
            nbytes,
            row_nbytes: self.nbytes,
            hash: None,
        }
    }
}

fn string(value: &str) -> Result<String> {
    let inner = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
    match inner {
        Some(inner) if !inner.contains(['"', '\\']) => Ok(inner.to_owned()),
        _ => Err(Error::format(format!("{value} is not a plain string"))),
    }
}

fn number(value: &str) -> Result<u64> {
    // C++ literals may end in L or LL.
    value.trim().trim_end_matches('L').parse().map_err(|_| Error::format(format!("{value:?} is not a size")))
}

fn numbers(value: &str) -> Result<Vec<u64>> {
    let inner = value.strip_prefix('{').and_then(|value| value.strip_suffix('}'));
    let inner = inner.ok_or_else(|| Error::format(format!("{value:?} is not a list of sizes")))?;
    inner.split(',').filter(|item| !item.trim().is_empty()).map(number).collect()
}

/// The rows must be exactly the bytes of the record.
fn check_rows_fill(rows: &[Row], record_nbytes: u64) -> Result<()> {
    let end = rows.last().map_or(0, |row| row.byte_offset + row.nbytes);
    if let Some(row) = rows.iter().find(|row| !row.byte_offset.is_multiple_of(ROW_ALIGNMENT)) {
        return Err(
            Error::format(format!("row starts at {:#x}, not at a multiple of 64", row.byte_offset)).of_key(&row.fqn)
        );
    }
    if end == record_nbytes {
        return Ok(());
    }
    Err(Error::format(format!("the program's rows take {end} bytes, the weights record has {record_nbytes}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: &str = r#"
    constants_info_[0].name = "fc_weight";
    constants_info_[0].dtype = cached_torch_dtype_float32;
    constants_info_[0].offset = 0;
    constants_info_[0].data_size = 64;
    constants_info_[0].from_folded = false;
    constants_info_[0].type = static_cast<int32_t>(torch::aot_inductor::ConstantType::Parameter);
    constants_info_[0].shape = {2, 3L};
    constants_info_[0].stride = {3, 1};
    constants_info_[0].layout = static_cast<int32_t>(cached_torch_layout_strided);
    constants_info_[0].original_fqn = "fc.weight";
"#;

    #[test]
    fn rows_are_read_from_the_source() {
        let rows = parse_rows(ROWS).unwrap();
        assert_eq!((rows[0].fqn.as_str(), rows[0].kind), ("fc.weight", Some(SlotKind::Parameter)));
        assert_eq!((&rows[0].shape[..], &rows[0].strides[..]), (&[2, 3][..], &[3, 1][..]));
        check_rows_fill(&rows, 64).unwrap();
        assert!(check_rows_fill(&rows, 128).is_err());
    }

    #[test]
    fn rows_that_lie_are_refused() {
        for (from, to) in [
            ("{2, 3L}", "{200, 3}"),
            ("{3, 1}", "{3}"),
            ("= 64", "= -1"),
            ("layout_strided", "layout__mkldnn"),
            ("dtype_float32", "dtype_float33"),
            ("constants_info_[0].name", "constants_info_[7].name"),
        ] {
            assert!(parse_rows(&ROWS.replacen(from, to, 1)).is_err(), "{to}");
        }
    }
}
