//! Other monitors of VMs: QEMU's microvm, Firecracker, Cloud Hypervisor. All boot the kernel
//! that mayfly boots, with our init, and the image's files on a disk.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use serde_json::json;

use super::commands::{first_line, program, words};
use super::engine::{About, Engine, Job, PROBE, Place};
use crate::error::{Context, Error};
use crate::instance::{Launch, Sign};
use crate::model::Mark;

/// The kernel's parameters for the disk with the image's files.
const ROOT: &str = "root=/dev/vda rootfstype=squashfs ro";

/// The kernel's parameter for the network that QEMU's user network has by default.
const SLIRP: &str = "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off";

pub struct Machine {
    kind: Monitor,
    program: PathBuf,
    version: Option<String>,
    kernel: PathBuf,
    initrd: PathBuf,
    disk: PathBuf,
    /// QEMU can be a network's other side by itself; others need a device of the host's.
    network: bool,
    /// The image has other variables than `PATH`, which a kernel's command line would take for
    /// its own.
    only_path: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Monitor {
    Qemu,
    Firecracker,
    CloudHypervisor,
}

impl Monitor {
    /// The kernel's parameters for a monitor's devices: the console and the restart that its
    /// documentation recommends, and no probing for devices that are not there.
    fn devices(self) -> &'static str {
        match self {
            // docs/system/i386/microvm.rst, with all legacy devices off but the clock
            Monitor::Qemu => "console=hvc0 reboot=t pci=off 8250.nr_uarts=0",
            // docs/getting-started.md; the keyboard as in `DEFAULT_KERNEL_CMDLINE`
            Monitor::Firecracker => {
                "console=ttyS0 reboot=k pci=off 8250.nr_uarts=1 i8042.noaux i8042.nomux \
                 i8042.dumbkbd"
            }
            Monitor::CloudHypervisor => "console=hvc0 8250.nr_uarts=0",
        }
    }
}

impl Machine {
    pub fn find(name: &str, place: &Place) -> Result<Self, String> {
        let (kind, program) = match name {
            "qemu" => (Monitor::Qemu, program("qemu-system-x86_64")?),
            "firecracker" => (Monitor::Firecracker, program("firecracker")?),
            _ => (Monitor::CloudHypervisor, program("cloud-hypervisor")?),
        };
        (place.mayfly.check_kvm)()?;
        let guest = &place.mayfly.guest;
        let initrd = guest.initrd.clone().ok_or("there is no kernel for it")?;
        let kernel = guest.kernel.clone();
        Ok(Machine {
            kind,
            version: first_line(&program, &["--version"]),
            program,
            kernel,
            initrd,
            disk: place.root.with_extension("squashfs"),
            network: kind == Monitor::Qemu,
            only_path: place.env.iter().any(|it| !it.starts_with("PATH=")),
        })
    }

    /// The kernel's command line: the same for all monitors, and mayfly's as well, but for
    /// what each has.
    fn cmdline(&self, place: &Place, job: &Job) -> Result<String, Error> {
        let mut cmdline = format!(
            "{} {} {ROOT} init={PROBE}",
            place.mayfly.cmdline,
            self.kind.devices()
        );
        if self.network {
            cmdline.extend([" ", SLIRP]);
        }
        // The kernel gives its init what it does not know itself.
        let path = place.env.iter().find(|it| it.starts_with("PATH="));
        if let Some(path) = path {
            cmdline.extend([" ".to_owned(), quoted(path)?]);
        }
        // The probe is the first process there, and ends the machine.
        let end = match self.kind {
            // Here a machine that restarts does not end.
            Monitor::CloudHypervisor => "off",
            Monitor::Qemu | Monitor::Firecracker => "restart",
        };
        let probe = ["--", &job.nonce, end].into_iter();
        for word in probe.chain(job.words.iter().map(String::as_str)) {
            cmdline.extend([" ".to_owned(), quoted(word)?]);
        }
        Ok(cmdline)
    }
}

