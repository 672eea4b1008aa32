//! The embedded tensors are those of the checkpoint, byte for byte.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use reweft::Dtype;

/// The bytes of the records `data/0` and `data/1` of `training.pt`, as `unzip -p` prints them.
const WEIGHT: [u32; 12] = [
    0xdad0_37bb,
    0xa8e3_883e,
    0xa83a_d2be,
    0x92f6_bbbe,
    0x04b5_44be,
    0x10a1_083e,
    0x8672_32bc,
    0x817b_cb3e,
    0x89b3_31bd,
    0xa67a_063e,
    0xf4bb_19be,
    0x984d_c7bd,
];
const BIAS: [u32; 3] = [0xb891_f4be, 0x528b_a9be, 0xe80e_53be];

#[test]
fn embedded_bytes_are_the_checkpoints() {
    let weights = embed_weights::weights().unwrap();
    assert_eq!(weights.keys().collect::<Vec<_>>(), ["linear.weight", "linear.bias"]);
    for (key, shape, words) in [("linear.weight", &[3, 4][..], &WEIGHT[..]), ("linear.bias", &[3], &BIAS)] {
        let info = weights.get(key).unwrap();
        assert_eq!((info.dtype, &info.shape[..]), (Dtype::F32, shape));
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        assert_eq!(weights.read(key).unwrap(), bytes, "{key}");
    }
}
