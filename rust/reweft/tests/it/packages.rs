//! Packages: sealing, planning, refitting, verifying.

use std::path::{Path, PathBuf};

use reweft::artifact::manifest::{Input, Leaf, Origin, Origins, Output, RefitRule, Signature, Size, hash, seal};
use reweft::plan::{Allow, FindingKind, Given, Plan, Running, plan, plan_running};
use reweft::source::{Access, Source};
use reweft::tensor::contiguous;
use reweft::write::{refit, refit_in_place, strip, verify};
use reweft::{Artifact, Checkpoint, Dtype, ErrorKind, Limits, OpenOptions, Result, TensorInfo};

use crate::build::Zip;
use crate::fixture;

fn artifact(path: &Path) -> Artifact {
    Artifact::open(path, Access::Read, &Limits::default()).unwrap()
}

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(&fixture(name), &OpenOptions::default()).unwrap()
}

fn origin(names: &[&str], used: bool) -> Origin {
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    Origin { names, persistent: true, mutated: false, used }
}

/// The plain package with a manifest: a tied weight, a tensor nobody reads, one that was compiled into the code.
fn sealed(folder: &Path) -> PathBuf {
    sealed_for(folder, RefitRule::Any)
}

fn sealed_for(folder: &Path, refit: RefitRule) -> PathBuf {
    let tensors = vec![
        origin(&["fc.weight", "head.weight"], true),
        origin(&["fc.bias"], true),
        origin(&["steps"], true),
        origin(&["unread"], false),
        origin(&["baked"], true),
    ];
    let input = Input {
        name: "x".into(),
        dtype: "float32".into(),
        shape: vec![Size::Number(1), Size::Number(3)],
        strides: vec![Size::Number(3), Size::Number(1)],
        device: "cpu".into(),
        mutated: false,
    };
    let signature = Signature {
        inputs: vec![input],
        leaves: vec![Leaf::Input],
        outputs: vec![Output::Tensor],
        ..Signature::default()
    };
    let (torch, device) = ("2.15.0".into(), "cpu".into());
    let origins = Origins { torch, device, target: None, signature, refit, program: None, tensors, folded: None };
    let out = folder.join(format!("sealed-{refit:?}.pt2"));
    seal(&fixture("packages/plain.pt2"), &origins, &out).unwrap();
    out
}

/// Row-major tensors in memory.
fn memory(tensors: &[(&str, Dtype, &[u64], Vec<u8>)]) -> Checkpoint {
    let sources = tensors.iter().map(|row| std::sync::Arc::new(row.3.clone()) as Source).collect();
    let infos = tensors.iter().enumerate().map(|(storage, (key, dtype, shape, _))| {
        let (strides, shape) = (contiguous(shape), shape.to_vec());
        ((*key).to_owned(), TensorInfo { dtype: *dtype, shape, strides, storage, storage_offset: 0 })
    });
    Checkpoint::from_memory(Path::new("memory"), sources, infos).unwrap()
}

fn weights(scale: f32) -> Vec<(&'static str, Dtype, &'static [u64], Vec<u8>)> {
    let floats = |values: &[f32]| values.iter().flat_map(|value| (value * scale).to_le_bytes()).collect();
    vec![
        ("fc.weight", Dtype::F32, &[2, 3], floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        ("fc.bias", Dtype::F32, &[2], floats(&[7.0, 8.0])),
        ("steps", Dtype::I64, &[], 9_i64.to_le_bytes().to_vec()),
    ]
}

fn planned(package: &Path, checkpoint: &Checkpoint) -> Plan {
    plan(&artifact(package), checkpoint, Allow::default()).unwrap()
}

fn refitted(package: &Path, checkpoint: &Checkpoint, out: &Path) -> Result<reweft::write::RefitReport> {
    let artifact = artifact(package);
    let plan = plan(&artifact, checkpoint, Allow::default())?;
    refit(&plan, &artifact, checkpoint, out, &mut |_, _| ())
}

fn kinds(plan: &Plan) -> Vec<(FindingKind, bool)> {
    plan.findings.iter().map(|finding| (finding.kind, finding.blocking)).collect()
}

#[test]
fn refit_with_the_same_weights_is_byte_identical() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.pt2");
    for package in [fixture("packages/plain.pt2"), sealed(folder.path())] {
        let whole = artifact(&package);
        let report = refitted(&package, &memory(&present(&whole)), &out).unwrap();
        assert_eq!((report.slots, report.slots_changed), (3, 0));
        assert_eq!(std::fs::read(&package).unwrap(), std::fs::read(&out).unwrap());
    }
}

