//! The `reweft` command as a library: arguments in, exit code out.
//!
//! stdout is data, stderr is for people. Exit codes: 0 done, 1 a check found differences, 2 error.

mod args;
mod cache;
mod config;
mod diff;
mod inspect;
mod output;
mod run;
mod weights;

use std::ffi::OsString;
use std::io;

use clap::Parser;

use args::{Args, Command};

/// The command did what it was asked.
const DONE: u8 = 0;
/// `plan`, `verify` or `diff` found differences.
const DIFFERENT: u8 = 1;
/// Nothing was done.
const ERROR: u8 = 2;

/// Runs the command line `args`, whose first item is the program's name. Gives the exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            // Help and version are no errors and go to stdout; clap knows.
            let wanted = !error.use_stderr();
            return if error.print().is_ok() && wanted { DONE } else { ERROR };
        }
    };
    let mut stdout = io::stdout().lock();
    let result = match &args.command {
        Command::Inspect(command) => inspect::run(command, &mut stdout),
        Command::Explain(command) => inspect::explain(command, &mut stdout),
        Command::Config(command) => config::run(command, &mut stdout),
        Command::Convert(command) => weights::convert(command, &mut stdout),
        Command::Extract(command) => weights::extract(command, &mut stdout),
        Command::Plan(command) => weights::plan(command, &mut stdout),
        Command::Refit(command) => weights::refit(command, &mut stdout),
        Command::Verify(command) => weights::verify(command, &mut stdout),
        Command::Strip(command) => weights::strip(command, &mut stdout),
        Command::Diff(command) => diff::run(command, &mut stdout),
        Command::Run(command) => run::run(command, &mut stdout),
        Command::Cache(command) => cache::run(command, &mut stdout),
    };
    match result {
        Ok(true) => DONE,
        Ok(false) => DIFFERENT,
        // A reader that closed the pipe has seen what it wanted.
        Err(error) if of_stdout(&error).is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) => DONE,
        Err(error) => {
            let unprinted = of_stdout(&error).map(|error| {
                anyhow::anyhow!("write to standard output: {error}\nhint: a file that was to be written is there")
            });
            output::error(&unprinted.unwrap_or(error));
            ERROR
        }
    }
}

/// What stdout gave. Errors of files are the engine's.
fn of_stdout(error: &anyhow::Error) -> Option<&io::Error> {
    error.downcast_ref()
}
