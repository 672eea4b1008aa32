//! The stream of pickles that torch wrote before 1.6; without CRCs, so that every change of a byte reaches the reader.

use crate::sources::{agree, options};

pub(crate) fn body(bytes: &[u8]) {
    let _ = agree(bytes, &options());
}
