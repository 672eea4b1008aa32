//! Reads Python pickles as data: nothing is imported, called or resolved, whatever the pickle asks
//! for.
//!
//! [`Pickle::parse`] gives an arena of [`Value`]s that name each other by [`NodeId`]. A class or
//! function is a [`Value::Global`] with two names, a call is a [`Value::Object`] that says what
//! would have been called with what, and the object behind a persistent id is a
//! [`Value::Persistent`]. What they mean is the caller's business.
//!
//! All of protocols 0 to 5 is read, except buffers that travel outside the pickle. No input makes
//! the reader panic or recurse, and its time and memory are linear in the input, bounded by
//! [`Limits`].
//!
//! [`disassemble`] prints the opcodes, [`dump`] the values. [`Writer`] writes what others then read.
//!
//! ```
//! use reweft_pickle::{Limits, Pickle};
//!
//! // pickle.dumps({"epoch": 3, "lr": 0.5}, protocol=2)
//! let bytes = b"\x80\x02}q\0(X\x05\0\0\0epochq\x01K\x03X\x02\0\0\0lrq\x02G\x3f\xe0\0\0\0\0\0\0u.";
//! let pickle = Pickle::parse(bytes, &Limits::default())?;
//! let pairs = pickle.dict(pickle.root()).expect("a dict");
//! assert_eq!(pickle.as_str(pairs[0].0), Some("epoch"));
//! assert_eq!(pickle.as_i64(pairs[0].1), Some(3));
//! # Ok::<(), reweft_pickle::Error>(())
//! ```

#![forbid(unsafe_code)]
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

mod bigint;
mod cursor;
mod dump;
mod error;
mod limits;
mod names;
mod opcode;
mod pickle;
mod text;
mod value;
mod vm;
mod writer;

pub use bigint::BigInt;
pub use dump::{DumpLimits, disassemble, dump};
pub use error::{Error, ErrorKind, Result};
pub use limits::Limits;
pub use names::python3_name;
pub use pickle::Pickle;
pub use text::Text;
pub use value::{Children, How, NodeId, Object, Value};
pub use writer::{Memoized, Writer};
