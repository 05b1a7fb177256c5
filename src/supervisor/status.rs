//! What a user is told of a VM while it runs: whether it is paused, and what of it has
//! failed. The supervisor keeps it, tells who listens to events, and has it written
//! down, so that `ps`, `inspect`, `info` and `events` agree.

use std::sync::{Arc, Mutex};

use mayfly_devices::bus::lock;
use mayfly_text::printable;
use serde::{Deserialize, Serialize};

use crate::control::{Event, Subscriber};

/// More problems than these are only logged.
const PROBLEMS_MAX: usize = 16;

/// How a VM that runs does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Its vCPUs are stopped, as the user wished.
    pub paused: bool,
    /// What has failed while it goes on, a line each, such as
    /// `network: passt was ended by signal 9`.
    pub problems: Vec<String>,
}

type Observer = Box<dyn Fn(&Status) + Send>;

/// The status of one VM, which any thread of the supervisor may change.
#[derive(Clone, Default)]
pub struct StatusBoard(Arc<Mutex<Board>>);

#[derive(Default)]
struct Board {
    status: Status,
    subscribers: Vec<Subscriber>,
    observer: Option<Observer>,
    /// The VM has ended: what ends with it is no problem.
    closed: bool,
}

impl Board {
    /// Tells all who listen; one that lags behind is let go.
    fn tell(&mut self, event: &Event) {
        self.subscribers
            .retain(|subscriber| subscriber.tell(event.clone()));
    }

    fn changed(&self) {
        if let Some(observer) = &self.observer {
            observer(&self.status);
        }
    }
}

impl StatusBoard {
    /// Calls a function with the status now, and whenever it has changed.
    pub fn observe(&self, observer: impl Fn(&Status) + Send + 'static) {
        let mut board = lock(&self.0);
        observer(&board.status);
        board.observer = Some(Box::new(observer));
    }

    /// The status now.
    pub fn status(&self) -> Status {
        lock(&self.0).status.clone()
    }

    /// Notes that something has failed while the VM goes on: the event `problem`. The
    /// same problem is noted once.
    pub fn add_problem(&self, problem: &str) {
        let problem = printable::line(problem);
        let mut board = lock(&self.0);
        if board.closed || board.status.problems.contains(&problem) {
            return;
        }
        log::warn!("{problem}");
        board.tell(&Event::now("problem", Some(problem.clone())));
        if board.status.problems.len() < PROBLEMS_MAX {
            board.status.problems.push(problem);
            board.changed();
        }
    }

    /// Notes that a problem is over: the event `problem-over`.
    pub fn remove_problem(&self, problem: &str) {
        let problem = printable::line(problem);
        let mut board = lock(&self.0);
        let before = board.status.problems.len();
        board.status.problems.retain(|known| *known != problem);
        if board.status.problems.len() < before {
            board.tell(&Event::now("problem-over", Some(problem)));
            board.changed();
        }
    }

    pub(super) fn set_paused(&self, paused: bool) {
        let mut board = lock(&self.0);
        if board.status.paused != paused {
            board.status.paused = paused;
            board.changed();
        }
    }

    pub(super) fn subscribe(&self, subscriber: Option<Subscriber>) {
        let mut board = lock(&self.0);
        // Those that left would gather while nothing happens.
        board.subscribers.retain(Subscriber::is_here);
        if !board.closed {
            board.subscribers.extend(subscriber);
        }
    }

    pub(super) fn tell(&self, event: &Event) {
        lock(&self.0).tell(event);
    }

    /// The VM has ended: nothing changes any more, and who listens hears no more.
    pub(super) fn close(&self) {
        let mut board = lock(&self.0);
        board.closed = true;
        board.subscribers.clear();
        board.observer = None;
    }

    #[cfg(test)]
    pub(super) fn subscribers(&self) -> usize {
        lock(&self.0).subscribers.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_told_once_until_it_is_over() {
        let (board, (subscriber, events)) = (StatusBoard::default(), Subscriber::new());
        board.subscribe(Some(subscriber));
        let (tell, told) = std::sync::mpsc::channel();
        board.observe(move |status| tell.send(status.clone()).unwrap());
        board.add_problem("network: passt\x1b[2J ended\nforged");
        board.add_problem("network: passt\x1b[2J ended");
        board.set_paused(true);
        board.set_paused(true);
        board.remove_problem("network: passt\x1b[2J ended");
        board.close();
        board.add_problem("passt ended, as the VM has");
        assert_eq!(board.status().problems, [""; 0]);
        let told: Vec<_> = told.iter().map(|it| (it.paused, it.problems)).collect();
        let problem = vec!["network: passt?[2J ended".to_owned()];
        let expected = [
            (false, vec![]),
            (false, problem.clone()),
            (true, problem),
            (true, vec![]),
        ];
        assert_eq!(told, expected);
        let names: Vec<_> = events.all().into_iter().map(|event| event.event).collect();
        assert_eq!(names, ["problem", "problem-over"]);
    }

    #[test]
    fn problems_without_end_are_not_kept_without_end() {
        let board = StatusBoard::default();
        for number in 0..10 * PROBLEMS_MAX {
            board.add_problem(&format!("problem {number}"));
        }
        assert_eq!(board.status().problems.len(), PROBLEMS_MAX);
    }
}
