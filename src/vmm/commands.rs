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

use super::devices::AttachedDevice;
use super::platform::PlatformHandle;
use super::vcpus::VcpuControl;
use crate::control::{Command, Event, Reply};
use crate::link::{FromVmm, Link, Outcome};
use crate::metrics::Exposition;
use crate::spec::{MachineSpec, WatchdogAction, check_balloon_size};
use crate::timing::{Timeline, milliseconds};

/// The parts of a running machine that commands change.
pub struct Handles {
    /// The vCPUs.
    pub vcpus: Arc<VcpuControl>,
    /// The virtio devices.
    pub devices: Arc<[AttachedDevice]>,
    /// The balloon, if there is one.
    pub balloon: Option<BalloonHandle>,
    /// Power button, watchdog.
    pub platform: PlatformHandle,
    /// To the supervisor, for events.
    pub link: Arc<Link>,
}

/// Carries out commands to a running machine.
pub struct CommandHandler {
    handles: Handles,
    watchdog: WatchdogAction,
    /// The guest's memory in bytes.
    memory: u64,
    state: State,
    /// Goes off while a guest that was asked to turn off has not …
    shutdown_timer: TimerFd,
    /// … and this is when its time is over.
    deadline: Option<Instant>,
    started: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Paused,
}

impl CommandHandler {
    /// For a machine whose vCPUs are about to run.
    pub fn new(spec: &MachineSpec, handles: Handles) -> std::io::Result<Self> {
        Ok(CommandHandler {
            handles,
            watchdog: spec.watchdog.unwrap_or(WatchdogAction::Crash),
            memory: spec.memory.size,
            state: State::Running,
            shutdown_timer: TimerFd::new().map_err(std::io::Error::from)?,
            deadline: None,
            started: Instant::now(),
        })
    }

    /// Readable when [`CommandHandler::shutdown_timer_expired`] is to be
    /// called.
    pub fn shutdown_timer(&self) -> RawFd {
        self.shutdown_timer.as_raw_fd()
    }

    /// Readable when the watchdog was not fed in time.
    pub fn watchdog_timer(&self) -> Option<RawFd> {
        Some(lock(self.handles.platform.watchdog()?).timer())
    }

    /// Does what the watchdog is for; returns how the machine ends, if it does.
    pub fn watchdog_expired(&mut self) -> Option<Outcome> {
        let (misses, late) = lock(self.handles.platform.watchdog()?).expired()?;
        match self.watchdog {
            WatchdogAction::Reset => Some(Outcome::Reset),
            WatchdogAction::Nmi if misses == 1 => {
                self.handles.vcpus.interrupt();
                self.tell("watchdog", Some("nmi".to_owned()));
                None
            }
            WatchdogAction::Crash | WatchdogAction::Nmi => Some(Outcome::Hung(late)),
        }
    }

    /// Carries out a command and answers it.
    pub fn handle(&mut self, command: Command, timeline: &Timeline) -> Reply {
        let done = match command {
            Command::Pause {} => self.pause(),
            Command::Resume {} => self.resume(),
            Command::Info {} => Ok(self.info()),
            // The supervisor tells them.
            Command::Events {} => Ok(serde_json::Value::Null),
            Command::Metrics {} => Ok(self.metrics(timeline).into()),
            Command::Shutdown { deadline } => self.shutdown(Duration::from_secs(deadline)),
            Command::Nmi {} => self.interrupt(),
            Command::Balloon { size } => self.inflate(size),
            Command::Limit { device, limits } => self.limit(&device, limits),
        };
        done.map_or_else(Reply::Error, Reply::Ok)
    }

    /// Tells the supervisor of an event. What it has no time for is lost.
    pub fn tell(&mut self, event: &str, detail: Option<String>) {
        let event = Event::now(event, detail);
        let _ = self.handles.link.try_send(&FromVmm::Event(event));
    }

    fn pause(&mut self) -> Result<serde_json::Value, String> {
        if self.state == State::Paused {
            return Ok(serde_json::Value::Null);
        }
        if !self.handles.vcpus.pause() {
            self.handles.vcpus.resume();
            return Err("a vCPU does not leave the guest; it runs on".into());
        }
        self.handles.platform.pause();
        self.state = State::Paused;
        self.tell("paused", None);
        Ok(serde_json::Value::Null)
    }

    fn resume(&mut self) -> Result<serde_json::Value, String> {
        if self.state == State::Paused {
            self.handles.platform.resume();
            self.handles.vcpus.resume();
            self.state = State::Running;
            self.tell("resumed", None);
        }
        Ok(serde_json::Value::Null)
    }

    fn interrupt(&self) -> Result<serde_json::Value, String> {
        self.handles.vcpus.interrupt();
        Ok(serde_json::Value::Null)
    }

