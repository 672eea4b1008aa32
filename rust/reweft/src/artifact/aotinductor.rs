//! AOTInductor packages: a `.pt2` archive with a compiled library, its sources and its weights.
//!
//! The rows of weights are stated in the packed `*.wrapper.cpp` as `constants_info_[i].field = value;`, in the order
//! of their bytes; folded rows have no bytes. Checked against packages of torch 2.13 and 2.15.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use indexmap::IndexMap;
use regex::Regex;

use super::manifest::{self, Manifest};
use super::stored::block_overlaps;
use super::{Absent, Artifact, Checksum, Holds, Kind, Packed, Slot, SlotKind, library};
use crate::checkpoint::json::{self, Unique};
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::container::zip::Archive;
use crate::convert::Packing;
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::Limits;
use crate::source::{self, Access, Source, Window};
use crate::tensor::{numel, span};

/// Paths inside the archive, below its root folder.
mod paths {
    pub const FORMAT: &str = "archive_format";
    pub const MODELS: &str = "data/aotinductor/";
    pub const LIBRARY_END: &str = ".wrapper.so";
    pub const SOURCE_END: &str = ".wrapper.cpp";
    pub const WEIGHTS_END: &str = ".wrapper_weights.blob";
    pub const METADATA_END: &str = ".wrapper_metadata.json";
    pub const CONFIG_END: &str = "/weights_config.json";
    /// Nodes that libtorch runs through a proxy executor.
    pub const EXTERN_NODES_END: &str = ".wrapper.json";
}

/// What `archive_format` says in a package.
const FORMAT: &[u8] = b"pt2";
/// Where `pickle_weights` puts weights, below the root folder.
const WEIGHTS: &str = "data/weights/";
/// Rows start at multiples of this in a weights record, unless all are on a GPU.
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
    /// Where the weights are beside the program, if they were written as torch checkpoints.
    pub weights_config: Option<String>,
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

/// A compiled program: the archive that it is in, its models, and where their weights are.
#[derive(Debug)]
pub struct Program {
    archive: Option<Arc<Archive>>,
    models: Vec<Records>,
    regions: Vec<Region>,
    pub(super) manifest: Option<Manifest>,
    pub(super) absent: Option<Absent>,
    recomputed: Vec<String>,
}

/// A range of the file that holds weights.
#[derive(Debug)]
struct Region {
    start: u64,
    /// The record of the archive that it lies in.
    record: Option<String>,
    /// The CRC of the record of an archive within that record.
    inner: Option<Checksum>,
}

impl Program {
    /// The archive that the package is; `None` for a library.
    pub fn archive(&self) -> Option<&Arc<Archive>> {
        self.archive.as_ref()
    }

    /// The models of the package.
    pub fn models(&self) -> &[Records] {
        &self.models
    }

    /// Names of constants that the program computes from others when it is loaded; they follow a refit by themselves.
    pub fn recomputed(&self) -> &[String] {
        &self.recomputed
    }

    pub(super) fn place(&self, region: usize, byte_offset: u64) -> Result<u64> {
        let region =
            self.regions.get(region).ok_or_else(|| Error::new(ErrorKind::Usage, "slot of another artifact"))?;
        Ok(region.start + byte_offset)
    }

    pub(super) fn checksums(&self, regions: &[usize]) -> Result<Vec<Checksum>> {
        let mut checksums = Vec::new();
        for region in regions.iter().filter_map(|region| self.regions.get(*region)) {
            checksums.extend(region.inner.clone());
            if let (Some(archive), Some(record)) = (&self.archive, &region.record) {
                checksums.extend(Checksum::of_record(archive, record, 0)?);
            }
        }
        Ok(checksums)
    }
}

