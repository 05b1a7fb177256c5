//! `--console`

use std::path::PathBuf;
use std::str::FromStr;

/// Where the guest's serial console is on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ConsoleConfig {
    /// Standard input and output.
    #[default]
    Stdio,
    /// A file that takes the output.
    File(PathBuf),
    /// A new pseudo-terminal, whose name is printed.
    Pty,
    /// A Unix socket that takes one client at a time.
    Unix(PathBuf),
    /// Nowhere.
    None,
}

impl FromStr for ConsoleConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = |path: &str| match path {
            "" => Err("names no file".to_owned()),
            _ => Ok(PathBuf::from(path)),
        };
        match text.split_once('=') {
            None if text == "stdio" => Ok(ConsoleConfig::Stdio),
            None if text == "pty" => Ok(ConsoleConfig::Pty),
            None if text == "none" => Ok(ConsoleConfig::None),
            Some(("file", name)) => Ok(ConsoleConfig::File(path(name)?)),
            Some(("unix", name)) => Ok(ConsoleConfig::Unix(path(name)?)),
            _ => Err("not one of stdio, file=F, pty, unix=S, none".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles() {
        assert_eq!("pty".parse::<ConsoleConfig>().unwrap(), ConsoleConfig::Pty);
        assert_eq!(
            "file=a=b".parse::<ConsoleConfig>().unwrap(),
            ConsoleConfig::File("a=b".into())
        );
        for bad in ["", "file", "file=", "unix=", "stdio=1", "serial"] {
            assert!(bad.parse::<ConsoleConfig>().is_err(), "{bad}");
        }
    }
}