#[test]
fn refit_twice_is_the_last_refit_and_back_is_the_original() {
    let folder = tempfile::tempdir().unwrap();
    let package = sealed(folder.path());
    let [x, y, xy, back] = ["x", "y", "xy", "back"].map(|name| folder.path().join(name));
    let original = artifact(&package);
    let rows = present(&original);
    refitted(&package, &memory(&weights(1.0)), &x).unwrap();
    refitted(&package, &memory(&weights(-2.0)), &y).unwrap();
    refitted(&x, &memory(&weights(-2.0)), &xy).unwrap();
    refitted(&xy, &memory(&rows), &back).unwrap();
    assert_eq!(std::fs::read(&xy).unwrap(), std::fs::read(&y).unwrap());
    assert_eq!(std::fs::read(&back).unwrap(), std::fs::read(&package).unwrap());
    assert_ne!(std::fs::read(&x).unwrap(), std::fs::read(&y).unwrap());
}

#[test]
fn verify_tells_equal_from_different() {
    let folder = tempfile::tempdir().unwrap();
    let package = sealed(folder.path());
    let out = folder.path().join("out.pt2");
    let weights = memory(&weights(3.0));
    let check = |package: &Path| verify(&planned(package, &weights), &artifact(package), &weights, &mut |_, _| ());
    let before = check(&package).unwrap();
    assert_eq!((before.equal, before.differences.len()), (false, 3));
    refitted(&package, &weights, &out).unwrap();
    assert!(check(&out).unwrap().equal, "also the manifest's hashes");
}

#[test]
fn the_output_may_be_the_package_itself_but_not_the_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let package = sealed(folder.path());
    refitted(&package, &memory(&weights(4.0)), &package).unwrap();
    assert_eq!(artifact(&package).slots().len(), 3);
    let weights = folder.path().join("fc.pt");
    std::fs::copy(fixture("checkpoints/fc.pt"), &weights).unwrap();
    let checkpoint = Checkpoint::open(&weights, &OpenOptions::default()).unwrap();
    let error = refitted(&package, &checkpoint, &weights).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn the_manifest_labels_slots_and_what_has_none() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = artifact(&sealed(folder.path()));
    assert_eq!(artifact.slots()[0].aliases, ["head.weight"]);
    assert_eq!((artifact.unused(), artifact.unrefittable()[0].name.as_str()), (&["unread".to_owned()][..], "baked"));
}

#[test]
fn a_baked_weight_is_never_merely_unused() {
    let folder = tempfile::tempdir().unwrap();
    let package = sealed(folder.path());
    let mut rows = weights(1.0);
    rows.push(("baked", Dtype::F32, &[1], vec![0; 4]));
    rows.push(("unread", Dtype::F32, &[1], vec![0; 4]));
    let allow = Allow { unused: true, missing: true, cast: true };
    let plan = plan(&artifact(&package), &memory(&rows), allow).unwrap();
    assert_eq!(kinds(&plan), [(FindingKind::Baked, true), (FindingKind::NotRead, false)]);
    assert_eq!(plan.check().unwrap_err().kind(), ErrorKind::Mismatch);
}