pub(super) fn read(path: &Path, source: Source, limits: &Limits) -> Result<Artifact> {
    if library::detect(&*source) {
        return read_library(path, source, limits);
    }
    let archive = Arc::new(Archive::open(source.clone())?);
    let models = find_models(&archive)?;
    let several = models.len() > 1;
    let mut reader = Reader::new(limits);
    for records in &models {
        reader.read_model(&archive, records, several)?;
    }
    let manifest = match models.as_slice() {
        [records] => manifest::read(&archive, records, limits)?,
        _ => None,
    };
    let originals = match &manifest {
        Some(manifest) => manifest.label(&mut reader.slots)?,
        None => Vec::new(),
    };
    let artifact = reader.finish(path, source, Kind::Aotinductor, Some(archive), models, manifest);
    Ok(Artifact { originals, ..artifact })
}

/// Reads a library that stands beside its generated source, as `torch._inductor.aot_compile` leaves it.
fn read_library(path: &Path, source: Source, limits: &Limits) -> Result<Artifact> {
    let beside = path.with_extension("cpp");
    let text = source::open(&beside, Access::Read).map_err(|error| {
        let what = format!("the library's rows are stated in its source, which is not there: {error}");
        Error::new(ErrorKind::Unsupported, what).with_hint("keep the .wrapper.cpp file beside the library")
    })?;
    check_text(text.len(), limits).map_err(|error| error.in_file(&beside))?;
    let text = source::read_vec(&*text, 0, text.len())?;
    let rows = parse_rows(&String::from_utf8_lossy(&text)).map_err(|error| error.in_file(&beside))?;
    let mut reader = Reader::new(limits);
    let range = library::find_rows(&source, rows.nbytes())?;
    let region = range.map(|range| reader.region(Region { start: range.start, record: None, inner: None }));
    if region.is_none() {
        let blob = path.with_file_name(format!("{}_weights.blob", path.file_stem().unwrap_or_default().display()));
        let (why, hint) = if blob.exists() {
            ("the library's weights are in a file of their own", "compile a .pt2 package, which holds both")
        } else {
            (WITHOUT_WEIGHTS, KEEP_WEIGHTS)
        };
        reader.absent = Some(Absent { why: why.to_owned(), hint });
    }
    reader.keep_rows(rows, "", region, &HashMap::new())?;
    Ok(reader.finish(path, source, Kind::Library, None, Vec::new(), None))
}

const WITHOUT_WEIGHTS: &str = "the package was compiled without its weights";
const KEEP_WEIGHTS: &str =
    "compile with package_constants_in_so=True, or package_constants_on_disk_format=\"binary_blob\"";

/// Gathers slots and regions model by model.
struct Reader<'a> {
    limits: &'a Limits,
    slots: Vec<Slot>,
    regions: Vec<Region>,
    recomputed: Vec<String>,
    absent: Option<Absent>,
    /// The slot that a place on disk belongs to: models of a package share weights there.
    on_disk: HashMap<(usize, u64), usize>,
    /// Region by record, for weights that models share.
    by_record: HashMap<String, usize>,
}

impl<'a> Reader<'a> {
    fn new(limits: &'a Limits) -> Self {
        let (on_disk, by_record) = (HashMap::new(), HashMap::new());
        Self {
            limits,
            slots: Vec::new(),
            regions: Vec::new(),
            recomputed: Vec::new(),
            absent: None,
            on_disk,
            by_record,
        }
    }

    fn region(&mut self, region: Region) -> usize {
        self.regions.push(region);
        self.regions.len() - 1
    }

    fn read_model(&mut self, archive: &Arc<Archive>, records: &Records, several: bool) -> Result<()> {
        let rows = read_rows(archive, records, self.limits)?;
        let region = self.find_region(archive, records, &rows)?;
        let on_disk = match &records.weights_config {
            Some(config) => self.read_config(archive, records, config).map_err(|error| error.in_record(config))?,
            None => HashMap::new(),
        };
        if region.is_none() && on_disk.is_empty() && !rows.rows.is_empty() {
            self.absent = Some(Absent { why: WITHOUT_WEIGHTS.to_owned(), hint: KEEP_WEIGHTS });
        }
        let prefix = if several { format!("{}.", records.model) } else { String::new() };
        self.keep_rows(rows, &prefix, region, &on_disk)
    }

