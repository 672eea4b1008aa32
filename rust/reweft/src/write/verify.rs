//! Whether an artifact holds a checkpoint's weights.

use std::path::PathBuf;

use serde::Serialize;

use super::Progress;
use crate::artifact::Artifact;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::plan::{Finding, Plan};

/// What a comparison found.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// The artifact.
    pub artifact: PathBuf,
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// Whether every slot holds its key's bytes.
    pub equal: bool,
    /// Slots that were compared.
    pub slots: usize,
    /// Bytes that were compared.
    pub nbytes: u64,
    /// Slots whose bytes differ, and what stood against a comparison.
    pub differences: Vec<Finding>,
}

/// Compares every slot with what a refit would put there. Reads all weight bytes of both sides, and compares the
/// weights record's CRC.
///
/// # Errors
/// Read errors, and [`ErrorKind::Format`](crate::ErrorKind::Format) for a wrong CRC. Differences are in the report.
pub fn verify(
    plan: &Plan,
    artifact: &Artifact,
    checkpoint: &Checkpoint,
    progress: Progress<'_>,
) -> Result<VerifyReport> {
    let mut differences: Vec<Finding> = plan.blocking().cloned().collect();
    let mut nbytes = 0;
    if artifact.weights_record().is_ok() {
        artifact.check_weights()?;
        for refill in &plan.refills {
            let Some(slot) = artifact.slots().get(refill.slot) else { continue };
            let found = artifact.read_slot(slot)?;
            let wanted = refill.recipe.evaluate(checkpoint, slot.nbytes)?;
            let differ = found.iter().zip(&wanted).filter(|(left, right)| left != right).count();
            if found.len() != wanted.len() || differ > 0 {
                let what = format!("{differ} of {} bytes differ from the checkpoint", found.len());
                differences.push(Finding::value(slot, what));
            }
            if slot.hash.as_ref().is_some_and(|hash| *hash != crate::artifact::manifest::hash(&found)) {
                differences.push(Finding::value(slot, "its bytes are not those that the manifest states"));
            }
            nbytes += slot.nbytes;
            progress(nbytes, plan.nbytes());
        }
    }
    Ok(VerifyReport {
        artifact: plan.artifact.clone(),
        checkpoint: plan.checkpoint.clone(),
        equal: differences.is_empty(),
        slots: plan.refills.len(),
        nbytes,
        differences,
    })
}
