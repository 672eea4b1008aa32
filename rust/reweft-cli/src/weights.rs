//! `convert`, `extract`, `plan`, `refit`, `verify`, `strip`: what moves or compares weights.

use std::io::Write;

use reweft::plan::Finding;
use reweft::source::Access;
use reweft::{Artifact, Checkpoint, Error, ErrorKind, Limits, plan, write};

use crate::args::{Allow, Convert, Extract, Pair, Plan, Refit, Strip, Target, Verify};
use crate::output;

/// Gives whether the check found no difference; `convert`, `extract`, `refit` and `strip` check nothing.
type Outcome = anyhow::Result<bool>;

pub fn convert(command: &Convert, out: &mut dyn Write) -> Outcome {
    write_checkpoint(command.target.keys.open(&command.input)?, &command.target, out)
}

pub fn extract(command: &Extract, out: &mut dyn Write) -> Outcome {
    let artifact = Artifact::open(&command.artifact, Access::Read, &Limits::default())?;
    if let Some(absent) = artifact.absent() {
        return Err(Error::new(ErrorKind::Unsupported, &absent.why).in_file(artifact.path()).into());
    }
    let target = &command.target;
    if let Some(key) = &target.keys.top_level_key {
        let what = "the slots of an artifact lie in no dict, so there is no top-level key";
        return Err(Error::new(ErrorKind::Usage, what)
            .of_key(key)
            .with_hint("--strip-prefix takes a prefix off")
            .into());
    }
    for slot in artifact.slots().iter().filter(|slot| slot.obstacle().is_some()) {
        let (name, why) = (&slot.name, slot.obstacle().unwrap_or_default());
        output::notices([&format!("{name} is no weight as a module has it: {why}")]);
    }
    let (weights, keys) = (artifact.weights()?, target.keys.key_map()?);
    let weights = if keys.is_identity() { weights } else { weights.rekey(&keys)? };
    write_checkpoint(weights, target, out)
}

fn write_checkpoint(checkpoint: Checkpoint, target: &Target, out: &mut dyn Write) -> Outcome {
    let checkpoint = target.cast(checkpoint)?;
    let bar = output::progress(target.json);
    let options = target.options();
    let report = write::convert(&checkpoint, &target.output, &options, &mut output::told(&bar))?;
    bar.finish_and_clear();
    if target.json {
        output::json(out, &report)?;
    } else {
        output::notices(&report.notices);
        for (key, kept) in &report.dropped_aliases {
            output::notices([&format!("{key} has the bytes of {kept} and was left out")]);
        }
        if !report.not_carried.is_empty() {
            let list = report.not_carried.join(", ");
            output::notices([&format!("not tensors, so not in the file: {}", shorten(&list))]);
        }
        let (tensors, nbytes) = (report.tensors, output::bytes(report.nbytes));
        let shards =
            if report.files.len() > 1 { format!(" in {} files", report.files.len() - 1) } else { String::new() };
        writeln!(out, "{}: {tensors} tensors, {nbytes} bytes{shards}", report.out.display())?;
    }
    Ok(true)
}

/// Cuts a list that would fill the screen.
fn shorten(text: &str) -> String {
    const MOST: usize = 300;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{} ... (`reweft inspect` lists all)", &text[..end]),
        None => text.to_owned(),
    }
}

/// Opens both files of a command and plans.
fn prepare(pair: &Pair, allow: &Allow) -> anyhow::Result<(Artifact, Checkpoint, plan::Plan)> {
    let artifact = Artifact::open(&pair.artifact, Access::Read, &Limits::default())?;
    let checkpoint = pair.keys.open(&pair.checkpoint)?;
    let mut plan = plan::plan(&artifact, &checkpoint, allow.into())?;
    if let Some(original) = &pair.original {
        plan.check_original(&artifact, &pair.keys.open(original)?)?;
    }
    Ok((artifact, checkpoint, plan))
}

