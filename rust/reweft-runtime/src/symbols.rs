//! How a table of native functions is declared once and resolved by name at run time.
//!
//! The tables themselves are in `torch.rs` and `library.rs`.

use crate::error::{Error, ErrorKind, Result};

/// A resolved function with the name it was found under, for messages.
#[derive(Clone, Copy)]
pub(crate) struct Function<F> {
    pub name: &'static str,
    pub call: F,
}

/// Declares a struct of [`Function`]s and its `resolve`: one line per function is the whole table. They are C++ inside, and
/// an exception may pass through our frames.
macro_rules! symbols {
    (
        $(#[$attribute:meta])* struct $table:ident;
        required { $($field:ident = $symbol:literal: fn($($argument:ty),*) $(-> $output:ty)?;)* }
        optional { $($maybe:ident = $maybe_symbol:literal: fn($($maybe_argument:ty),*) $(-> $maybe_output:ty)?;)* }
    ) => {
        $(#[$attribute])*
        pub(crate) struct $table {
            $(pub $field: $crate::symbols::Function<unsafe extern "C-unwind" fn($($argument),*) $(-> $output)?>,)*
            $(pub $maybe: Option<$crate::symbols::Function<unsafe extern "C-unwind" fn($($maybe_argument),*) $(-> $maybe_output)?>>,)*
        }

        impl $table {
            /// Resolves every line of the table.
            ///
            /// # Errors
            /// [`ErrorKind::Symbol`](crate::ErrorKind::Symbol) for the first required function that is absent.
            ///
            /// # Safety
            /// Functions of these names in `library` have these signatures, and `library` stays loaded for as
            /// long as the table is used.
            pub unsafe fn resolve(library: &libloading::Library) -> $crate::error::Result<Self> {
                Ok(Self {
                    // SAFETY: the caller vouches for the signatures and for the library's life.
                    $($field: unsafe { $crate::symbols::required(library, $symbol)? },)*
                    // SAFETY: the same.
                    $($maybe: unsafe { $crate::symbols::optional(library, $maybe_symbol) },)*
                })
            }
        }
    };
}
pub(crate) use symbols;

/// Looks up a function that must exist.
///
/// # Safety
/// `F` is the type of the function, and it is not called after `library` is closed.
pub(crate) unsafe fn required<F: Copy>(library: &libloading::Library, name: &'static str) -> Result<Function<F>> {
    // SAFETY: passed on to the caller.
    unsafe { optional(library, name) }
        .ok_or_else(|| Error::new(ErrorKind::Symbol, format!("function {name} is not exported; it is needed")))
}

/// Looks up a function that only some versions export.
///
/// # Safety
/// As [`required`].
pub(crate) unsafe fn optional<F: Copy>(library: &libloading::Library, name: &'static str) -> Option<Function<F>> {
    // SAFETY: passed on to the caller.
    let symbol = unsafe { library.get::<F>(name) }.ok()?;
    Some(Function { name, call: *symbol })
}
