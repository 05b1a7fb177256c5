//! The one thread that owns the host's side of all devices.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use mayfly_devices::bus::lock;
use mayfly_devices::mailbox::Mailbox;
use mayfly_devices::platform::PlatformEvent;
use mayfly_devices::pvpanic::GuestPanic;
use mayfly_devices::virtio::mmio::VirtioMmio;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::commands::CommandHandler;
use super::events::VmEvent;
use crate::console::{Console, Pumped};
use crate::control::Reply;
use crate::kvm::vcpu::VcpuEnd;
use crate::link::{FromVmm, Link, Outcome, ToVmm};
use crate::net::host::Updates;
use crate::timing::Timeline;

/// What the subscribers of the loop tell it.
pub struct LoopState {
    /// How the machine ended.
    pub outcome: Option<Outcome>,
    /// The phases.
    pub timeline: Timeline,
}

/// Shared by the subscribers, which all run on one thread.
pub type Shared = Rc<RefCell<LoopState>>;

/// The loop.
pub struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
    state: Shared,
}

impl EventLoop {
    /// A loop without subscribers.
    pub fn new(timeline: Timeline) -> Result<Self, event_manager::Error> {
        Ok(EventLoop {
            manager: EventManager::new()?,
            state: Rc::new(RefCell::new(LoopState {
                outcome: None,
                timeline,
            })),
        })
    }

    /// The state that subscribers share.
    pub fn state(&self) -> Shared {
        self.state.clone()
    }

    /// Adds a subscriber.
    pub fn add(&mut self, subscriber: impl MutEventSubscriber + 'static) {
        self.manager.add_subscriber(Box::new(subscriber));
    }

    /// Runs until there is an outcome.
    pub fn run(&mut self) -> Outcome {
        loop {
            if let Some(outcome) = self.state.borrow().outcome.clone() {
                return outcome;
            }
            match self.manager.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
                Err(error) => return Outcome::Internal(format!("event loop: {error:?}")),
            }
        }
    }
}

/// Adds a descriptor, and ends the VM if that fails.
fn add(ops: &mut EventOps, events: Events, state: &Shared) {
    if let Err(error) = ops.add(events) {
        let failure = format!("event loop: adding a descriptor: {error:?}");
        state
            .borrow_mut()
            .outcome
            .get_or_insert(Outcome::Internal(failure));
    }
}

/// Marks the event of a guest that does not turn off …
const SHUTDOWN: u32 = 1;
/// … of the watchdog …
const WATCHDOG: u32 = 2;
/// … and of the time that a panic has.
const GRACE: u32 = 3;
/// The time that a kernel which panicked may print, unless it restarts before.
const GRACE_PERIOD: Duration = Duration::from_secs(1);

