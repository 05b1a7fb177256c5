//! Records for tests.

use proptest::collection::vec;
use proptest::prelude::*;

use crate::model::*;
use crate::statistics::Summary;

/// The record that the page's test in a browser shows, too. Its figures are made up.
pub fn record() -> Report {
    serde_json::from_str(include_str!("../../../tests/report/record.json")).unwrap()
}

/// A record of these engines, and nothing else.
pub fn report(engines: Vec<EngineReport>) -> Report {
    let mut report = record();
    report.engines = engines;
    report.warnings.clear();
    report.order.clear();
    report
}

/// An engine with a sample of each of these marks, in ns.
pub fn engine(name: &str, kind: Kind, samples: &[&[(Mark, u64)]]) -> EngineReport {
    let sample = |(place, marks): (usize, &&[(Mark, u64)])| Sample {
        round: place as u32,
        position: place as u32,
        marks_ns: marks.iter().copied().collect(),
        status: Some(0),
        command_status: Some(0),
        error: None,
    };
    let mut engine = EngineReport {
        command_line: vec![name.to_owned()],
        network: "none".to_owned(),
        samples: samples.iter().enumerate().map(sample).collect(),
        ..EngineReport::new(name, kind)
    };
    engine.sum_up();
    engine
}

/// An engine that is not there.
pub fn absent(name: &str, why: &str) -> EngineReport {
    EngineReport {
        missing: Some(why.to_owned()),
        ..EngineReport::new(name, Kind::Container)
    }
}

/// Where any record is drawn from: every number, every text.
struct Source {
    numbers: Vec<u64>,
    texts: Vec<String>,
    at: usize,
}

impl Source {
    fn number(&mut self) -> u64 {
        self.at += 1;
        // Not the same again after a turn.
        let turn = (self.at / self.numbers.len()) as u64;
        self.numbers[self.at % self.numbers.len()].rotate_left(turn as u32)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }

    fn float(&mut self) -> f64 {
        f64::from_bits(self.number())
    }

    fn text(&mut self) -> String {
        let place = self.below(self.texts.len() as u64) as usize;
        self.texts[place].clone()
    }

    fn maybe<T>(&mut self, of: impl Fn(&mut Source) -> T) -> Option<T> {
        (self.below(3) > 0).then(|| of(self))
    }

    fn some<T>(&mut self, of: impl Fn(&mut Source) -> T) -> Vec<T> {
        (0..self.below(4)).map(|_| of(self)).collect()
    }

    fn summary(&mut self) -> Summary {
        Summary {
            count: self.number() as u32,
            median: self.number(),
            mean: self.float(),
            deviation: self.float(),
            min: self.number(),
            max: self.number(),
            p95: self.number(),
            p99: self.number(),
            outliers: self.number() as u32,
        }
    }

    fn mark(&mut self) -> Mark {
        Mark::ALL[self.below(7) as usize]
    }

    fn sample(&mut self) -> Sample {
        Sample {
            round: self.number() as u32,
            position: self.number() as u32,
            marks_ns: self
                .some(|it| (it.mark(), it.number()))
                .into_iter()
                .collect(),
            status: self.maybe(|it| it.number() as i32),
            command_status: self.maybe(|it| it.number() as i32),
            error: self.maybe(Source::text),
        }
    }

    fn engine(&mut self) -> EngineReport {
        EngineReport {
            name: self.text(),
            kind: Kind::ALL[self.below(4) as usize],
            version: self.maybe(Source::text),
            missing: self.maybe(Source::text).filter(|_| self.below(2) > 0),
            command_line: self.some(Source::text),
            settings: (self.some(|it| (it.text(), it.text().into())).into_iter()).collect(),
            network: self.text(),
            notes: self.some(Source::text),
            warmups: self.some(Source::sample),
            samples: self.some(Source::sample),
            phases: self
                .some(|it| (it.mark(), it.summary()))
                .into_iter()
                .collect(),
            start: self.maybe(Source::summary),
            total: self.maybe(Source::summary),
            memory: self.some(|it| MemoryPoint {
                instances: it.number() as u32,
                private_kib: it.number(),
                shared_kib: it.number(),
                pss_kib: it.number(),
            }),
            load: self.maybe(|it| Load {
                at_once: it.number() as u32,
                launched_within_ns: it.number(),
                starts_ns: it.some(Source::number),
                start: it.maybe(Source::summary),
                starts_per_second: it.float(),
                failed: it.number() as u32,
            }),
            steady: self.some(|it| Figure {
                name: it.text(),
                value: it.float(),
                unit: it.text(),
                rounds: it.some(Source::float),
            }),
            tcp: self.maybe(|it| match it.below(4) {
                0 => Way::Loopback,
                1 => Way::Network,
                2 => Way::None,
                _ => Way::Lost(it.text()),
            }),
            isolation: self.maybe(|it| Isolation {
                kernel: it.text(),
                host_kernel: it.below(2) > 0,
                host_syscalls: it.maybe(|it| it.number() as u32),
                monitor_syscalls: it.maybe(|it| it.number() as u32),
                devices: it.some(Source::text),
                capabilities: it.some(Source::text),
                own_user_namespace: it.below(2) > 0,
                namespaces: it.some(|it| (it.text(), it.text())).into_iter().collect(),
                host_namespaces: it.some(Source::text),
                sees_of_host: it.some(Source::text),
                seccomp: it.number() as u32,
            }),
        }
    }

    fn report(&mut self) -> Report {
        Report {
            format: FORMAT,
            mayfly: self.text(),
            started_ms: self.number(),
            seed: self.number(),
            runs: self.number() as u32,
            warmup: self.number() as u32,
            page_cache: [PageCache::Warm, PageCache::Dropped][self.below(2) as usize],
            interrupted: self.below(2) > 0,
            host: Host {
                kernel: self.text(),
                cpu: self.text(),
                cpus: self.number() as u32,
                memory_mib: self.number(),
                system: self.text(),
                virtualised: self.maybe(Source::text),
                root: self.below(2) > 0,
                governor: self.maybe(Source::text),
                turbo: self.maybe(|it| it.below(2) > 0),
                load_before: self.float(),
                load_after: self.float(),
                stolen: self.float(),
                namespaces: self.some(|it| (it.text(), it.text())).into_iter().collect(),
            },
            workload: Workload {
                image: self.text(),
                image_id: self.text(),
                command: self.some(Source::text),
                cpus: self.number() as u32,
                memory_mib: self.number(),
                guest: self.some(|it| (it.text(), it.text())).into_iter().collect(),
            },
            engines: self.some(Source::engine),
            order: self.some(|it| it.number() as u32),
            warnings: self.some(Source::text),
        }
    }
}

/// Any record, also one that makes no sense.
pub fn any_report() -> impl Strategy<Value = Report> {
    let hostile = [
        "</script><b evil=\"",
        "' evil='\" evil=\"",
        "\x1b[2J\r\n",
        "-->",
        "&lt;",
        "名前",
        "",
    ];
    let number = prop_oneof![any::<u64>(), 0u64..100, 1_000_000u64..1_000_000_000];
    let text = prop_oneof![
        proptest::sample::select(hostile.to_vec()).prop_map(str::to_owned),
        any::<String>()
    ];
    let source = (vec(number, 1..200), vec(text, 1..12));
    source.prop_map(|(numbers, texts)| {
        Source {
            numbers,
            texts,
            at: 0,
        }
        .report()
    })
}
