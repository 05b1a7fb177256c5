//! What is linked is this program alone.

fn main() {
    for flag in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
        println!("cargo::rustc-link-arg-bins={flag}");
    }
}
