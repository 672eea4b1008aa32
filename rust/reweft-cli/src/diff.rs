//! `diff`: what differs between two files.

use std::io::Write;

use reweft::diff::{Absent, Change, Options, Report, Side, Which, diff};
use reweft::{KeyMap, OpenOptions};

use crate::args::Diff;
use crate::output;

/// Gives whether nothing differs.
pub fn run(command: &Diff, out: &mut dyn Write) -> anyhow::Result<bool> {
    let options = Options::default().values(!command.no_values);
    let options = command.only.iter().try_fold(options, |options, pattern| options.only(pattern))?;
    let open =
        |top_level_key: &Option<String>| OpenOptions { top_level_key: top_level_key.clone(), ..OpenOptions::default() };
    let a = Side::open(&command.a, &open(&command.keys.top_level_key), &command.keys.key_map()?)?;
    let b = Side::open(&command.b, &open(&command.b_top_level_key), &KeyMap::new())?;
    let bar = output::progress(command.json);
    let report = diff(&a, &b, &options, &mut output::told(&bar))?;
    bar.finish_and_clear();
    if command.json {
        output::json(out, &report)?;
    } else {
        output::notices(a.checkpoint().notices());
        output::notices(b.checkpoint().notices());
        show(&report, out)?;
    }
    Ok(report.equal)
}

fn show(report: &Report, out: &mut dyn Write) -> anyhow::Result<()> {
    let header = ["key", "dtype", "shape", "differing", "nan", "max abs", "max rel", "at"];
    let right = ["differing", "nan", "max abs", "max rel"];
    output::table(out, &header, &right, report.changed.iter().map(row).collect())?;
    absent(out, "a", &report.only_in_a)?;
    absent(out, "b", &report.only_in_b)?;
    for row in &report.unreadable {
        writeln!(out, "not compared: {}: in {}, {}", row.key, name(row.side), row.reason)?;
    }
    for tie in &report.ties {
        writeln!(out, "one tensor in {} only: {}", name(tie.tied_in), tie.keys.join(", "))?;
    }
    for value in &report.values {
        let text = |side: &Option<String>| side.clone().unwrap_or_else(|| "nothing".to_owned());
        writeln!(out, "value: {}: {} in a, {} in b", value.path, text(&value.a), text(&value.b))?;
    }
    for path in &report.values_not_compared {
        writeln!(out, "value not compared: {path}")?;
    }
    let verdict = if report.equal { "equal" } else { "different" };
    let (tensors, nbytes, changed) = (report.tensors, output::bytes(report.nbytes), report.changed.len());
    writeln!(out, "{verdict}: {tensors} tensors on both sides, {nbytes} bytes compared, {changed} differ")?;
    Ok(())
}

fn name(which: Which) -> &'static str {
    match which {
        Which::A => "a",
        Which::B => "b",
    }
}

fn row(change: &Change) -> Vec<String> {
    let both = |left: String, right: String| if left == right { left } else { format!("{left} -> {right}") };
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.4e}"));
    let numel: u64 = change.a.shape.iter().product();
    let differing = change.differing.map(|count| format!("{} of {}", output::bytes(count), output::bytes(numel)));
    let nan = [(change.nan, ""), (change.nan_bits, " other bits")];
    let nan = nan.into_iter().filter(|(count, _)| *count > 0);
    let nan: Vec<String> = nan.map(|(count, what)| format!("{}{what}", output::bytes(count))).collect();
    vec![
        change.key.clone(),
        both(change.a.dtype.to_owned(), change.b.dtype.to_owned()),
        both(format!("{:?}", change.a.shape), format!("{:?}", change.b.shape)),
        differing.unwrap_or_default(),
        nan.join(", "),
        change.max_abs.map_or_else(String::new, |value| value.to_string()),
        number(change.max_rel),
        change.at.as_ref().map_or_else(String::new, |at| format!("{at:?}")),
    ]
}

fn absent(out: &mut dyn Write, side: &str, rows: &[Absent]) -> anyhow::Result<()> {
    for row in rows {
        let layout = row.layout.as_ref().map(|layout| format!(" {} {:?}", layout.dtype, layout.shape));
        let excuse = row.excuse.as_ref().map(|excuse| format!(" ({excuse})"));
        writeln!(out, "only in {side}: {}{}{}", row.key, layout.unwrap_or_default(), excuse.unwrap_or_default())?;
    }
    Ok(())
}
