//! `--watchdog`

use std::str::FromStr;

use super::keys::Keys;

const SYNTAX: &str = "action=crash, action=reset or action=nmi";

/// What happens when the guest does not feed its watchdog in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchdogAction {
    /// The VM ends as one that hung.
    Crash,
    /// The VM ends as one that restarted.
    Reset,
    /// The guest gets a non-maskable interrupt, to show where it is; if it is
    /// late once more, the VM ends as one that hung.
    Nmi,
}

impl FromStr for WatchdogAction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut keys = Keys::parse(text, SYNTAX);
        let action = match keys.required("action")?.as_str() {
            "crash" => WatchdogAction::Crash,
            "reset" => WatchdogAction::Reset,
            "nmi" => WatchdogAction::Nmi,
            other => return Err(format!("{other:?} is no action; write {SYNTAX}")),
        };
        keys.finish()?;
        Ok(action)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions() {
        assert_eq!("action=crash".parse(), Ok(WatchdogAction::Crash));
        assert_eq!("action=reset".parse(), Ok(WatchdogAction::Reset));
        assert_eq!("action=nmi".parse(), Ok(WatchdogAction::Nmi));
        for wrong in [
            "",
            "crash",
            "action=",
            "action=panic",
            "action=nmi,action=nmi",
            "action=nmi,x",
        ] {
            assert!(wrong.parse::<WatchdogAction>().is_err(), "{wrong}");
        }
    }
}
