//! What a guest may reach: `CIDR[:PORT]` or `DOMAIN[:PORT]`.

use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::net::cidr::Cidr;

const NAME_MAX: usize = 253;
const LABEL_MAX: usize = 63;

/// A permission.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Whom it may reach.
    pub target: Target,
    /// At which port of TCP and UDP; else at all, and by ping.
    pub port: Option<u16>,
}

/// Whom a guest may reach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// Addresses.
    Network(Cidr),
    /// A name, in small letters.
    Domain(String),
    /// All names below one.
    Below(String),
}

impl Rule {
    /// It names the address and the port.
    pub fn permits(&self, address: IpAddr, port: Option<u16>) -> bool {
        let Target::Network(network) = &self.target else {
            return false;
        };
        network.contains(address) && (self.port.is_none() || self.port == port)
    }

    /// The same, and it means this address: a rule for all addresses means those of the
    /// internet.
    pub fn permits_explicitly(&self, address: IpAddr, port: Option<u16>) -> bool {
        let all = matches!(&self.target, Target::Network(network) if network.prefix() == 0);
        !all && self.permits(address, port)
    }

    /// It names the name, which is in small letters.
    pub fn names(&self, name: &str) -> bool {
        match &self.target {
            Target::Network(_) => false,
            Target::Domain(domain) => name == domain,
            Target::Below(domain) => name
                .strip_suffix(domain)
                .and_then(|rest| rest.strip_suffix('.'))
                .is_some_and(|label| !label.is_empty()),
        }
    }
}

impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = match text.strip_prefix('[') {
            Some(rest) => bracketed(rest),
            None if text.parse::<Cidr>().is_ok() => Ok((text, None)),
            None => match text.rsplit_once(':') {
                // An IPv6 address that is none.
                Some((head, _)) if head.contains(':') => Err("is not an address".to_owned()),
                Some((head, port)) => parse_port(port).map(|port| (head, Some(port))),
                None => Ok((text, None)),
            },
        };
        let rule = parsed.and_then(|(target, port)| {
            let target = parse_target(target)?;
            Ok(Rule { target, port })
        });
        rule.map_err(|reason| {
            format!("allow={text}: {reason}; write CIDR[:PORT], [IPV6]:PORT or [*.]DOMAIN[:PORT]")
        })
    }
}

/// `2001:db8::/32]:443`
fn bracketed(rest: &str) -> Result<(&str, Option<u16>), String> {
    let (target, behind) = rest.split_once(']').ok_or("has no ]")?;
    match behind {
        "" => Ok((target, None)),
        _ => {
            let port = behind.strip_prefix(':').ok_or("has no : behind ]")?;
            Ok((target, Some(parse_port(port)?)))
        }
    }
}

fn parse_port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(port @ 1..) => Ok(port),
        _ => Err(format!("{text:?} is not a port")),
    }
}

fn parse_target(text: &str) -> Result<Target, String> {
    let looks_numeric = |text: &str| {
        let mut bytes = text.bytes();
        text.contains(':') || bytes.all(|byte| byte.is_ascii_digit() || b"./".contains(&byte))
    };
    if text.contains('/') || looks_numeric(text) {
        return text.parse().map(Target::Network);
    }
    let (below, domain) = match text.strip_prefix("*.") {
        Some(domain) => (true, domain),
        None => (false, text),
    };
    let domain = domain.strip_suffix('.').unwrap_or(domain);
    let label = |label: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        (1..=LABEL_MAX).contains(&label.len()) && label.bytes().all(plain)
    };
    if domain.len() > NAME_MAX || !domain.split('.').all(label) {
        return Err("is neither an address nor a name (other letters as xn--…)".into());
    }
    let domain = domain.to_ascii_lowercase();
    Ok(match below {
        true => Target::Below(domain),
        false => Target::Domain(domain),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_with_and_without_a_port() {
        for (text, address, port, permitted) in [
            ("10.0.0.0/8", "10.1.2.3", Some(1), true),
            ("10.0.0.0/8", "10.1.2.3", None, true),
            ("10.0.0.0/8", "11.1.2.3", Some(1), false),
            ("1.2.3.4:443", "1.2.3.4", Some(443), true),
            ("1.2.3.4:443", "1.2.3.4", Some(80), false),
            ("1.2.3.4:443", "1.2.3.4", None, false),
            ("0.0.0.0/0", "1.2.3.4", Some(9), true),
            ("0.0.0.0/0", "2001:db8::1", Some(9), false),
            ("2001:db8::/32", "2001:db8::1", Some(9), true),
            ("[2001:db8::/32]:9", "2001:db8:1::1", Some(9), true),
            ("[2001:db8::1]:9", "2001:db8::1", Some(8), false),
            ("[2001:db8::1]", "2001:db8::1", None, true),
            ("example.com", "1.2.3.4", Some(1), false),
        ] {
            let address = address.parse().unwrap();
            assert_eq!(rule(text).permits(address, port), permitted, "{text}");
        }
    }

    #[test]
    fn all_addresses_are_not_each_of_them() {
        let address = "169.254.169.254".parse().unwrap();
        for (text, explicit) in [
            ("0.0.0.0/0", false),
            ("0.0.0.0/0:80", false),
            ("169.254.0.0/16", true),
            ("169.254.169.254:80", true),
            ("169.254.169.254:81", false),
        ] {
            let rule = rule(text);
            assert_eq!(
                rule.permits_explicitly(address, Some(80)),
                explicit,
                "{text}"
            );
        }
    }

    #[test]
    fn names_and_what_is_below() {
        for (text, name, named) in [
            ("example.com", "example.com", true),
            ("Example.COM.:443", "example.com", true),
            ("example.com", "www.example.com", false),
            ("example.com", "example.com.evil.net", false),
            ("*.example.com", "www.example.com", true),
            ("*.example.com", "a.b.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", ".example.com", false),
            ("*.example.com", "evilexample.com", false),
            ("localhost", "localhost", true),
        ] {
            assert_eq!(rule(text).names(name), named, "{text} {name}");
        }
        assert_eq!(rule("example.com:443").port, Some(443));
    }

    #[test]
    fn mistakes_are_told() {
        for bad in [
            "",
            ":80",
            "*",
            "*.",
            "a..b",
            "-/-",
            "1.2.3",
            "1.2.3.4/33",
            "10.0.0.1/8",
            "1.2.3.4:0",
            "1.2.3.4:http",
            "1.2.3.4:70000",
            "a b",
            "*.*.a",
            "a.*.b",
            "[::1",
            "[::1]80",
            "2001:db8::1:",
            "bücher.example",
            "2001:db8::/129",
            "[example.com]x",
            "example.com:",
        ] {
            let message = bad.parse::<Rule>().unwrap_err();
            assert!(message.contains("write CIDR"), "{bad}: {message}");
        }
    }
}