/// The weights that an artifact has.
fn present(artifact: &Artifact) -> Vec<(&str, Dtype, &[u64], Vec<u8>)> {
    let row = |slot| artifact.read_slot(slot).unwrap();
    artifact.slots().iter().map(|slot| (slot.name.as_str(), slot.dtype, &slot.shape[..], row(slot))).collect()
}

#[test]
fn immutable_weights_are_not_replaced_whatever_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let package = sealed_for(folder.path(), RefitRule::Never);
    let whole = artifact(&package);
    let allow = Allow { unused: true, missing: true, cast: true };
    let same = memory(&present(&whole));
    let planned = plan(&whole, &same, allow).unwrap();
    assert_eq!(kinds(&planned), [(FindingKind::Immutable, true)]);
    let error = planned.check().unwrap_err();
    let text = error.to_string();
    assert!(text.contains("\"fc.weight\"") && text.contains("found keys for 3 slots, wanted none"), "{text}");
    assert!(error.hint().is_some());
    let before = std::fs::read(&package).unwrap();
    let in_place = refit_in_place(&planned, &whole, &same, &mut |_, _| ());
    assert_eq!(in_place.unwrap_err().kind(), ErrorKind::Mismatch);
    assert_eq!(refitted(&package, &same, &folder.path().join("x")).unwrap_err().kind(), ErrorKind::Mismatch);
    assert_eq!(std::fs::read(&package).unwrap(), before);
    // What it holds can be compared, and written down by whoever serves it.
    assert!(verify(&planned, &whole, &same, &mut |_, _| ()).unwrap().equal);
    let saving = Running { given: Given::Saved, ..Running::default() };
    plan_running(&whole, &memory(&weights(2.0)), allow, saving).unwrap().check().unwrap();
}

#[test]
fn identical_weights_are_the_only_ones_that_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let [out, stripped] = ["out", "stripped"].map(|name| folder.path().join(name));
    for rule in [RefitRule::Identical, RefitRule::Never] {
        let package = sealed_for(folder.path(), rule);
        let whole = artifact(&package);
        strip(&whole, &[], &stripped, &mut |_, _| ()).unwrap();
        let mut rows = present(&whole);
        // To put back what was left out replaces nothing.
        let target = if rule == RefitRule::Never { &stripped } else { &package };
        refitted(target, &memory(&rows), &out).unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&package).unwrap());
        *rows[1].3.last_mut().unwrap() ^= 1;
        for target in [target, &stripped] {
            let plan = planned(target, &memory(&rows));
            assert_eq!(kinds(&plan), [(FindingKind::Identical, true)]);
            let (error, slot) = (plan.check().unwrap_err(), &whole.slots()[1]);
            let (text, found) = (error.to_string(), hash(&rows[1].3));
            let wanted = slot.hash.as_deref().unwrap();
            assert!(text.contains(&format!("slot {:?}", slot.name)), "{text}");
            assert!(text.contains(&format!("found {found}, wanted {wanted}")), "{text}");
        }
        let report = verify(&planned(&package, &memory(&rows)), &whole, &memory(&rows), &mut |_, _| ()).unwrap();
        assert_eq!(report.differences.len(), 1);
    }
}

#[test]
fn tied_keys_must_agree() {
    let folder = tempfile::tempdir().unwrap();
    let package = sealed(folder.path());
    let mut rows = weights(1.0);
    rows.push(("head.weight", Dtype::F32, &[2, 3], rows[0].3.clone()));
    assert_eq!(kinds(&planned(&package, &memory(&rows))), []);
    rows[3].3[0] ^= 1;
    let plan = planned(&package, &memory(&rows));
    assert_eq!(kinds(&plan), [(FindingKind::Tied, true)]);
    assert!(plan.check().unwrap_err().to_string().contains("head.weight"));
}

