//! Commands to a running machine, carried out on the event loop. What the user
//! asks for is done here and nowhere else: pause has one owner.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mayfly_devices::bus::lock;
use mayfly_devices::rate_limiter::{LimitHandle, Limits};
use mayfly_devices::virtio::balloon::BalloonHandle;
use serde_json::json;
use vmm_sys_util::timerfd::TimerFd;

use super::attach::Slot;
use super::link::{Link, Word};
use super::platform::PlatformHandle;
use super::run::{Outcome, VcpuControl};
use crate::config::{MachineConfig, WatchdogAction, check_balloon_size};
use crate::control::{Command, Event, Reply};
use crate::metrics::Exposition;
use crate::net::publish::summary;
use crate::timing::{Timeline, milliseconds};

/// What a running machine is called by commands.
pub struct Commander {
    about: About,
    vcpus: Arc<VcpuControl>,
    slots: Arc<[Slot]>,
    balloon: Option<BalloonHandle>,
    platform: PlatformHandle,
    watchdog: WatchdogAction,
    state: State,
    link: Arc<Link>,
    /// Goes off while a guest that was asked to turn off has not …
    insistence: TimerFd,
    /// … and this is when its time is over.
    deadline: Option<Instant>,
    started: Instant,
}

/// What does not change.
struct About {
    name: String,
    kernel: String,
    cmdline: String,
    cpus: u8,
    memory: u64,
    /// The ports that are published.
    ports: Vec<String>,
    /// The process that the user knows.
    keeper: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Paused,
}

impl Commander {
    /// Commands a machine whose vCPUs are about to run.
    pub fn new(
        config: &MachineConfig,
        keeper: u32,
        vcpus: Arc<VcpuControl>,
        slots: Arc<[Slot]>,
        balloon: Option<BalloonHandle>,
        platform: PlatformHandle,
        link: Arc<Link>,
    ) -> std::io::Result<Self> {
        Ok(Commander {
            about: About {
                name: config.name.clone(),
                kernel: config.kernel.display().to_string(),
                cmdline: config.cmdline.clone(),
                cpus: config.cpus,
                memory: config.memory.size,
                ports: config
                    .nets
                    .iter()
                    .flat_map(|net| summary(net.ports()))
                    .collect(),
                keeper,
            },
            vcpus,
            slots,
            balloon,
            platform,
            watchdog: config.watchdog.unwrap_or(WatchdogAction::Crash),
            state: State::Running,
            link,
            insistence: TimerFd::new().map_err(std::io::Error::from)?,
            deadline: None,
            started: Instant::now(),
        })
    }

    /// Readable when [`Commander::insist`] is to be called.
    pub fn insistence(&self) -> RawFd {
        self.insistence.as_raw_fd()
    }

    /// Readable when the watchdog was not fed in time.
    pub fn watchdog_timer(&self) -> Option<RawFd> {
        Some(lock(self.platform.watchdog()?).timer())
    }

    /// Does what the watchdog is for; returns how the machine ends, if it does.
    pub fn watchdog_expired(&mut self) -> Option<Outcome> {
        let (misses, late) = lock(self.platform.watchdog()?).expired()?;
        match self.watchdog {
            WatchdogAction::Reset => Some(Outcome::Reset),
            WatchdogAction::Nmi if misses == 1 => {
                self.vcpus.interrupt();
                self.tell("watchdog", Some("nmi".to_owned()));
                None
            }
            WatchdogAction::Crash | WatchdogAction::Nmi => Some(Outcome::Hung(late)),
        }
    }

    /// Carries out a command and answers it.
    pub fn serve(&mut self, command: Command, timeline: &Timeline) -> Reply {
        let done = match command {
            Command::Pause {} => self.pause(),
            Command::Resume {} => self.resume(),
            Command::Info {} => Ok(self.info()),
            // The keeper tells them.
            Command::Events {} => Ok(serde_json::Value::Null),
            Command::Metrics {} => Ok(self.metrics(timeline).into()),
            Command::Shutdown { deadline } => self.shutdown(Duration::from_secs(deadline)),
            Command::Nmi {} => self.interrupt(),
            Command::Balloon { size } => self.inflate(size),
            Command::Limit { device, limits } => self.limit(&device, limits),
        };
        done.map_or_else(Reply::Error, Reply::Ok)
    }

