//! Very many starts: not one may fail at random.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::common::{Host, Verb};

const STARTS: usize = 2000;
const AT_ONCE: usize = 400;

#[test]
fn two_thousand_starts_end_alike() {
    let host = Host::new();
    let flags = ["--rm", "--net", "none", "--memory", "32M"];
    let (next, others) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while next.fetch_add(1, Ordering::Relaxed) < STARTS {
                    let ended = host
                        .start(host.command(Verb::Run, "turns-off", &flags))
                        .wait();
                    if !ended.is_off(Verb::Run) {
                        let how = (ended.status.code(), ended.stderr);
                        *others.lock().unwrap().entry(how).or_insert(0) += 1;
                    }
                }
            });
        }
    });
    assert_eq!(others.into_inner().unwrap(), BTreeMap::new());
    assert_eq!(host.left(), [""; 0].map(std::path::PathBuf::from));
}
