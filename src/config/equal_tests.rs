//! Flags, TOML and a program that fills options in get equal machines for equal wishes.

use std::collections::BTreeMap;
use std::fmt::Write;

use mayfly_devices::rate_limiter::{Limits, Rate};
use mayfly_devices::virtio::balloon::Abilities;
use proptest::collection::btree_map;
use proptest::option;
use proptest::prelude::*;
use proptest::strategy::ValueTree;

use super::machine::testing::validate;
use super::{
    BalloonConfig, ChannelConfig, ConsoleConfig, DiskConfig, Format, HostEnd, MachineConfig,
    MachineOptions, NetConfig, Network, Queues, RawConfig, Setting, VsockConfig,
};
use crate::spec::{BootProtocol, MemorySpec, WatchdogAction};

/// What a user wants.
#[derive(Clone, Debug)]
struct Wishes {
    cpus: u8,
    memory_mib: u64,
    shared: bool,
    nested: bool,
    cmdline: Option<String>,
    /// By their paths: read-only, an id, and operations a second.
    disks: BTreeMap<String, (bool, Option<String>, Option<u64>)>,
    /// By their TAPs: the last byte of a MAC, and whether there is a queue for each vCPU.
    nets: BTreeMap<String, (Option<u8>, bool)>,
    vsock: Option<(u32, String)>,
    balloon_mib: Option<(u64, bool)>,
    watchdog: Option<WatchdogAction>,
    /// By their names, the sockets.
    channels: BTreeMap<String, String>,
}

/// A path, which may need commas, quotes and backslashes escaped.
fn path() -> impl Strategy<Value = String> {
    "[a-zä,=\"\\\\ ]{1,12}".prop_map(|path| format!("/p/{path}"))
}

fn wishes() -> impl Strategy<Value = Wishes> {
    let disk = (
        any::<bool>(),
        option::of("[a-z0-9]{1,20}"),
        option::of(1..10_000u64),
    );
    let watchdog = prop_oneof![
        Just(WatchdogAction::Crash),
        Just(WatchdogAction::Reset),
        Just(WatchdogAction::Nmi)
    ];
    let first = (
        1..=32u8,
        64..4096u64,
        any::<bool>(),
        any::<bool>(),
        option::of("[a-z=]{1,10}"),
    );
    let second = (
        btree_map(path(), disk, 0..4),
        btree_map(
            "[a-z]{1,15}",
            (option::of(any::<u8>()), any::<bool>()),
            0..3,
        ),
        option::of((3..1000u32, "/[a-z,]{1,12}")),
        option::of((0..64u64, any::<bool>())),
        option::of(watchdog),
        btree_map("[a-z]{1,8}", path(), 0..3),
    );
    (first, second).prop_map(|(first, second)| {
        let (cpus, memory_mib, shared, nested, cmdline) = first;
        let (disks, nets, vsock, balloon_mib, watchdog, channels) = second;
        Wishes {
            cpus,
            memory_mib,
            shared,
            nested,
            cmdline,
            disks,
            nets,
            vsock,
            balloon_mib,
            watchdog,
            channels,
        }
    })
}

fn mac(last: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, last]
}

fn action(action: WatchdogAction) -> &'static str {
    match action {
        WatchdogAction::Crash => "crash",
        WatchdogAction::Reset => "reset",
        WatchdogAction::Nmi => "nmi",
    }
}

fn as_flags(wishes: &Wishes) -> RawConfig {
    let path = |path: &str| path.replace(',', ",,");
    let setting = |text: String| Setting::Text(text.into());
    let disks = wishes.disks.iter().map(|(file, (read_only, id, iops))| {
        let mut text = format!("path={}", path(file));
        text += if *read_only { ",ro" } else { "" };
        let _ = id.iter().try_for_each(|id| write!(text, ",id={id}"));
        let _ = iops
            .iter()
            .try_for_each(|iops| write!(text, ",iops={iops}"));
        setting(text)
    });
    let nets = wishes.nets.iter().map(|(tap, (last, queues))| {
        let mut text = format!("tap={tap}");
        let _ = last
            .iter()
            .try_for_each(|last| write!(text, ",mac=02:00:00:00:00:{last:02x}"));
        text += if *queues { ",queues=cpus" } else { "" };
        setting(text)
    });
    let channels = wishes.channels.iter();
    let shared = if wishes.shared { ",shared" } else { "" };
    RawConfig {
        name: Some("vm".into()),
        cpus: Some(setting(wishes.cpus.to_string())),
        memory: Some(setting(format!("{}M{shared}", wishes.memory_mib))),
        nested: wishes.nested,
        cmdline: wishes.cmdline.clone(),
        boot_protocol: Some(BootProtocol::Pvh),
        disk: disks.collect(),
        net: nets.collect(),
        vsock: wishes
            .vsock
            .as_ref()
            .map(|(cid, unix)| setting(format!("cid={cid},unix={}", path(unix)))),
        balloon: wishes.balloon_mib.map(|(mib, reporting)| {
            setting(format!(
                "{mib}{}",
                if reporting { ",reporting" } else { "" }
            ))
        }),
        watchdog: wishes
            .watchdog
            .map(|it| setting(format!("action={}", action(it)))),
        channel: channels
            .map(|(name, unix)| setting(format!("name={name},unix={}", path(unix))))
            .collect(),
        console: Some(setting("none".into())),
        ..RawConfig::default()
    }
}