/// Takes what vCPUs, signals and the user tell.
pub struct Control {
    /// Wakes up for [`Control::events`].
    pub wake: EventFd,
    /// From the vCPUs' threads.
    pub events: Mailbox<VmEvent>,
    /// From the supervisor.
    pub link: Arc<Link>,
    /// The guest said that it panicked.
    pub panicked: bool,
    /// Then, how long it may go on.
    pub grace: TimerFd,
    /// Carries out what the user asks.
    pub handler: Rc<RefCell<CommandHandler>>,
    /// Signalled when the terminal's size changed.
    pub resized: Option<EventFd>,
    /// Hears of changes of the host's networks.
    pub host: Updates,
    /// Where it goes.
    pub state: Shared,
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        add(ops, Events::new(&self.wake, EventSet::IN), &self.state);
        add(ops, Events::new(&*self.link, EventSet::IN), &self.state);
        let handler = self.handler.borrow();
        let timers = [
            (Some(handler.shutdown_timer()), SHUTDOWN),
            (handler.watchdog_timer(), WATCHDOG),
            (Some(self.grace.as_raw_fd()), GRACE),
        ];
        for (fd, data) in timers {
            let Some(fd) = fd else { continue };
            let events = Events::with_data_raw(fd, data, EventSet::IN);
            add(ops, events, &self.state);
        }
    }

    fn process(&mut self, event: Events, _: &mut EventOps) {
        let _ = self.wake.read();
        let mut state = self.state.borrow_mut();
        let mut handler = self.handler.borrow_mut();
        let mut outcome = match event.data() {
            SHUTDOWN => handler.shutdown_timer_expired(),
            WATCHDOG => handler.watchdog_expired(),
            GRACE => Some(Outcome::Panic),
            _ => None,
        };
        for event in self.events.take() {
            let next = match event {
                VmEvent::Vcpu(VcpuEnd::Stopped) => None,
                VmEvent::Vcpu(VcpuEnd::PowerOff) => Some(Outcome::PowerOff),
                VmEvent::Vcpu(VcpuEnd::Reset) => Some(Outcome::Reset),
                VmEvent::Vcpu(VcpuEnd::Crash(reason)) => Some(Outcome::Crash(reason)),
                VmEvent::Platform(PlatformEvent::PowerOff, _) => Some(Outcome::PowerOff),
                VmEvent::Platform(PlatformEvent::Reset, _) => Some(Outcome::Reset),
                VmEvent::Platform(PlatformEvent::BootMark, when) => {
                    state.timeline.guest_init = state.timeline.at(when);
                    handler.tell("guest-init", None);
                    None
                }
                VmEvent::Panic(GuestPanic::Panicked) => {
                    self.panicked = true;
                    handler.tell("panicked", None);
                    let timer = self.grace.reset(GRACE_PERIOD, None);
                    timer.is_err().then_some(Outcome::Panic)
                }
                VmEvent::Panic(GuestPanic::CrashLoaded) => {
                    handler.tell("crash-kernel", None);
                    None
                }
                VmEvent::SnapshotPoint => Some(Outcome::Saved),
                // Kept where it is written.
                VmEvent::Platform(PlatformEvent::Status(_), _) => None,
            };
            outcome = outcome.or(next);
        }
        match self.link.try_receive() {
            Ok(
                None | Some(ToVmm::DeviceBackend { .. } | ToVmm::Build(_) | ToVmm::Start { .. }),
            ) => {}
            Ok(Some(ToVmm::Ask { id, command })) => {
                let reply = handler.handle(command, &state.timeline);
                let reply = match self.link.send(&FromVmm::Reply { id, reply }, &[]) {
                    Ok(()) => None,
                    Err(error) => Some(Reply::Error(error.to_string())),
                };
                if let Some(reply) = reply {
                    let _ = self.link.try_send(&FromVmm::Reply { id, reply });
                }
            }
            Ok(Some(ToVmm::Resized)) => {
                // Only refuses when it is signalled already.
                let _ = self.resized.as_ref().map(|console| console.write(1));
            }
            Ok(Some(ToVmm::HostNetworks { part, more })) => self.host.take(part, more),
            Ok(Some(ToVmm::Signal(signal))) => {
                outcome = outcome.or(Some(Outcome::Signal(signal)));
            }
            Ok(Some(ToVmm::End)) | Err(_) => outcome = outcome.or(Some(Outcome::Forced)),
        }
        if state.outcome.is_none() {
            state.outcome = outcome.map(|outcome| match outcome {
                // However a kernel that panicked makes an end.
                Outcome::PowerOff | Outcome::Reset | Outcome::Crash(_) if self.panicked => {
                    Outcome::Panic
                }
                outcome => outcome,
            });
        }
    }
}

/// Moves the bytes of a console or a channel.
pub struct ConsolePump {
    /// Both sides.
    pub console: Rc<RefCell<Console>>,
    /// Signalled by the guest's side.
    pub host_event: EventFd,
    /// Where a wish to quit goes.
    pub state: Shared,
}

impl ConsolePump {
    fn watch_sources(&self, ops: &mut EventOps) {
        for source in self.console.borrow().sources() {
            // On edges: the pump moves all it can, and what it leaves lying
            // must not wake it up. Files can't be watched, and need not be.
            let _ = ops.add(ConsolePump::edges(source));
        }
    }

    fn edges(source: RawFd) -> Events {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        Events::new_raw(source, events)
    }

    fn pump(&mut self, ops: &mut EventOps) {
        let mut console = self.console.borrow_mut();
        match console.pump() {
            Pumped::All => {}
            Pumped::More => drop(self.host_event.write(1)),
            Pumped::Quit => {
                let mut state = self.state.borrow_mut();
                state.outcome.get_or_insert(Outcome::Quit);
            }
        }
        let left = console.take_left();
        for file in &left {
            let _ = ops.remove(ConsolePump::edges(file.as_raw_fd()));
        }
        if !left.is_empty() {
            // For who waits for a client to leave.
            let _ = self.host_event.write(1);
        }
    }
}

