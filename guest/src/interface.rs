//! The guest's network devices, without a program to help (Linux' `netdevice(7)`).

#![allow(unsafe_code, reason = "ioctls that set the network up")]

use std::io;
use std::mem::size_of_val;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::system::check;

/// The only network device of a machine with an agent, and the first.
pub const FIRST: &str = "eth0";

/// Gives a device addresses, with the lengths of their prefixes, and gateways.
pub fn configure(
    device: &str,
    addresses: &[(IpAddr, u8)],
    gateways: &[IpAddr],
) -> Result<(), String> {
    // Nobody else has these addresses: they need not be asked for.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{device}/accept_dad"), "0");
    for &(address, prefix) in addresses {
        let added = match address {
            IpAddr::V4(address) => add_v4(device, address, prefix),
            IpAddr::V6(address) => add_v6(device, address, prefix),
        };
        added.map_err(|error| format!("{device}: address {address}/{prefix}: {error}"))?;
    }
    turn_on(device).map_err(|error| format!("{device}: {error}"))?;
    for &gateway in gateways {
        let added = match gateway {
            IpAddr::V4(gateway) => route_v4(gateway),
            IpAddr::V6(gateway) => route_v6(device, gateway),
        };
        match added {
            // A kernel that reads `ip=` itself was first.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            added => added.map_err(|error| format!("{device}: gateway {gateway}: {error}"))?,
        }
    }
    Ok(())
}

/// Turns a device on.
pub fn turn_on(device: &str) -> io::Result<()> {
    let socket = socket(libc::AF_INET)?;
    let mut request = request(device);
    control(&socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: the call above filled in this member.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    control(&socket, libc::SIOCSIFFLAGS, &mut request)
}

fn socket(family: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    match fd {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: a new descriptor, that nothing else owns.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

/// The structure must be the one that the request is about.
fn control<T>(socket: &OwnedFd, what: libc::c_ulong, structure: &mut T) -> io::Result<()> {
    // SAFETY: reads and writes a live structure of the size that the request has.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut *structure) }.into())
}

fn request(device: &str) -> libc::ifreq {
    // SAFETY: plain bytes, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = size_of_val(&request.ifr_name) - 1;
    for (target, source) in request.ifr_name.iter_mut().take(room).zip(device.bytes()) {
        *target = source.cast_signed();
    }
    request
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(address.octets()),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: both are plain bytes, and of one size.
    unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) }
}

fn mask(prefix: u8) -> Ipv4Addr {
    let host = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
    Ipv4Addr::from(!host)
}

fn add_v4(device: &str, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
    let socket = socket(libc::AF_INET)?;
    let mut request = request(device);
    request.ifr_ifru.ifru_addr = socket_address(address);
    control(&socket, libc::SIOCSIFADDR, &mut request)?;
    request.ifr_ifru.ifru_netmask = socket_address(mask(prefix));
    control(&socket, libc::SIOCSIFNETMASK, &mut request)
}

fn route_v4(gateway: Ipv4Addr) -> io::Result<()> {
    let socket = socket(libc::AF_INET)?;
    // SAFETY: numbers and pointers that may be null.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    control(&socket, libc::SIOCADDRT, &mut route)
}

fn index(socket: &OwnedFd, device: &str) -> io::Result<libc::c_int> {
    let mut request = request(device);
    control(socket, libc::SIOCGIFINDEX, &mut request)?;
    // SAFETY: the call above filled in this member.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex })
}

fn in6(address: Ipv6Addr) -> libc::in6_addr {
    libc::in6_addr {
        s6_addr: address.octets(),
    }
}

fn add_v6(device: &str, address: Ipv6Addr, prefix: u8) -> io::Result<()> {
    /// Linux' `linux/ipv6.h`.
    #[repr(C)]
    struct In6Ifreq {
        address: libc::in6_addr,
        prefix: u32,
        index: libc::c_int,
    }
    let socket = socket(libc::AF_INET6)?;
    let mut request = In6Ifreq {
        address: in6(address),
        prefix: prefix.into(),
        index: index(&socket, device)?,
    };
    control(&socket, libc::SIOCSIFADDR, &mut request)
}

fn route_v6(device: &str, gateway: Ipv6Addr) -> io::Result<()> {
    /// Linux' `linux/ipv6_route.h`; libc's fields are private.
    #[repr(C)]
    struct In6Rtmsg {
        destination: libc::in6_addr,
        source: libc::in6_addr,
        gateway: libc::in6_addr,
        kind: u32,
        destination_len: u16,
        source_len: u16,
        metric: u32,
        info: libc::c_ulong,
        flags: u32,
        index: libc::c_int,
    }
    let socket = socket(libc::AF_INET6)?;
    let any = in6(Ipv6Addr::UNSPECIFIED);
    let mut route = In6Rtmsg {
        destination: any,
        source: any,
        gateway: in6(gateway),
        kind: 0,
        destination_len: 0,
        source_len: 0,
        metric: 1,
        info: 0,
        flags: u32::from(libc::RTF_UP | libc::RTF_GATEWAY),
        index: index(&socket, device)?,
    };
    control(&socket, libc::SIOCADDRT, &mut route)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks() {
        for (prefix, expected) in [
            (0, [0, 0, 0, 0]),
            (24, [255, 255, 255, 0]),
            (32, [255, 255, 255, 255]),
            (200, [255, 255, 255, 255]),
        ] {
            assert_eq!(mask(prefix), Ipv4Addr::from(expected));
        }
    }
}