    fn inflate(&mut self, size: u64) -> Result<serde_json::Value, String> {
        let Some(balloon) = &self.handles.balloon else {
            return Err("it has no balloon; start it with --balloon 0".into());
        };
        check_balloon_size(size, self.memory)?;
        balloon.set_target(size);
        self.tell("balloon", Some(size.to_string()));
        Ok(serde_json::Value::Null)
    }

    fn limit(&mut self, device: &str, limits: Limits) -> Result<serde_json::Value, String> {
        let found = self.handles.devices.iter().find(|it| it.name == device);
        let found =
            found.ok_or_else(|| format!("{device}: no such device; see mayfly ctl … info"))?;
        let Some(handle) = &found.limits else {
            return Err(format!("{device}: has no limits; disks and networks have"));
        };
        handle.set(limits);
        self.tell("limit", Some(device.to_owned()));
        Ok(serde_json::Value::Null)
    }

    /// Presses the power button, again and again. A paused guest cannot turn off:
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
    pub fn shutdown_timer_expired(&mut self) -> Option<Outcome> {
        let left = self.deadline?.saturating_duration_since(Instant::now());
        let over = left.is_zero() || self.press(left).is_err();
        over.then_some(Outcome::Forced)
    }

    fn press(&mut self, left: Duration) -> Result<(), vmm_sys_util::errno::Error> {
        const AGAIN: Duration = Duration::from_secs(2);
        // A timer of zero would never fire.
        const SOON: Duration = Duration::from_millis(1);
        self.handles.platform.press_power_button();
        self.shutdown_timer.reset(left.clamp(SOON, AGAIN), None)
    }

    /// What only this process knows; the supervisor adds the rest.
    fn info(&self) -> serde_json::Value {
        let devices: Vec<_> = self
            .handles
            .devices
            .iter()
            .map(|device| {
                json!({
                    "name": device.name,
                    "kind": format!("{:?}", device.kind).to_lowercase(),
                    "limits": device.limits.as_ref().map(LimitHandle::get),
                })
            })
            .collect();
        json!({
            "state": match self.state {
                State::Running => "running",
                State::Paused => "paused",
            },
            "uptime_ms": milliseconds(self.started.elapsed()),
            "devices": devices,
            "balloon": self.handles.balloon.as_ref().map(balloon_info),
        })
    }

    fn metrics(&self, timeline: &Timeline) -> String {
        let mut text = Exposition::default();
        text.gauge("mayfly_uptime_seconds", "Time since the vCPUs were started")
            .sample(&[], self.started.elapsed().as_secs_f64());
        text.gauge("mayfly_paused", "1 while the vCPUs are paused")
            .sample(&[], f64::from(u8::from(self.state == State::Paused)));
        if let Some(balloon) = &self.handles.balloon {
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
        for (index, counters) in self.handles.vcpus.exits().iter().enumerate() {
            for (reason, count) in counters.all() {
                let labels = [("vcpu", index.to_string()), ("reason", reason.to_owned())];
                let labels = labels
                    .each_ref()
                    .map(|(name, value)| (*name, value.as_str()));
                exits.sample(&labels, count as f64);
            }
        }
        let mut all: Vec<(&str, Vec<(&str, u64)>)> = Vec::new();
        for device in self.handles.devices.iter() {
            for (name, count) in lock(&device.transport).counters() {
                match all.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, samples)) => samples.push((&device.name, count)),
                    None => all.push((name, vec![(&device.name, count)])),
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
    fn handler() -> CommandHandler {
        let gate = Arc::new(Gate::new(0));
        let vcpus = VcpuControl::start(Vec::new(), Buses::default(), gate, || (), |_| ()).unwrap();
        CommandHandler {
            handles: Handles {
                vcpus: Arc::new(vcpus),
                devices: Arc::new([]),
                balloon: None,
                platform: PlatformHandle::alone(),
                link: Arc::new(Link::pair().unwrap().0),
            },
            watchdog: WatchdogAction::Crash,
            memory: 0,
            state: State::Running,
            shutdown_timer: TimerFd::new().unwrap(),
            deadline: None,
            started: Instant::now(),
        }
    }

    fn ask(handler: &mut CommandHandler, command: Command) -> Reply {
        handler.handle(command, &Timeline::start())
    }

    #[test]
    fn what_is_refused_changes_nothing() {
        let mut handler = handler();
        assert_eq!(ask(&mut handler, Command::Pause {}), Reply::done());
        let deadline = u64::MAX;
        let reply = ask(&mut handler, Command::Shutdown { deadline });
        assert!(matches!(reply, Reply::Error(_)), "{reply:?}");
        assert_eq!(handler.state, State::Paused);
        assert_eq!(handler.deadline, None);
        let deadline = 1;
        let reply = ask(&mut handler, Command::Shutdown { deadline });
        assert_eq!(reply, Reply::done());
        assert_eq!(handler.state, State::Running);
    }
}
