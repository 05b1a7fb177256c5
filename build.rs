//! Compiles the lists of system calls of virtiofsd.

use std::error::Error;

use mayfly_seccomp::compile;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    let filters = ["virtiofsd-files", "virtiofsd-unseen", "virtiofsd-groups"];
    compile("resources/helpers/virtiofsd.json", &filters)
}
