//! What a comparison's numbers mean, and what they do not, in plain language.

use super::units::{duration, list, mib, printable, times};
use super::view::{
    bar, differ, failed_warmups, failures, fastest, further, memory, missing, ranked, ratio,
    started,
};
use crate::model::{EngineReport, Kind, Mark, PageCache, Report};
use crate::statistics::Summary;

/// The least runs that make a tail: 1 of 100 is slower than p99.
const RUNS_FOR_A_TAIL: u32 = 100;

/// What was compared: the image and its command.
pub fn subject(report: &Report) -> String {
    let workload = &report.workload;
    let mut words = vec![printable(&workload.image)];
    words.extend(workload.command.iter().map(|it| printable(it)));
    words.join(" ")
}

/// How it was measured, in a line.
pub fn method(report: &Report) -> String {
    let warmup = match report.warmup {
        0 => String::new(),
        count => format!(" after {count} that {} not count", does(count)),
    };
    let page_cache = match report.page_cache {
        PageCache::Warm => "files in the page cache",
        PageCache::Dropped => "page cache dropped before each",
    };
    format!(
        "{} of each engine{warmup}, in random order (seed {}); {page_cache}; {} and {} MiB each.",
        counted(report.runs, "run"),
        report.seed,
        counted(report.workload.cpus, "CPU"),
        report.workload.memory_mib
    )
}

fn does(count: u32) -> &'static str {
    if count == 1 { "does" } else { "do" }
}

fn counted(count: u32, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        _ => format!("{count} {what}s"),
    }
}

/// What the engines' times say: a sentence each.
pub fn headline(report: &Report) -> Vec<String> {
    let mut says = Vec::new();
    let [process, container, vm, own] = Kind::ALL.map(|kind| fastest(report, Some(kind)));

    let took = |(engine, start): (&EngineReport, Summary)| {
        let what = match engine.kind {
            Kind::Process => "as a bare process".to_owned(),
            Kind::Container if engine.name == BUILT_IN => {
                "in the fastest container (the built-in one)".to_owned()
            }
            Kind::Container => format!("in the fastest container ({})", called(engine)),
            Kind::Vm => format!("in the fastest VM ({})", called(engine)),
            Kind::Own => format!("in {}", called(engine)),
        };
        format!("{} {what}", duration(start.median as f64))
    };
    let starts: Vec<String> = [process, container, vm, own]
        .into_iter()
        .flatten()
        .map(took)
        .collect();
    match starts.as_slice() {
        [] if !started(&ranked(report)) => {}
        [] => says.push("No run counts, so there is nothing to compare.".to_owned()),
        starts => says.push(format!(
            "From its launch to its first instruction, the command took {}.",
            list(starts)
        )),
    }

    if let (Some((container, theirs)), Some((vm, its))) = (container, vm) {
        let apart = duration(its.median.abs_diff(theirs.median) as f64);
        let (slow, fast) = if its.median >= theirs.median {
            (its, theirs)
        } else {
            (theirs, its)
        };
        let by = times(ratio(&slow, &fast).of);
        says.push(if !differ(&its, &theirs) {
            format!(
                "Between {} and {} there is no difference that these runs can tell from noise.",
                called(vm),
                called(container)
            )
        } else if its.median >= theirs.median {
            format!(
                "A machine with a kernel of its own thus costs {apart} more than the fastest \
                 container: {by} the time."
            )
        } else {
            format!(
                "The VM starts {apart} sooner than the fastest container, which takes {by} the time."
            )
        });
        says.extend(longest_phase(vm, &its));
    }
    says
}

/// What the rest says: a paragraph each.
pub fn more(report: &Report) -> Vec<String> {
    let mut says = Vec::new();
    let engines = ranked(report);
    let alike = alike(&engines);
    if !alike.is_empty() {
        says.push(format!(
            "What lies within the noise should not be ranked: {}.",
            list(&alike)
        ));
    }
    let both = [Kind::Container, Kind::Vm].map(|kind| fastest(report, Some(kind)));
    let of_memory: Vec<String> = both
        .into_iter()
        .flatten()
        .filter_map(|(it, _)| of_memory(it))
        .collect();
    if !of_memory.is_empty() {
        says.push(format!("Idle, {}.", of_memory.join("; ")));
    }
    says.extend(isolation(&engines));
    says
}

/// The engine that is a part of mayfly.
const BUILT_IN: &str = "container";

/// An engine in a sentence.
fn called(engine: &EngineReport) -> String {
    match engine.name.as_str() {
        BUILT_IN => "the built-in container".to_owned(),
        "process" => "a bare process".to_owned(),
        name => printable(name),
    }
}

