//! passt: a process beside the VM that turns the guest's packets into sockets
//! of an ordinary user, and back.
//!
//! It has one end of a pair of sockets, and ends when nobody has the other: so
//! it never outlives the VM, however that ends.

use std::ffi::CStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use etherparse::{ArpHardwareId, ArpOperation, ArpPacket, EtherType, PacketBuilder};
use mayfly_process::programs::find_program;
use mayfly_sandbox::Door;

use super::egress::EgressPolicy;
use super::publish::Protocol;
use super::user::{UserConfig, UserNet};
use crate::failure::{Failure, OrFail};
use crate::helper::{self, Chatter, Helper, Ready};
use crate::signals::StartSignals;

const PROGRAM: &str = "passt";
/// What a process that waits to become it is called.
const NAME: &CStr = c"passt (waits)";
/// Who passt is to the guest.
const MAC: [u8; 6] = [0x02, 0x6d, 0x61, 0x79, 0x66, 0x6c];
const MTU: u16 = 1500;
/// It starts in this time, or not at all.
const TIMEOUT: Duration = Duration::from_secs(10);
const FRAME_MAX: usize = 64 << 10;
/// What it says when all is well.
const CHATTER: Chatter = &[
    "Failed to send",
    "Don't run as root",
    "Couldn't get any nameserver",
    "No routable interface for IPv6",
];

/// Where the program is, if it is installed.
pub fn program() -> Option<PathBuf> {
    find_program(PROGRAM)
}

/// A passt that starts.
pub struct Starting {
    flag: String,
    policy: EgressPolicy,
    socket: UnixStream,
    helper: Helper,
    guest_mac: [u8; 6],
    /// It starts with the guest's first frame.
    later: bool,
}

/// Starts it; [`Starting::ready`] waits for it. Many a guest uses no network: unless
/// there are ports to be opened, a process waits in its stead for the first frame.
pub fn start(
    config: &UserConfig,
    net: &UserNet,
    guest_mac: [u8; 6],
    door: &Door,
) -> Result<Starting, Failure> {
    let flag = "--net user".to_owned();
    let missing = || {
        Failure::host(format!(
            "{flag}: needs {PROGRAM}, which is not installed: apt install passt"
        ))
    };
    let program = program().ok_or_else(missing)?;
    let (socket, theirs) = UnixStream::pair().or_host(&flag)?;
    let fd = theirs.as_raw_fd();
    let mut command = helper::command(&program).or_host(&flag)?;
    command.args(arguments(net, config, fd));
    let later = config.publish.is_empty();
    door.lead(&mut command).or_host(&flag)?;
    helper::give(&mut command, fd, later.then_some(NAME));
    let helper = Helper::spawn(PROGRAM, CHATTER, command)
        .map_err(|error| Failure::host(format!("{flag}: starting {PROGRAM}: {error}")))?;
    Ok(Starting {
        flag,
        policy: EgressPolicy::new(net, config),
        socket,
        helper,
        guest_mac,
        later,
    })
}

/// All that it would else take from the host is given, so that it starts
/// without a route or a resolver, too, and is the same everywhere. The gateway
/// stays mapped to the host's loopback, as bookworm's passt sends what answers a
/// client from there by that; who may use it the filter says.
fn arguments(net: &UserNet, config: &UserConfig, fd: RawFd) -> Vec<String> {
    let mac = MAC.map(|byte| format!("{byte:02x}")).join(":");
    let mut all = vec![
        "--foreground".to_owned(),
        "--quiet".to_owned(),
        format!("--fd={fd}"),
        // With larger packets, bookworm's often waits for seconds.
        format!("--mtu={MTU}"),
        format!("--mac-addr={mac}"),
        format!("--address={}", net.guest_ip),
        format!("--netmask={}", net.prefix),
        format!("--gateway={}", net.gateway),
    ];
    match &net.ip6 {
        Some(ip6) => all.extend([
            format!("--interface={}", ip6.device),
            format!("--address={}", ip6.guest_ip),
            format!("--gateway={}", ip6.gateway),
        ]),
        None => all.extend(["--ipv4-only".to_owned(), "--interface=lo".to_owned()]),
    }
    for resolver in &net.resolvers {
        all.push(format!("--dns={resolver}"));
    }
    for resolver in net.dns.iter().filter(|dns| net.is_gateway(**dns)) {
        all.push(format!("--dns-forward={resolver}"));
    }
    for (protocol, option) in [
        (Protocol::Tcp, "--tcp-ports"),
        (Protocol::Udp, "--udp-ports"),
    ] {
        let ports = config
            .publish
            .iter()
            .filter(|publish| publish.protocol == protocol);
        // All are chosen by now.
        let ports = ports.filter_map(|publish| Some((publish.address()?, publish.guest)));
        let ports: Vec<_> = ports
            .map(|(host, guest)| format!("{option}={}/{}:{guest}", host.ip(), host.port()))
            .collect();
        // Else those of TCP would be ports of UDP, too.
        match ports.is_empty() {
            true => all.push(format!("{option}=none")),
            false => all.extend(ports),
        }
    }
    all
}

