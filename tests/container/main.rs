//! The container that `mayfly compare` has built in: real ones, of a busybox. As root, and
//! from there as an ordinary user. Inside, this program tries what is refused.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, unsafe_code)]

mod harness;
mod inside;

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use mayfly_compare::container::{self, Spec};
use mayfly_testing::processes::{descendants, runs};
use mayfly_testing::until;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use harness::{Running, Setup, status_of};

/// What nobody has.
const NOBODY: u32 = 65534;
/// Docker's 14 capabilities.
const CAPABILITIES: &str = "00000000a80425fb";

type Outcome = Result<(), String>;

/// Fails with what was seen, unless it is as expected.
macro_rules! expect {
    ($condition:expr, $($seen:tt)+) => {
        if !$condition {
            return Err(format!("{}: {}", stringify!($condition), format_args!($($seen)+)));
        }
    };
}

type Test = (&'static str, fn(&Setup) -> Outcome);

const TESTS: [Test; 16] = [
    ("the status is the command's", statuses),
    ("marks are told in order", marks),
    ("it is alone in its namespaces", namespaces),
    ("it has Docker's rights", rights),
    ("what Docker refuses is refused", refusals),
    ("what Docker hides is hidden", hidden),
    ("what is written vanishes", written),
    ("two at once do not meet", two),
    ("volumes are the host's", volumes),
    ("links of an image lead nowhere", links),
    ("devices of an image are none", devices),
    ("descriptors of the host stay out", descriptors),
    ("another user has no rights", users),
    ("limits hold, or their lack is told", limits),
    ("a signal is passed on", signals),
    ("a killed launcher takes all along", killed),
];

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == inside::WORD) {
        return inside::main();
    }
    let filter = args.iter().find(|arg| !arg.starts_with("--"));
    let setup = Setup::make();
    println!(
        "\nas {}:",
        if setup.root {
            "root"
        } else {
            "an ordinary user"
        }
    );
    // What this host lacks, for who reads the results.
    for (_, note) in setup.shell("exit 0").run().notes() {
        println!("note: {note}");
    }
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in TESTS {
        if filter.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        match test(&setup) {
            Ok(()) => {
                println!("{name:<40} ok");
                passed += 1;
            }
            Err(why) => {
                println!("{name:<40} FAILED\n    {why}");
                failed += 1;
            }
        }
    }
    if failed > 0 || passed == 0 {
        println!("test result: FAILED. {passed} passed; {failed} failed");
        return ExitCode::FAILURE;
    }
    println!("test result: ok. {passed} passed; 0 failed");
    match setup.root {
        true => as_nobody(&args, &setup),
        false => ExitCode::SUCCESS,
    }
}

