//! See `reweft_fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| reweft_fuzz::run("index", bytes));
