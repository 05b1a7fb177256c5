//! `queues=N`

use super::keys::Keys;

/// How many queues a device offers to its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queues {
    /// A fixed number.
    Number(u8),
    /// One for each vCPU.
    Cpus,
}

impl Default for Queues {
    fn default() -> Self {
        Queues::Number(1)
    }
}

impl Queues {
    /// Takes the key.
    pub fn take(keys: &mut Keys) -> Result<Self, String> {
        match keys.value("queues")?.as_deref() {
            None => Ok(Queues::default()),
            Some("cpus") => Ok(Queues::Cpus),
            Some(text) => match text.parse() {
                Ok(number @ 1..) => Ok(Queues::Number(number)),
                _ => Err(format!("queues={text}: not a number from 1, or cpus")),
            },
        }
    }

    /// The number of queues in a VM of `cpus` vCPUs.
    pub fn number(self, cpus: u8) -> u8 {
        match self {
            Queues::Number(number) => number,
            Queues::Cpus => cpus,
        }
    }

    /// A queue without a vCPU would never be used.
    pub fn check(self, cpus: u8) -> Result<(), String> {
        match self {
            Queues::Number(number) if number > cpus => Err(format!(
                "queues={number} are more than the VM's vCPUs; write queues=cpus or raise --cpus {cpus}"
            )),
            _ => Ok(()),
        }
    }
}
