//! Limits that a caller set, by their names in `reweft.Limits`.

use std::collections::HashMap;

use reweft::{Error, ErrorKind, Limits};

use crate::error::Result;

/// The default limits but for those given.
pub fn limits(given: HashMap<String, u64>) -> Result<Limits> {
    let mut limits = Limits::default();
    for (name, value) in given {
        set(&mut limits, &name, value)?;
    }
    Ok(limits)
}

fn set(limits: &mut Limits, name: &str, value: u64) -> reweft::Result<()> {
    let size = || usize::try_from(value).unwrap_or(usize::MAX);
    match name {
        "max_keys" => limits.max_keys = size(),
        "max_key_nbytes" => limits.max_key_nbytes = size(),
        "max_expansion" => limits.max_expansion = value,
        "max_metadata_nbytes" => limits.max_metadata_nbytes = value,
        "max_inflation" => limits.max_inflation = value,
        "max_repeated_nbytes" => limits.max_repeated_nbytes = value,
        "max_header_nbytes" => limits.max_header_nbytes = value,
        "max_nodes" => limits.pickle.max_nodes = u32::try_from(value).unwrap_or(u32::MAX),
        "max_memo" => limits.pickle.max_memo = size(),
        "max_int_digits" => limits.pickle.max_int_digits = size(),
        other => return Err(Error::new(ErrorKind::Usage, format!("there is no limit {other:?}"))),
    }
    Ok(())
}
