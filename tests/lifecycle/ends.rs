//! How VMs end is told truly, and what they had is free.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Output};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use mayfly_testing::processes::{children, kill, name, runs};
use mayfly_testing::user::User;
use mayfly_testing::{TIMEOUT, eventually, eventually_within, many_times, text};

/// So often a process is killed.
const KILLS: u64 = 50;

/// A VM of an image, in the foreground; it is killed when this is dropped.
struct Vm {
    child: Child,
    name: String,
}

impl Vm {
    fn start(user: &User, name: &str, words: &[&str]) -> Self {
        Vm::with_network(user, name, &[words, &["--net", "none"]].concat())
    }

    fn with_network(user: &User, name: &str, words: &[&str]) -> Self {
        let run = ["run", "--name", name, "--memory", "32M"];
        let words = [&run, words, &["tiny", "x"]].concat();
        let child = user.mayfly(&words).spawn().unwrap();
        Vm {
            child,
            name: name.to_owned(),
        }
    }

    /// Its VMM process, as soon as there is one; none if there will be none.
    fn vmm(&mut self) -> Option<u32> {
        self.process("mayfly-vmm")
    }

    /// Its process of a program, whose name may have an end such as `.avx2`, as soon as there is one; none if there will be none.
    fn process(&mut self, program: &str) -> Option<u32> {
        eventually("no process", || {
            let found = children(self.child.id())
                .into_iter()
                .find(|pid| name(*pid).starts_with(program));
            match (found, self.child.try_wait().unwrap()) {
                (None, None) => None,
                (found, _) => Some(found),
            }
        })
    }

    /// Waits until its guest runs.
    fn wait_until_up(&self, user: &User) {
        eventually("its guest does not run", || {
            let info = user.output(&["ctl", &self.name, "info"]);
            info.status.success().then_some(())
        });
    }

