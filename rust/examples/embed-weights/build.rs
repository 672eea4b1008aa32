//! Takes one layer out of a training checkpoint and writes it to `OUT_DIR` as safetensors.

fn main() -> reweft_build::Result<()> {
    reweft_build::Weights::new("../../../fixtures/checkpoints/training.pt")
        .top_level_key("model_state_dict")
        .select(r"^module\.0\.")
        .remap(r"^module\.0\.", "linear.")
        .convert("linear.safetensors")?;
    Ok(())
}
