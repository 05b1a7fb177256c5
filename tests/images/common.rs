//! Stores, registries, and comparing what is in them.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use mayfly_testing::tools::{free_port, run};
use mayfly_testing::user::{NOBODY, as_nobody};
use mayfly_testing::{mayfly, until};
use tempfile::TempDir;

/// Runs a script that must succeed, with `$1`, `$2`, ….
pub fn shell(script: &str, args: &[&Path]) -> String {
    run(Command::new("bash")
        .arg("-euc")
        .arg(script)
        .arg("-")
        .args(args))
}

/// A user with a store.
pub struct User {
    pub home: TempDir,
    plain: bool,
}

impl User {
    pub fn root() -> Self {
        let home = tempfile::tempdir().unwrap();
        User { home, plain: false }
    }

    pub fn nobody() -> Self {
        let home = tempfile::tempdir().unwrap();
        // Where the binary is may be closed to others.
        fs::copy(mayfly(), home.path().join("mayfly")).unwrap();
        run(Command::new("chown")
            .arg(NOBODY.to_string())
            .arg(home.path()));
        User { home, plain: true }
    }

    /// The binary under test, run by this user for images.
    pub fn mayfly(&self, args: &[&str]) -> Command {
        let mut command = self.verb("image");
        command.args(args);
        command
    }

    /// The same for another verb.
    pub fn verb(&self, verb: &str) -> Command {
        let mut command = match self.plain {
            false => Command::new(mayfly()),
            true => as_nobody(None, &self.home.path().join("mayfly")),
        };
        command.arg(verb).env("HOME", self.home.path());
        command
            .env_remove("XDG_DATA_HOME")
            .env_remove("DOCKER_CONFIG")
            .stdin(Stdio::null());
        command
    }

    pub fn ok(&self, args: &[&str]) -> String {
        run(&mut self.mayfly(args))
    }

    /// A call that must fail: its exit code, and what it says.
    pub fn fails(&self, args: &[&str]) -> (i32, String) {
        let output: Output = self.mayfly(args).output().unwrap();
        let text = String::from_utf8(output.stderr.clone()).unwrap();
        assert!(!output.status.success(), "{args:?}: {output:?}");
        assert!(!text.contains("panicked"), "{text}");
        (output.status.code().unwrap(), text)
    }

    /// A call that must succeed, with something on standard input, which is a pipe.
    pub fn piped(&self, args: &[&str], input: &Path) -> String {
        let script = "input=$1; shift; cat \"$input\" | \"$@\"";
        let mut command = self.mayfly(args);
        let program = command.get_program().to_owned();
        let words: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let mut shell = Command::new("bash");
        shell.args(["-euc", script, "-"]).arg(input).arg(program);
        shell.args(words).env("HOME", self.home.path());
        shell
            .env_remove("XDG_DATA_HOME")
            .env_remove("DOCKER_CONFIG");
        command.stdin(Stdio::null());
        run(&mut shell)
    }

    pub fn store(&self) -> PathBuf {
        self.home.path().join(".local/share/mayfly")
    }

    /// All files of the store below some folders.
    pub fn files(&self, folders: &[&str]) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for folder in folders {
            let entries = fs::read_dir(self.store().join(folder))
                .into_iter()
                .flatten();
            found.extend(entries.map(|entry| entry.unwrap().path()));
        }
        found
    }

    /// Nothing is left of what was being made.
    pub fn assert_tidy(&self) {
        assert_eq!(self.files(&["tmp", "partial"]), [""; 0].map(PathBuf::from));
    }

    /// Fails unless nothing at all is there.
    pub fn assert_empty(&self) {
        assert_eq!(
            self.files(&["tmp", "images", "layers"]),
            [""; 0].map(PathBuf::from)
        );
    }

    /// The layers of an image, lowest first.
    pub fn layers(&self, image: &str) -> Vec<PathBuf> {
        let all: serde_json::Value = serde_json::from_str(&self.ok(&["inspect", image])).unwrap();
        let layers = all[0]["layers"].as_array().unwrap().iter();
        layers.map(|layer| layer.as_str().unwrap().into()).collect()
    }

    /// What a guest would see of an image: all layers, by overlayfs.
    pub fn fingerprint(&self, image: &str) -> String {
        let layers = self.layers(image);
        let args: Vec<&Path> = layers.iter().map(PathBuf::as_path).collect();
        let script = format!(
            "mount -t tmpfs tmpfs /mnt
             lower=
             number=0
             for layer; do
                 number=$((number + 1))
                 mkdir /mnt/$number
                 mount -o loop,ro \"$layer\" /mnt/$number
                 lower=/mnt/$number/root${{lower:+:$lower}}
             done
             mkdir /mnt/all /mnt/none
             mount -t overlay -o ro,lowerdir=\"$lower:/mnt/none\" overlay /mnt/all
             {}",
            FINGERPRINT.replace("$1", "/mnt/all")
        );
        let mut command = Command::new("unshare");
        command
            .args(["-m", "bash", "-euc", &script, "-"])
            .args(args);
        run(&mut command)
    }
}

/// Names, kinds, owners, modes, times, links, devices, attributes; and a digest
/// of it all with the data. What a folder's own time is depends on who made it.
const FINGERPRINT: &str = "cd $1
    { find . \\( -type d -printf '%p %y %m %U:%G\\n' \\) -o \\
        -printf '%p %y %m %U:%G %n %s %Ts %l\\n'
      find . -type f -print0 | xargs -0r sha256sum
      find . \\( -type b -o -type c \\) -print0 | xargs -0r stat -c '%n %t:%T'
      find . -print0 | xargs -0r getfattr -h -d -m '^(user|security)' -e hex |
          awk '/^# file: /{file = $0; next} NF{print file, $0}'
    } | LC_ALL=C sort | cat -v";

