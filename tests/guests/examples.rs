//! The examples of the repository, run as their first lines say.

use std::fs;
use std::path::{Path, PathBuf};

use mayfly_testing::tools::{free_port, run, tool};
use mayfly_testing::user::User;

fn example(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("examples").join(name)
}

#[test]
fn a_disk_keeps_what_is_written() {
    let user = User::root();
    let disk = "/tmp/mayfly-example.img";
    tool("truncate", &["-s", "64M", disk]);
    tool("mkfs.ext4", &["-qF", disk]);
    for number in 1..=2 {
        let mut boot = user.program("mayfly");
        let console = run(boot.args(["boot", "--config"]).arg(example("disk.toml")));
        assert!(console.contains(&format!("boot {number}")), "{console}");
    }
    fs::remove_file(disk).unwrap();
}

#[test]
fn a_web_server_answers_on_a_port() {
    let user = User::root();
    let mut server = user.program(example("web-server"));
    let said = run(server.arg(free_port().to_string()));
    assert_eq!(said, "example-web\nhello from a VM\nexample-web\n");
    assert_eq!(user.text(&["ps", "-a", "-q"]), "");
}

#[test]
fn an_untrusted_build_writes_to_one_folder_and_reaches_nothing() {
    let user = User::root();
    let (source, output) = (user.path("source"), user.path("output"));
    for folder in [&source, &output] {
        fs::create_dir(folder).unwrap();
    }
    // Two lines of /proc/net/dev are headings, the third is loopback's.
    let script = "touch /src/x 2>/dev/null || echo read-only\n\
                  test $(wc -l </proc/net/dev) -le 4 && ! ping -c 1 -W 1 192.0.2.1 && echo alone\n\
                  echo built >/out/it; exit 7";
    fs::write(source.join("build.sh"), script).unwrap();
    let mut build = user.program(example("untrusted-build"));
    let output_of = build.args([&source, &output]).output().unwrap();
    let said = mayfly_testing::text(&output_of.stdout);
    assert_eq!(output_of.status.code(), Some(7), "{output_of:?}");
    assert!(said.starts_with("read-only\n"), "{said}");
    assert!(said.ends_with("alone\n"), "{said}");
    assert_eq!(fs::read(output.join("it")).unwrap(), b"built\n");
    assert!(!source.join("x").exists());
}
