//! The console, serial and virtio, on a terminal, pipes, a file, a pty; channels.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use mayfly_testing::guest::Guest;
use mayfly_testing::tools::random_file;
use mayfly_testing::{TIMEOUT, test_data};

/// A terminal, and what a program on it printed.
struct Terminal {
    master: File,
    slave: File,
    seen: String,
}

impl Terminal {
    fn new() -> Self {
        let (mut master, mut slave) = (-1, -1);
        let null = std::ptr::null_mut();
        // SAFETY: writes two descriptors; the other arguments may be null.
        let result = unsafe { libc::openpty(&mut master, &mut slave, null, null as _, null as _) };
        assert_eq!(result, 0);
        // SAFETY: two new descriptors, that nothing else owns.
        let (master, slave) =
            unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        Terminal {
            master: master.into(),
            slave: slave.into(),
            seen: String::new(),
        }
    }

    fn stdio(&self) -> Stdio {
        self.slave.try_clone().unwrap().into()
    }

    fn settings(&self) -> (u32, u32, u32) {
        let mut settings = std::mem::MaybeUninit::<libc::termios>::uninit();
        // SAFETY: fills in the structure.
        let result = unsafe { libc::tcgetattr(self.slave.as_raw_fd(), settings.as_mut_ptr()) };
        assert_eq!(result, 0);
        // SAFETY: the call above succeeded.
        let settings = unsafe { settings.assume_init() };
        (settings.c_iflag, settings.c_oflag, settings.c_lflag)
    }

    fn resize(&self, columns: u16, rows: u16) {
        let size = libc::winsize {
            ws_col: columns,
            ws_row: rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: reads a live structure.
        let result = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
        assert_eq!(result, 0);
    }

    fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Waits for a text that was not seen before.
    fn expect(&mut self, what: &str) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(at) = self.seen.find(what) {
                self.seen.drain(..at + what.len());
                return;
            }
            assert!(Instant::now() < deadline, "no {what:?} in {:?}", self.seen);
            let mut entry = libc::pollfd {
                fd: self.master.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one live entry.
            if unsafe { libc::poll(&mut entry, 1, 200) } > 0 {
                let mut chunk = [0; 4096];
                let len = self.master.read(&mut chunk).unwrap_or(0);
                self.seen.push_str(&String::from_utf8_lossy(&chunk[..len]));
            }
        }
    }
}

/// A guest with a shell on a terminal.
fn shell(terminal: &Terminal) -> Guest {
    let mut guest =
        Guest::new("echo ready; exec setsid sh -c 'exec sh -i </dev/ttyS0 >/dev/ttyS0 2>&1'");
    guest
        .command
        .stdin(terminal.stdio())
        .stdout(terminal.stdio())
        .stderr(terminal.stdio());
    guest.own_output()
}