    /// The record beside the library that holds the rows, or the range of the library that does.
    fn find_region(&mut self, archive: &Arc<Archive>, records: &Records, rows: &Rows) -> Result<Option<usize>> {
        if let Some(weights) = &records.weights {
            check_rows_fill(rows, archive.entry(weights)?.nbytes).map_err(|error| error.in_record(weights))?;
            let start = archive.place(weights)?.data.start;
            return Ok(Some(self.region(Region { start, record: Some(weights.clone()), inner: None })));
        }
        if rows.rows.is_empty() {
            return Ok(None);
        }
        let in_record = |error: Error| error.in_record(&records.library);
        let place = archive.place(&records.library)?.data;
        let library: Source =
            Arc::new(Window::new(archive.source().clone(), place.start, place.end - place.start).map_err(in_record)?);
        let Some(range) = library::find_rows(&library, rows.nbytes()).map_err(in_record)? else { return Ok(None) };
        let record = Some(records.library.clone());
        Ok(Some(self.region(Region { start: place.start + range.start, record, inner: None })))
    }

    /// Reads where `pickle_weights` puts a model's weights: a torch.save archive for each storage.
    fn read_config(
        &mut self,
        archive: &Arc<Archive>,
        records: &Records,
        config: &str,
    ) -> Result<HashMap<String, OnDisk>> {
        check_text(archive.entry(config)?.nbytes, self.limits)?;
        let Unique(rows): Unique<(String, Vec<u64>, Vec<u64>, u64)> = json::parse(&archive.read(config)?)?;
        let mut found = HashMap::with_capacity(rows.len());
        for (name, (file, shape, strides, storage_offset)) in rows {
            if file.contains(['/', '\\']) {
                return Err(Error::format(format!("record name {file:?} leaves its folder")).of_key(name));
            }
            let record = format!("{}/{WEIGHTS}{file}", records.root);
            let region = match self.by_record.get(&record) {
                Some(region) => *region,
                None => self.pickled_region(archive, &record).map_err(|error| error.in_record(&record))?,
            };
            found.insert(name, OnDisk { region, shape, strides, storage_offset });
        }
        Ok(found)
    }

    /// The one storage of a torch.save archive that is a record.
    fn pickled_region(&mut self, archive: &Arc<Archive>, record: &str) -> Result<usize> {
        let place = archive.place(record)?.data;
        let source: Source = Arc::new(Window::new(archive.source().clone(), place.start, place.end - place.start)?);
        let options = OpenOptions { limits: self.limits.clone(), ..OpenOptions::default() };
        let inner = Checkpoint::from_source(Path::new(record), source.clone(), &options)?;
        let [storage] = inner.storages().iter().collect::<Vec<_>>()[..] else {
            return Err(Error::format("the record holds several storages, wanted one"));
        };
        let Some((_, start)) = storage.locate()?.filter(|_| !storage.is_swapped()) else {
            return Err(Error::new(ErrorKind::Unsupported, "the weights do not stand in the record as they are"));
        };
        let inner = match storage.archive_record() {
            Some((archive, name)) => Checksum::of_record(archive, name, place.start)?,
            None => None,
        };
        let region = self.region(Region { start: place.start + start, record: Some(record.to_owned()), inner });
        self.by_record.insert(record.to_owned(), region);
        Ok(region)
    }

