//! What can be said of an archive that was cut short: its directory stood at the end, its first records did not.

use super::{FLAG_DESCRIPTOR, Fields, LOCAL_HEADER_NBYTES, LOCAL_SIGNATURE, Method, directory};
use crate::source::{ReadAt, read_vec};

/// Most records that are stepped over.
const MAX_RECORDS: usize = 16;

/// A stored record by its local header alone.
#[derive(Debug)]
pub struct CutRecord {
    /// Its name.
    pub name: String,
    /// First byte of its data, which may lie behind the end.
    pub start: u64,
}

/// Whether the archive has an end record. Reads up to 64 KiB from the end.
pub fn has_end(source: &dyn ReadAt) -> bool {
    directory::find_end(source).is_ok()
}

/// The first stored record whose name ends in `end`, as far as local headers lead: those of torch's records say
/// nothing of their length, so that the search ends behind the first of them.
pub fn find_record(source: &dyn ReadAt, end: &str) -> Option<CutRecord> {
    let mut at = 0;
    for _ in 0..MAX_RECORDS {
        let fixed = read_vec(source, at, LOCAL_HEADER_NBYTES).ok()?;
        let field = Fields(&fixed);
        if field.u32(0) != LOCAL_SIGNATURE || field.u16(8) != Method::STORED.0 {
            return None;
        }
        let (name_nbytes, extra_nbytes) = (u64::from(field.u16(26)), u64::from(field.u16(28)));
        let name = read_vec(source, at + LOCAL_HEADER_NBYTES, name_nbytes).ok()?;
        let name = String::from_utf8(name).ok()?;
        let start = at + LOCAL_HEADER_NBYTES + name_nbytes + extra_nbytes;
        if name.ends_with(end) {
            return Some(CutRecord { name, start });
        }
        if field.u16(6) & FLAG_DESCRIPTOR != 0 {
            return None;
        }
        at = start.checked_add(u64::from(field.u32(18)))?;
    }
    None
}