    /// Tells all who listen. What the keeper has no time for is lost.
    pub fn tell(&mut self, event: &str, detail: Option<String>) {
        let event = Event::now(event, detail);
        let _ = self.link.try_send(&Word::Event(event));
    }

    fn pause(&mut self) -> Result<serde_json::Value, String> {
        if self.state == State::Paused {
            return Ok(serde_json::Value::Null);
        }
        if !self.vcpus.pause() {
            self.vcpus.resume();
            return Err("a vCPU does not leave the guest; it runs on".into());
        }
        self.platform.pause();
        self.state = State::Paused;
        self.tell("paused", None);
        Ok(serde_json::Value::Null)
    }

    fn resume(&mut self) -> Result<serde_json::Value, String> {
        if self.state == State::Paused {
            self.platform.resume();
            self.vcpus.resume();
            self.state = State::Running;
            self.tell("resumed", None);
        }
        Ok(serde_json::Value::Null)
    }

    fn interrupt(&self) -> Result<serde_json::Value, String> {
        self.vcpus.interrupt();
        Ok(serde_json::Value::Null)
    }

    fn inflate(&mut self, size: u64) -> Result<serde_json::Value, String> {
        let Some(balloon) = &self.balloon else {
            return Err("it has no balloon; start it with --balloon 0".into());
        };
        check_balloon_size(size, self.about.memory)?;
        balloon.set_target(size);
        self.tell("balloon", Some(size.to_string()));
        Ok(serde_json::Value::Null)
    }

    fn limit(&mut self, device: &str, limits: Limits) -> Result<serde_json::Value, String> {
        let slot = self.slots.iter().find(|slot| slot.name == device);
        let slot =
            slot.ok_or_else(|| format!("{device}: no such device; see mayfly ctl … info"))?;
        let Some(handle) = &slot.limits else {
            return Err(format!("{device}: has no limits; disks and networks have"));
        };
        handle.set(limits);
        self.tell("limit", Some(device.to_owned()));
        Ok(serde_json::Value::Null)
    }

    /// Presses the power button, and insists. A paused guest cannot turn off:
    /// it runs again.
    fn shutdown(&mut self, deadline: Duration) -> Result<serde_json::Value, String> {
        let end = Instant::now().checked_add(deadline);
        let end = end.ok_or("that deadline never comes")?;
        self.resume()?;
        self.deadline = Some(end);
        self.press(deadline)
            .map_err(|error| format!("setting a timer: {error}"))?;
        self.tell("shutdown", Some(format!("within {} s", deadline.as_secs())));
        Ok(serde_json::Value::Null)
    }

    /// Presses the power button once more: a guest that was still booting did
    /// not notice. When its time is over, returns how the machine ends.
    pub fn insist(&mut self) -> Option<Outcome> {
        let left = self.deadline?.saturating_duration_since(Instant::now());
        let over = left.is_zero() || self.press(left).is_err();
        over.then_some(Outcome::Forced)
    }

    fn press(&mut self, left: Duration) -> Result<(), vmm_sys_util::errno::Error> {
        const AGAIN: Duration = Duration::from_secs(2);
        // A timer of zero would never fire.
        const SOON: Duration = Duration::from_millis(1);
        self.platform.press_power_button();
        self.insistence.reset(left.clamp(SOON, AGAIN), None)
    }

    fn info(&self) -> serde_json::Value {
        let devices: Vec<_> = self
            .slots
            .iter()
            .map(|slot| {
                json!({
                    "name": slot.name,
                    "kind": format!("{:?}", slot.kind).to_lowercase(),
                    "flag": slot.flag,
                    "limits": slot.limits.as_ref().map(LimitHandle::get),
                })
            })
            .collect();
        json!({
            "name": self.about.name,
            "pid": self.about.keeper,
            "state": match self.state {
                State::Running => "running",
                State::Paused => "paused",
            },
            "uptime_ms": milliseconds(self.started.elapsed()),
            "cpus": self.about.cpus,
            "memory": self.about.memory,
            "kernel": self.about.kernel,
            "cmdline": self.about.cmdline,
            "ports": self.about.ports,
            "devices": devices,
            "balloon": self.balloon.as_ref().map(balloon_info),
        })
    }

