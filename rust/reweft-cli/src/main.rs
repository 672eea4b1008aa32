//! The `reweft` binary; everything is in the library, which the Python package's console script calls too.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(reweft_cli::run(std::env::args_os()))
}