fn as_toml(wishes: &Wishes) -> RawConfig {
    // A basic string of TOML is written as one of JSON.
    let quoted = |text: &str| serde_json::to_string(text).unwrap();
    let mut text = format!(
        "name = \"vm\"\ncpus = {}\nmemory = {{ size = \"{}M\", shared = {} }}\nnested = {}\n\
         boot-protocol = \"pvh\"\nconsole = \"none\"\n",
        wishes.cpus, wishes.memory_mib, wishes.shared, wishes.nested
    );
    let mut add = |line: String| text += &(line + "\n");
    if let Some(cmdline) = &wishes.cmdline {
        add(format!("cmdline = {}", quoted(cmdline)));
    }
    if let Some((cid, unix)) = &wishes.vsock {
        add(format!(
            "vsock = {{ cid = {cid}, unix = {} }}",
            quoted(unix)
        ));
    }
    if let Some((mib, reporting)) = &wishes.balloon_mib {
        add(format!(
            "balloon = {{ size = {mib}, reporting = {reporting} }}"
        ));
    }
    if let Some(watchdog) = wishes.watchdog {
        add(format!(
            "watchdog = {{ action = \"{}\" }}",
            action(watchdog)
        ));
    }
    for (file, (read_only, id, iops)) in &wishes.disks {
        add(format!(
            "[[disk]]\npath = {}\nro = {read_only}",
            quoted(file)
        ));
        id.iter().for_each(|id| add(format!("id = {}", quoted(id))));
        iops.iter().for_each(|iops| add(format!("iops = {iops}")));
    }
    for (tap, (last, queues)) in &wishes.nets {
        add(format!("[[net]]\ntap = {}", quoted(tap)));
        let mac = |last| format!("mac = \"02:00:00:00:00:{last:02x}\"");
        last.iter().for_each(|last| add(mac(last)));
        let number = if *queues { "\"cpus\"" } else { "1" };
        add(format!("queues = {number}"));
    }
    for (name, unix) in &wishes.channels {
        add(format!(
            "[[channel]]\nname = {}\nunix = {}",
            quoted(name),
            quoted(unix)
        ));
    }
    RawConfig::from_toml(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// As `mayfly run` does it.
fn as_options(wishes: &Wishes) -> MachineOptions {
    let disks = wishes
        .disks
        .iter()
        .map(|(file, (read_only, id, iops))| DiskConfig {
            path: file.into(),
            format: Format::Raw,
            backing: None,
            read_only: *read_only,
            id: id.clone(),
            limits: Limits {
                bandwidth: None,
                operations: iops.and_then(|per_second| {
                    Some(Rate {
                        per_second: per_second.try_into().ok()?,
                        burst: 0,
                    })
                }),
            },
            queues: Queues::Number(1),
            origin: None,
            name: None,
        });
    let nets = wishes.nets.iter().map(|(tap, (last, queues))| NetConfig {
        network: Network::Tap {
            name: tap.clone(),
            queues: if *queues {
                Queues::Cpus
            } else {
                Queues::Number(1)
            },
        },
        mac: last.map(mac),
        limits: Limits::default(),
    });
    let channels = wishes.channels.iter().map(|(name, unix)| ChannelConfig {
        name: name.clone(),
        end: HostEnd::Unix(unix.into()),
    });
    let vsock = wishes.vsock.as_ref();
    MachineOptions {
        name: Some("vm".into()),
        cpus: wishes.cpus,
        memory: MemorySpec {
            size: wishes.memory_mib << 20,
            shared: wishes.shared,
            ..MemorySpec::default()
        },
        nested: wishes.nested,
        cmdline: wishes.cmdline.clone(),
        boot_protocol: BootProtocol::Pvh,
        disks: disks.collect(),
        nets: nets.collect(),
        vsock: vsock.map(|(cid, unix)| VsockConfig {
            cid: *cid,
            path: unix.into(),
        }),
        balloon: wishes.balloon_mib.map(|(mib, reporting)| BalloonConfig {
            size: mib << 20,
            abilities: Abilities {
                deflate_on_oom: false,
                reporting,
            },
        }),
        watchdog: wishes.watchdog,
        channels: channels.collect(),
        console: ConsoleConfig {
            end: HostEnd::None,
            virtio: false,
        },
        ..MachineOptions::default()
    }
}

proptest! {
    #[test]
    fn equal_wishes_give_equal_machines(wishes in wishes()) {
        let machine = |options| validate(options).map_err(|failure| failure.to_string());
        let all = [
            machine(as_options(&wishes)),
            as_flags(&wishes).parse().map_err(|it| it.to_string()).and_then(machine),
            as_toml(&wishes).parse().map_err(|it| it.to_string()).and_then(machine),
        ];
        let [direct, flags, toml] = all;
        let direct = direct.expect("a machine");
        for other in [flags, toml] {
            let other: MachineConfig = other.expect("a machine");
            prop_assert_eq!(&direct.spec, &other.spec);
            // And what of the host they have.
            prop_assert_eq!(format!("{direct:?}"), format!("{other:?}"));
        }
    }
}

#[test]
fn there_are_wishes_of_all_kinds() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let some: Vec<Wishes> = (0..64)
        .map(|_| wishes().new_tree(&mut runner).unwrap().current())
        .collect();
    assert!(
        some.iter()
            .any(|it| it.disks.keys().any(|path| path.contains(',')))
    );
    assert!(some.iter().any(|it| it.nets.len() == 2));
    assert!(
        some.iter()
            .any(|it| it.vsock.is_some() && it.watchdog.is_some())
    );
}