/// Makes of the image's files a read-only file system, once for all of them, compressed as
/// mayfly's layers are.
fn make_disk(root: &Path, disk: &Path) -> Result<(), String> {
    if disk.exists() {
        return Ok(());
    }
    let output = Command::new("mksquashfs")
        .arg(root)
        .arg(disk)
        .args(["-comp", "lz4", "-noappend", "-no-progress", "-quiet"])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("mksquashfs (package squashfs-tools): {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "mksquashfs: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}

impl Engine for Machine {
    fn about(&self) -> About {
        let mut notes =
            vec!["mayfly's kernel and init, the image's files on a read-only disk".into()];
        if self.kind == Monitor::Qemu && !self.network {
            notes.push("without a network, as it failed with one".into());
        }
        if self.kind == Monitor::Firecracker {
            notes.push("without its jailer".into());
        }
        if self.only_path {
            notes.push("of the image's variables, the command has only PATH".into());
        }
        About {
            version: self.version.clone(),
            network: match self.network {
                true => "user network (slirp)".into(),
                false => "none".into(),
            },
            notes,
        }
    }

    fn ask_less(&mut self) -> bool {
        std::mem::take(&mut self.network)
    }

    fn prepare(&mut self, place: &Place) -> Result<(), String> {
        make_disk(&place.root, &self.disk)
    }

    fn has_volumes(&self) -> bool {
        false
    }

    fn launch(&self, place: &Place, job: &Job) -> Result<Launch, Error> {
        let machine = Description {
            kernel: text(&self.kernel),
            initrd: text(&self.initrd),
            disk: text(&self.disk),
            cmdline: self.cmdline(place, job)?,
            cpus: place.cpus,
            memory_mib: place.memory_mib,
        };
        let mut signs = Vec::new();
        let arguments = match self.kind {
            Monitor::Qemu => {
                // Our init writes a byte to a port.
                let mark = job.directory.join("mark");
                signs.push(Sign::Byte(fifo(&mark)?, Mark::Init));
                qemu(&machine, &mark, self.network)
            }
            Monitor::Firecracker => firecracker(&machine, job)?,
            Monitor::CloudHypervisor => cloud_hypervisor(&machine),
        };
        let mut command = vec![self.program.clone().into_os_string()];
        command.extend(arguments);
        Ok(Launch {
            command,
            nonce: job.nonce.clone(),
            signs,
            own_status: true,
            ..Launch::default()
        })
    }
}

/// The machine that a monitor is asked for.
struct Description {
    kernel: String,
    initrd: String,
    disk: String,
    cmdline: String,
    cpus: u32,
    memory_mib: u64,
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The arguments of QEMU, whose debug console writes init's byte to `mark`.
fn qemu(machine: &Description, mark: &Path, network: bool) -> Vec<OsString> {
    let (cpus, memory) = (machine.cpus.to_string(), machine.memory_mib.to_string());
    // The clock stays, as Debian's kernel waits for one, for seconds.
    let mut arguments = words([
        "-M",
        "microvm,x-option-roms=off,pit=off,pic=off,isa-serial=off,rtc=on",
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-smp",
        &cpus,
        "-m",
        &memory,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-global",
        "virtio-mmio.force-legacy=false",
    ]);
    arguments.extend(words(["-kernel", &machine.kernel]));
    arguments.extend(words(["-initrd", &machine.initrd]));
    arguments.extend(words(["-append", &machine.cmdline]));
    arguments.extend(words([
        "-chardev",
        "stdio,id=console",
        "-device",
        "virtio-serial-device",
        "-device",
        "virtconsole,chardev=console",
        "-chardev",
        &format!("file,id=mark,path={}", mark.display()),
        "-device",
        "isa-debugcon,iobase=0xb04,chardev=mark",
        "-drive",
        &format!(
            "id=root,file={},format=raw,readonly=on,if=none",
            machine.disk
        ),
        "-device",
        "virtio-blk-device,drive=root",
    ]));
    if network {
        arguments.extend(words(["-netdev", "user,id=net"]));
        arguments.extend(words(["-device", "virtio-net-device,netdev=net"]));
    }
    arguments
}

/// The arguments of Firecracker, and its configuration in the job's directory.
fn firecracker(machine: &Description, job: &Job) -> Result<Vec<OsString>, Error> {
    let config = json!({
        "boot-source": {
            "kernel_image_path": machine.kernel,
            "initrd_path": machine.initrd,
            "boot_args": machine.cmdline,
        },
        "drives": [{
            "drive_id": "root", "path_on_host": machine.disk,
            "is_root_device": false, "is_read_only": true,
        }],
        "machine-config": {
            "vcpu_count": machine.cpus, "mem_size_mib": machine.memory_mib,
        },
    });
    let path = job.directory.join("firecracker.json");
    fs::write(&path, config.to_string()).or_host(path.display())?;
    // Its log goes where the console does.
    Ok(words([
        "--no-api",
        "--level",
        "Error",
        "--id",
        &job.id,
        "--config-file",
        &path.to_string_lossy(),
    ]))
}

/// The arguments of Cloud Hypervisor.
fn cloud_hypervisor(machine: &Description) -> Vec<OsString> {
    words([
        "--kernel",
        &machine.kernel,
        "--initramfs",
        &machine.initrd,
        "--cmdline",
        &machine.cmdline,
        "--cpus",
        &format!("boot={}", machine.cpus),
        "--memory",
        &format!("size={}M", machine.memory_mib),
        "--disk",
        &format!("path={},readonly=on", machine.disk),
        "--console",
        "tty",
        "--serial",
        "off",
    ])
}

/// A word as a kernel's command line has it.
fn quoted(word: &str) -> Result<String, Error> {
    // The kernel takes quotes as a shell does, but none within.
    match word {
        _ if word.contains('"') => Err(Error::invalid(format!(
            "{word}: a kernel's command line cannot have quotes"
        ))),
        _ if word.contains(char::is_whitespace) => Ok(format!("\"{word}\"")),
        _ => Ok(word.to_owned()),
    }
}

/// Makes a pipe with a name, and opens its end for reading: who writes need not wait.
fn fifo(path: &PathBuf) -> Result<OwnedFd, Error> {
    let what = path.display();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path,
        rustix::fs::FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .or_host(&what)?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).or_host(what)
}