/// What one instance takes, and each further one.
fn of_memory(engine: &EngineReport) -> Option<String> {
    let points = memory(engine);
    let one = points.first().filter(|it| it.instances == 1)?;
    let kernel = if engine.kind == Kind::Vm {
        " with its kernel"
    } else {
        ""
    };
    let more = further(&points).map_or_else(String::new, |it| {
        format!(", and each further one {} MiB", mib(it))
    });
    Some(format!(
        "{} takes {} MiB of memory{kernel}{more}",
        called(engine),
        mib(one.pss_kib as f64)
    ))
}

/// Where most of a start's time goes.
fn longest_phase(engine: &EngineReport, start: &Summary) -> Option<String> {
    let parts = bar(engine)
        .into_iter()
        .filter(|it| it.mark <= Mark::Command);
    let longest = parts.max_by_key(|it| it.summary.median)?;
    let name = match longest.together() {
        true => format!("what lies from {}", longest.name()),
        false => format!("its {} phase", longest.name()),
    };
    Some(format!(
        "The longest part of {}'s start is {name}: {} of {}.",
        called(engine),
        duration(longest.summary.median as f64),
        duration(start.median as f64)
    ))
}

/// Neighbours in rank that do not differ.
fn alike(ranked: &[&EngineReport]) -> Vec<String> {
    let pair = |pair: &[&EngineReport]| {
        let [one, other] = pair else { return None };
        let (a, b) = (one.start?, other.start?);
        let told = a.count.min(b.count) > 1 && !differ(&a, &b);
        told.then(|| format!("{} beside {}", called(one), called(other)))
    };
    ranked.windows(2).filter_map(pair).collect()
}

/// Whose kernel it is.
fn isolation(engines: &[&EngineReport]) -> Option<String> {
    let seen = |host| {
        let all = engines.iter();
        all.filter(move |it| it.isolation.as_ref().map(|it| it.host_kernel) == Some(host))
    };
    let names = |host| -> Vec<String> { seen(host).map(|it| called(it)).collect() };
    let (shared, own) = (names(true), names(false));
    let give = if own.len() == 1 { "gives" } else { "give" };
    // What else has a kernel of its own need not be a VM.
    let border = match seen(false).all(|it| it.kind == Kind::Vm) {
        true => ", behind a VM's border",
        false => "",
    };
    match (shared.as_slice(), own.as_slice()) {
        ([], _) | (_, []) => None,
        (shared, own) => Some(format!(
            "The command runs on the host's kernel in {}, so that a flaw in that kernel is a way \
             out; {} {give} it a kernel of its own{border}.",
            list(shared),
            list(own),
        )),
    }
}

/// What the numbers do not say: a sentence each.
pub fn limits(report: &Report) -> Vec<String> {
    let mut says = Vec::new();
    if let Some(by) = &report.host.virtualised {
        says.push(format!(
            "This host is itself virtual ({}): absolute times mean little, and ratios hold only \
             roughly. VMs mostly suffer more from it than containers do, as each of their exits \
             to the host passes through one machine more.",
            printable(by)
        ));
    }
    if report.interrupted {
        says.push(
            "The comparison was ended before it was through: there are fewer runs than were \
             wanted, and parts may be missing."
                .to_owned(),
        );
    }
    says.push(
        "The numbers hold for this machine, this kernel and this image. Elsewhere, even ratios \
         can be others."
            .to_owned(),
    );
    says.push(match report.page_cache {
        PageCache::Warm => {
            "Files were in the host's memory, as they are for whoever starts the same again; \
             the first start after the host's own takes longer."
                .to_owned()
        }
        PageCache::Dropped => {
            "The host forgot files before each run, so that the disk's speed is part of \
             all times, but for the image's own files, which lay in memory."
                .to_owned()
        }
    });
    let count = ranked(report)
        .iter()
        .filter_map(|it| Some(it.start?.count))
        .min();
    if let Some(count) = count.filter(|&it| it < RUNS_FOR_A_TAIL) {
        says.push(format!(
            "{} little of rare events: p99 is then the slowest of them.",
            if count == 1 {
                "A single run says".to_owned()
            } else {
                format!("{count} runs say")
            }
        ));
    }
    says.push(
        "Engines differ in what they set up by default (networks, logs, limits), so a faster one \
         may just do less; what was launched is below, word by word."
            .to_owned(),
    );
    if missing(report).next().is_some() {
        says.push(
            "Of an engine that is missing, nothing is known: it is not a slow one.".to_owned(),
        );
    }
    says
}

