//! The walls that `ARCHITECTURE.md` draws: which crate may know which, and no circle among
//! the files of one.

#![allow(clippy::unwrap_used)]

mod files;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Every crate of the workspace, and all of the others that it knows. What only tests or
/// build scripts use does not count.
const KNOWS: &[(&str, &[&str])] = &[
    (
        "mayfly",
        &[
            "boot", "compare", "devices", "files", "image", "process", "protocol", "sandbox",
            "text",
        ],
    ),
    (
        "mayfly-compare",
        &["image", "process", "protocol", "sandbox", "text"],
    ),
    ("mayfly-boot", &[]),
    ("mayfly-devices", &[]),
    ("mayfly-files", &[]),
    ("mayfly-guest", &["protocol"]),
    ("mayfly-image", &["files", "process", "text"]),
    ("mayfly-process", &[]),
    ("mayfly-protocol", &[]),
    ("mayfly-sandbox", &[]),
    ("mayfly-seccomp", &[]),
    ("mayfly-text", &[]),
    // For tests and packaging.
    ("mayfly-generate", &["mayfly"]),
    ("mayfly-testing", &["boot"]),
];

/// What only this crate may be built with: nobody else talks to KVM.
const KVM: [&str; 2] = ["kvm-bindings", "kvm-ioctls"];

/// Crates whose files import in one direction.
const WITHOUT_CIRCLES: [&str; 11] = [
    ".", "boot", "compare", "devices", "files", "guest", "image", "process", "protocol", "sandbox",
    "text",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The workspace's crates, and what each is built with.
fn crates() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap().iter();
    let dependencies = |package: &Value| {
        let all = package["dependencies"].as_array().unwrap().iter();
        let normal = all.filter(|it| it["kind"].is_null());
        normal
            .map(|it| it["name"].as_str().unwrap().to_owned())
            .collect()
    };
    packages
        .map(|it| (it["name"].as_str().unwrap().to_owned(), dependencies(it)))
        .collect()
}

#[test]
fn crates_know_what_they_may_and_no_more() {
    let crates = crates();
    let names: BTreeSet<&str> = crates.keys().map(String::as_str).collect();
    assert_eq!(names, KNOWS.iter().map(|(name, _)| *name).collect());
    for (name, knows) in KNOWS {
        let known = crates[*name].iter().map(String::as_str);
        let known: BTreeSet<&str> = known
            .filter(|it| names.contains(it))
            .map(|it| it.strip_prefix("mayfly-").unwrap_or(it))
            .collect();
        assert_eq!(known, knows.iter().copied().collect(), "{name}");
    }
}

#[test]
fn only_the_vmm_talks_to_kvm() {
    for (name, dependencies) in crates() {
        let kvm = KVM.iter().any(|it| dependencies.contains(*it));
        assert!(!kvm || name == "mayfly", "{name}");
    }
}

#[test]
fn no_files_of_a_crate_import_each_other() {
    for folder in WITHOUT_CIRCLES {
        let source: PathBuf = root().join(folder).join("src");
        let imports = files::imports(&source);
        assert!(!imports.is_empty(), "{folder}");
        let circles = files::circles(&imports);
        assert!(circles.is_empty(), "{folder}: {circles:#?}");
    }
}
