//! A VMM with all of its threads, seen from outside.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Barrier};

use mayfly_sandbox::{self as sandbox, Keep, Limits, Mode, Policy, Role, SandboxSetup};

const POLICY: Policy = Policy {
    mode: Mode::Require,
    new_net: true,
};
const ON: Policy = Policy {
    mode: Mode::On,
    ..POLICY
};

const TIMEOUT_MS: libc::c_int = 10_000;

/// A VMM of three threads, one of which started before the sandbox closed. It says when
/// they are confined, and lives until it is told to end.
fn vmm(setup: SandboxSetup, told: &mut io::PipeReader, say: &mut io::PipeWriter) -> io::Result<()> {
    let kept = [0, 1, 2, told.as_raw_fd(), say.as_raw_fd()];
    let pending = setup.barrier().pending();
    std::thread::spawn(move || pending.confine(Role::Io).map(|()| std::thread::park()));
    let confinement = setup.close(&Limits::default(), Keep::Only(&kept));
    let confinement = confinement.map_err(io::Error::other)?;
    let confined = Arc::new(Barrier::new(2));
    let (its_confinement, its_confined) = (confinement.clone(), confined.clone());
    std::thread::spawn(move || {
        let result = its_confinement.confine(Role::Vcpu);
        its_confined.wait();
        result.map(|()| std::thread::park())
    });
    confined.wait();
    confinement.settle();
    confinement.confine(Role::EventLoop)?;
    say.write_all(b"x")?;
    told.read(&mut [0]).map(drop)
}

/// Each thread of a VMM has nothing left.
pub fn every_thread_is_confined(root: bool) -> Result<(), String> {
    let (mut told, tell) = io::pipe().map_err(text)?;
    let (mut said, mut say) = io::pipe().map_err(text)?;
    let child = sandbox::spawn(&ON, |setup| {
        let done = vmm(setup, &mut told, &mut say);
        done.inspect_err(|error| eprintln!("{error}"))
            .is_err()
            .into()
    });
    let child = child.map_err(text)?;
    drop(say);
    said.read_exact(&mut [0]).map_err(text)?;
    let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).map_err(text)?;
    let mut count = 0;
    for task in tasks {
        let status = task.map_err(text)?.path().join("status");
        let status = fs::read_to_string(status).map_err(text)?;
        count += 1;
        let nothing = "0000000000000000";
        for (name, value) in [
            ("CapInh", nothing),
            ("CapPrm", nothing),
            ("CapEff", nothing),
            ("CapBnd", nothing),
            ("CapAmb", nothing),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
        ] {
            let line = format!("{name}:\t{value}\n");
            (status.contains(&line) || status.contains(line.trim_end()))
                .then_some(())
                .ok_or_else(|| format!("no {line:?} in {status}"))?;
        }
        if root && !status.contains("Uid:\t18") {
            return Err(format!("no uid of its own: {status}"));
        }
    }
    drop(tell);
    match count {
        3 => Ok(()),
        _ => Err(format!("{count} threads")),
    }
}

/// A supervisor that is killed leaves no VMM behind.
pub fn a_killed_supervisor_takes_it_along() -> Result<(), String> {
    let (mut told, _tell) = io::pipe().map_err(text)?;
    let (mut said, mut say) = io::pipe().map_err(text)?;
    // SAFETY: this process has one thread.
    let supervisor = unsafe { libc::fork() };
    if supervisor == 0 {
        let child = sandbox::spawn(&ON, |setup| {
            u8::from(vmm(setup, &mut told, &mut say).is_err())
        });
        // Only the VMM has it then, and this lives until it is killed.
        drop(say);
        let _child = child.map_err(text);
        loop {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    }
    drop(say);
    let begun = said.read_exact(&mut [0]);
    // SAFETY: numbers; nobody else waits for it.
    unsafe {
        libc::kill(supervisor, libc::SIGKILL);
        libc::waitpid(supervisor, std::ptr::null_mut(), 0);
    }
    begun.map_err(text)?;
    // Its end closes the last writer.
    let mut entry = libc::pollfd {
        fd: said.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one live entry.
    match unsafe { libc::poll(&mut entry, 1, TIMEOUT_MS) } {
        1 => Ok(()),
        _ => Err("it lives".to_owned()),
    }
}

/// What threads do all the time is not forbidden: they allocate, wait, are interrupted,
/// and end; the last panics, or aborts.
pub fn the_ordinary_is_allowed() -> Result<(), String> {
    for abort in [false, true] {
        let child = sandbox::spawn(&ON, |setup| {
            match ordinary(setup) {
                Ok(()) if abort => std::process::abort(),
                Ok(()) => panic!("as it should"),
                Err(error) => eprintln!("{error}"),
            }
            1
        });
        let status = child.and_then(|mut child| child.wait()).map_err(text)?;
        if status.code() != Some(sandbox::PANIC.into()) {
            return Err(status.to_string());
        }
    }
    Ok(())
}

fn ordinary(setup: SandboxSetup) -> io::Result<()> {
    mayfly::kvm::vcpu::install_kick_handler().map_err(io::Error::other)?;
    let allocate = || {
        let mut pieces: Vec<Vec<u8>> = (0..1000).map(|len| vec![1; 10 * len]).collect();
        pieces.push(vec![1; 4 << 20]);
        pieces.iter().map(Vec::len).sum::<usize>()
    };
    let pending = setup.barrier().pending();
    let io = std::thread::spawn(move || pending.confine(Role::Io).map(|()| allocate()));
    let confinement = setup.close(&Limits::default(), Keep::Only(&[0, 1, 2]));
    let confinement = confinement.map_err(io::Error::other)?;
    let (say, said) = std::sync::mpsc::channel();
    let its_confinement = confinement.clone();
    let vcpu = std::thread::spawn(move || {
        its_confinement.confine(Role::Vcpu)?;
        let _ = say.send(allocate());
        std::thread::park();
        Ok::<_, io::Error>(allocate())
    });
    confinement.settle();
    confinement.confine(Role::EventLoop)?;
    let seeds: std::collections::HashMap<usize, usize> = [(1, allocate())].into();
    said.recv().map_err(io::Error::other)?;
    // SAFETY: it was not joined, and the signal's handler is installed.
    unsafe { libc::pthread_kill(vcpu.as_pthread_t(), mayfly::kvm::vcpu::kick_signal()) };
    vcpu.thread().unpark();
    let failed = |_| io::Error::other("a thread panicked");
    let sizes = [vcpu.join().map_err(failed)??, io.join().map_err(failed)??];
    match sizes.map(Some) == [seeds.get(&1).copied(); 2] {
        true => Ok(()),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// It would have the locks of threads that it does not have.
pub fn a_process_with_threads_is_not_divided() -> Result<(), String> {
    let barrier = Arc::new(Barrier::new(2));
    let same = barrier.clone();
    let thread = std::thread::spawn(move || same.wait());
    let refused = sandbox::spawn(&POLICY, |_| 0).is_err();
    barrier.wait();
    let _ = thread.join();
    match refused {
        true => Ok(()),
        false => Err("it was".to_owned()),
    }
}

/// What is required is there, or the layer that is missing is named.
pub fn what_is_missing_is_named() -> Result<(), String> {
    let probed = sandbox::probe(&ON).map_err(text)?;
    let required = sandbox::probe(&POLICY);
    match (probed.missing(), required) {
        (None, Ok(_)) => Ok(()),
        (Some((layer, _)), Err(error)) if error.to_string().contains(layer.name()) => Ok(()),
        (missing, required) => Err(format!("{missing:?}, but {required:?}")),
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