#[test]
fn a_shell_on_a_terminal_in_raw_mode_that_is_restored() {
    let mut terminal = Terminal::new();
    let before = terminal.settings();
    let running = shell(&terminal).start();
    terminal.expect("ready");
    terminal.expect("# ");
    assert_ne!(terminal.settings(), before);
    terminal.type_in("echo answer-$((40 + 2))\n");
    terminal.expect("answer-42");
    terminal.expect("# ");
    terminal.type_in("\x01h");
    terminal.expect("Ctrl-A x");
    terminal.type_in("\x01x");
    let ended = running.wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_signal_restores_the_terminal_too() {
    let mut terminal = Terminal::new();
    let before = terminal.settings();
    let running = shell(&terminal).start();
    terminal.expect("ready");
    running.signal(15);
    let ended = running.wait();
    assert_eq!(ended.code(), Some(143), "{ended:?}");
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_crash_restores_the_terminal_too() {
    let mut terminal = Terminal::new();
    let before = terminal.settings();
    let mut guest = Guest::new("").args(["--cmdline", "reboot=t -- reboot"]);
    guest
        .command
        .stdin(terminal.stdio())
        .stdout(terminal.stdio())
        .stderr(terminal.stdio());
    let running = guest.own_output().start();
    terminal.expect("triple fault");
    assert_eq!(running.wait().code(), Some(4));
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_paste_is_not_lost() {
    let mut guest = Guest::new("stty -echo; echo ready; head -n 200 | md5sum; echo over");
    guest.command.stdin(Stdio::piped());
    let mut running = guest.start();
    let mut stdin = running.child.stdin.take().unwrap();
    let lines: String = (0..200)
        .map(|line| format!("line {line} of a long paste\n"))
        .collect();
    stdin.write_all(lines.as_bytes()).unwrap();
    drop(stdin);
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy");
    std::fs::write(&copy, &lines).unwrap();
    let sum = mayfly_testing::tools::tool("md5sum", &[copy.to_str().unwrap()]);
    let sum = sum.split(' ').next().unwrap().to_owned();
    let ended = running.wait();
    assert!(ended.stdout.contains(&sum), "{sum}: {ended:?}");
}

#[test]
fn much_output_arrives_whole_at_a_slow_reader() {
    let guest = Guest::new(
        "i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); echo line $i of much; done; echo over",
    );
    let mut running = guest.start();
    running.expect("over");
    let ended = running.wait();
    for line in 1..=3000 {
        assert!(
            ended.stdout.contains(&format!("line {line} of much\n")),
            "line {line}"
        );
    }
}

#[test]
fn a_file_takes_the_output() {
    let guest = Guest::new("echo to-the-file");
    let file = guest.path("log");
    let mut running = guest
        .args(["--console", &format!("file={}", file.display())])
        .start();
    let folder = std::mem::replace(&mut running.folder, tempfile::tempdir().unwrap());
    let ended = running.wait();
    assert_eq!((ended.code(), ended.stdout.as_str()), (Some(0), ""));
    assert!(
        std::fs::read_to_string(&file)
            .unwrap()
            .contains("to-the-file")
    );
    drop(folder);
}

#[test]
fn no_console_is_quiet() {
    let ended = Guest::new("echo nobody hears this")
        .args(["--console", "none"])
        .start()
        .wait();
    assert_eq!(
        (ended.code(), ended.stdout.as_str()),
        (Some(0), ""),
        "{ended:?}"
    );
}

#[test]
fn a_pty_is_named_and_talks() {
    let mut guest =
        Guest::new("stty -echo; echo ready; read line; echo got-$line").args(["--console", "pty"]);
    guest.command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut running = guest.own_output().start();
    let mut errors = running.child.stderr.take().unwrap();
    let mut told = String::new();
    while !told.contains('\n') {
        let mut byte = [0];
        assert_eq!(errors.read(&mut byte).unwrap(), 1, "{told}");
        told.push(byte[0].into());
    }
    let name = told
        .trim()
        .strip_prefix("mayfly: console is ")
        .unwrap_or_else(|| panic!("{told}"))
        .to_owned();
    let slave = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY) // else its end would be ours
        .open(&name)
        .unwrap();
    let mut terminal = Terminal {
        master: slave.try_clone().unwrap(),
        slave,
        seen: String::new(),
    };
    terminal.expect("ready");
    terminal.type_in("hello\n");
    terminal.expect("got-hello");
    assert_eq!(running.wait().code(), Some(0));
    std::thread::sleep(Duration::from_millis(10));
}

#[test]
fn a_virtio_console_has_a_shell_and_the_terminal_s_size() {
    let mut terminal = Terminal::new();
    terminal.resize(100, 30);
    let mut guest = Guest::plain().args(["--console", "virtio"]);
    guest
        .command
        .stdin(terminal.stdio())
        .stdout(terminal.stdio())
        .stderr(terminal.stdio());
    // SAFETY: only system calls between fork and exec.
    unsafe {
        guest.command.pre_exec(|| {
            // A terminal tells of its size those whom it controls.
            assert!(libc::setsid() >= 0 && libc::ioctl(0, libc::TIOCSCTTY, 0) == 0);
            Ok(())
        });
    }
    let running = guest.own_output().start();
    terminal.expect("# ");
    terminal.type_in("tty; stty size; cat /sys/class/tty/console/active\n");
    for expected in ["/dev/hvc0", "30 100", "hvc0"] {
        terminal.expect(expected);
    }
    terminal.expect("# ");
    terminal.type_in("until stty size | grep '^40 120'; do usleep 10000; done; echo re''sized\n");
    terminal.resize(120, 40);
    terminal.expect("40 120");
    terminal.expect("resized");
    terminal.type_in("\x01x");
    assert_eq!(running.wait().code(), Some(0));
}

/// The kernel's first words come by the serial port, before there is a driver.
#[test]
fn a_virtio_console_loses_nothing_and_says_nothing_twice() {
    let mut guest = Guest::with_kernel(
        "generic-6.1",
        "vmlinux",
        "stty -echo; head -n 200 | md5sum
         i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); echo line $i of much; done; echo over",
    )
    .args(["--console", "virtio", "--cmdline", "loglevel=6"]);
    let input = guest.path("input");
    let lines: String = (0..200)
        .map(|line| format!("line {line} of a long paste\n"))
        .collect();
    std::fs::write(&input, &lines).unwrap();
    let sum = mayfly_testing::tools::tool("md5sum", &[input.to_str().unwrap()]);
    guest.command.stdin(File::open(&input).unwrap());
    let shown = guest.run();
    assert!(shown.contains(sum.split(' ').next().unwrap()), "{shown}");
    assert_eq!(shown.matches("Kernel command line:").count(), 1, "{shown}");
    let lines = shown.lines().filter(|line| line.ends_with(" of much"));
    assert_eq!(lines.count(), 2000);
}

#[test]
fn channels_carry_bytes_both_ways_and_tell_who_is_there() {
    const MUCH: usize = 8 << 20;
    let guest = Guest::new(
        "cd /dev/virtio-ports; ls -1
         exec 3<>echo; cat <&3 >&3; echo hung-up
         until read line <&3; do usleep 10000; done; echo again-$line; echo answer >&3
         echo by-the-way >aside; echo done",
    );
    let folder = guest.path("");
    let channel = |name: &str| format!("name={name},unix={}", folder.join(name).display());
    let mut running = guest
        .args([
            "--channel",
            &channel("echo"),
            "--channel",
            &channel("aside"),
        ])
        .start();
    let mut aside = connect(&folder.join("aside"));
    let data = folder.join("data");
    random_file(&data, MUCH);
    let data = std::fs::read(data).unwrap();
    {
        let mut echo = connect(&folder.join("echo"));
        let (mut writer, sent) = (echo.try_clone().unwrap(), data.clone());
        let writer = std::thread::spawn(move || writer.write_all(&sent).unwrap());
        let mut came_back = vec![0; MUCH];
        echo.read_exact(&mut came_back).unwrap();
        assert!(came_back == data, "changed on the way");
        writer.join().unwrap();
    }
    running.expect("hung-up");
    let mut echo = connect(&folder.join("echo"));
    echo.write_all(b"hello\n").unwrap();
    let mut answer = [0; 7];
    echo.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer\n");
    let mut words = [0; 11];
    aside.read_exact(&mut words).unwrap();
    assert_eq!(&words, b"by-the-way\n");
    let ended = running.wait();
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    for expected in ["aside\necho\n", "again-hello", "done"] {
        assert!(ended.stdout.contains(expected), "{ended:?}");
    }
    assert!(!folder.join("echo").exists());
}

/// Connects as soon as the VM listens.
fn connect(path: &std::path::Path) -> UnixStream {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) if Instant::now() > deadline => panic!("{}: {error}", path.display()),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

#[test]
fn one_instruction_reads_and_prints_many_bytes() {
    let guest = Guest::of_kernel(&test_data("hostile"));
    let console = guest
        .args(["--cmdline", "strings", "--memory", "64M"])
        .run();
    assert!(console.contains(&"x".repeat(16)), "{console}");
}