    fn keep_rows(
        &mut self,
        rows: Rows,
        prefix: &str,
        region: Option<usize>,
        on_disk: &HashMap<String, OnDisk>,
    ) -> Result<()> {
        self.recomputed.extend(rows.recomputed.into_iter().map(|name| format!("{prefix}{name}")));
        for row in rows.rows {
            let mut slot = row.into_slot(region);
            let disk = on_disk.get(&slot.name);
            slot.name.insert_str(0, prefix);
            let Some(disk) = disk else {
                self.slots.push(slot);
                continue;
            };
            if (&disk.shape, &disk.strides) != (&slot.shape, &slot.strides) {
                return Err(Error::format("the program and the weights beside it differ in shape").of_key(&slot.name));
            }
            let place = (disk.region, slot.dtype.nbytes(disk.storage_offset).unwrap_or(u64::MAX));
            // Others that begin there share some of its bytes, and are blocked for it.
            let same =
                |other: &Slot| (other.dtype, &other.shape, &other.strides) == (slot.dtype, &slot.shape, &slot.strides);
            if let Some(number) = self.on_disk.get(&place).filter(|number| same(&self.slots[**number])) {
                let other = &mut self.slots[*number];
                other.copies.extend(slot.region.map(|region| (region, slot.byte_offset)));
                other.aliases.push(slot.name);
                continue;
            }
            self.on_disk.insert(place, self.slots.len());
            if slot.region.is_some() {
                slot.copies.push(place);
            } else {
                (slot.region, slot.byte_offset) = (Some(place.0), place.1);
            }
            self.slots.push(slot);
        }
        Ok(())
    }

    fn finish(
        self,
        path: &Path,
        source: Source,
        kind: Kind,
        archive: Option<Arc<Archive>>,
        models: Vec<Records>,
        manifest: Option<Manifest>,
    ) -> Artifact {
        let (unused, unrefittable) = manifest.as_ref().map(Manifest::absent).unwrap_or_default();
        let Self { mut slots, regions, recomputed, absent, .. } = self;
        block_overlaps(&mut slots);
        let holds = Holds::Program(Box::new(Program { archive, models, regions, manifest, absent, recomputed }));
        Artifact {
            path: path.to_owned(),
            source,
            stripped: None,
            kind,
            slots,
            originals: Vec::new(),
            unused,
            unrefittable,
            holds,
        }
    }
}

/// Where weights stand beside a program.
struct OnDisk {
    region: usize,
    shape: Vec<u64>,
    strides: Vec<u64>,
    storage_offset: u64,
}

/// The records of every model, in the order of the archive.
fn find_models(archive: &Archive) -> Result<Vec<Records>> {
    let root = archive.root()?.to_owned();
    let folder = format!("{root}/{}", paths::MODELS);
    let mut by_model: IndexMap<&str, Vec<&str>> = IndexMap::new();
    for name in archive.entries().keys() {
        if let Some((model, _)) = name.strip_prefix(&folder).and_then(|rest| rest.split_once('/')) {
            by_model.entry(model).or_default().push(name);
        }
    }
    by_model.into_iter().map(|(model, inside)| find_records(&root, model, &inside)).collect()
}

fn find_records(root: &str, model: &str, inside: &[&str]) -> Result<Records> {
    let find = |end: &str| -> Result<Option<String>> {
        let mut found = inside.iter().filter(|name| name.ends_with(end));
        match (found.next(), found.next()) {
            (Some(_), Some(second)) => {
                let what = format!("model {model:?} has two {end} records; the second is {second:?}");
                Err(Error::new(ErrorKind::Unsupported, what))
            }
            (first, _) => Ok(first.map(|name| (*name).to_owned())),
        }
    };
    let required = |end: &str| {
        find(end)?.ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("model {model:?} has no {end} record"))
                .with_hint("packages that ship sources only (package_cpp_only) are not handled")
        })
    };
    Ok(Records {
        model: model.to_owned(),
        library: required(paths::LIBRARY_END)?,
        source: required(paths::SOURCE_END)?,
        metadata: find(paths::METADATA_END)?,
        weights: find(paths::WEIGHTS_END)?,
        weights_config: find(paths::CONFIG_END)?,
        extern_nodes: find(paths::EXTERN_NODES_END)?,
        root: root.to_owned(),
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
    /// What the compiler states of an opaque layout.
    descriptor: Vec<u8>,
    device: String,
}

/// The rows that have bytes, in the order of those, and the names of those that have none.
struct Rows {
    rows: Vec<Row>,
    recomputed: Vec<String>,
}

impl Rows {
    fn nbytes(&self) -> u64 {
        self.rows.last().map_or(0, |row| row.byte_offset + row.nbytes)
    }
}

pub(super) fn check_text(nbytes: u64, limits: &Limits) -> Result<()> {
    let limit = limits.max_metadata_nbytes;
    if nbytes <= limit {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Limit, format!("text of {nbytes} bytes; max_metadata_nbytes is {limit}")))
}

