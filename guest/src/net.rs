//! The network, from the kernel's own `ip=` syntax (Linux'
//! `Documentation/admin-guide/nfs/nfsroot.rst`): Debian's kernels lack it.

use std::net::{IpAddr, Ipv4Addr};

use crate::interface;

/// `ip=ADDRESS::GATEWAY:NETMASK:HOSTNAME:DEVICE:off:RESOLVER:RESOLVER`
#[derive(Debug, PartialEq, Eq)]
pub struct Config {
    address: Ipv4Addr,
    gateway: Option<Ipv4Addr>,
    prefix: u8,
    hostname: Option<String>,
    device: String,
    resolvers: Vec<String>,
}

/// Finds the configuration on a kernel command line.
pub fn from_cmdline(cmdline: &str) -> Result<Option<Config>, String> {
    let Some(value) = cmdline
        .split_whitespace()
        .take_while(|&word| word != "--")
        .filter_map(|word| word.strip_prefix("ip="))
        .last()
    else {
        return Ok(None);
    };
    match value {
        "off" | "none" => return Ok(None),
        "on" | "any" | "dhcp" | "bootp" | "rarp" | "both" => {
            return Err(format!(
                "ip={value}: not supported; write ip=ADDRESS::GATEWAY:NETMASK::DEVICE:off"
            ));
        }
        _ => {}
    }
    let field = |index: usize| {
        value
            .split(':')
            .nth(index)
            .filter(|text| !text.is_empty())
            .map(str::to_owned)
    };
    let address = |index| {
        let parse = |text: String| {
            let parsed = text.parse::<Ipv4Addr>();
            parsed.map_err(|_| format!("ip={value}: {text} is not an address"))
        };
        field(index).map(parse).transpose()
    };
    let own = address(0)?.ok_or_else(|| format!("ip={value}: no address"))?;
    let prefix = match field(3) {
        Some(mask) => {
            prefix_of(&mask).ok_or_else(|| format!("ip={value}: {mask} is not a netmask"))?
        }
        None => 24,
    };
    Ok(Some(Config {
        address: own,
        gateway: address(2)?,
        prefix,
        hostname: field(4),
        device: field(5).unwrap_or_else(|| "eth0".to_owned()),
        resolvers: [field(7), field(8)].into_iter().flatten().collect(),
    }))
}

fn prefix_of(mask: &str) -> Option<u8> {
    let bits = u32::from(mask.parse::<Ipv4Addr>().ok()?);
    let ones = (bits.leading_ones() + bits.trailing_zeros() == u32::BITS || bits == 0)
        .then(|| bits.leading_ones());
    ones.and_then(|ones| u8::try_from(ones).ok())
}

/// Applies the configuration.
pub fn configure(config: &Config) -> Result<(), String> {
    let addresses = [(config.address.into(), config.prefix)];
    let gateway: Option<IpAddr> = config.gateway.map(Into::into);
    interface::configure(&config.device, &addresses, gateway.as_slice())?;
    if let Some(name) = &config.hostname {
        let path = "/proc/sys/kernel/hostname";
        std::fs::write(path, name).map_err(|error| format!("{path}: {error}"))?;
    }
    if !config.resolvers.is_empty() {
        let path = "/etc/resolv.conf";
        let lines = config.resolvers.iter();
        let lines: String = lines
            .map(|address| format!("nameserver {address}\n"))
            .collect();
        let written = std::fs::create_dir_all("/etc").and_then(|()| std::fs::write(path, lines));
        written.map_err(|error| format!("{path}: {error}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernel_s_syntax() {
        let config = from_cmdline("quiet ip=10.0.0.2::10.0.0.1:255.255.255.0::eth1:off panic=-1")
            .unwrap()
            .unwrap();
        assert_eq!(
            config,
            Config {
                address: Ipv4Addr::new(10, 0, 0, 2),
                gateway: Some(Ipv4Addr::new(10, 0, 0, 1)),
                prefix: 24,
                hostname: None,
                device: "eth1".into(),
                resolvers: Vec::new(),
            }
        );
        let config =
            from_cmdline("ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off:1.1.1.1:8.8.8.8:x")
                .unwrap()
                .unwrap();
        assert_eq!(config.resolvers, ["1.1.1.1", "8.8.8.8"]);
        assert_eq!(from_cmdline("quiet -- ip=1.2.3.4"), Ok(None));
        assert_eq!(from_cmdline("ip=off"), Ok(None));
        assert!(from_cmdline("ip=dhcp").unwrap_err().contains("ip=dhcp"));
        assert!(from_cmdline("ip=::1").is_err());
        assert!(from_cmdline("ip=1.2.3.4:::255.0.255.0").is_err());
        assert!(from_cmdline("ip=1.2.3.4::gateway").is_err());
        assert_eq!(prefix_of("255.255.254.0"), Some(23));
        assert_eq!(prefix_of("0.0.0.0"), Some(0));
    }
}
