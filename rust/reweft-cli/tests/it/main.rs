//! The command on every fixture: exit code, stdout and stderr against `fixtures/expected/`.
//!
//! `make bless` writes the expected files anew; they are reviewed as code.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

/// Runs the command in the fixtures' folder and writes down all that comes of it.
fn transcript(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_reweft")).args(args).current_dir(fixtures()).output().unwrap();
    let mut text = String::new();
    writeln!(text, "$ reweft {}", args.join(" ")).unwrap();
    writeln!(text, "exit {}", output.status.code().unwrap()).unwrap();
    for (name, bytes) in [("stdout", output.stdout), ("stderr", output.stderr)] {
        let lines = String::from_utf8(bytes).unwrap();
        if !lines.is_empty() {
            write!(text, "--- {name}\n{lines}").unwrap();
        }
    }
    text
}

fn compare(name: &str, found: &str) {
    let path = fixtures().join("expected").join(name);
    if std::env::var_os("BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, found).unwrap();
    }
    let wanted = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, wanted, "{name} differs; `make bless` accepts it");
}

#[test]
fn inspect_of_every_fixture_is_as_expected() {
    for folder in ["checkpoints", "packages", "hostile", "shards"] {
        let mut names: Vec<String> = fs::read_dir(fixtures().join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        for name in names {
            let file = format!("{folder}/{name}");
            compare(&format!("{file}.inspect.txt"), &transcript(&["inspect", &file]));
        }
    }
}

#[test]
fn json_of_a_checkpoint_and_a_package_is_as_expected() {
    for file in ["checkpoints/state_dict.pt", "packages/plain.pt2"] {
        compare(&format!("{file}.inspect.json.txt"), &transcript(&["inspect", "--json", file]));
    }
}

#[test]
fn configs_are_json_or_an_error_with_a_path() {
    let config = |name: &str, args: &[&str]| {
        compare(&format!("config/{name}.txt"), &transcript(&[&["config"], args].concat()));
    };
    config("all_kinds", &["checkpoints/config.pt", "--key", "my_config"]);
    config("legacy", &["checkpoints/config_legacy.pt", "--top-level-key", "my_config.schedulers"]);
    config("tensor", &["checkpoints/config.pt"]);
    config("no_such_key", &["checkpoints/config.pt", "--key", "my_confg"]);
    config("arrays", &["checkpoints/arrays5.pkl", "--key", "model"]);
    config("structured", &["checkpoints/arrays5.pkl"]);
    config("package", &["packages/plain.pt2"]);
}

#[test]
fn differences_are_listed_by_size() {
    let diff = |name: &str, args: &[&str]| {
        compare(&format!("diff/{name}.txt"), &transcript(&[&["diff"], args].concat()));
    };
    diff("formats", &["checkpoints/state_dict.pt", "checkpoints/legacy.pt"]);
    diff("package", &["packages/plain.pt2", "checkpoints/fc.pt"]);
    diff("other_model", &["checkpoints/training.pt", "checkpoints/fc.pt", "--top-level-key", "model_state_dict"]);
    diff("values", &["checkpoints/config.pt", "checkpoints/config_legacy.pt"]);
    diff("arrays", &["checkpoints/arrays.pkl", "checkpoints/arrays5.pkl"]);
    diff("damaged", &["hostile/wrong_crc.pt", "hostile/wrong_crc.pt"]);
}

#[test]
fn plans_say_what_blocks_a_refit() {
    let plan = |name: &str, args: &[&str]| {
        compare(&format!("plan/{name}.txt"), &transcript(&[&["plan"], args].concat()));
    };
    plan("fits", &["packages/plain.pt2", "checkpoints/fc.pt"]);
    plan("other_model", &["packages/plain.pt2", "checkpoints/training.pt", "--top-level-key", "model_state_dict"]);
    plan("no_such_top_level_key", &["packages/plain.pt2", "checkpoints/training.pt", "--top-level-key", "model_state"]);
    let remap = ["--select", "fc", "--remap", r"^fc\.(bias|weight)$=x", "--allow-missing"];
    plan("two_keys_on_one_name", &[&["packages/plain.pt2", "checkpoints/fc.pt"], &remap[..]].concat());
    plan("frozen", &["packages/frozen.pt2", "checkpoints/fc.pt", "--allow-missing", "--allow-unused"]);
    plan("swapped_arguments", &["checkpoints/fc.pt", "packages/plain.pt2"]);
}

#[test]
fn damage_is_found_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.safetensors");
    fs::write(&out, "old").unwrap();
    let command = Command::new(env!("CARGO_BIN_EXE_reweft"))
        .args(["convert", "hostile/wrong_crc.pt"])
        .arg(&out)
        .current_dir(fixtures())
        .output()
        .unwrap();
    assert_eq!(command.status.code(), Some(2));
    let stderr = String::from_utf8(command.stderr).unwrap();
    assert!(stderr.contains("wrong_crc.pt: \"a\": archive/data/0: CRC of the bytes is"), "{stderr}");
    assert_eq!(fs::read(&out).unwrap(), b"old");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn a_key_map_file_is_reported_with_what_it_did() {
    let args = ["inspect", "checkpoints/training.pt", "--keys", "keys/training.toml"];
    compare("keys/training.txt", &transcript(&args));
    compare("keys/training.json.txt", &transcript(&[&args[..], &["--json"]].concat()));
    compare("keys/broken.txt", &transcript(&["inspect", "checkpoints/training.pt", "--keys", "keys/broken.toml"]));
}