/// Reads the rows of a model.
fn read_rows(archive: &Archive, records: &Records, limits: &Limits) -> Result<Rows> {
    let nbytes = archive.entry(&records.source)?.nbytes;
    check_text(nbytes, limits).map_err(|error| error.in_record(&records.source))?;
    let text = archive.read(&records.source)?;
    parse_rows(&String::from_utf8_lossy(&text)).map_err(|error| error.in_record(&records.source))
}

static ASSIGNMENT: LazyLock<Result<Regex, regex::Error>> =
    LazyLock::new(|| Regex::new(r"(?m)^\s*constants_info_\[(\d+)\]\.(\w+) = (.*);$"));

fn parse_rows(text: &str) -> Result<Rows> {
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
    let recomputed = rows.iter().filter(|row| row.folded).map(|row| row.fqn.clone()).collect();
    rows.retain(|row| !row.folded);
    let mut byte_offset = 0_u64;
    for row in &mut rows {
        row.byte_offset = byte_offset;
        byte_offset = byte_offset
            .checked_add(row.nbytes)
            .ok_or_else(|| Error::format("rows take more than 2^64 bytes").of_key(&row.fqn))?;
        row.check().map_err(|error| error.of_key(&row.fqn))?;
    }
    Ok(Rows { rows, recomputed })
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
            "opaque_metadata" => self.descriptor = bytes(value)?,
            "layout" => value.clone_into(&mut self.layout),
            "device_type" => value.clone_into(&mut self.device),
            "dtype" => self.dtype = value.strip_prefix("cached_torch_dtype_").and_then(Dtype::from_name),
            "type" => {
                self.kind = match value.rsplit("::").next().map(|name| name.trim_end_matches(')')) {
                    Some("Parameter") => Some(SlotKind::Parameter),
                    Some("Buffer") => Some(SlotKind::Buffer),
                    _ => Some(SlotKind::Constant),
                }
            }
            // What later versions add says nothing about the bytes.
            _ => {}
        }
        Ok(())
    }

    /// The row must be as large as its tensor; opaque (packed) rows have no layout that could be checked.
    fn check(&self) -> Result<()> {
        if self.constant.is_empty() || self.fqn.is_empty() {
            return Err(Error::format("row has no name"));
        }
        let (None, Some(dtype)) = (self.blocked(), self.dtype) else { return Ok(()) };
        let elements = span(&self.shape, &self.strides)
            .filter(|_| self.shape.len() == self.strides.len())
            .and_then(|span| if span == 0 { Some(0) } else { span.checked_add(self.storage_offset) });
        match elements.and_then(|elements| dtype.nbytes(elements)) {
            Some(nbytes) if nbytes <= self.nbytes => Ok(()),
            _ => Err(Error::format(format!("row of {} bytes is too small for its tensor", self.nbytes))),
        }
    }

    /// Why nothing is known of what the row's bytes mean, if so.
    fn blocked(&self) -> Option<&'static str> {
        if !self.layout.contains("strided") {
            Some("its bytes are packed for oneDNN (freezing=True)")
        } else if self.dtype.is_none() {
            Some("its dtype is not known")
        } else {
            None
        }
    }

    fn into_slot(self, region: Option<usize>) -> Slot {
        let blocked = self.blocked().map(str::to_owned);
        if blocked.is_some() {
            return self.into_blocked(region, blocked);
        }
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
            region,
            byte_offset: self.byte_offset + if nbytes == 0 { 0 } else { first },
            nbytes,
            row_nbytes: self.nbytes,
            copies: Vec::new(),
            hash: None,
            blocked,
            stripped: false,
            recipe: None,
            packed: None,
        }
    }

    /// What is known of a row that is packed for oneDNN. A descriptor of another kind stays unknown.
    fn packed(&self) -> Option<Packed> {
        let (packing, dtype) = Packing::from_descriptor(&self.descriptor, self.nbytes).ok()?;
        packing.check(dtype, numel(&self.shape)?).ok()?;
        let (shape, descriptor) = (self.shape.clone(), self.descriptor.clone());
        (self.dtype == Some(dtype)).then_some(Packed { dtype, shape, descriptor, packing })
    }

    /// A slot of as many bytes as the row has.
    fn into_blocked(self, region: Option<usize>, blocked: Option<String>) -> Slot {
        let packed = self.packed();
        let plain = Self {
            dtype: Some(Dtype::U8),
            shape: vec![self.nbytes],
            strides: vec![1],
            storage_offset: 0,
            layout: "strided".to_owned(),
            ..self
        };
        Slot { blocked, packed, ..plain.into_slot(region) }
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

fn bytes(value: &str) -> Result<Vec<u8>> {
    let byte = |value: &u64| u8::try_from(*value).map_err(|_| Error::format(format!("{value} is no byte")));
    numbers(value)?.iter().map(byte).collect()
}

/// The rows must be exactly the bytes of the record.
fn check_rows_fill(rows: &Rows, record_nbytes: u64) -> Result<()> {
    let end = rows.nbytes();
    let on_gpu = rows.rows.iter().all(|row| row.device.contains("cuda"));
    let is_aligned = |row: &Row| on_gpu || row.byte_offset.is_multiple_of(ROW_ALIGNMENT);
    if let Some(row) = rows.rows.iter().find(|row| !is_aligned(row)) {
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
        let row = &rows.rows[0];
        assert_eq!((row.fqn.as_str(), row.kind), ("fc.weight", Some(SlotKind::Parameter)));
        assert_eq!((&row.shape[..], &row.strides[..]), (&[2, 3][..], &[3, 1][..]));
        check_rows_fill(&rows, 64).unwrap();
        assert!(check_rows_fill(&rows, 128).is_err());
    }

    #[test]
    fn rows_that_lie_are_refused() {
        for (from, to) in [
            ("{2, 3L}", "{200, 3}"),
            ("{3, 1}", "{3}"),
            ("= 64", "= -1"),
            ("constants_info_[0].name", "constants_info_[7].name"),
        ] {
            assert!(parse_rows(&ROWS.replacen(from, to, 1)).is_err(), "{to}");
        }
    }

    #[test]
    fn rows_whose_bytes_mean_nothing_known_are_blocked() {
        for (from, to, why) in
            [("layout_strided", "layout__mkldnn", "oneDNN"), ("dtype_float32", "dtype_float33", "not known")]
        {
            let slot = parse_rows(&ROWS.replacen(from, to, 1)).unwrap().rows.remove(0).into_slot(Some(0));
            assert!(slot.obstacle().unwrap().contains(why), "{to}");
            assert_eq!((slot.dtype, slot.nbytes), (Dtype::U8, 64));
        }
    }

    #[test]
    fn names_that_the_compiler_gave_are_blocked_in_every_model() {
        for given in ["_tensor_constant0", "_frozen_param3"] {
            let text = ROWS.replace("fc_weight", given).replace("fc.weight", given);
            let mut slot = parse_rows(&text).unwrap().rows.remove(0).into_slot(Some(0));
            slot.name.insert_str(0, "decoder.");
            assert!(slot.obstacle().is_some(), "{given}");
        }
    }

    #[test]
    fn rows_on_a_gpu_are_packed_tightly() {
        let second = ROWS.replace("[0]", "[1]").replace("= 64", "= 24");
        let text = ROWS.replace("= 64", "= 24") + &second;
        assert!(check_rows_fill(&parse_rows(&text).unwrap(), 48).is_err());
        let device = |number| format!("    constants_info_[{number}].device_type = cached_torch_device_type_cuda;\n");
        let text = text + &device(0) + &device(1);
        check_rows_fill(&parse_rows(&text).unwrap(), 48).unwrap();
    }
}
