//! The clients of a VM's control socket: whose question an answer is for.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::mpsc::SyncSender;

use mayfly_devices::bus::lock;
use mayfly_sandbox::Report;
use serde_json::{Map, Value, json};

use super::status::StatusBoard;
use crate::config::MachineConfig;
use crate::control::{Ask, Command, Reply};
use crate::link::{Link, ToVmm};
use crate::net::publish::summary;

/// Questions that may wait for an answer; older ones are forgotten.
const ASKED_MAX: usize = 64;

/// What the VMM process tells for the command `info`.
const TOLD: [&str; 4] = ["state", "uptime_ms", "devices", "balloon"];

/// What the supervisor knows of a machine, for the command `info`. The VMM process, which
/// knows no paths and flags, tells the rest.
#[derive(Default)]
pub(super) struct About {
    facts: Map<String, Value>,
    /// What asked for each device.
    flags: BTreeMap<String, String>,
}

impl About {
    pub fn of(config: &MachineConfig) -> Self {
        let ports = config.nets.iter();
        let ports: Vec<String> = ports
            .flat_map(|net| summary(net.config.config.ports()))
            .collect();
        let facts = json!({
            "name": config.name,
            "pid": std::process::id(),
            "cpus": config.spec.cpus,
            "memory": config.spec.memory.size,
            "kernel": config.guest.kernel.display().to_string(),
            "cmdline": config.spec.cmdline,
            "ports": ports,
        });
        About {
            facts: match facts {
                Value::Object(facts) => facts,
                _ => Map::new(),
            },
            flags: config.flags(),
        }
    }

    /// Adds it to what the VMM process tells.
    fn complete(&self, info: &mut Map<String, Value>) {
        // A guest may have taken the process over.
        info.retain(|key, _| TOLD.contains(&key.as_str()));
        info.extend(self.facts.clone());
        let devices = info.get_mut("devices").and_then(Value::as_array_mut);
        for device in devices.into_iter().flatten() {
            let name = device.get("name").and_then(Value::as_str);
            let flag = name.and_then(|name| self.flags.get(name)).cloned();
            if let Some(device) = device.as_object_mut() {
                device.remove("flag");
                device.extend(flag.map(|flag| ("flag".to_owned(), flag.into())));
            }
        }
    }
}

/// Who asks, and who listens, over the control socket.
pub(super) struct Clients {
    link: Link,
    about: About,
    state: Mutex<ClientsState>,
    board: StatusBoard,
}

#[derive(Default)]
struct ClientsState {
    next: u64,
    asked: BTreeMap<u64, (Command, SyncSender<Reply>)>,
    /// Nobody will answer any more.
    over: bool,
    sandbox: Option<Report>,
}

impl Clients {
    /// Clients of the VMM process behind a link.
    pub fn new(link: Link, board: StatusBoard, about: About) -> Self {
        Clients {
            link,
            about,
            state: Mutex::default(),
            board,
        }
    }

    /// Keeps what was said of the sandbox before the guest ran.
    pub fn note_sandbox(&self, report: Report) {
        lock(&self.state).sandbox.get_or_insert(report);
    }

    /// Passes a command on, and remembers who asked.
    pub fn ask(&self, ask: Ask) {
        let mut state = lock(&self.state);
        if state.over {
            return;
        }
        if ask.command == (Command::Events {}) {
            self.board.subscribe(ask.subscriber);
            let _ = ask.reply.try_send(Reply::done());
            return;
        }
        let id = state.next;
        state.next += 1;
        let order = ToVmm::Ask {
            id,
            command: ask.command.clone(),
        };
        match self.link.try_send(&order) {
            Ok(()) => {
                while state.asked.len() >= ASKED_MAX {
                    state.asked.pop_first();
                }
                state.asked.insert(id, (ask.command, ask.reply));
            }
            Err(error) => {
                let error = format!("asking the VMM process: {error}");
                let _ = ask.reply.try_send(Reply::Error(error));
            }
        }
    }

