//! `--net`

use std::fmt;
use std::str::FromStr;

use mayfly_devices::rate_limiter::Limits;

use super::keys::{FromKeys, Keys};
use super::limits::take_limits;
use super::queues::Queues;
use crate::failure::Failure;
use crate::net::publish::{PORTS_MAX, Publish, Reserved};
use crate::net::user::UserConfig;

/// A network device's name is shorter than this (Linux' `IFNAMSIZ`).
const TAP_NAME_MAX: usize = 16;
const SYNTAX: &str = "tap=NAME[,queues=N|cpus] or \
                      user[,publish=[[IP:]HOST:]GUEST[/udp]]…[,allow=CIDR|DOMAIN[:PORT]]…[,dns=IP]…[,isolated][,host-loopback], \
                      and [,mac=XX:XX:XX:XX:XX:XX][,bw=10M][,bw-burst=50M][,pps=5000][,pps-burst=1000]";

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// What it leads to.
    pub network: Network,
    /// The guest's MAC address; else derived from the network's name.
    pub mac: Option<[u8; 6]>,
    /// How much the guest may send, and as much again receive.
    pub limits: Limits,
}

/// What a network device leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// A TAP device of the host.
    Tap {
        /// Its name.
        name: String,
        /// How many pairs of queues the guest has.
        queues: Queues,
    },
    /// Sockets of the user's, by passt.
    User(UserConfig),
}

impl From<UserConfig> for NetConfig {
    fn from(user: UserConfig) -> Self {
        NetConfig {
            network: Network::User(user),
            mac: None,
            limits: Limits::default(),
        }
    }
}

impl NetConfig {
    /// A device on a TAP of a name.
    pub fn on_tap(name: String) -> Result<Self, String> {
        check_tap_name(&name)?;
        let queues = Queues::default();
        Ok(NetConfig {
            network: Network::Tap { name, queues },
            mac: None,
            limits: Limits::default(),
        })
    }

    /// How many pairs of queues the guest has.
    pub fn queues(&self) -> Queues {
        match &self.network {
            Network::Tap { queues, .. } => *queues,
            Network::User(_) => Queues::default(),
        }
    }

    /// Its network, if that is made of sockets.
    pub fn user(&self) -> Option<&UserConfig> {
        match &self.network {
            Network::Tap { .. } => None,
            Network::User(user) => Some(user),
        }
    }

    /// Chooses the host's ports that lead to the guest's, where that is left to us.
    pub fn choose_ports(&mut self) -> Result<Reserved, Failure> {
        match &mut self.network {
            Network::Tap { .. } => Ok(Reserved::default()),
            Network::User(user) => Reserved::choose(&mut user.publish),
        }
    }

    /// What its MAC address is derived from. Networks of sockets are apart from each other, so
    /// there it may be the same for all guests.
    pub(super) fn seed(&self) -> &str {
        match &self.network {
            Network::Tap { name, .. } => name,
            Network::User(_) => "user",
        }
    }

    /// The ports that are published.
    pub fn ports(&self) -> &[Publish] {
        self.user().map_or(&[], |user| &user.publish)
    }

    /// The flag, for messages.
    pub fn flag(&self) -> String {
        format!("--net {}", self.network)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Network::Tap { name, .. } => write!(f, "tap={name}"),
            Network::User(_) => f.write_str("user"),
        }
    }
}

impl FromStr for NetConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_text(text.as_ref())
    }
}

impl FromKeys for NetConfig {
    const SYNTAX: &'static str = SYNTAX;

    fn from_keys(mut keys: Keys) -> Result<Self, String> {
        let network = match keys.flag("user")? {
            true => Network::User(take_user(&mut keys)?),
            false => take_tap(&mut keys)?,
        };
        let net = NetConfig {
            network,
            mac: keys.value("mac")?.as_deref().map(parse_mac).transpose()?,
            limits: take_limits(&mut keys, "pps")?,
        };
        keys.finish()?;
        Ok(net)
    }
}

fn take_tap(keys: &mut Keys) -> Result<Network, String> {
    let name = keys.required("tap")?;
    check_tap_name(&name)?;
    let queues = Queues::take(keys)?;
    Ok(Network::Tap { name, queues })
}

fn check_tap_name(name: &str) -> Result<(), String> {
    match name.len() >= TAP_NAME_MAX || name.contains(['/', '%', ' ', '\0']) {
        true => Err("tap must be a device's name, of 1 to 15 characters".into()),
        false => Ok(()),
    }
}

fn take_user(keys: &mut Keys) -> Result<UserConfig, String> {
    let address = |text: &String| {
        let address = text.parse();
        address.map_err(|_| format!("dns={text}: is not an address"))
    };
    let publish = keys.values("publish")?;
    let allow = keys.values("allow")?;
    Ok(UserConfig {
        publish: parse_ports(&publish)?,
        allow: allow
            .iter()
            .map(|text| text.parse())
            .collect::<Result<_, _>>()?,
        dns: keys
            .values("dns")?
            .iter()
            .map(address)
            .collect::<Result<_, _>>()?,
        isolated: keys.flag("isolated")?,
        host_loopback: keys.flag("host-loopback")?,
    })
}

/// Reads the ports that are to be published.
pub fn parse_ports<'a>(
    texts: impl IntoIterator<Item = &'a String>,
) -> Result<Vec<Publish>, String> {
    let mut all = Vec::new();
    for text in texts {
        all.extend(Publish::parse(text)?);
        if all.len() > PORTS_MAX {
            return Err(format!("{text}: more than {PORTS_MAX} ports are published"));
        }
    }
    Ok(all)
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
        let net: NetConfig = "tap=t0,mac=02:00:00:00:00:0a,queues=cpus".parse().unwrap();
        assert_eq!(net.mac, Some([2, 0, 0, 0, 0, 10]));
        assert_eq!(net.flag(), "--net tap=t0");
        assert_eq!((net.queues(), net.user()), (Queues::Cpus, None));
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
            "tap=a,allow=1.2.3.4",
            "tap=a,user",
            "bridge",
            "user,tap=a",
            "user,queues=2",
            "user,publish=80:",
            "user,publish=1-1024:1-1024,publish=2000:80",
            "user,allow=",
            "user,allow=1.2.3.4:x",
            "user,dns=localhost",
            "user,host-loopback=1",
        ] {
            assert!(bad.parse::<NetConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn networks_of_sockets() {
        let plain: NetConfig = "user".parse().unwrap();
        assert_eq!(plain, UserConfig::default().into());
        let net: NetConfig =
            "user,publish=8080-8081:80-81,allow=10.0.0.0/8:443,publish=0.0.0.0:53:53/udp,\
                              allow=*.debian.org,dns=1.1.1.1,dns=::1,isolated,host-loopback,bw=1M"
                .parse()
                .unwrap();
        let user = net.user().unwrap();
        assert_eq!(
            (user.publish.len(), user.allow.len(), user.dns.len()),
            (3, 2, 2)
        );
        assert!(user.isolated && user.host_loopback && net.limits.bandwidth.is_some());
        assert_eq!(net.flag(), "--net user");
    }
}
