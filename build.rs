//! Compiles the lists of system calls of virtiofsd and of containers.

use std::error::Error;

use mayfly_seccomp::compile;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    let filters = ["virtiofsd-files", "virtiofsd-unseen", "virtiofsd-groups"];
    compile("resources/helpers/virtiofsd.json", &filters)?;
    let filters = ["docker", "docker-clone3"];
    compile("resources/compare/docker-seccomp.json", &filters)
}