    fn metrics(&self, timeline: &Timeline) -> String {
        let mut text = Exposition::default();
        text.gauge("mayfly_uptime_seconds", "Time since the vCPUs were started")
            .sample(&[], self.started.elapsed().as_secs_f64());
        text.gauge("mayfly_paused", "1 while the vCPUs are paused")
            .sample(&[], f64::from(u8::from(self.state == State::Paused)));
        if let Some(balloon) = &self.balloon {
            text.gauge(
                "mayfly_balloon_target_bytes",
                "The balloon's size as asked for",
            )
            .sample(&[], balloon.target() as f64);
            text.gauge(
                "mayfly_balloon_actual_bytes",
                "The balloon's size as the guest says",
            )
            .sample(&[], balloon.actual() as f64);
        }
        let mut phases = text.gauge(
            "mayfly_boot_phase_seconds",
            "When a phase of the boot ended, from the process's start",
        );
        for (name, end) in timeline.keyed() {
            if let Some(end) = end {
                phases.sample(&[("phase", name)], end.as_secs_f64());
            }
        }
        let mut exits = text.counter(
            "mayfly_vcpu_exits_total",
            "How often a vCPU left the guest for the monitor",
        );
        for (index, counters) in self.vcpus.exits().iter().enumerate() {
            for (reason, count) in counters.all() {
                let labels = [("vcpu", index.to_string()), ("reason", reason.to_owned())];
                let labels = labels
                    .each_ref()
                    .map(|(name, value)| (*name, value.as_str()));
                exits.sample(&labels, count as f64);
            }
        }
        let mut all: Vec<(&str, Vec<(&str, u64)>)> = Vec::new();
        for slot in self.slots.iter() {
            for (name, count) in lock(&slot.transport).counters() {
                match all.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, samples)) => samples.push((&slot.name, count)),
                    None => all.push((name, vec![(&slot.name, count)])),
                }
            }
        }
        for (name, samples) in all {
            let help = name.replace('_', " ");
            let mut family = text.counter(&format!("mayfly_device_{name}_total"), &help);
            for (device, count) in samples {
                family.sample(&[("device", device)], count as f64);
            }
        }
        text.finish()
    }
}

/// Statistics are the last that the guest sent, and how old they are; newer
/// ones are asked for.
fn balloon_info(balloon: &BalloonHandle) -> serde_json::Value {
    balloon.request_statistics();
    let statistics = balloon.statistics().map(|statistics| {
        let mut all: serde_json::Map<_, _> = statistics
            .values
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        let age = milliseconds(statistics.when.elapsed());
        all.insert("age_ms".to_owned(), age.into());
        all
    });
    json!({
        "target": balloon.target(),
        "actual": balloon.actual(),
        "statistics": statistics,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::gate::Gate;
    use crate::kvm::vcpu::Buses;

    /// Of a machine without vCPUs.
    fn commander() -> Commander {
        let gate = Arc::new(Gate::new(0));
        let vcpus = VcpuControl::start(Vec::new(), Buses::default(), gate, || (), |_| ()).unwrap();
        Commander {
            about: About {
                name: "vm".into(),
                kernel: String::new(),
                cmdline: String::new(),
                cpus: 0,
                memory: 0,
                ports: Vec::new(),
                keeper: 1,
            },
            vcpus: Arc::new(vcpus),
            slots: Arc::new([]),
            balloon: None,
            platform: PlatformHandle::alone(),
            watchdog: WatchdogAction::Crash,
            state: State::Running,
            link: Arc::new(Link::pair().unwrap().0),
            insistence: TimerFd::new().unwrap(),
            deadline: None,
            started: Instant::now(),
        }
    }

    fn ask(commander: &mut Commander, command: Command) -> Reply {
        commander.serve(command, &Timeline::start())
    }

    #[test]
    fn what_is_refused_changes_nothing() {
        let mut commander = commander();
        assert_eq!(ask(&mut commander, Command::Pause {}), Reply::done());
        let deadline = u64::MAX;
        let reply = ask(&mut commander, Command::Shutdown { deadline });
        assert!(matches!(reply, Reply::Error(_)), "{reply:?}");
        assert_eq!(commander.state, State::Paused);
        assert_eq!(commander.deadline, None);
        let deadline = 1;
        let reply = ask(&mut commander, Command::Shutdown { deadline });
        assert_eq!(reply, Reply::done());
        assert_eq!(commander.state, State::Running);
    }
}
