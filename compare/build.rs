//! Compiles Docker's list of system calls.

use std::error::Error;

use mayfly_seccomp::compile;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    let filters = ["docker", "docker-clone3"];
    compile("../resources/compare/docker-seccomp.json", &filters)
}
