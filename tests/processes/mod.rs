//! Who started whom. The kernel's own list of a process's children
//! (`/proc/PID/task/PID/children`) is not reliable while any of them runs (proc(5)).

use std::fs;

/// The processes that a process has started, and that nobody has waited for.
pub fn children(pid: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let all = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Behind the name, which may hold anything: the state, and the parent.
        let (_, fields) = stat.rsplit_once(") ")?;
        fields.split(' ').nth(1)?.parse::<u32>().ok()
    };
    let mut children: Vec<u32> = all.filter(|&it| parent(it) == Some(pid)).collect();
    children.sort_unstable();
    children
}
