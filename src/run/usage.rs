//! What a VM uses of the host: as its control groups say, where it has some, else
//! its processes (Linux' `proc_pid_stat(5)`).

use std::fs;
use std::time::Duration;

use rustix::param::{clock_ticks_per_second, page_size};

use mayfly_sandbox::GroupUsage;

/// What processes have used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Of the CPUs.
    pub time: Duration,
    /// Bytes of memory that are there.
    pub resident: u64,
}

impl Usage {
    /// What a VM has used so far, whose supervisor has a process id: that process, the
    /// machine's, and those beside it.
    pub fn of(pid: u32) -> Option<Self> {
        let mut all = Usage::of_process(pid)?;
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        for child in children.split_whitespace().filter_map(|it| it.parse().ok()) {
            let Some(mut its) = Usage::of_process(child) else {
                continue;
            };
            let group = GroupUsage::of_process(child, pid);
            its.time = group.cpu_us.map_or(its.time, Duration::from_micros);
            its.resident = group.memory.unwrap_or(its.resident);
            all.time += its.time;
            all.resident += its.resident;
        }
        Some(all)
    }

    fn of_process(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        Usage::parse(&text, clock_ticks_per_second(), page_size() as u64)
    }

    fn parse(text: &str, ticks: u64, page: u64) -> Option<Self> {
        // Behind the name, which may hold anything.
        let (_, fields) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let number = |index: usize| -> Option<u64> { fields.get(index)?.parse().ok() };
        // The state is field 3 there, and 0 here.
        let (user, system, pages) = (number(11)?, number(12)?, number(21)?);
        let time = user
            .checked_add(system)?
            .checked_mul(1000)?
            .checked_div(ticks)?;
        Some(Usage {
            time: Duration::from_millis(time),
            resident: pages.checked_mul(page)?,
        })
    }

    /// How much of one CPU was used since then, in percent.
    pub fn percent(&self, later: &Usage, time: Duration) -> f64 {
        100.0 * later.time.saturating_sub(self.time).as_secs_f64() / time.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernel_s_words() {
        let text =
            "42 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 4 0 99 1000 25 18446744073709551615";
        let usage = Usage::parse(text, 100, 4096).unwrap();
        assert_eq!(usage.time, Duration::from_secs(2));
        assert_eq!(usage.resident, 25 * 4096);
        let later = Usage {
            time: Duration::from_millis(2500),
            ..usage
        };
        assert!((usage.percent(&later, Duration::from_secs(1)) - 50.0).abs() < 0.01);
        assert_eq!(Usage::parse("42 (a", 100, 4096), None);
        assert!(Usage::of(std::process::id()).unwrap().resident > 0);
    }
}
