//! What reading may cost, whoever wrote the file. Every limit is named in the error it causes and can be raised.

/// Limits for opening checkpoints and artifacts.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Limits of the pickle reader.
    pub pickle: reweft_pickle::Limits,
    /// Keys that one checkpoint may flatten to; containers saved under many keys multiply.
    pub max_keys: usize,
    /// Longest flattened key in bytes, so that deep nesting stays linear.
    pub max_key_nbytes: usize,
    /// Steps and bytes that the containers of a pickle may unfold to, for each of its bytes: a few bytes can save one
    /// container under very many keys. Every value that is met costs its path and 64, every item that is looked at 8.
    pub max_expansion: u64,
    /// Bytes of one pickle or metadata record, which are read into memory.
    pub max_metadata_nbytes: u64,
    /// Bytes that one byte of a compressed pickle may unpack to; the first mebibyte is free. Pickles of checkpoints
    /// shrink to a fifth.
    pub max_inflation: u64,
    /// Bytes that a tensor which repeats its storage (stride 0) may take when it is written out.
    pub max_repeated_nbytes: u64,
    /// Values that a config may come to when shared ones are counted wherever they are used.
    pub max_config_nodes: u64,
    /// Levels of a config that is read into a type of serde's, which recurses along the data.
    pub max_config_depth: usize,
    /// Bytes of a safetensors header; the format's own limit.
    pub max_header_nbytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            pickle: reweft_pickle::Limits::default(),
            max_keys: 1_000_000,
            max_key_nbytes: 4096,
            max_expansion: 64,
            max_metadata_nbytes: 1 << 30,
            max_inflation: 100,
            max_repeated_nbytes: 1 << 30,
            max_config_nodes: 10_000_000,
            max_config_depth: 128,
            max_header_nbytes: 100_000_000,
        }
    }
}
