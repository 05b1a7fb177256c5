//! `--net`

use std::str::FromStr;

use mayfly_devices::rate_limiter::Limits;

use super::keys::Keys;
use super::limits::take_limits;
use super::queues::Queues;

/// A network device's name is shorter than this (Linux' `IFNAMSIZ`).
const TAP_NAME_MAX: usize = 16;
const SYNTAX: &str = "tap=NAME[,mac=XX:XX:XX:XX:XX:XX]\
                      [,bw=10M][,bw-burst=50M][,pps=5000][,pps-burst=1000][,queues=N|cpus]";

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The TAP device.
    pub tap: String,
    /// The guest's MAC address; else derived from the TAP's name.
    pub mac: Option<[u8; 6]>,
    /// How much the guest may send, and as much again receive.
    pub limits: Limits,
    /// How many pairs of queues it has.
    pub queues: Queues,
}

impl FromStr for NetConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut keys = Keys::parse(text, SYNTAX);
        let net = NetConfig {
            tap: keys.required("tap")?,
            mac: keys.value("mac")?.as_deref().map(parse_mac).transpose()?,
            limits: take_limits(&mut keys, "pps")?,
            queues: Queues::take(&mut keys)?,
        };
        keys.finish()?;
        if net.tap.len() >= TAP_NAME_MAX || net.tap.contains(['/', '%', ' ', '\0']) {
            return Err("tap must be a device's name, of 1 to 15 characters".into());
        }
        Ok(net)
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    const MULTICAST: u8 = 1;
    let digits = |part: &str| {
        let plain = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        plain.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(digits).collect();
    let mac: [u8; 6] = bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| format!("mac {text} is not of the form 02:00:00:00:00:01"))?;
    if mac[0] & MULTICAST != 0 || mac == [0; 6] {
        return Err(format!(
            "mac {text} is not the address of one device; begin with 02"
        ));
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let net: NetConfig = "tap=t0,mac=02:00:00:00:00:0a".parse().unwrap();
        assert_eq!(
            (net.tap.as_str(), net.mac),
            ("t0", Some([2, 0, 0, 0, 0, 10]))
        );
        for bad in [
            "",
            "tap=",
            "tap=a/b",
            "tap=a%d",
            "tap=1234567890123456",
            "mac=02:00:00:00:00:0a",
            "tap=a,mac=01:00:00:00:00:00",
            "tap=a,mac=00:00:00:00:00:00",
            "tap=a,mac=2:0:0:0:0:1",
            "tap=a,mac=+2:00:00:00:00:01",
            "tap=a,mac=02:00:00:00:00",
            "tap=a,model=e1000",
            "tap=a,iops=1",
            "tap=a,pps=0",
            "tap=a,queues=0",
        ] {
            assert!(bad.parse::<NetConfig>().is_err(), "{bad}");
        }
    }
}