/// What a folder holds, to be compared.
pub fn fingerprint(folder: &Path) -> String {
    shell(FINGERPRINT, &[folder])
}

/// Fails with the difference.
pub fn assert_same(found: &str, expected: &str) {
    if found != expected {
        let lost: Vec<&str> = expected
            .lines()
            .filter(|line| !found.lines().any(|other| other == *line))
            .collect();
        let new: Vec<&str> = found
            .lines()
            .filter(|line| !expected.lines().any(|other| other == *line))
            .collect();
        panic!("lost: {lost:#?}\nnew: {new:#?}");
    }
}

/// Makes an OCI layout `oci`, tag `t`, of two layers, by umoci, and the files that
/// it ends up with in `bundle/rootfs`. `$SIZE` MiB of it cannot be compressed.
const MAKE_IMAGE: &str = r#"
    cd "$1"
    umoci init --layout oci
    umoci new --image oci:t
    umoci unpack --image oci:t bundle
    cd bundle/rootfs
    mkdir -p bin etc/secret tmp gone opaque/below
    cp "$(command -v busybox)" bin/busybox
    ln bin/busybox bin/sh
    ln -s sh bin/ash
    chmod 1777 tmp
    chmod 700 etc/secret
    chown 1000:2000 etc/secret
    echo old >etc/secret/a
    echo gone >gone/x
    echo below >opaque/below/x
    head -c "${2}M" /dev/urandom >random
    # umoci rounds times.
    find . -exec touch -h -d @1700000000 {} +
    cd ../..
    umoci repack --image oci:t bundle
    rm -r bundle
    umoci unpack --image oci:t bundle
    cd bundle/rootfs
    rm -r gone etc/secret/a opaque/below
    echo new >opaque/new
    echo t >tmp/t
    head -c "${2}M" /dev/urandom >random2
    chmod 4755 bin/busybox
    # umoci rounds times.
    find . -exec touch -h -d @1700000000 {} +
    cd ../..
    umoci repack --image oci:t bundle
    umoci config --image oci:t --config.cmd sh --config.env A=b --config.workingdir /tmp
"#;

pub struct Made {
    pub folder: TempDir,
}

impl Made {
    pub fn image(mib: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let size = mib.to_string();
        shell(MAKE_IMAGE, &[folder.path(), Path::new(&size)]);
        Made { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn fingerprint(&self) -> String {
        fingerprint(&self.path("bundle/rootfs"))
    }

    /// Copies the image to somewhere.
    pub fn copy(&self, options: &[&str], target: &str) {
        let source = format!("oci:{}:t", self.path("oci").display());
        run(Command::new("skopeo")
            .args(["copy", "-q"])
            .args(options)
            .args([&source, target]));
    }
}

/// A real registry on this host.
pub struct Registry {
    pub folder: TempDir,
    pub port: u16,
    child: Child,
}

impl Registry {
    pub fn open() -> Self {
        Registry::start("")
    }

    /// One that lets in `me` with the password `secret`.
    pub fn closed() -> Self {
        Registry::start("auth: {htpasswd: {realm: r, path: FOLDER/users}}\n")
    }

    /// One that speaks TLS only; its certificate is `cert.pem` in its folder.
    pub fn secure() -> Self {
        Registry::start("TLS")
    }

    fn start(more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display().to_string();
        let port = free_port();
        run(Command::new("htpasswd").args(["-Bbc", &format!("{path}/users"), "me", "secret"]));
        let tls = match more {
            "TLS" => format!(", tls: {{certificate: {path}/cert.pem, key: {path}/key.pem}}"),
            _ => String::new(),
        };
        if !tls.is_empty() {
            shell(
                "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \\
                     -subj /CN=test -addext basicConstraints=critical,CA:FALSE -addext subjectAltName=IP:127.0.0.1,DNS:localhost \\
                     -keyout \"$1/key.pem\" -out \"$1/cert.pem\" 2>/dev/null",
                &[folder.path()],
            );
        }
        let config = format!(
            "version: 0.1\nlog: {{accesslog: {{disabled: false}}, level: warn}}\n\
             storage: {{filesystem: {{rootdirectory: {path}/data}}}}\n\
             http: {{addr: \"127.0.0.1:{port}\"{tls}}}\n{}",
            more.replace("FOLDER", &path).replace("TLS", "")
        );
        fs::write(folder.path().join("config.yml"), config).unwrap();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(folder.path().join("config.yml"))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let registry = Registry {
            folder,
            port,
            child,
        };
        until("the registry answers", || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        registry
    }

    pub fn name(&self, image: &str) -> String {
        format!("localhost:{}/{image}", self.port)
    }

    pub fn push(&self, made: &Made, image: &str, options: &[&str]) {
        let options = [&["--dest-tls-verify=false"], options].concat();
        made.copy(
            &options,
            &format!("docker://127.0.0.1:{}/{image}", self.port),
        );
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// The files of all blobs that are larger than a size.
    pub fn blobs(&self, larger: u64) -> Vec<PathBuf> {
        let found = shell("find \"$1/data\" -name data -type f", &[self.folder.path()]);
        let found = found.lines().map(PathBuf::from);
        found
            .filter(|path| path.metadata().unwrap().len() > larger)
            .collect()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
