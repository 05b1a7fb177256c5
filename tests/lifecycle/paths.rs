//! Paths may be of any bytes but NUL.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Child;

use mayfly_testing::user::User;
use mayfly_testing::{eventually, text};

/// No UTF-8, and a comma, which is written twice.
const STRANGE: &[u8] = b"\xff\xfe,x";

struct Vm(Child);

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A value such as `path=FILE`, and what follows.
fn value(key: &str, path: &Path, rest: &str) -> OsString {
    let mut value = OsString::from(key);
    for byte in path.as_os_str().as_bytes() {
        let doubled: &[u8] = if *byte == b',' {
            b",,"
        } else {
            std::slice::from_ref(byte)
        };
        value.push(OsStr::from_bytes(doubled));
    }
    value.push(rest);
    value
}

#[test]
fn paths_keep_their_bytes_from_flags_to_files() {
    let user = User::tiny();
    let folder = user.path("").join(OsStr::from_bytes(STRANGE));
    fs::create_dir(&folder).unwrap();
    let inside = |name: &str| folder.join(name);
    fs::copy(user.path("halts"), inside("kernel")).unwrap();
    for disk in ["disk", "read-only"] {
        File::create(inside(disk))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
    }
    let words: Vec<OsString> = vec![
        "boot".into(),
        "--name=strange".into(),
        "--memory=32M".into(),
        "--kernel".into(),
        inside("kernel").into(),
        "--disk".into(),
        value("path=", &inside("disk"), ""),
        "--disk".into(),
        value("path=", &inside("read-only"), ",ro"),
        "--vsock".into(),
        value("cid=3,unix=", &inside("vsock"), ""),
        "--console".into(),
        value("file=", &inside("console"), ""),
        "--channel".into(),
        value("name=agent,unix=", &inside("channel"), ""),
        "--log".into(),
        value("info,file=", &inside("log"), ""),
        "--pidfile".into(),
        inside("pid").into(),
    ];
    let mut vm = Vm(user.mayfly(&words).spawn().unwrap());
    eventually("its guest does not run", || {
        if let Some(status) = vm.0.try_wait().unwrap() {
            panic!("it ended: {status}");
        }
        let info = user.output(&["ctl", "strange", "info"]);
        info.status.success().then_some(())
    });
    for file in ["console", "log", "pid"] {
        assert!(inside(file).is_file(), "{file}");
    }
    for socket in ["vsock", "channel"] {
        let kind = inside(socket).metadata().unwrap().file_type();
        assert!(kind.is_socket(), "{socket}");
    }
    // Each disk is the one that was named.
    assert!(File::open(inside("disk")).unwrap().try_lock().is_err());
    user.text(&["ctl", "strange", "shutdown", "--deadline", "0"]);
    vm.0.wait().unwrap();
    assert!(!inside("vsock").exists() && !inside("pid").exists());
    // A missing one is told of by its name, as far as that can be shown.
    let missing = user.output(&[
        OsStr::new("boot"),
        OsStr::new("--kernel"),
        inside("no").as_os_str(),
    ]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(text(&missing.stderr).contains("no such file"));
}
