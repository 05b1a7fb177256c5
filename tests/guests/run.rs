//! `mayfly run` and its kin, on the image that the project makes of busybox.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use mayfly_testing::user::User;
use mayfly_testing::{TIMEOUT, text, until};

/// Makes tests of these, as root's and as an ordinary user's.
macro_rules! for_both {
    ($($test:ident)*) => {
        mod as_root {
            $(#[test]
            fn $test() {
                super::$test(&super::User::root());
            })*
        }
        mod as_an_ordinary_user {
            $(#[test]
            fn $test() {
                super::$test(&super::User::plain());
            })*
        }
    };
}

for_both! {
    statuses_and_streams_are_the_command_s
    the_machine_is_what_flags_say
    what_is_written_can_go_to_a_disk
    signals_and_times_end_it
    vms_in_the_background_are_listed_asked_and_ended
    a_killed_process_is_told_as_such
    a_terminal_is_a_real_one
    a_user_may_leave_and_come_back
    output_that_cannot_be_written_is_no_success
}

fn statuses_and_streams_are_the_command_s(user: &User) {
    for (words, status, out, err) in [
        (&["echo", "hello"][..], 0, "hello\n", ""),
        (&["sh", "-c", "echo a; echo b >&2; exit 7"], 7, "a\n", "b\n"),
        (&["sh", "-c", "kill -TERM $$"], 128 + 15, "", ""),
        (&["nothere"], 127, "", "nothere: not found"),
        (&["/etc/passwd"], 126, "", "Permission denied"),
    ] {
        let output = user.output(&[&["run", "demo"], words].concat());
        assert_eq!(output.status.code(), Some(status), "{words:?} {output:?}");
        assert_eq!(text(&output.stdout), out, "{words:?}");
        assert!(text(&output.stderr).contains(err), "{words:?} {output:?}");
    }
    for (words, status) in [
        (&["run", "nosuchimage", "true"][..], 125),
        (&["run", "--nosuchflag", "demo"], 125),
        (&["run", "--memory", "x", "demo", "true"], 125),
        (&["exec", "nosuchvm", "true"], 125),
    ] {
        assert_eq!(user.output(words).status.code(), Some(status), "{words:?}");
    }
    // What never ran is not listed; what ran is.
    assert_eq!(user.text(&["ps", "-a", "-q"]).lines().count(), 5);
}

fn the_machine_is_what_flags_say(user: &User) {
    let script = "id -u; id -g; pwd; echo $A $B $HOME; hostname; cat /proc/sys/kernel/hostname; \
                  touch /x 2>/dev/null || echo read-only; touch /scratch/x && echo scratch; \
                  grep -c ^processor /proc/cpuinfo; head -c 1 /dev/vda | wc -c; \
                  dd if=/dev/zero of=/dev/vda bs=512 count=1 2>/dev/null || echo kept";
    let output = user.text(&[
        "run",
        "--rm",
        "-e",
        "A=1",
        "-e",
        "B=x y",
        "-w",
        "/tmp",
        "-u",
        "nobody",
        "--hostname",
        "box",
        "--read-only",
        "--tmpfs",
        "/scratch:size=1M",
        "--cpus",
        "2",
        "demo",
        "sh",
        "-c",
        script,
    ]);
    let expected = "65534\n65534\n/tmp\n1 x y /nonexistent\nbox\nbox\nread-only\nscratch\n2\n";
    assert!(output.starts_with(expected), "{output}");
    assert_eq!(user.text(&["ps", "-a", "-q"]), "");
    let output = user.text(&[
        "run",
        "demo",
        "sh",
        "-c",
        "dd if=/dev/zero of=/dev/vda bs=512 count=1 2>/dev/null || echo kept; \
         ln /bin/busybox /bin/b2 && rm /bin/sh && ls /bin/b2",
    ]);
    assert_eq!(output, "kept\n/bin/b2\n");
}

fn what_is_written_can_go_to_a_disk(user: &User) {
    let script = "dd if=/dev/zero of=/big bs=1M count=300 2>/dev/null && ls -l /big | wc -l; df /";
    let words = [
        "run",
        "--rm",
        "--memory",
        "256M",
        "--disk-size",
        "1G",
        "demo",
        "sh",
        "-c",
        script,
    ];
    let output = user.text(&words);
    assert!(output.starts_with("1\n"), "{output}");
}

