//! What a pickle holds beside tensors: as values, as JSON and as a type of serde's.

use std::path::Path;
use std::sync::Arc;

use reweft::config::Config;
use reweft::source::{self, Access, Source};
use reweft::{Limits, OpenOptions};

use crate::memory::within;
use crate::sources::{OPEN_FACTOR, OPEN_NBYTES, with_file};

/// Bytes of JSON that an input may come to; more would only make the fuzzer slow.
const JSON_NBYTES: u64 = 1 << 20;

pub(crate) fn body(bytes: &[u8]) {
    let limits = Limits { max_config_nodes: 10_000, max_repeated_nbytes: JSON_NBYTES, ..Limits::default() };
    let options = OpenOptions { limits, ..OpenOptions::default() };
    with_file(bytes, |path| {
        let memory = open(path, Arc::new(bytes.to_vec()), &options);
        for access in [Access::Read, Access::Map] {
            let file = source::open(path, access).map_err(|error| error.to_string());
            let found = file.and_then(|file| open(path, file, &options));
            assert_eq!(format!("{found:?}"), format!("{memory:?}"), "{access:?} and memory differ");
        }
        if let Ok(config) = memory {
            forms(&config, &options);
        }
    });
}

fn open(path: &Path, source: Source, options: &OpenOptions) -> Result<Config, String> {
    let limit = OPEN_FACTOR * source.len() + OPEN_NBYTES;
    within(limit, "opening", || Config::from_source(path, source, options)).map_err(|error| error.to_string())
}

fn forms(config: &Config, options: &OpenOptions) {
    let paths: usize = (0..config.values().len()).take(100).map(|_| config.path(config.root()).len()).sum();
    assert!(paths < 1 << 20);
    let text = within(16 * JSON_NBYTES + OPEN_NBYTES, "writing JSON", || config.to_json(options));
    let value = config.deserialize::<serde_json::Value>(options);
    let Ok(text) = text else { return };
    assert_eq!(text, config.to_json(options).unwrap());
    match serde_json::from_str::<serde_json::Value>(&text) {
        // Where a type of serde's can hold the value, both ways to it agree on what kind of thing it is.
        Ok(parsed) => assert!(value.is_err() || value.is_ok_and(|value| same_kind(&value, &parsed)), "{text}"),
        // JSON has no largest number and no deepest level; this reader does.
        Err(error) => {
            let known = ["recursion limit", "number out of range"];
            assert!(known.iter().any(|known| error.to_string().contains(known)), "{error}: {text}");
        }
    }
}

fn same_kind(left: &serde_json::Value, right: &serde_json::Value) -> bool {
    // What has no JSON of its own is an object that says so, and something plainer to serde.
    right.is_object() || std::mem::discriminant(left) == std::mem::discriminant(right)
}