#[test]
fn shape_dtype_missing_and_unused_block() {
    let package = fixture("packages/plain.pt2");
    let mut rows = weights(1.0);
    rows[0].2 = &[3, 2];
    rows[1] = ("fc.bias", Dtype::F64, &[2], vec![0; 16]);
    rows[2].0 = "step";
    let plan = planned(&package, &memory(&rows));
    let wanted = [FindingKind::Shape, FindingKind::Dtype, FindingKind::Missing, FindingKind::Baked];
    assert_eq!(kinds(&plan), wanted.map(|kind| (kind, true)));
    let text = plan.check().unwrap_err().to_string();
    assert!(text.contains("found float32 [3, 2], wanted float32 [2, 3]"), "{text}");
}

#[test]
fn a_cast_is_made_only_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let (package, out) = (fixture("packages/plain.pt2"), folder.path().join("out"));
    let mut rows = weights(1.0);
    rows[1] = ("fc.bias", Dtype::F64, &[2], [0.1_f64, -3.0].iter().flat_map(|value| value.to_le_bytes()).collect());
    let (artifact, weights) = (artifact(&package), memory(&rows));
    let plan = plan(&artifact, &weights, Allow { cast: true, ..Allow::default() }).unwrap();
    refit(&plan, &artifact, &weights, &out, &mut |_, _| ()).unwrap();
    let slot = artifact.slot("fc.bias").unwrap();
    let wanted: Vec<u8> = [0.1_f32, -3.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(Artifact::open(&out, Access::Read, &Limits::default()).unwrap().read_slot(slot).unwrap(), wanted);
}

#[test]
fn a_frozen_package_is_refused_whatever_is_allowed() {
    let allow = Allow { cast: true, missing: true, unused: true };
    let artifact = artifact(&fixture("packages/frozen.pt2"));
    let plan = plan(&artifact, &checkpoint("checkpoints/fc.pt"), allow).unwrap();
    assert!(plan.blocking().any(|finding| finding.kind == FindingKind::Unrefittable));
}

#[test]
fn a_manifest_of_another_program_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let package = sealed(folder.path());
    let mut bytes = std::fs::read(&package).unwrap();
    let at = bytes.windows(9).rposition(|window| window == b"\"fc.bias\"").unwrap();
    bytes[at + 1] = b'x';
    std::fs::write(&package, bytes).unwrap();
    let error = Artifact::open(&package, Access::Read, &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("CRC"), "{error}");
}

#[test]
fn damage_in_the_weights_is_found_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let (package, out) = (folder.path().join("damaged.pt2"), folder.path().join("out.pt2"));
    let mut bytes = std::fs::read(fixture("packages/plain.pt2")).unwrap();
    let at = bytes.windows(8).position(|window| window == [8_f32.to_le_bytes(), 9_f32.to_le_bytes()].as_flattened());
    bytes[at.unwrap()] ^= 1;
    std::fs::write(&package, bytes).unwrap();
    let error = refitted(&package, &memory(&weights(1.0)), &out).unwrap_err();
    assert!(error.to_string().contains("CRC"), "{error}");
    assert!(!out.exists());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// What a refit has against a file; it puts the slots' own values there, changed, or that of the first alone.
fn refusal(path: &Path, out: &Path, change: u8, only_first: bool) -> Option<String> {
    let refused = || {
        let artifact = Artifact::open(path, Access::Read, &Limits::default())?;
        let slots = artifact.slots().iter().filter(|slot| slot.nbytes > 0);
        let rows = slots.map(|slot| {
            let bytes = artifact.read_slot(slot)?.iter().map(|byte| byte ^ change).collect();
            Ok((slot.name.as_str(), slot.dtype, &slot.shape[..], bytes))
        });
        let mut rows = rows.collect::<Result<Vec<_>>>()?;
        rows.truncate(if only_first { 1 } else { usize::MAX });
        let checkpoint = memory(&rows);
        let plan = plan(&artifact, &checkpoint, Allow { missing: true, ..Allow::default() })?;
        let verified = verify(&plan, &artifact, &checkpoint, &mut |_, _| ());
        let written = refit(&plan, &artifact, &checkpoint, out, &mut |_, _| ());
        assert_eq!(verified.is_err(), written.is_err());
        written
    };
    refused().err().map(|error: reweft::Error| error.to_string())
}

