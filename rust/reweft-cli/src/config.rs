//! `config`: what a checkpoint holds beside its tensors.

use std::io::Write;

use reweft::OpenOptions;
use reweft::config::Config;

use crate::args;

pub fn run(command: &args::Config, out: &mut dyn Write) -> anyhow::Result<bool> {
    let options = OpenOptions { top_level_key: command.key.clone(), ..OpenOptions::default() };
    let config = Config::open(&command.file, &options)?;
    let json = config.to_json(&options).map_err(|error| error.in_file(&command.file))?;
    writeln!(out, "{json}")?;
    Ok(true)
}
