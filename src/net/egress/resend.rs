//! Requests for connections to published ports, sent again until the guest answers.
//!
//! A kernel drops a SYN when the queue of connections that the server has not accepted
//! is full (`listen(2)`), and counts on its being sent again, as all TCPs do (RFC 9293,
//! 3.8.1). passt of 2023 does not: it sends one, and resets the client 10 s later. So
//! clients of a burst were lost, here 190 of 200 of a server with a backlog of 9.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::flow::Flow;

/// How long a request waits for its answer before it is sent again: what Linux waits.
const INTERVAL: Duration = Duration::from_secs(1);
/// After this time it is given up, just before passt gives the connection up.
const GIVE_UP: Duration = Duration::from_secs(9);
/// At most this many are sent at once, and more after a pause: the queue of a server with
/// a small backlog would be full again before it runs.
const BATCH: u32 = 4;
const PAUSE: Duration = Duration::from_millis(10);
/// Requests that are kept at once.
const REQUESTS_MAX: usize = 512;
/// The largest that is kept: headers of Ethernet, IPv6, and TCP with all options.
const FRAME_MAX: usize = 14 + 40 + 60;

/// A request that the guest has not answered.
struct Request {
    flow: Flow,
    frame: Vec<u8>,
    begun: Instant,
    due: Instant,
}

/// The requests that the guest has not answered, in the order in which they are due.
#[derive(Default)]
pub struct Requests {
    waiting: VecDeque<Request>,
    /// How many were sent since the last pause, and when the next one ends.
    sent: u32,
    pause: Option<Instant>,
    resent: u64,
}

impl Requests {
    /// The network asks the guest for a connection. With [`REQUESTS_MAX`] others waiting, or
    /// in a frame that is larger than needed, it does so once.
    pub fn add(&mut self, flow: Flow, frame: &[u8], now: Instant) {
        // The network itself may ask again.
        let known = self.waiting.iter().any(|request| request.flow == flow);
        if known || self.waiting.len() >= REQUESTS_MAX || frame.len() > FRAME_MAX {
            return;
        }
        self.waiting.push_back(Request {
            flow,
            frame: frame.to_vec(),
            begun: now,
            due: now + INTERVAL,
        });
    }

    /// The guest has answered, or the network wants no answer any more.
    pub fn remove(&mut self, flow: &Flow) {
        self.waiting.retain(|request| request.flow != *flow);
    }

    /// When [`Requests::take`] returns the next one.
    pub fn next_due(&self) -> Option<Instant> {
        let due = self.waiting.front()?.due;
        Some(self.pause.map_or(due, |pause| due.max(pause)))
    }

    /// The next frame that is sent again now. It is called until there is none.
    pub fn take(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.pause.is_some_and(|pause| now < pause) {
            return None;
        }
        self.pause = None;
        // Those of a VM that was paused meanwhile, for one.
        let given_up = |first: &Request| now >= first.begun + GIVE_UP;
        while self.waiting.front().is_some_and(given_up) {
            self.waiting.pop_front();
        }
        let is_due = self.waiting.front().is_some_and(|first| first.due <= now);
        if !is_due {
            self.sent = 0;
            return None;
        }
        if self.sent == BATCH {
            self.sent = 0;
            self.pause = Some(now + PAUSE);
            return None;
        }
        let mut request = self.waiting.pop_front()?;
        let frame = request.frame.clone();
        request.due = now + INTERVAL;
        if request.due < request.begun + GIVE_UP {
            self.waiting.push_back(request);
        }
        self.sent += 1;
        self.resent += 1;
        Some(frame)
    }

    /// How many were sent again.
    pub fn resent(&self) -> u64 {
        self.resent
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::super::flow::End;
    use super::*;
    use crate::net::publish::Protocol;

    fn flow(peer_port: u16) -> Flow {
        Flow {
            begun_by: End::Peer,
            protocol: Protocol::Tcp,
            guest_port: 80,
            peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
            peer_port,
        }
    }

    /// What is sent again when all that is due is asked for, and when.
    fn run(requests: &mut Requests, now: Instant) -> Vec<(Duration, Vec<u8>)> {
        let mut all = Vec::new();
        while let Some(due) = requests.next_due() {
            while let Some(frame) = requests.take(due) {
                all.push((due - now, frame));
            }
        }
        all
    }

    #[test]
    fn what_is_not_answered_is_sent_each_second_and_given_up() {
        let now = Instant::now();
        let mut requests = Requests::default();
        for port in 0..3 {
            requests.add(flow(port), &[port as u8; 54], now);
            // The network's own second try is not kept beside the first.
            requests.add(flow(port), &[9; 54], now);
        }
        requests.remove(&flow(1));
        let sent = run(&mut requests, now);
        let seconds: Vec<_> = sent
            .iter()
            .map(|(at, frame)| (at.as_secs(), frame[0]))
            .collect();
        let expected: Vec<_> = (1..=8)
            .flat_map(|second| [(second, 0), (second, 2)])
            .collect();
        assert_eq!(seconds, expected);
        assert_eq!((requests.resent(), requests.next_due()), (16, None));
    }

    #[test]
    fn what_was_given_up_meanwhile_is_not_sent() {
        let now = Instant::now();
        let mut requests = Requests::default();
        requests.add(flow(0), &[0; 54], now);
        requests.add(flow(1), &[1; 54], now + INTERVAL);
        assert_eq!(requests.take(now + GIVE_UP), Some(vec![1; 54]));
        assert_eq!(requests.take(now + GIVE_UP), None);
        assert_eq!(requests.next_due(), None);
    }

    #[test]
    fn a_burst_is_sent_in_small_batches() {
        let now = Instant::now();
        let mut requests = Requests::default();
        for port in 0..100 {
            requests.add(flow(port), &[0; 54], now);
        }
        let sent = run(&mut requests, now);
        for (index, (at, _)) in sent.iter().take(100).enumerate() {
            assert_eq!(*at, INTERVAL + PAUSE * (index as u32 / BATCH));
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let now = Instant::now();
        let mut requests = Requests::default();
        requests.add(flow(9999), &[0; FRAME_MAX + 1], now);
        assert_eq!(requests.next_due(), None);
        for port in 0..1000 {
            requests.add(flow(port), &[0; FRAME_MAX], now);
        }
        assert_eq!(requests.waiting.len(), REQUESTS_MAX);
    }
}