/// An exported program of torch before 2.8, whose weights are archives in the archive.
fn old_export() -> Vec<u8> {
    let [weights, constants] =
        ["fc.pt", "one_tensor.pt"].map(|name| std::fs::read(fixture("checkpoints").join(name)).unwrap());
    Zip::new(&[
        ("serialized_exported_program.json", b"{}"),
        ("serialized_state_dict.pt", &weights),
        ("serialized_constants.pt", &constants),
    ])
    .bytes
}

#[test]
fn damage_to_any_byte_of_a_record_that_is_written_to_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let [path, out] = ["damaged", "out"].map(|name| folder.path().join(name));
    // Between its slots the one has padding, the other headers, a pickle and a directory, which may be refused before.
    let plain = std::fs::read(fixture("packages/plain.pt2")).unwrap();
    for (bytes, wanted, step) in [(plain, "CRC", 1), (old_export(), "", 3)] {
        std::fs::write(&path, &bytes).unwrap();
        let whole = artifact(&path);
        // The last checksum is the one around the others.
        let covers = whole.checksums(whole.slots().first()).unwrap().pop().unwrap().covers;
        // All slots unchanged; the first one changed and the others kept.
        for (change, only_first) in [(0, false), (0x11, true)] {
            assert_eq!(refusal(&path, &out, change, only_first), None);
            std::fs::remove_file(&out).unwrap();
            for at in covers.clone().step_by(step).map(|at| usize::try_from(at).unwrap()) {
                let mut damaged = bytes.clone();
                damaged[at] ^= 4;
                std::fs::write(&path, damaged).unwrap();
                let found = refusal(&path, &out, change, only_first).unwrap_or_else(|| panic!("byte {at:#x} passed"));
                assert!(found.contains(wanted) && !out.exists(), "byte {at:#x}: {found}");
            }
            std::fs::write(&path, &bytes).unwrap();
        }
    }
}

#[test]
fn a_prefix_before_every_key_is_recognised() {
    let mut rows = weights(1.0);
    let names = ["module.fc.weight", "module.fc.bias", "module.steps"];
    rows.iter_mut().zip(names).for_each(|(row, name)| row.0 = name);
    let plan = planned(&fixture("packages/plain.pt2"), &memory(&rows));
    let hints: Vec<&str> = plan.findings.iter().filter_map(|finding| finding.hint.as_deref()).collect();
    assert_eq!(hints.len(), 6);
    assert!(hints.iter().all(|hint| hint.contains(r"--remap '^module\.='")), "{hints:?}");
}

#[test]
fn a_stripped_package_gives_what_the_whole_gives() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, stripped, filled] = ["whole", "stripped", "filled"].map(|name| folder.path().join(name));
    for package in [fixture("packages/plain.pt2"), sealed(folder.path())] {
        let report = strip(&artifact(&package), &[], &stripped, &mut |_, _| ()).unwrap();
        assert_eq!((report.slots, report.nbytes, report.kept.len()), (3, 40, 0));
        refitted(&package, &memory(&weights(5.0)), &whole).unwrap();
        refitted(&stripped, &memory(&weights(5.0)), &filled).unwrap();
        assert_eq!(std::fs::read(&filled).unwrap(), std::fs::read(&whole).unwrap());
        let present = artifact(&stripped);
        assert!(present.is_stripped() && present.slots().iter().all(|slot| slot.stripped));
        assert_eq!(present.read_slot(&present.slots()[0]).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(present.weights().unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(strip(&present, &[], &filled, &mut |_, _| ()).unwrap_err().kind(), ErrorKind::Usage);
    }
}