impl MutEventSubscriber for ConsolePump {
    fn init(&mut self, ops: &mut EventOps) {
        add(
            ops,
            Events::new(&self.host_event, EventSet::IN),
            &self.state,
        );
        self.watch_sources(ops);
        self.pump(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.host_event.as_raw_fd() {
            let _ = self.host_event.read();
        }
        self.pump(ops);
        // Whether one left is known by now.
        let accepted = self.console.borrow_mut().accept();
        if accepted.more {
            let _ = self.host_event.write(1);
        }
        if accepted.client {
            self.watch_sources(ops);
            self.pump(ops);
        }
    }
}

/// Lets a virtio device work.
pub struct VirtioWorker {
    transport: Arc<Mutex<VirtioMmio>>,
    state: Shared,
}

/// Marks the events of queues; those without are of the device's sources.
const QUEUE_EVENT: u32 = 1 << 31;

impl VirtioWorker {
    /// A worker for a device.
    pub fn new(transport: Arc<Mutex<VirtioMmio>>, state: Shared) -> Self {
        VirtioWorker { transport, state }
    }
}

impl MutEventSubscriber for VirtioWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let transport = lock(&self.transport);
        let ours = if transport.is_vhost_user() {
            &[]
        } else {
            transport.kicks()
        };
        for (queue, kick) in (0..).zip(ours) {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let events = Events::with_data(kick, QUEUE_EVENT | queue, events);
            add(ops, events, &self.state);
        }
        for (token, fd) in transport.sources() {
            // On edges: a device that is not active leaves what is ready.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            add(ops, Events::with_data_raw(fd, token, events), &self.state);
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let mut transport = lock(&self.transport);
        match events.data() {
            queue if queue & QUEUE_EVENT != 0 => {
                transport.queue_notified((queue & !QUEUE_EVENT) as usize)
            }
            token => transport.event_ready(token),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;
    use std::path::{Path, PathBuf};

    use mayfly_devices::char_device::CharDevice;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::config::HostEnd;
    use crate::console::{Connection, HostConsole};

    /// A guest that takes all.
    #[derive(Default)]
    struct Guest(Vec<u8>);

    impl CharDevice for Guest {
        fn output(&self) -> &[u8] {
            &[]
        }
        fn output_done(&mut self, _: usize) {}
        fn input_room(&self) -> usize {
            100
        }
        fn input(&mut self, data: &[u8]) {
            self.0.extend(data);
        }
    }

    /// A loop with a channel.
    struct Bench {
        events: EventLoop,
        guest: Arc<Mutex<Guest>>,
        path: PathBuf,
        _opened: HostConsole,
        _folder: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("s");
            let guest = Arc::new(Mutex::new(Guest::default()));
            let connection = Connection {
                name: "channel agent".into(),
                lines: vec![guest.clone()],
                host_event: EventFd::new(EFD_NONBLOCK).unwrap(),
            };
            let end = HostEnd::Unix(path.clone());
            let mut opened = HostConsole::open(&end, "agent", "--channel").unwrap();
            let ends = opened.fds.take().unwrap();
            let mut events = EventLoop::new(Timeline::start()).unwrap();
            let state = events.state();
            events.add(ConsolePump {
                console: Rc::new(RefCell::new(Console::new(&connection, ends))),
                host_event: connection.host_event,
                state,
            });
            Bench {
                events,
                guest,
                path,
                _opened: opened,
                _folder: folder,
            }
        }

        /// Until nothing happens any more.
        fn run(&mut self) {
            while self.events.manager.run_with_timeout(50).unwrap() > 0 {}
        }
    }

    fn connect(path: &Path) -> UnixStream {
        UnixStream::connect(path).unwrap()
    }

    fn is_disconnected(mut client: &UnixStream) -> bool {
        client.set_nonblocking(true).unwrap();
        match client.read(&mut [0]) {
            Ok(0) => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_client_may_come_right_after_another() {
        let mut bench = Bench::new();
        let first = connect(&bench.path);
        bench.run();
        // Not only closed: what other tests fork may have it for a moment.
        first.shutdown(Shutdown::Both).unwrap();
        let mut second = connect(&bench.path);
        bench.run();
        assert!(!is_disconnected(&second));
        second.write_all(b"hello").unwrap();
        bench.run();
        assert_eq!(lock(&bench.guest).0, b"hello");
    }

    #[test]
    fn many_clients_are_seen_to_in_several_turns() {
        let mut bench = Bench::new();
        let clients: Vec<_> = (0..200).map(|_| connect(&bench.path)).collect();
        bench.run();
        let hung_up = clients.iter().filter(|client| is_disconnected(client));
        assert_eq!(hung_up.count(), clients.len() - 1);
    }

    #[test]
    fn clients_that_say_one_thing_are_all_heard() {
        let mut bench = Bench::new();
        for _ in 0..5 {
            connect(&bench.path).write_all(b"word ").unwrap();
        }
        bench.run();
        assert_eq!(lock(&bench.guest).0, b"word ".repeat(5));
    }
}
