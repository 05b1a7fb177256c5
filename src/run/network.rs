//! The network of a VM of `mayfly run`: the device, and what its guest makes of it.

use std::io::Write;
use std::net::IpAddr;
use std::str::FromStr;

use mayfly_protocol::agent::Net;

use super::options::{Mode, Options};
use crate::config::{HostFacts, Keys, NetConfig, Network, parse_ports};
use crate::failure::Failure;
use crate::net::egress::rule::Rule;
use crate::net::passt;
use crate::net::user::UserNet;

const SYNTAX: &str = "user[,isolated], none, or tap=NAME,ip=ADDRESS/PREFIX[,gateway=IP]";

/// What the user asks for: a device, and the guest's side of it; neither, if there
/// is to be no network.
pub fn network(options: &Options, host: &HostFacts) -> Result<Option<(NetConfig, Net)>, Failure> {
    let wishes = !options.publish.is_empty() || !options.allow.is_empty();
    if options.net.is_none() && !wishes && passt::program().is_none() {
        // Told once: not by those that another process follows, which runs the VM.
        if matches!(options.mode(), Mode::Foreground | Mode::Background) {
            let _ = writeln!(
                std::io::stderr(),
                "mayfly: no network, as passt is not installed: apt install passt, or say --net none"
            );
        }
        return Ok(None);
    }
    let text = match options.net.as_deref() {
        // Docker's words for what every VM has to itself.
        None | Some("bridge" | "default") => "user",
        Some(text) => text,
    };
    if text.split(',').next() == Some("user") {
        return user(text, options, host).map(Some);
    }
    // These are carried out by what lies behind `user`.
    for (flag, given) in [
        ("--publish", !options.publish.is_empty()),
        ("--allow", !options.allow.is_empty()),
    ] {
        if given {
            return Err(Failure::config(format!("{flag} needs --net user")));
        }
    }
    match text {
        "none" => Ok(None),
        "host" => Err(Failure::config(
            "--net host: a VM has a network of its own; publish its ports with -p, and say --net user",
        )),
        _ if text.starts_with("container:") => Err(Failure::config(format!(
            "--net {text}: a VM cannot have another's network"
        ))),
        _ => tap(text, options)
            .map(Some)
            .map_err(|why| Failure::config(format!("--net {text}: {why}"))),
    }
}

fn user(text: &str, options: &Options, host: &HostFacts) -> Result<(NetConfig, Net), Failure> {
    let wrong = |why| Failure::config(format!("--net {text}: {why}"));
    let mut device = NetConfig::from_str(text).map_err(wrong)?;
    let Network::User(config) = &mut device.network else {
        return Err(wrong(format!("write {SYNTAX}")));
    };
    let all = parse_ports(&options.publish);
    let all = all.map_err(|why| Failure::config(format!("--publish {why}")))?;
    config.publish.extend(all);
    config
        .allow
        .extend(parse::<Rule>("--allow", &options.allow)?);
    config.dns.extend(&options.dns);
    let net = UserNet::new(config, &host.network);
    let ip6 = net.ip6.as_ref();
    let mut addresses = vec![(IpAddr::V4(net.guest_ip), net.prefix)];
    addresses.extend(ip6.map(|ip6| (IpAddr::V6(ip6.guest_ip), ip6.prefix)));
    let mut gateways = vec![IpAddr::V4(net.gateway)];
    gateways.extend(ip6.map(|ip6| IpAddr::V6(ip6.gateway)));
    let guest = Net {
        addresses,
        gateways,
        dns: net.dns.clone(),
        ..Net::default()
    };
    Ok((device, guest))
}

fn tap(text: &str, options: &Options) -> Result<(NetConfig, Net), String> {
    let mut keys = Keys::parse(text, SYNTAX);
    let name = keys.required("tap")?;
    let address = keys.required("ip")?;
    let gateway = keys.value("gateway")?;
    keys.finish()?;
    let wrong = |text: &str| format!("{text}: is not an address");
    let (ip, prefix) = address
        .split_once('/')
        .and_then(|(ip, prefix)| Some((ip.parse().ok()?, prefix.parse().ok()?)))
        .filter(|&(ip, prefix): &(IpAddr, u8)| prefix <= if ip.is_ipv4() { 32 } else { 128 })
        .ok_or_else(|| format!("ip={address}: write it as 10.0.0.2/24"))?;
    let gateway = gateway
        .map(|text| text.parse().map_err(|_| wrong(&text)))
        .transpose()?;
    let config = NetConfig::on_tap(name)?;
    let guest = Net {
        addresses: vec![(ip, prefix)],
        gateways: gateway.into_iter().collect(),
        dns: options.dns.clone(),
        ..Net::default()
    };
    Ok((config, guest))
}

fn parse<T: FromStr<Err = String>>(flag: &str, texts: &[String]) -> Result<Vec<T>, Failure> {
    let one = |text: &String| {
        let parsed = text.parse();
        parsed.map_err(|why: String| Failure::config(format!("{flag} {text}: {why}")))
    };
    texts.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(net: &str) -> Options {
        Options {
            net: Some(net.into()),
            ..Options::default()
        }
    }

    #[test]
    fn networks_are_few() {
        assert!(
            network(&options("none"), &HostFacts::default())
                .unwrap()
                .is_none()
        );
        for text in ["user", "bridge", "default"] {
            let (device, _) = network(&options(text), &HostFacts::default())
                .unwrap()
                .unwrap();
            assert!(device.user().is_some(), "{text}");
        }
        let (device, guest) = network(&options("user"), &HostFacts::default())
            .unwrap()
            .unwrap();
        assert!(device.user().is_some());
        assert_eq!(guest.addresses[0].1, 24);
        let closed = Options {
            allow: vec!["10.0.0.1".into()],
            ..options("user,isolated,allow=a.example,dns=9.9.9.9")
        };
        let (device, guest) = network(&closed, &HostFacts::default()).unwrap().unwrap();
        let user = device.user().unwrap();
        assert!(user.isolated);
        assert_eq!(user.allow.len(), 2);
        assert_eq!(guest.dns, ["9.9.9.9".parse::<IpAddr>().unwrap()]);
        let (device, guest) = network(
            &options("tap=t0,ip=10.0.0.2/24,gateway=10.0.0.1"),
            &HostFacts::default(),
        )
        .unwrap()
        .unwrap();
        assert_eq!(device.flag(), "--net tap=t0");
        assert_eq!(guest.gateways, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        for wrong in [
            "",
            "host",
            "container:web",
            "mynet",
            "tap=t0",
            "tap=t0,ip=10.0.0.2",
            "tap=t0,ip=10.0.0.2/33",
            "tap=t0,ip=10.0.0.2/24,gateway=x",
            "none,x",
            "user,x",
            "user,tap=t0",
        ] {
            assert!(
                network(&options(wrong), &HostFacts::default()).is_err(),
                "{wrong}"
            );
        }
        let published = Options {
            publish: vec!["80:80".into()],
            ..options("none")
        };
        assert!(
            network(&published, &HostFacts::default())
                .unwrap_err()
                .to_string()
                .contains("--net user")
        );
        let nonsense = Options {
            allow: vec!["a b".into()],
            ..Options::default()
        };
        assert!(
            network(&nonsense, &HostFacts::default())
                .unwrap_err()
                .to_string()
                .starts_with("--allow a b")
        );
    }
}
