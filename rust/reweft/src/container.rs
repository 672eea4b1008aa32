//! Archives that hold checkpoints and artifacts. Byte offsets are first-class: a record is a range of the file.

pub mod tar;
pub mod zip;
