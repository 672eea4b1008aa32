//! Prints the embedded tensors.

use std::io::Write;

fn main() -> reweft::Result<()> {
    let weights = embed_weights::weights()?;
    let mut out = std::io::stdout().lock();
    for (key, info) in weights.tensors() {
        let bytes = weights.read(key)?;
        let values: Vec<f32> = bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes).collect();
        let written = writeln!(out, "{key} {} {:?} {values:?}", info.dtype, info.shape);
        written.map_err(|error| reweft::Error::io("write", error))?;
    }
    Ok(())
}
