//! The process that the user started: the supervisor of a VM. It opened what the machine
//! needs, and starts the VMM process, which may be taken over by its guest. Names, the
//! terminal, clients and the processes beside the VM stay here.

mod clients;
mod pidfile;
mod resources;
mod start;
mod status;
mod supervise;
mod vmm_process;

pub use self::start::SnapshotFiles;
pub use self::status::{Status, StatusBoard};
pub use self::supervise::{Supervisor, was_killed};
pub use self::vmm_process::StopHandle;

use crate::config::MachineConfig;
use crate::failure::{Failure, OrFail};
use crate::link::Ending;
use crate::net::publish::Reserved;
use crate::signals::StartSignals;
use crate::timing::Timeline;

/// Builds a machine and runs it to its end. Its published ports are chosen, and held
/// until it has them.
pub fn run(
    config: &MachineConfig,
    ports: Vec<Reserved>,
    timeline: Timeline,
) -> Result<Ending, Failure> {
    let signals = StartSignals::take().or_internal("blocking signals")?;
    let supervisor = Supervisor::start(config, SnapshotFiles::None, timeline, &signals)?;
    drop(ports);
    supervisor.run()
}
