//! `mayfly run` with what people run: a Debian with apt, Python, nginx, ping and
//! curl; many of it at once; and where disks are full.

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mayfly_testing::tools::{Peer, random_file, tool};
use mayfly_testing::user::{NOBODY, User};
use mayfly_testing::{distro, test_data, text, until};

use crate::user_nets::{HOSTS, Internet, OWN, Servers, internet, within};

/// The store with Debian's images.
const DEBIAN: &str = "debian";

/// A host with a resolver, and packages on port 80 of the world's addresses.
struct Host {
    namespace: Internet,
    _servers: Servers,
    _httpd: Peer,
}

impl Host {
    fn new(name: &str) -> Self {
        let namespace = internet(name);
        let _servers = Servers::start(&namespace);
        let mut httpd = namespace.world.command("busybox");
        httpd.args(["httpd", "-f", "-p", "80", "-h"]);
        let _httpd = Peer(httpd.arg(distro("repository")).spawn().unwrap());
        Host {
            namespace,
            _servers,
            _httpd,
        }
    }

    /// Runs mayfly there.
    fn mayfly(&self, user: &User, words: &[&str]) -> Command {
        self.namespace.inside(&user.mayfly(words))
    }

    /// What a host's program there gets of a page.
    fn curl(&self, words: &[&str]) -> Output {
        let mut curl = self.namespace.command("curl");
        curl.args(["--silent", "--show-error", "--max-time", "300"]);
        curl.args(words).output().unwrap()
    }
}

fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

fn sum(path: &Path) -> String {
    let sum = tool("sha256sum", &[path.to_str().unwrap()]);
    sum.split(' ').next().unwrap().to_owned()
}