pub fn plan(command: &Plan, out: &mut dyn Write) -> Outcome {
    let (artifact, checkpoint, plan) = prepare(&command.pair, &command.allow)?;
    let refused = plan.blocking().count();
    if command.json {
        output::json(out, &plan)?;
        return Ok(refused == 0);
    }
    let rows = plan.refills.iter().filter_map(|refill| {
        let slot = artifact.slots().get(refill.slot)?;
        let steps: Vec<String> = refill.recipe.0.iter().map(ToString::to_string).collect();
        let shape = format!("{:?}", slot.shape);
        Some(vec![slot.name.clone(), slot.dtype.to_string(), shape, output::bytes(slot.nbytes), steps.join(" | ")])
    });
    output::table(out, &["slot", "dtype", "shape", "bytes", "recipe"], &["bytes"], rows.collect())?;
    output::notices(checkpoint.notices());
    findings(out, &plan.findings)?;
    let (count, nbytes, kept) = (plan.refills.len(), output::bytes(plan.nbytes()), plan.kept.len());
    writeln!(out, "{count} slots to fill with {nbytes} bytes, {kept} kept, {refused} findings block a refit")?;
    Ok(refused == 0)
}

fn findings(out: &mut dyn Write, findings: &[Finding]) -> anyhow::Result<()> {
    for finding in findings {
        let label = if finding.blocking { "blocks" } else { "note" };
        writeln!(out, "{label}: {finding}")?;
        if let Some(hint) = &finding.hint {
            writeln!(out, "  hint: {hint}")?;
        }
    }
    Ok(())
}

pub fn refit(command: &Refit, out: &mut dyn Write) -> Outcome {
    let (artifact, checkpoint, plan) = prepare(&command.pair, &command.allow)?;
    let bar = output::progress(command.json);
    let progress: write::Progress<'_> = &mut output::told(&bar);
    let report = match &command.output {
        Some(path) => write::refit(&plan, &artifact, &checkpoint, path, progress)?,
        None => write::refit_in_place(&plan, &artifact, &checkpoint, progress)?,
    };
    bar.finish_and_clear();
    if command.json {
        output::json(out, &report)?;
    } else {
        output::notices(&report.notices);
        let (path, slots, changed) = (report.out.display(), report.slots, report.slots_changed);
        let (nbytes, kept) = (output::bytes(report.nbytes), report.kept.len());
        writeln!(out, "{path}: {slots} slots filled with {nbytes} bytes, {changed} of them changed, {kept} kept")?;
    }
    Ok(true)
}

pub fn verify(command: &Verify, out: &mut dyn Write) -> Outcome {
    let (artifact, checkpoint, plan) = prepare(&command.pair, &command.allow)?;
    let bar = output::progress(command.json);
    let report = write::verify(&plan, &artifact, &checkpoint, &mut output::told(&bar))?;
    bar.finish_and_clear();
    if command.json {
        output::json(out, &report)?;
        return Ok(report.equal);
    }
    output::notices(checkpoint.notices());
    findings(out, &report.differences)?;
    let (slots, nbytes) = (report.slots, output::bytes(report.nbytes));
    let verdict = if report.equal { "equal" } else { "different" };
    writeln!(out, "{verdict}: {slots} slots, {nbytes} bytes compared")?;
    Ok(report.equal)
}

pub fn strip(command: &Strip, out: &mut dyn Write) -> Outcome {
    let artifact = Artifact::open(&command.artifact, Access::Read, &Limits::default())?;
    let keep: Vec<&str> = command.keep.iter().map(String::as_str).collect();
    let bar = output::progress(command.json);
    let report = write::strip(&artifact, &keep, &command.output, &mut output::told(&bar))?;
    bar.finish_and_clear();
    if command.json {
        output::json(out, &report)?;
        return Ok(true);
    }
    if !report.kept.is_empty() {
        output::notices([&format!("these keep their bytes: {}", shorten(&report.kept.join(", ")))]);
    }
    let (path, slots, nbytes) = (report.out.display(), report.slots, output::bytes(report.nbytes));
    writeln!(
        out,
        "{path}: {slots} slots with {nbytes} bytes left out, {} bytes stay",
        output::bytes(report.out_nbytes)
    )?;
    Ok(true)
}