/// What the record itself warns of, and runs that do not count.
pub fn warnings(report: &Report) -> Vec<String> {
    let mut warnings: Vec<String> = report.warnings.iter().map(|it| printable(it)).collect();
    for engine in ranked(report) {
        if let Some((failed, of, why)) = failures(engine) {
            let does = does(u32::try_from(failed).unwrap_or(u32::MAX));
            warnings.push(format!(
                "{}: {failed} of {of} runs {does} not count: {}",
                printable(&engine.name),
                printable(why)
            ));
        }
        if let Some((failed, of, why)) = failed_warmups(engine) {
            warnings.push(format!(
                "{}: {failed} of {of} runs before those that count failed: {}",
                printable(&engine.name),
                printable(why)
            ));
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::*;

    /// Starts after these many ms, and ends 1 ms later.
    fn starts(name: &str, kind: Kind, ms: &[u64]) -> EngineReport {
        let marks: Vec<_> = (ms.iter())
            .map(|ms| {
                [
                    (Mark::Command, ms * 1_000_000),
                    (Mark::Gone, (ms + 1) * 1_000_000),
                ]
            })
            .collect();
        let samples: Vec<&[(Mark, u64)]> = marks.iter().map(|it| it.as_slice()).collect();
        engine(name, kind, &samples)
    }

    fn says(engines: Vec<EngineReport>) -> String {
        let report = report(engines);
        headline(&report).join(" ") + &more(&report).join(" ")
    }

    #[test]
    fn who_is_slower_is_said_either_way() {
        let crun = || starts("crun", Kind::Container, &[20, 21, 22]);
        let text = says(vec![starts("mayfly", Kind::Vm, &[60, 63, 66]), crun()]);
        assert!(
            text.contains("costs 42.0 ms more than the fastest container: 3.0× the time"),
            "{text}"
        );
        assert!(text.contains(
            "21.0 ms in the fastest container (crun) and 63.0 ms in the fastest VM (mayfly)"
        ));
        let text = says(vec![starts("mayfly", Kind::Vm, &[6, 7, 8]), crun()]);
        assert!(text.contains("The VM starts 14.0 ms sooner"), "{text}");
        assert!(text.contains("takes 3.0× the time"), "{text}");
    }

    /// What a user's program does is not known: it is neither the floor nor a VM.
    #[test]
    fn ones_own_is_called_by_its_name() {
        let text = says(vec![
            starts("gvisor", Kind::Own, &[5, 5, 6]),
            starts("crun", Kind::Container, &[20, 21, 22]),
        ]);
        assert!(
            text.contains("21.0 ms in the fastest container (crun) and 5.00 ms in gvisor."),
            "{text}"
        );
        assert!(
            !text.contains("bare process") && !text.contains("VM"),
            "{text}"
        );
    }

    #[test]
    fn what_lies_within_the_noise_is_not_ranked() {
        let text = says(vec![
            starts("mayfly", Kind::Vm, &[20, 24, 28]),
            starts("crun", Kind::Container, &[19, 23, 27]),
        ]);
        assert!(
            text.contains("Between mayfly and crun there is no difference"),
            "{text}"
        );
        assert!(
            text.contains("should not be ranked: crun beside mayfly."),
            "{text}"
        );
    }

    #[test]
    fn without_runs_nothing_is_claimed() {
        assert_eq!(
            says(vec![absent("crun", "away")]),
            "No run counts, so there is nothing to compare."
        );
        let mut measured = engine("crun", Kind::Container, &[]);
        measured.memory = record().engines[1].memory.clone();
        assert_eq!(says(vec![measured]), "", "it was not asked for starts");
        let alone = says(vec![starts("crun", Kind::Container, &[20])]);
        assert!(!alone.contains("VM") && !alone.contains("noise"), "{alone}");
    }

    #[test]
    fn limits_are_those_of_the_measurement() {
        let mut report = report(vec![starts("crun", Kind::Container, &[20, 21])]);
        let text = limits(&report).join(" ");
        assert!(text.contains("2 runs say little") && text.contains("in the host's memory"));
        assert!(!text.contains("virtual") && !text.contains("ended before"));
        report.host.virtualised = Some("kvm".to_owned());
        report.interrupted = true;
        report.page_cache = PageCache::Dropped;
        let text = limits(&report).join(" ");
        assert!(text.contains("itself virtual (kvm): absolute times mean little"));
        assert!(text.contains("ended before") && text.contains("forgot files"));
    }

    #[test]
    fn runs_that_do_not_count_are_told() {
        let mut crun = starts("crun", Kind::Container, &[20, 21]);
        crun.samples[1].error = Some("busy\u{1b}[2J".to_owned());
        let told = ["crun: 1 of 2 runs does not count: busy\u{fffd}[2J"];
        assert_eq!(warnings(&report(vec![crun])), told);
    }
}