#[test]
fn debian_s_python_and_apt() {
    let (user, host) = (User::plain_with(DEBIAN), Host::new("python"));
    let data = user.home.path().join("data");
    random_file(&data, 1 << 20);
    let script = "set -e
        python3 -c '
import hashlib, shutil, socket, sys
with open(\"/tmp/data\", \"wb\") as data:
    shutil.copyfileobj(sys.stdin.buffer, data)
print(hashlib.sha256(open(\"/tmp/data\", \"rb\").read()).hexdigest())
with socket.create_connection((\"web.example\", 80)) as peer:
    peer.sendall(b\"GET /Packages HTTP/1.0\\r\\n\\r\\n\")
    print(peer.getpeername()[0], peer.makefile(\"rb\").read().count(b\"mayfly-greeting.deb\"))
'
        python3 -m venv --without-pip /tmp/venv
        /tmp/venv/bin/python -c 'import sys; print(sys.prefix, sys.prefix != sys.base_prefix)'
        echo 'deb [trusted=yes] http://web.example ./' >/etc/apt/sources.list
        apt-get -qq update
        apt-get -qq install mayfly-greeting >/dev/null
        mayfly-greeting
        apt list --installed 2>/dev/null | grep -c -e ^python3/ -e ^mayfly-greeting/";
    let words = ["run", "--rm", "-i", "--dns", "127.0.0.1", DEBIAN];
    let words = [&words[..], &["bash", "-c", script]].concat();
    let mut command = host.mayfly(&user, &words);
    let output = command.stdin(File::open(&data).unwrap()).output().unwrap();
    let expected = format!(
        "{}\n{} 1\n/tmp/venv True\ngreetings, installed\n2\n",
        sum(&data),
        HOSTS[1]
    );
    assert_eq!(text(&output.stdout), expected, "{output:?}");
    assert!(output.status.success(), "{output:?}");
}

/// nginx in the background, of nothing that it could write to, as its image says.
fn nginx_is_published(user: &User, name: &str) {
    let host = Host::new(name);
    let pages = user.home.path().join("pages");
    fs::create_dir(&pages).unwrap();
    let (body, got) = (pages.join("body"), user.home.path().join("got"));
    random_file(&body, 2 << 20);
    let wish = format!("{}:/var/www/html:ro", pages.display());
    let words = ["run", "-d", "--name", "web", "-p", "8080:80", "--read-only"];
    let rest = [
        "--tmpfs",
        "/run",
        "--tmpfs",
        "/var/lib/nginx",
        "-v",
        &wish,
        "nginx",
    ];
    let started = host.mayfly(user, &[&words[..], &rest].concat()).output();
    assert_eq!(succeeded(&started.unwrap()), "web\n");
    let page = "http://127.0.0.1:8080/body";
    until("nginx answers", || {
        host.curl(&["--head", page]).status.success()
    });
    succeeded(&host.curl(&["--output", got.to_str().unwrap(), page]));
    assert_eq!(sum(&got), sum(&body));
    let missing = host.curl(&["http://127.0.0.1:8080/missing"]);
    assert!(succeeded(&missing).contains("404 Not Found"), "{missing:?}");
    // Nowhere but on loopback.
    let elsewhere = within(&host.namespace, || TcpStream::connect((OWN, 8080)));
    assert!(elsewhere.is_err(), "{elsewhere:?}");
    let logged = |stream: fn(Output) -> Vec<u8>, what: &str| {
        until(what, || {
            text(&stream(user.output(&["logs", "web"]))).contains(what)
        });
    };
    logged(|logs| logs.stdout, "\"GET /body HTTP/1.1\" 200 2097152");
    assert_eq!(user.text(&["stop", "web"]), "web\n");
    assert_eq!(user.text(&["wait", "web"]), "0\n");
    // Its image says how to end it, and it had the time to.
    logged(|logs| logs.stderr, "signal 3 (SIGQUIT) received");
    logged(|logs| logs.stderr, "exited with code 0");
    user.text(&["rm", "web"]);
}

#[test]
fn nginx_serves_the_host() {
    nginx_is_published(&User::root_with(DEBIAN), "nginx");
}

#[test]
fn an_ordinary_user_s_nginx_too() {
    nginx_is_published(&User::plain_with(DEBIAN), "nginx2");
}

#[test]
fn only_what_is_allowed_is_reached() {
    let (user, host) = (User::root_with(DEBIAN), Host::new("reach"));
    let greeting = sum(&distro("repository/mayfly-greeting.deb"));
    let script = "
        page() { curl -sS --max-time 300 http://$1/mayfly-greeting.deb 2>/tmp/error | sha256sum | cut -d ' ' -f 1
            echo ${PIPESTATUS[0]}; }
        fails() { curl -sS --max-time 300 http://$1/ >/dev/null 2>&1; echo $1: $?; }
        page 198.51.100.1
        fails 198.51.100.3
        fails 198.51.100.1:8000
        fails 198.51.100.2
        fails other.example
        page web.example
        getent ahostsv4 web.example | head -n 1 | cut -d ' ' -f 1
        # Without the right to plain sockets of it, ping needs what its file says.
        echo 1 0 >/proc/sys/net/ipv4/ping_group_range
        www() { setpriv --reuid www-data --regid www-data --clear-groups \"$@\"; }
        www ping -c 1 -W 60 web.example >/dev/null && echo ping: ok
        www ping -c 1 -W 2 198.51.100.3 >/dev/null || echo ping: none
        cp /usr/bin/ping /tmp && { www /tmp/ping -c 1 198.51.100.1 2>/dev/null || echo ping: not allowed; }
        # Only root may read what a setuid program is asked for here.
        www cat /etc/shadow 2>/dev/null || www passwd -S | cut -d ' ' -f 1,2";
    let words = ["run", "--rm", "--dns", "127.0.0.1"];
    let allowed = ["--allow", "198.51.100.1:80", "--allow", "web.example"];
    let command = [DEBIAN, "bash", "-c", script];
    let words = [&words[..], &allowed, &command].concat();
    let output = host.mayfly(&user, &words).output().unwrap();
    // curl's words for a refused connection, and for a name without an address.
    let expected = format!(
        "{greeting}\n0\n198.51.100.3: 7\n198.51.100.1:8000: 7\n198.51.100.2: 7\nother.example: 6\n\
         {greeting}\n0\n{}\nping: ok\nping: none\nping: not allowed\nwww-data L\n",
        HOSTS[1]
    );
    assert_eq!(succeeded(&output), expected, "{output:?}");
}

/// The image's user and another one by name.
#[test]
fn users_have_names() {
    let user = User::plain_with(DEBIAN);
    let id = "id -un; id -gn; id -Gn; echo $HOME; touch /root/x 2>/dev/null || echo denied";
    for (flags, image, expected) in [
        (
            &[][..],
            "www",
            "www-data\nwww-data\nwww-data\n/var/www\ndenied\n",
        ),
        (
            &["-u", "nobody:games"],
            "www",
            "nobody\ngames\ngames\n/nonexistent\ndenied\n",
        ),
    ] {
        let words = [
            &["run", "--rm", "--net", "none"],
            flags,
            &[image, "sh", "-c", id],
        ]
        .concat();
        assert_eq!(user.text(&words), expected);
    }
}

/// A disk of few bytes, in memory, gone with this.
struct Small {
    path: PathBuf,
    /// The folder that it lies on, if that is its own.
    _folder: Option<tempfile::TempDir>,
}

impl Small {
    fn new(size: &str, user: &User) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut small = Small::at(folder.path().to_owned(), size, user);
        small._folder = Some(folder);
        small
    }

    /// On a folder that is made if it is missing.
    fn at(path: PathBuf, size: &str, user: &User) -> Self {
        let owner = if user.plain { NOBODY } else { 0 };
        let options = format!("size={size},mode=700,uid={owner}");
        fs::create_dir_all(&path).unwrap();
        let place = path.to_str().unwrap();
        tool("mount", &["-t", "tmpfs", "-o", &options, "tmpfs", place]);
        Small {
            path,
            _folder: None,
        }
    }

    fn path(&self) -> &Path {
        &self.path
    }

    /// What VMs left, but for the file that those lock that make a folder.
    fn left(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.path).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != ".making").collect()
    }

    /// Takes all the space that there is.
    fn fill(&self) -> PathBuf {
        let path = self.path().join("filler");
        let mut file = File::create(&path).unwrap();
        while file.write_all(&[0xaa; 4096]).is_ok() {}
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[test]
fn a_full_disk_is_said_and_survived() {
    for user in [User::root(), User::plain()] {
        let runtime = Small::new("256k", &user);
        let logs = user.home.path().join("share/mayfly/logs");
        let log = Small::at(logs, "256k", &user);
        let run = |words: &[&str]| {
            let mut command = user.mayfly(words);
            command.env("MAYFLY_RUNTIME_DIR", runtime.path());
            command.output().unwrap()
        };
        // No place for anything: one line, and nothing is left.
        let filler = runtime.fill();
        let output = run(&["run", "demo", "true"]);
        assert_eq!(output.status.code(), Some(125), "{output:?}");
        let errors = text(&output.stderr);
        assert!(errors.contains("No space left"), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
        fs::remove_file(filler).unwrap();
        assert_eq!(runtime.left(), [""; 0]);
        assert_eq!(log.left(), [""; 0]);
        // No place for all that is written: it comes out, though not all is kept.
        let script = "head -c 1000000 /dev/zero; exit 3";
        let output = run(&["run", "--name", "much", "demo", "sh", "-c", script]);
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        assert_eq!(output.stdout.len(), 1_000_000);
        let errors = text(&output.stderr);
        assert!(errors.contains("No space left"), "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
        // How it ended is known all the same.
        assert_eq!(succeeded(&run(&["wait", "much"])), "3\n");
        let ps = run(&["ps", "-a"]);
        assert!(succeeded(&ps).contains("exited (3)"), "{ps:?}");
        let logs = run(&["logs", "much"]);
        assert!(succeeded(&logs).len() > 100_000);
        succeeded(&run(&["rm", "much"]));
        assert_eq!(runtime.left(), [""; 0]);
        assert_eq!(log.left(), [""; 0]);
    }
}

/// The disk for what a guest writes, full inside, and on a host that has no more.
#[test]
fn a_guest_s_full_disk_is_the_guest_s() {
    let user = User::root();
    let script = "dd if=/dev/zero of=/big bs=1M count=100 2>&1 | grep -o 'No space left.*'
        rm /big; echo alive > /it; cat /it";
    let words = [
        "run",
        "--rm",
        "--disk-size",
        "64M",
        "demo",
        "sh",
        "-c",
        script,
    ];
    assert_eq!(user.text(&words), "No space left on device\nalive\n");

    let data = Small::new("16M", &user);
    let from = user.home.path().join("share/.");
    let paths = [from.as_path(), data.path()].map(|path| path.to_str().unwrap());
    tool("cp", &["-r", paths[0], paths[1]]);
    let run = |script: &str| {
        let words = [
            "run",
            "--rm",
            "--disk-size",
            "1G",
            "demo",
            "sh",
            "-c",
            script,
        ];
        let mut command = user.mayfly(&words);
        command.env("XDG_DATA_HOME", data.path()).output().unwrap()
    };
    let script =
        "dd if=/dev/zero of=/big bs=1M count=40 conv=fsync 2>&1 | grep -o 'Input/output error'
        echo alive > /dev/shm/it; cat /dev/shm/it; exit 4";
    let output = run(script);
    assert_eq!(
        text(&output.stdout),
        "Input/output error\nalive\n",
        "{output:?}"
    );
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    // It went with its VM. Now there is no place for one at all.
    data.fill();
    let output = run("true");
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let errors = text(&output.stderr);
    assert!(
        errors.contains("--disk-size") && errors.contains("No space left"),
        "{errors}"
    );
    assert_eq!(errors.lines().count(), 1, "{errors}");
}

/// The host has an image's pages once, whoever reads them.
#[test]
fn ten_machines_share_a_page_cache() {
    const MACHINES: usize = 10;
    /// What a machine needs for this and that.
    const LITTLE: u64 = 16 << 20;
    // Not a copy in memory: that would be its own cache.
    let (user, store) = (User::root(), test_data(DEBIAN));
    let run = |words: &[&str]| {
        let mut command = user.mayfly(words);
        command.env("XDG_DATA_HOME", &store);
        succeeded(&command.output().unwrap())
    };
    let folder = store.join("mayfly/layers");
    let mut layers = fs::read_dir(folder).unwrap();
    let layer = &layers
        .next()
        .unwrap()
        .unwrap()
        .path()
        .join("layer.squashfs");
    assert!(layers.next().is_none());
    let file = File::open(layer).unwrap();
    let len = file.metadata().unwrap().len();
    assert!(len > 2 * LITTLE);
    // SAFETY: an open descriptor.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert!(cached(layer) < LITTLE, "{}", cached(layer));

    let mut before = 0;
    for number in 0..MACHINES {
        let name = number.to_string();
        let words = [
            "run", "-d", "--net", "none", "--memory", "96M", "--name", &name,
        ];
        run(&[&words[..], &[DEBIAN, "sleep", "100000"]].concat());
        let resident = resident(&user, &name);
        // All of the layer; the guest itself keeps none of it.
        let read = "dd if=/dev/vda1 iflag=direct bs=1M 2>/dev/null | wc -c";
        let read = run(&["exec", &name, "sh", "-c", read]);
        assert_eq!(read.trim(), len.to_string());
        let grown = self::resident(&user, &name).saturating_sub(resident);
        assert!(grown < LITTLE, "{number}: {grown}");
        if number == 0 {
            // From here on, nobody reads it from the disk any more.
            assert_eq!(cached(layer), len.next_multiple_of(4096));
            before = page_cache();
        }
    }
    assert_eq!(user.text(&["ps", "-q"]).lines().count(), MACHINES);
    let grown = page_cache().saturating_sub(before);
    // Not once more, with all else that the host reads meanwhile.
    assert!(grown < len, "{grown}");
    for number in 0..MACHINES {
        run(&["kill", &number.to_string()]);
    }
}

/// How much of a file is cached, in bytes.
fn cached(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len() as usize;
    let mut pages = vec![0u8; len.div_ceil(4096)];
    let null = std::ptr::null_mut();
    // SAFETY: a new mapping, which nobody writes to.
    let at = unsafe {
        libc::mmap(
            null,
            len,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert!(at != libc::MAP_FAILED);
    // SAFETY: that mapping, and a byte for each of its pages.
    assert_eq!(unsafe { libc::mincore(at, len, pages.as_mut_ptr()) }, 0);
    // SAFETY: nobody uses it any more.
    unsafe { libc::munmap(at, len) };
    4096 * pages.iter().filter(|&page| page & 1 != 0).count() as u64
}

/// The pages of files on disks that are cached, in bytes.
fn page_cache() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let kib = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap()
    };
    (kib("Cached:") - kib("Shmem:")) << 10
}

fn resident(user: &User, name: &str) -> u64 {
    let text = user.text(&["stats", "--json", name]);
    let stats: serde_json::Value = serde_json::from_str(&text).unwrap();
    stats["memory"].as_u64().unwrap()
}