#[test]
fn a_gibibyte_goes_in_and_out() {
    let user = User::root();
    let mut vm = user
        .mayfly(&["run", "--rm", "-i", "demo", "cat"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (vm.stdin.take().unwrap(), vm.stdout.take().unwrap());
    const LEN: u64 = 1 << 30;
    // A sequence in which no block is like another.
    let block = |number: u64| {
        let mut seed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut block = Vec::with_capacity(1 << 16);
        while block.len() < 1 << 16 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            block.extend_from_slice(&seed.to_le_bytes());
        }
        block
    };
    let writer = thread::spawn(move || {
        for number in 0..LEN >> 16 {
            input.write_all(&block(number)).unwrap();
        }
    });
    let mut got = vec![0; 1 << 16];
    for number in 0..LEN >> 16 {
        output.read_exact(&mut got).unwrap();
        assert!(got == block(number), "block {number}");
    }
    assert_eq!(output.read(&mut got).unwrap(), 0);
    writer.join().unwrap();
    assert!(vm.wait().unwrap().success());
}

#[test]
fn a_reader_that_goes_ends_the_command() {
    let user = User::root();
    let mut vm = user
        .mayfly(&[
            "run",
            "--rm",
            "demo",
            "sh",
            "-c",
            "while echo y; do :; done; echo end >&2",
        ])
        .spawn()
        .unwrap();
    let mut output = BufReader::new(vm.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "y\n");
    drop(output);
    let ended = vm.wait_with_output().unwrap();
    // SIGPIPE, or its shell's word for it.
    assert!(!text(&ended.stderr).contains("no such"), "{ended:?}");
    assert!(ended.status.code().is_some(), "{ended:?}");
}

fn signals_and_times_end_it(user: &User) {
    let output = user.output(&["run", "--timeout", "20", "demo", "sleep", "1000"]);
    assert_eq!(output.status.code(), Some(124));
    assert!(text(&output.stderr).contains("--timeout"), "{output:?}");
    let script = "trap 'echo got; exit 3' TERM; echo ready; while :; do sleep 1; done";
    let mut vm = user
        .mayfly(&["run", "demo", "sh", "-c", script])
        .spawn()
        .unwrap();
    let mut output = BufReader::new(vm.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    // SAFETY: touches no memory.
    unsafe { libc::kill(vm.id().cast_signed(), libc::SIGTERM) };
    line.clear();
    output.read_line(&mut line).unwrap();
    assert_eq!(
        (line.as_str(), vm.wait().unwrap().code()),
        ("got\n", Some(3))
    );
}

#[test]
fn a_machine_without_memory_says_so() {
    let user = User::root();
    let output = user.output(&["run", "--memory", "128M", "demo", "tail", "/dev/zero"]);
    assert_eq!(output.status.code(), Some(137), "{output:?}");
    assert!(
        text(&output.stderr).contains("ran out of memory (128M)"),
        "{output:?}"
    );
}

fn vms_in_the_background_are_listed_asked_and_ended(user: &User) {
    let name = user.text(&[
        "run",
        "-d",
        "-i",
        "--name",
        "bg",
        "-e",
        "A=1",
        "demo",
        "sh",
        "-c",
        "echo begun; echo complaint >&2; while read line; do echo got $line; done; sleep 1000",
    ]);
    assert_eq!(name, "bg\n");
    assert_eq!(user.text(&["ps", "-q"]), "bg\n");
    assert!(user.text(&["ps"]).contains("up "), "{}", user.text(&["ps"]));
    let again = user.output(&["run", "--name", "bg", "demo", "true"]);
    assert_eq!(again.status.code(), Some(125));
    assert!(text(&again.stderr).contains("--name bg"), "{again:?}");
    // exec: another process of the same machine, as the same user.
    assert_eq!(
        user.text(&[
            "exec",
            "bg",
            "sh",
            "-c",
            "echo $A; ps | grep -c 'while [r]ead'"
        ]),
        "1\n1\n"
    );
    let exec = user.output(&["exec", "bg", "sh", "-c", "echo e >&2; exit 9"]);
    assert_eq!(
        (exec.status.code(), text(&exec.stderr)),
        (Some(9), "e\n".into())
    );
    assert_eq!(
        user.output(&["exec", "bg", "nothere"]).status.code(),
        Some(127)
    );
    let mut cat = user
        .mayfly(&["exec", "-i", "bg", "wc", "-c"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    cat.stdin
        .take()
        .unwrap()
        .write_all(&[b'x'; 300_000])
        .unwrap();
    assert_eq!(text(&cat.wait_with_output().unwrap().stdout), "300000\n");
    // attach: the command's own streams.
    let mut attached = user
        .mayfly(&["attach", "bg"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(attached.stdout.take().unwrap());
    let mut input = attached.stdin.take().unwrap();
    input.write_all(b"one\n").unwrap();
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "got one\n");
    // logs: both streams, apart.
    let logs = user.output(&["logs", "bg"]);
    assert_eq!(
        (text(&logs.stdout), text(&logs.stderr)),
        ("begun\ngot one\n".into(), "complaint\n".into())
    );
    let last = user.output(&["logs", "-n", "1", "-t", "bg"]);
    let (time, line) = text(&last.stdout).split_once(' ').map_or_else(
        || panic!("{last:?}"),
        |(time, line)| (time.to_owned(), line.to_owned()),
    );
    assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
    assert_eq!(
        (line.as_str(), text(&last.stderr)),
        ("got one\n", String::new())
    );
    let mut follower = user.mayfly(&["logs", "-f", "bg"]).spawn().unwrap();
    let stats: serde_json::Value =
        serde_json::from_str(&user.text(&["stats", "--json", "bg"])).unwrap();
    assert!(stats["memory"].as_u64().unwrap() > 1 << 20, "{stats}");
    let inspect: serde_json::Value = serde_json::from_str(&user.text(&["inspect", "bg"])).unwrap();
    assert_eq!(inspect[0]["state"], "running");
    assert_eq!(inspect[0]["machine"]["cpus"], 1);
    assert_eq!(user.output(&["rm", "bg"]).status.code(), Some(2));
    // stop: a shell that waits for input dies of SIGTERM.
    let waiter = user.mayfly(&["wait", "bg"]).spawn().unwrap();
    assert_eq!(user.text(&["stop", "bg"]), "bg\n");
    assert_eq!(text(&waiter.wait_with_output().unwrap().stdout), "143\n");
    assert_eq!(attached.wait().unwrap().code(), Some(143));
    let mut followed = String::new();
    follower
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut followed)
        .unwrap();
    assert!(follower.wait().unwrap().success());
    assert_eq!(followed, "begun\ngot one\n");
    assert_eq!(user.text(&["ps", "-q"]), "");
    assert!(user.text(&["ps", "-a"]).contains("exited (143)"));
    assert_eq!(user.text(&["rm", "bg"]), "bg\n");
    assert_eq!(user.text(&["ps", "-a", "-q"]), "");
    // What is left is for all VMs.
    let left = fs::read_dir(user.path("run")).unwrap();
    let names = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| !name.starts_with('.')).count(), 0);
}

fn a_killed_process_is_told_as_such(user: &User) {
    user.text(&["run", "-d", "--name", "k", "demo", "sleep", "1000"]);
    let inspect: serde_json::Value = serde_json::from_str(&user.text(&["inspect", "k"])).unwrap();
    let pid = inspect[0]["pid"].as_i64().unwrap() as i32;
    // SAFETY: touches no memory.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
    assert_eq!(user.text(&["wait", "k"]), "137\n");
    assert!(user.text(&["ps", "-a"]).contains("killed"));
    assert_eq!(user.output(&["exec", "k", "true"]).status.code(), Some(125));
    user.text(&["rm", "k"]);
    user.text(&["run", "-d", "--rm", "--name", "k", "demo", "sleep", "1000"]);
    let waiter = user.mayfly(&["wait", "k"]).spawn().unwrap();
    thread::sleep(Duration::from_secs(1));
    user.text(&["kill", "k"]);
    assert_eq!(text(&waiter.wait_with_output().unwrap().stdout), "137\n");
    until("it removes itself", || {
        user.text(&["ps", "-a", "-q"]).is_empty()
    });
}

/// A terminal, and a program on its other end.
struct Terminal {
    master: File,
    child: Child,
    /// What came and was not expected yet.
    seen: String,
}

impl Terminal {
    fn start(mut command: Command) -> Self {
        let (mut master, mut slave) = (-1, -1);
        let size = libc::winsize {
            ws_row: 31,
            ws_col: 97,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let null = std::ptr::null_mut::<libc::c_char>();
        // SAFETY: writes two descriptors; the size is live, the others may be null.
        let made = unsafe { libc::openpty(&mut master, &mut slave, null, null as _, &size) };
        assert_eq!(made, 0);
        // SAFETY: two new descriptors.
        let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        command
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(slave);
        // SAFETY: only system calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        Terminal {
            master,
            child,
            seen: String::new(),
        }
    }

    /// Waits for a text, and forgets all up to its end.
    fn expect(&mut self, wanted: &str) {
        assert!(
            self.comes(wanted, TIMEOUT),
            "no {wanted:?} in {:?}",
            self.seen
        );
    }

    /// Types something again and again, until a text comes of it.
    fn type_until(&mut self, typed: &[u8], wanted: &str) {
        for _ in 0..60 {
            self.master.write_all(typed).unwrap();
            if self.comes(wanted, Duration::from_secs(5)) {
                return;
            }
        }
        panic!("no {wanted:?} in {:?}", self.seen);
    }

    fn comes(&mut self, wanted: &str, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(at) = self.seen.find(wanted) {
                self.seen.drain(..at + wanted.len());
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            let mut entry = libc::pollfd {
                fd: self.master.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one live entry.
            if unsafe { libc::poll(&mut entry, 1, 500) } > 0 {
                let mut buffer = [0; 4096];
                match self.master.read(&mut buffer) {
                    Ok(len) if len > 0 => self.seen += &text(&buffer[..len]),
                    _ => panic!("the terminal ended: {:?}", self.seen),
                }
            }
        }
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: reads a live structure.
        unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    }
}

fn a_terminal_is_a_real_one(user: &User) {
    let mut terminal =
        Terminal::start(user.mayfly(&["run", "--rm", "-it", "--name", "t", "demo", "sh"]));
    terminal.expect("# ");
    terminal.master.write_all(b"stty size; tty\n").unwrap();
    terminal.expect("31 97");
    terminal.expect("/dev/pts/");
    terminal.expect("# ");
    // When the guest has heard of it is not known.
    terminal.resize(40, 100);
    terminal.type_until(b"stty size\n", "40 100");
    // Ctrl-C ends the job, not the shell; Ctrl-Z stops it.
    terminal
        .master
        .write_all(b"sleep 1000; echo not reached\n")
        .unwrap();
    thread::sleep(Duration::from_secs(2));
    terminal.master.write_all(&[3]).unwrap();
    terminal
        .master
        .write_all(b"echo a''b; sleep 1001\n")
        .unwrap();
    terminal.expect("ab");
    terminal.type_until(&[26], "Stopped");
    let mut exec = Terminal::start(user.mayfly(&["exec", "-it", "t", "sh"]));
    exec.expect("# ");
    exec.master.write_all(b"stty size; exit 4\n").unwrap();
    exec.expect("31 97");
    assert_eq!(exec.child.wait().unwrap().code(), Some(4));
    // It says once that there is a stopped job.
    terminal.master.write_all(b"exit 5\nexit 5\n").unwrap();
    assert_eq!(terminal.child.wait().unwrap().code(), Some(5));
}

fn a_user_may_leave_and_come_back(user: &User) {
    const LEAVE: &[u8] = b"\x10\x11";
    user.text(&["run", "-d", "-it", "--name", "l", "demo", "sh"]);
    let attach = || Terminal::start(user.mayfly(&["attach", "l"]));
    let mut terminal = attach();
    terminal.type_until(b"A=kept; echo re''ady\n", "ready");
    terminal.master.write_all(LEAVE).unwrap();
    terminal.expect("left l");
    assert_eq!(terminal.child.wait().unwrap().code(), Some(0));
    let mut terminal = attach();
    terminal.type_until(b"echo $A-here\n", "kept-here");

    let script = "echo re''ady; sleep 3; i=0; while [ $i -lt 5000 ]; do echo $i; i=$((i+1)); done; \
                  echo done > /done";
    let exec = [
        "exec",
        "-it",
        "--detach-keys",
        "ctrl-x,q",
        "l",
        "sh",
        "-c",
        script,
    ];
    let mut exec = Terminal::start(user.mayfly(&exec));
    exec.expect("ready");
    exec.master.write_all(LEAVE).unwrap();
    exec.master.write_all(b"\x18q").unwrap();
    exec.expect("left l");
    assert_eq!(exec.child.wait().unwrap().code(), Some(0));
    until("it goes on", || {
        user.output(&["exec", "l", "cat", "/done"]).stdout == b"done\n"
    });
    terminal.master.write_all(b"exit 6\n").unwrap();
    assert_eq!(terminal.child.wait().unwrap().code(), Some(6));
    let refused = user.output(&["attach", "--detach-keys", "xx", "l"]);
    assert_eq!(refused.status.code(), Some(125));
}

fn output_that_cannot_be_written_is_no_success(user: &User) {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = user
        .mayfly(&["run", "--name", "f", "demo", "echo", "kept"])
        .stdout(full)
        .output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(text(&output.stderr).contains("No space left"), "{output:?}");
    assert_eq!(user.text(&["logs", "f"]), "kept\n");
}

#[test]
fn users_write_to_their_own_streams() {
    let user = User::root();
    let script = "echo out >/dev/stdout; echo err >/dev/stderr";
    let output = user.output(&["run", "--rm", "-u", "nobody", "demo", "sh", "-c", script]);
    assert_eq!(
        (text(&output.stdout), text(&output.stderr)),
        ("out\n".into(), "err\n".into())
    );
}

#[test]
fn pid_1_is_not_ended_from_inside() {
    let user = User::root();
    let script = "kill -9 1; kill -TERM 1; sleep 1; echo alive";
    assert_eq!(
        user.text(&["run", "--rm", "demo", "sh", "-c", script]),
        "alive\n"
    );
}
