//! Tables, JSON, progress and errors: how results look.

use std::io::{IsTerminal, Write};

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Prints an error as people read it: one line, findings below, the hint on its own line.
pub fn error(error: &anyhow::Error) {
    let mut stderr = std::io::stderr().lock();
    // Nothing can be done about an error that cannot be printed.
    let _ = writeln!(stderr, "reweft: error: {error}");
}

/// Prints notices to stderr.
pub fn notices<'a>(notices: impl IntoIterator<Item = &'a String>) {
    let mut stderr = std::io::stderr().lock();
    for notice in notices {
        let _ = writeln!(stderr, "reweft: note: {notice}");
    }
}

/// Prints a value as JSON.
pub fn json(out: &mut dyn Write, value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    Ok(writeln!(out, "{text}")?)
}

/// Prints a table; columns named in `right` are numbers.
pub fn table(out: &mut dyn Write, header: &[&str], right: &[&str], rows: Vec<Vec<String>>) -> anyhow::Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header.iter().map(|name| name.to_uppercase())).add_rows(rows);
    for (number, name) in header.iter().enumerate() {
        if let Some(column) = table.column_mut(number) {
            column.set_padding((0, 2));
            if right.contains(name) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    for line in table.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// A number of bytes with thousands set apart: `1,048,576`.
pub fn bytes(nbytes: u64) -> String {
    let digits = nbytes.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A progress bar over bytes on stderr; hidden where stderr is no terminal.
pub fn progress(json: bool) -> ProgressBar {
    if json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// What the engine tells its progress to.
pub fn told(bar: &ProgressBar) -> impl FnMut(u64, u64) + Send {
    let bar = bar.clone();
    move |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(super::bytes(0), "0");
        assert_eq!(super::bytes(999), "999");
        assert_eq!(super::bytes(1_048_576), "1,048,576");
    }
}