impl Starting {
    /// Waits until it answers, if it starts now. Returns the socket for the guest's frames, and
    /// what these may reach, too.
    pub fn ready(
        mut self,
        signals: &StartSignals,
    ) -> Result<(UnixStream, EgressPolicy, Ready), Failure> {
        let what = format!("{}: {PROGRAM}", self.flag);
        let greeted = match self.later {
            true => Ok(()),
            false => self.greet(signals)?,
        };
        match greeted {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                return Err(Failure::host(format!("{what}: does not answer")));
            }
            Err(_) => {
                return Err(Failure::host(format!(
                    "{what}: {}",
                    self.helper.complaint()
                )));
            }
        }
        let socket = self.socket.try_clone().or_host(&what)?;
        Ok((
            socket,
            self.policy,
            Ready::new(self.helper, self.socket, "network"),
        ))
    }

    /// Asks for the gateway's address, which it answers once it has started.
    /// Fails if a signal ends the start; what is in it is how passt fares.
    fn greet(&mut self, signals: &StartSignals) -> Result<io::Result<()>, Failure> {
        let request = arp_request(self.guest_mac);
        let mut frame = u32::try_from(request.len())
            .unwrap_or(u32::MAX)
            .to_be_bytes()
            .to_vec();
        frame.extend(&request);
        if let Err(error) = self.socket.write_all(&frame) {
            return Ok(Err(error));
        }
        let deadline = Instant::now() + TIMEOUT;
        let mut read = |data: &mut [u8]| -> Result<io::Result<()>, Failure> {
            let mut len = 0;
            while let Some(rest @ [_, ..]) = data.get_mut(len..) {
                let left = deadline.saturating_duration_since(Instant::now());
                if !signals.wait(self.socket.as_fd(), left)? {
                    return Ok(Err(io::ErrorKind::TimedOut.into()));
                }
                match self.socket.read(rest) {
                    Ok(0) => return Ok(Err(io::ErrorKind::UnexpectedEof.into())),
                    Ok(more) => len += more,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Ok(Err(error)),
                }
            }
            Ok(Ok(()))
        };
        // Clients of published ports may come first.
        for _ in 0..100 {
            let mut len = [0; 4];
            if let Err(error) = read(&mut len)? {
                return Ok(Err(error));
            }
            let len = u32::from_be_bytes(len) as usize;
            if len > FRAME_MAX {
                break;
            }
            let mut frame = vec![0; len];
            if let Err(error) = read(&mut frame)? {
                return Ok(Err(error));
            }
            if frame.get(12..14) == Some(&EtherType::ARP.0.to_be_bytes()) {
                return Ok(Ok(()));
            }
        }
        Ok(Err(io::ErrorKind::InvalidData.into()))
    }
}

/// "Who has the gateway's address?", from the guest's. By this passt learns the guest's MAC
/// address, to which it sends clients of published ports, also before the guest itself has
/// sent anything.
fn arp_request(guest_mac: [u8; 6]) -> Vec<u8> {
    const BROADCAST: [u8; 6] = [0xff; 6];
    let (guest, gateway) = (super::user::GUEST_IP, super::user::GATEWAY);
    let arp = ArpPacket::new(
        ArpHardwareId::ETHERNET,
        EtherType::IPV4,
        ArpOperation::REQUEST,
        &guest_mac,
        &guest.octets(),
        &[0; 6],
        &gateway.octets(),
    );
    let mut frame = Vec::new();
    if let Ok(arp) = arp {
        // A vector takes all.
        let _ = PacketBuilder::ethernet2(guest_mac, BROADCAST)
            .arp(arp)
            .write_to_vec(&mut frame);
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_to_the_host() {
        let arguments = |dns: &str, publish: &[&str]| {
            let config = UserConfig {
                dns: vec![dns.parse().unwrap()],
                publish: publish.iter().map(|text| text.parse().unwrap()).collect(),
                ..Default::default()
            };
            let net = UserNet::new(&config, &Default::default());
            arguments(&net, &config, 7).join(" ")
        };
        assert_eq!(
            arguments("9.9.9.9", &[]),
            "--foreground --quiet --fd=7 --mtu=1500 --mac-addr=02:6d:61:79:66:6c --address=10.0.2.15 \
             --netmask=24 --gateway=10.0.2.2 --ipv4-only --interface=lo --dns=9.9.9.9 \
             --tcp-ports=none --udp-ports=none"
        );
        let given = arguments("127.0.0.53", &["80:8080", "0.0.0.0:81:81", "53:5353/udp"]);
        let end = "--dns=127.0.0.53 --dns-forward=10.0.2.2 --tcp-ports=127.0.0.1/80:8080 \
                   --tcp-ports=0.0.0.0/81:81 --udp-ports=127.0.0.1/53:5353";
        assert!(given.ends_with(end), "{given}");
    }

    #[test]
    fn it_is_greeted_in_the_guest_s_name() {
        let mac = [2, 1, 2, 3, 4, 5];
        let request = arp_request(mac);
        assert_eq!(request.len(), 42);
        assert_eq!((&request[6..12], &request[22..28]), (&mac[..], &mac[..]));
        assert_eq!(request[28..32], [10, 0, 2, 15]);
        assert_eq!(request[38..42], [10, 0, 2, 2]);
    }
}