    /// Gives an answer to whoever asked.
    pub fn answer(&self, id: u64, reply: Reply) {
        // A client that has gone needs no answer.
        let mut state = lock(&self.state);
        let Some((command, client)) = state.asked.remove(&id) else {
            return;
        };
        match (&command, &reply) {
            (Command::Pause {}, Reply::Ok(_)) => self.board.set_paused(true),
            // A guest that is to turn off runs again.
            (Command::Resume {} | Command::Shutdown { .. }, Reply::Ok(_)) => {
                self.board.set_paused(false);
            }
            _ => {}
        }
        let reply = match (command, reply) {
            (Command::Info {}, Reply::Ok(Value::Object(mut info))) => {
                self.about.complete(&mut info);
                info.insert("sandbox".into(), json!(state.sandbox));
                info.insert("problems".into(), json!(self.board.status().problems));
                Reply::Ok(info.into())
            }
            (_, reply) => reply,
        };
        let _ = client.try_send(reply);
    }

    /// Lets all of them know that it is over.
    pub fn forget(&self) {
        *lock(&self.state) = ClientsState {
            over: true,
            ..ClientsState::default()
        };
        self.board.close();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::control::{Event, Subscriber, Subscription};

    fn clients() -> (Clients, Link) {
        let (link, other) = Link::pair().unwrap();
        (
            Clients::new(link, StatusBoard::default(), About::default()),
            other,
        )
    }

    fn ask(clients: &Clients, command: Command) -> (mpsc::Receiver<Reply>, Subscription) {
        let (reply, answer) = mpsc::sync_channel(1);
        let (subscriber, subscription) = Subscriber::new();
        clients.ask(Ask {
            subscriber: (command == Command::Events {}).then_some(subscriber),
            command,
            reply,
        });
        (answer, subscription)
    }

    #[test]
    fn what_is_paused_is_known_to_be() {
        let (clients, machine) = clients();
        let commands = [
            Command::Pause {},
            Command::Info {},
            Command::Resume {},
            Command::Pause {},
            Command::Shutdown { deadline: 1 },
        ];
        let mut paused = Vec::new();
        for command in commands {
            let (answer, _) = ask(&clients, command);
            let Some(ToVmm::Ask { id, .. }) = machine.receive().unwrap() else {
                panic!();
            };
            clients.answer(id, Reply::done());
            answer.recv().unwrap();
            paused.push(clients.board.status().paused);
        }
        assert_eq!(paused, [true, true, false, true, false]);
    }

    #[test]
    fn an_answer_finds_who_asked() {
        let (clients, machine) = clients();
        let asked = [(); 2].map(|()| ask(&clients, Command::Pause {}).0);
        for _ in 0..2 {
            let Some(ToVmm::Ask { id, .. }) = machine.receive().unwrap() else {
                panic!();
            };
            clients.answer(id, Reply::Ok(id.into()));
            // A machine that was taken over says it twice.
            clients.answer(id, Reply::done());
        }
        for (id, answer) in asked.into_iter().enumerate() {
            assert_eq!(answer.recv().unwrap(), Reply::Ok(id.into()));
        }
        let (forgotten, _) = ask(&clients, Command::Pause {});
        clients.forget();
        assert!(forgotten.recv().is_err());
        assert!(ask(&clients, Command::Pause {}).0.recv().is_err());
    }

    #[test]
    fn a_machine_that_does_not_listen_holds_nobody_up() {
        let (clients, _machine) = clients();
        for _ in 0..10_000 {
            drop(ask(&clients, Command::Pause {}));
        }
        assert!(lock(&clients.state).asked.len() <= ASKED_MAX);
        let (refused, _) = ask(&clients, Command::Pause {});
        assert!(matches!(refused.recv().unwrap(), Reply::Error(_)));
    }

    #[test]
    fn subscribers_that_left_do_not_gather() {
        let (clients, _machine) = clients();
        let stays = ask(&clients, Command::Events {});
        for _ in 0..5 {
            drop(ask(&clients, Command::Events {}));
        }
        assert_eq!(clients.board.subscribers(), 2);
        clients.board.tell(&Event::now("one", None));
        assert_eq!(clients.board.subscribers(), 1);
        drop(stays);
    }
}
