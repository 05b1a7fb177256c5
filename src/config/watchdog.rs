//! `--watchdog`

use super::keys::{FromKeys, Keys};
use crate::spec::WatchdogAction;

const SYNTAX: &str = "action=crash, action=reset or action=nmi";

impl FromKeys for WatchdogAction {
    const SYNTAX: &'static str = SYNTAX;

    fn from_keys(mut keys: Keys) -> Result<Self, String> {
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
        let parse = |text: &str| WatchdogAction::from_text(text.as_ref());
        assert_eq!(parse("action=crash"), Ok(WatchdogAction::Crash));
        assert_eq!(parse("action=reset"), Ok(WatchdogAction::Reset));
        assert_eq!(parse("action=nmi"), Ok(WatchdogAction::Nmi));
        for wrong in [
            "",
            "crash",
            "action=",
            "action=panic",
            "action=nmi,action=nmi",
            "action=nmi,x",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