    fn end(mut self) -> Output {
        let status = self.child.wait().unwrap();
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let (out, err) = (self.child.stdout.take(), self.child.stderr.take());
        out.unwrap().read_to_end(&mut stdout).unwrap();
        err.unwrap().read_to_end(&mut stderr).unwrap();
        Output {
            status,
            stdout,
            stderr,
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A moment of a VM's life, from before it has a folder until after its guest runs.
fn moment(number: u64) {
    thread::sleep(Duration::from_millis(number * 37 % 150));
}

#[test]
fn disks_are_free_when_their_vm_has_ended() {
    let user = User::tiny();
    let disk = user.path("disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let kernel = user.path("turns-off");
    let kernel = kernel.to_str().unwrap();
    let path = format!("path={}", disk.display());
    let read_only = format!("{path},ro");
    for number in 0..KILLS {
        let disk = if number % 5 == 0 { &read_only } else { &path };
        let words = [
            "boot",
            "--kernel",
            kernel,
            "--console",
            "none",
            "--disk",
            disk,
        ];
        let ended = user.output(&words);
        assert_eq!(ended.status.code(), Some(0), "{number}: {ended:?}");
    }
    // A row of runs has one volume …
    let run = |number: u64| {
        let words = ["-v", "v:/v", "--timeout", "1", "--rm", "--kernel", kernel];
        let ended = Vm::start(&user, "one", &words).end();
        let said = text(&ended.stderr);
        assert!(said.contains("turned itself off"), "{number}: {said}");
    };
    let create = || user.text(&["volume", "create", "v", "--size", "8M"]);
    create();
    (0..KILLS).for_each(run);
    user.text(&["volume", "rm", "v"]);
    // … and it can be removed at once.
    for number in 0..KILLS / 5 {
        create();
        run(number);
        user.text(&["volume", "rm", "v"]);
    }
}

#[test]
fn a_killed_vmm_process_is_told() {
    let user = User::tiny();
    user.text(&["volume", "create", "v", "--size", "8M"]);
    let volume = File::open(user.path("share/mayfly/volumes/v.img")).unwrap();
    let mut recorded = 0;
    for number in 0..KILLS {
        let mut vm = Vm::start(&user, "vm", &["-v", "v:/v"]);
        moment(number);
        let vmm = vm.vmm();
        let vmm = vmm.unwrap_or_else(|| panic!("{number}: it does not start"));
        kill(vmm, libc::SIGKILL);
        let ended = vm.end();
        // What it had is free, at once.
        volume.try_lock().unwrap();
        volume.unlock().unwrap();
        assert!(!runs(vmm), "{number}");
        let said = text(&ended.stderr);
        assert_eq!(ended.status.code(), Some(125), "{number}: {said}");
        let reason = "the VMM process was ended by signal 9";
        assert!(said.contains(reason), "{number}: {said}");
        // One whose machine was not built yet never was.
        let Some(vm) = user.vm("vm") else { continue };
        recorded += 1;
        assert_eq!(vm["state"], "exited", "{number}: {vm}");
        assert_eq!(vm["ended"]["status"], 125, "{number}: {vm}");
        assert_eq!(vm["ended"]["reason"], format!("vm: {reason}"), "{number}");
        assert_eq!(user.text(&["wait", "vm"]), "125\n");
        assert_eq!(user.text(&["logs", "vm"]), "");
        user.text(&["rm", "vm"]);
    }
    assert!(recorded > KILLS / 4, "{recorded}");
    // With --rm nothing stays of one that ran.
    let mut vm = Vm::start(&user, "vm", &["--rm"]);
    vm.wait_until_up(&user);
    kill(vm.vmm().unwrap(), libc::SIGKILL);
    vm.end();
    assert_eq!(user.vm("vm"), None);
    let logs = std::fs::read_dir(user.path("share/mayfly/logs")).unwrap();
    assert_eq!(logs.count(), 0);
}

#[test]
fn a_vmm_process_s_end_is_an_event() {
    let user = User::tiny();
    let mut vm = Vm::start(&user, "vm", &[]);
    vm.wait_until_up(&user);
    let mut events = user.mayfly(&["ctl", "vm", "events"]).spawn().unwrap();
    let lines = BufReader::new(events.stdout.take().unwrap()).lines();
    let (tell, told) = mpsc::channel();
    let reader = thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let _ = tell.send(line);
        }
    });
    // It listens as soon as it hears something.
    eventually("no event", || {
        user.text(&["ctl", "vm", "pause"]);
        user.text(&["ctl", "vm", "resume"]);
        told.try_recv().ok()
    });
    kill(vm.vmm().unwrap(), libc::SIGKILL);
    vm.end();
    events.wait().unwrap();
    reader.join().unwrap();
    let last = told.iter().last().unwrap_or_default();
    assert!(last.contains(r#""event":"ended""#), "{last}");
    assert!(last.contains("ended by signal 9"), "{last}");
}

#[test]
fn a_killed_supervisor_takes_its_vm_along() {
    let user = User::tiny();
    user.text(&["volume", "create", "v", "--size", "8M"]);
    for number in 0..KILLS {
        let mut vm = Vm::start(&user, "vm", &["-v", "v:/v"]);
        moment(number);
        let vmm = (number % 2 == 0).then(|| vm.vmm()).flatten();
        let its = children(vm.child.id());
        kill(vm.child.id(), libc::SIGKILL);
        let ended = vm.end();
        let said = text(&ended.stderr);
        // The volume of the one before is free.
        assert_eq!(ended.status.signal(), Some(9), "{number}: {said}");
        for pid in its.into_iter().chain(vmm) {
            eventually("a process outlives its VM", || (!runs(pid)).then_some(()));
        }
        let Some(vm) = user.vm("vm") else { continue };
        assert_eq!(vm["state"], "killed", "{number}: {vm}");
        assert_eq!(vm["ended"]["status"], 137, "{number}: {vm}");
        assert_eq!(user.text(&["wait", "vm"]), "137\n");
        user.text(&["logs", "vm"]);
        user.text(&["rm", "vm"]);
    }
    // The last one's, too.
    let kernel = user.path("turns-off");
    let words = ["-v", "v:/v", "--kernel", kernel.to_str().unwrap()];
    let ended = Vm::start(&user, "vm", &words).end();
    let said = text(&ended.stderr);
    assert!(said.contains("turned itself off"), "{said}");
}

#[test]
fn a_killed_passt_is_told() {
    let user = User::tiny();
    let reason = "was ended by signal 9";
    let (mut told, mut timeout) = (0, TIMEOUT);
    for number in 0..KILLS {
        let begun = Instant::now();
        let mut vm = Vm::with_network(&user, "vm", &["-p", "127.0.0.1::80"]);
        // On a busy host it may start for longer than any moment.
        match number % 2 {
            0 => {
                vm.wait_until_up(&user);
                timeout = many_times(begun.elapsed());
            }
            _ => moment(number),
        }
        let passt = vm.process("passt");
        let passt = passt.unwrap_or_else(|| panic!("{number}: it has no passt"));
        kill(passt, libc::SIGKILL);
        let problem = eventually_within(timeout, "nobody is told", || {
            let vm_now = user.vm("vm");
            let problem = vm_now.and_then(|it| it["problems"][0].as_str().map(str::to_owned));
            match (problem, vm.child.try_wait().unwrap()) {
                (None, None) => None,
                (problem, _) => Some(problem),
            }
        });
        let Some(problem) = problem else {
            // It was still starting, and is refused.
            let ended = vm.end();
            assert_eq!(ended.status.code(), Some(125), "{number}: {ended:?}");
            let said = text(&ended.stderr);
            assert!(said.contains("passt"), "{number}: {said}");
            assert_eq!(user.vm("vm"), None, "{number}: {said}");
            continue;
        };
        told += 1;
        assert!(
            problem.contains("passt") && problem.contains(reason),
            "{problem}"
        );
        // The VM goes on.
        let vm_now = user.vm("vm").unwrap();
        assert_eq!(vm_now["state"], "running", "{number}: {vm_now}");
        assert!(user.text(&["ps"]).contains("problem"), "{number}");
        if number % 10 == 0 {
            user.text(&["stop", "-t", "0", "vm"]);
            let said = text(&vm.end().stderr);
            assert!(said.contains(reason), "{number}: {said}");
            let vm_now = user.vm("vm").unwrap();
            assert_eq!(vm_now["ended"]["problems"][0], problem.as_str());
        } else {
            drop(vm);
        }
        user.text(&["rm", "vm"]);
    }
    assert!(told >= KILLS / 2, "{told}");
}

#[test]
fn paused_and_stopped_vms_are_told_of_and_end_when_they_are_to() {
    let user = User::tiny();
    for stopped in ["guest", "VMM process", "supervisor"] {
        for words in [&["stop", "-t", "1", "vm"][..], &["rm", "-f", "vm"]] {
            let mut vm = Vm::start(&user, "vm", &[]);
            vm.wait_until_up(&user);
            match stopped {
                "guest" => {
                    user.text(&["ctl", "vm", "pause"]);
                    assert!(user.text(&["ps"]).contains("(paused)"));
                    assert_eq!(user.vm("vm").unwrap()["state"], "paused");
                    for words in [
                        &["exec", "vm", "x"][..],
                        &["attach", "vm"],
                        &["cp", "vm:/x", "/tmp"],
                        &["kill", "-s", "USR1", "vm"],
                    ] {
                        let refused = user.output(words);
                        let said = text(&refused.stderr);
                        assert!(said.contains("vm: is paused"), "{words:?}: {said}");
                        assert!(said.contains("mayfly ctl vm resume"), "{said}");
                    }
                    user.text(&["ctl", "vm", "resume"]);
                    assert_eq!(user.vm("vm").unwrap()["state"], "running");
                    user.text(&["ctl", "vm", "pause"]);
                }
                "supervisor" => kill(vm.child.id(), libc::SIGSTOP),
                _ => kill(vm.vmm().unwrap(), libc::SIGSTOP),
            }
            user.text(words);
            let ended = vm.end();
            // The guest hears nothing, and is turned off, in order.
            assert_eq!(
                ended.status.code(),
                Some(137),
                "{stopped} {words:?} {ended:?}"
            );
            if words[0] == "stop" {
                assert_eq!(user.vm("vm").unwrap()["state"], "exited");
                user.text(&["rm", "vm"]);
            }
        }
    }
}