/// The same once more, as an ordinary user, who may not see the binaries where they are.
fn as_nobody(args: &[String], setup: &Setup) -> ExitCode {
    let own = setup.folder().join("test");
    fs::copy(std::env::current_exe().unwrap(), &own).unwrap();
    let mut command = Command::new(&own);
    command.args(args).env_clear().stdin(Stdio::null());
    command.env("MAYFLY_BIN", &setup.mayfly).current_dir("/");
    match command.uid(NOBODY).gid(NOBODY).status().unwrap().code() {
        Some(0) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn statuses(setup: &Setup) -> Outcome {
    for (command, expected) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -USR1 $$; exit 3", 3),
    ] {
        let ended = setup.shell(command).run();
        expect!(ended.status == expected, "{command}: {ended:?}");
    }
    let ended = setup.container(&["not-there"]).run();
    expect!(ended.status == 127, "{ended:?}");
    expect!(ended.stderr.contains("not-there"), "{ended:?}");
    for cannot in ["/etc/plain", "/etc/no-program", "/etc"] {
        let ended = setup.container(&[cannot]).run();
        expect!(ended.status == 126, "{cannot}: {ended:?}");
    }
    let mut wrong = setup.shell("exit 0");
    wrong.spec.root = "/not-there".into();
    let ended = wrong.run();
    expect!(
        ended.status == i32::from(container::NO_CONTAINER),
        "{ended:?}"
    );
    expect!(ended.stderr.contains("/not-there"), "{ended:?}");
    // Only from outside can the first process be killed.
    let running = setup.shell("echo ready; exec sleep 1000").start();
    running.line("ready");
    // SAFETY: numbers.
    unsafe { libc::kill(running.init(), libc::SIGKILL) };
    let ended = running.end();
    expect!(ended.status == 128 + libc::SIGKILL, "{ended:?}");
    Ok(())
}

fn marks(setup: &Setup) -> Outcome {
    let before = container::now();
    let ended = setup.shell("exit 0").run();
    let after = container::now();
    let names: Vec<_> = ended.marks.iter().map(|(name, _)| name.as_str()).collect();
    let plain: Vec<_> = names.iter().filter(|name| **name != "note").collect();
    expect!(plain == [&"launched", &"built"], "{ended:?}");
    let time = |name: &str| ended.mark(name).parse::<u64>().unwrap();
    let (launched, built) = (time("launched"), time("built"));
    expect!(before < launched, "{before} {launched}");
    expect!(launched < built, "{launched} {built}");
    expect!(built < after, "{built} {after}");
    // Without one, nothing is told, and nobody minds.
    let mut quiet = setup.shell("exit 4");
    quiet.spec.marks = None;
    let ended = quiet.run();
    expect!(ended.status == 4 && ended.marks.is_empty(), "{ended:?}");
    Ok(())
}

fn namespaces(setup: &Setup) -> Outcome {
    let script = "echo $$; hostname; ls /sys/class/net; ip -o addr | wc -l; \
                  cat /proc/self/cgroup; for ns in /proc/self/ns/*; do readlink $ns; done; echo /proc/[0-9]*; cat /etc/hostname";
    let ended = setup.shell(script).run();
    let lines: Vec<_> = ended.stdout.lines().collect();
    let [pid, hostname, net, addresses, rest @ ..] = &lines[..] else {
        return Err(format!("{ended:?}"));
    };
    expect!(
        *pid == "1" && *hostname == "box" && *net == "lo",
        "{ended:?}"
    );
    expect!(addresses.parse::<u32>().is_ok_and(|it| it > 0), "{ended:?}");
    // Whatever group it is in, it sees as the root.
    for line in rest.iter().filter(|it| it.split(':').count() == 3) {
        expect!(line.ends_with(":/"), "{line}");
    }
    let own: Vec<_> = rest.iter().filter(|it| it.contains(":[")).collect();
    for kind in ["net", "pid", "mnt", "uts", "ipc", "user", "cgroup"] {
        let host = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        let its = own.iter().find(|it| it.starts_with(&format!("{kind}:")));
        let its = its.ok_or(format!("{kind}: {ended:?}"))?;
        expect!(host.to_str() != Some(**its), "{kind}: {its}");
    }
    // Of all processes it sees itself.
    expect!(lines[lines.len() - 2] == "/proc/1", "{ended:?}");
    expect!(lines.last() == Some(&"box"), "{ended:?}");
    Ok(())
}

fn rights(setup: &Setup) -> Outcome {
    let ended = setup.container(&["cat", "/proc/1/status"]).run();
    for (name, expected) in [
        ("CapPrm:", CAPABILITIES),
        ("CapEff:", CAPABILITIES),
        ("CapBnd:", CAPABILITIES),
        ("CapInh:", "0000000000000000"),
        ("CapAmb:", "0000000000000000"),
        ("NoNewPrivs:", "0"),
        ("Seccomp:", "2"),
        ("SigBlk:", "0000000000000000"),
        ("Groups:", if setup.root { "" } else { "65534" }),
    ] {
        let seen = status_of(&ended.stdout, name);
        // An ordinary user's groups are part of who it is.
        let fine = seen == Some(expected) || name == "Groups:" && !setup.root;
        expect!(fine, "{name} {seen:?}");
    }
    let ignored = status_of(&ended.stdout, "SigIgn:").unwrap_or_default();
    let ignored = u64::from_str_radix(ignored, 16).unwrap();
    // The C library lets nobody change two more.
    expect!(ignored & 0x7fff_ffff == 0, "{ignored:#x}");
    Ok(())
}

/// What this program finds inside.
fn refusals(setup: &Setup) -> Outcome {
    let mut container = setup.container(&["/probe", inside::WORD]);
    container.spec.volumes = harness::program();
    container
        .spec
        .env
        .push("LD_LIBRARY_PATH=/probe-libraries".into());
    let ended = container.run();
    expect!(ended.status == 0, "{ended:?}");
    expect!(ended.stdout.lines().count() >= 20, "{ended:?}");
    Ok(())
}

fn hidden(setup: &Setup) -> Outcome {
    let script = "cat /proc/kcore /proc/keys /proc/timer_list /proc/interrupts 2>/dev/null | wc -c; \
        ls /sys/firmware /proc/acpi /proc/scsi 2>/dev/null | grep -v : | grep -c .; \
        for file in /proc/sys/kernel/domainname /proc/sysrq-trigger /sys/kernel/mm/ksm/run; do \
            echo x 2>/dev/null >$file && echo $file; done; \
        mkdir /sys/firmware/x 2>/dev/null && echo made; \
        ls /dev; ls /dev/pts /dev/shm /dev/mqueue | grep -v :; \
        head -c 3 /dev/zero | wc -c; echo x >/dev/null && echo null; readlink /dev/ptmx; readlink /dev/fd";
    let ended = setup.shell(script).run();
    let words: Vec<_> = ended.stdout.split_whitespace().collect();
    let expected = "0 0 core fd full mqueue null ptmx pts random shm stderr stdin stdout tty \
                    urandom zero ptmx 3 null pts/ptmx /proc/self/fd";
    let expected: Vec<_> = expected.split_whitespace().collect();
    expect!(words == expected, "{ended:?}");
    Ok(())
}

fn written(setup: &Setup) -> Outcome {
    let before = harness::listing(&setup.image);
    let script = "echo changed >/etc/plain; rm /etc/no-program; mkdir -p -m 0 /deep/er; \
                  ln -s / /root-link; chmod 0 /etc; cat /etc/plain; echo x >/x && ls /x";
    let ended = setup.shell(script).run();
    expect!(ended.stdout == "changed\n/x\n", "{ended:?}");
    expect!(
        harness::listing(&setup.image) == before,
        "the image changed"
    );
    expect!(ended.left == 0, "{ended:?}");
    Ok(())
}

fn two(setup: &Setup) -> Outcome {
    let script = "echo $(hostname) >/tmp/mine; echo ready; read -r; ls /tmp; cat /tmp/mine";
    let begin = |name: &str| {
        let mut container = setup.shell(script);
        container.spec.hostname = name.into();
        container.start()
    };
    let both = [begin("one"), begin("two")];
    for running in &both {
        running.line("ready");
    }
    for (mut running, name) in both.into_iter().zip(["one", "two"]) {
        running.tell("go\n");
        let ended = running.end();
        expect!(ended.stdout == format!("mine\n{name}\n"), "{ended:?}");
    }
    Ok(())
}

fn volumes(setup: &Setup) -> Outcome {
    let host = tempfile::tempdir().unwrap();
    let file = host.path().join("file");
    fs::write(&file, "the host's\n").unwrap();
    let script = "cat /new/deep/file /data/file; echo inside >/data/made && echo written; \
                  echo x 2>/dev/null >/fixed/file || echo refused; \
                  touch /fixed/made 2>/dev/null || echo refused";
    let mut container = setup.shell(script);
    container.spec.volumes = vec![
        (host.path().into(), "/data".into(), false),
        (host.path().into(), "/fixed".into(), true),
        (file, "/new/deep/file".into(), true),
    ];
    let ended = container.run();
    let expected = "the host's\nthe host's\nwritten\nrefused\nrefused\n";
    expect!(ended.stdout == expected, "{ended:?}");
    let made = fs::read_to_string(host.path().join("made")).unwrap();
    expect!(made == "inside\n", "{made}");
    Ok(())
}

fn links(setup: &Setup) -> Outcome {
    let bait = tempfile::tempdir().unwrap();
    let data = tempfile::tempdir().unwrap();
    let image = harness::image();
    let root = image.path();
    fs::write(bait.path().join("hosts"), "mine").unwrap();
    // There is such a folder inside, too.
    let relative = bait.path().strip_prefix("/").unwrap();
    fs::create_dir_all(root.join(relative)).unwrap();
    let out = Path::new("/proc/self/cwd").join(relative);
    symlink(bait.path().join("hosts"), root.join("etc/hosts")).unwrap();
    symlink(bait.path(), root.join("vol")).unwrap();
    symlink(&out, root.join("out")).unwrap();
    symlink(&out, root.join("dev")).unwrap();
    let mut container = setup.shell("ls /vol/b /out/a && exit 5");
    container.spec.root = root.into();
    container.spec.volumes = ["/vol/a", "/out/b"]
        .map(|inside| (data.path().into(), inside.into(), false))
        .into();
    let ended = container.run();
    expect!(ended.status == 5, "{ended:?}");
    let names: Vec<_> = fs::read_dir(bait.path()).unwrap().flatten().collect();
    expect!(names.len() == 1, "{names:?} {ended:?}");
    let hosts = fs::read_to_string(bait.path().join("hosts")).unwrap();
    expect!(hosts == "mine", "{hosts}");
    // Nor does a command that is the launcher's own file.
    fs::write(root.join("tmp/script"), "#! /proc/self/exe --version\n").unwrap();
    let program = fs::Permissions::from_mode(0o755);
    fs::set_permissions(root.join("tmp/script"), program).unwrap();
    symlink("/proc/1/exe", root.join("tmp/link")).unwrap();
    for command in ["/proc/self/exe", "/tmp/link", "/tmp/script"] {
        let mut container = setup.container(&[command]);
        container.spec.root = root.into();
        let ended = container.run();
        let refused = ended.stderr.contains("permission denied");
        expect!(ended.status == 126 && refused, "{command}: {ended:?}");
    }
    // Nor do folders to start in that were the host's root.
    let bait = relative.join("hosts");
    for cwd in ["/proc/self/fd/3", "/proc/self/fd/8", "/proc/self/cwd"] {
        let mut container = setup.shell(&format!("cat {}", bait.display()));
        container.spec.cwd = Some(cwd.into());
        let ended = container.inheriting().run();
        expect!(!ended.stdout.contains("mine"), "{ended:?}");
    }
    Ok(())
}

/// Also where there can be no overlay: on two of them.
fn devices(setup: &Setup) -> Outcome {
    if !setup.root {
        // An ordinary user has made none, and may mount nothing.
        return Ok(());
    }
    let image = harness::image();
    // What is read-only has to have them.
    for folder in ["dev", "proc", "sys"] {
        fs::create_dir(image.path().join(folder)).unwrap();
    }
    let device = rustix::fs::makedev(1, 5);
    let (kind, mode) = (FileType::CharacterDevice, Mode::from_raw_mode(0o666));
    mknodat(CWD, image.path().join("etc/zero"), kind, mode, device).unwrap();
    let places = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut lower = image.path().to_owned();
    for place in &places {
        let folders = ["upper", "work"].map(|name| place.path().join(name));
        folders.iter().for_each(|it| fs::create_dir(it).unwrap());
        let [upper, work] = folders.map(|it| it.display().to_string());
        let below = lower.display();
        let options = format!("lowerdir={below},upperdir={upper},workdir={work}");
        let root = place.path().join("root");
        fs::create_dir(&root).unwrap();
        let options = CString::new(options).unwrap();
        mount("overlay", &root, "overlay", MountFlags::empty(), &*options).unwrap();
        lower = root;
    }
    let ended = [image.path(), &lower].map(|root| {
        let mut container = setup.shell("head -c 1 /etc/zero");
        container.spec.root = root.into();
        container.run()
    });
    for place in places.iter().rev() {
        unmount(place.path().join("root"), UnmountFlags::DETACH).unwrap();
    }
    let [plain, stacked] = &ended;
    expect!(!plain.mark("note").starts_with("/: "), "{plain:?}");
    let told = stacked
        .notes()
        .any(|(_, note)| note.starts_with("/: read-only"));
    expect!(told, "{stacked:?}");
    for ended in ended {
        let refused = ended.stderr.contains("Permission denied");
        expect!(ended.status == 1 && refused, "{ended:?}");
    }
    Ok(())
}

fn descriptors(setup: &Setup) -> Outcome {
    // The host's root, and a file.
    let ended = setup.container(&["ls", "/proc/self/fd"]).inheriting().run();
    // The last is that of `ls` itself.
    expect!(ended.stdout == "0\n1\n2\n3\n", "{ended:?}");
    Ok(())
}

fn users(setup: &Setup) -> Outcome {
    let mut container = setup.shell("id -u; id -g; cat /proc/self/status; pwd; echo $HOME$KEY");
    container.spec.uid = 1000;
    container.spec.gid = 1001;
    container.spec.cwd = Some("/etc".into());
    container.spec.env.push("KEY=value".into());
    let ended = container.run();
    expect!(ended.stdout.starts_with("1000\n1001\n"), "{ended:?}");
    expect!(ended.stdout.ends_with("/etc\nvalue\n"), "{ended:?}");
    let effective = status_of(&ended.stdout, "CapEff:");
    expect!(effective == Some("0000000000000000"), "{effective:?}");
    Ok(())
}

fn limits(setup: &Setup) -> Outcome {
    let eat = ["dd", "if=/dev/zero", "of=/dev/null", "bs=160M", "count=1"];
    let ended = setup.container(&eat).run();
    expect!(ended.status == 0, "{ended:?}");
    let name = format!("container-test-{}", std::process::id());
    let limited = |spec: &mut Spec| {
        spec.cgroup = Some(name.clone());
        spec.memory = Some(32 << 20);
        spec.cpus = Some(0.5);
        spec.pids = Some(4);
    };
    let mut container = setup.container(&eat);
    limited(&mut container.spec);
    let ended = container.run();
    if !setup.root {
        // Nobody gives this user a group.
        expect!(ended.status == 0, "{ended:?}");
        let told = ended
            .marks
            .iter()
            .any(|(_, text)| text.starts_with("cgroup: no limit"));
        expect!(told, "{ended:?}");
        return Ok(());
    }
    expect!(
        !ended
            .marks
            .iter()
            .any(|(_, text)| text.starts_with("cgroup")),
        "{ended:?}"
    );
    expect!(ended.status == 128 + libc::SIGKILL, "{ended:?}");
    let mut container = setup.shell("for i in 1 2 3 4 5 6; do sleep 9 & done; exit 0");
    limited(&mut container.spec);
    let ended = container.run();
    expect!(
        ended.status != 0 && ended.stderr.contains("fork"),
        "{ended:?}"
    );
    let left = harness::groups(&name);
    expect!(left.is_empty(), "{left:?}");
    Ok(())
}

fn signals(setup: &Setup) -> Outcome {
    let script = "trap 'exit 9' TERM; echo ready; while :; do sleep 1000 & wait; done";
    let running = setup.shell(script).start();
    running.line("ready");
    running.signal(libc::SIGTERM);
    let ended = running.end();
    expect!(ended.status == 9, "{ended:?}");
    Ok(())
}

fn killed(setup: &Setup) -> Outcome {
    // As root, and as a user that gives up all rights.
    for uid in [0, 1000] {
        let script = "trap '' TERM HUP; sleep 1000 & setsid sleep 1000 & echo ready; read -r";
        let mut container = setup.shell(script);
        container.spec.uid = uid;
        let running: Running = container.start();
        running.line("ready");
        let init = running.init();
        let all = descendants(init.cast_unsigned());
        expect!(all.len() == 3, "{all:?}");
        running.signal(libc::SIGKILL);
        let ended = running.end();
        expect!(ended.status == 128 + libc::SIGKILL, "{ended:?}");
        until("all of it ends", || !all.iter().any(|&pid| runs(pid)));
    }
    Ok(())
}
