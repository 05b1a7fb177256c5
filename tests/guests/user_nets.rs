//! Networks of the user's own sockets, by passt, in network namespaces that are the
//! host's, and the world's beside it.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mayfly_testing::guest::{Ended, Guest, Running};
use mayfly_testing::net::Namespace;
use mayfly_testing::processes::kill;
use mayfly_testing::tools::tool;
use mayfly_testing::{kernel, mayfly};

/// Addresses on the internet, or of a host, beside loopback's own.
pub const HOSTS: [&str; 3] = ["198.51.100.1", "198.51.100.2", "198.51.100.3"];
/// One of IPv6.
const HOST_6: &str = "2001:db8:77::1";
/// The host's own address, where there is an internet, and its router's.
pub const OWN: &str = "10.77.1.1";
const ROUTER: &str = "10.77.1.2";
const WEB: u16 = 8000;
/// Where a page is one line.
const NOTE: u16 = 8001;
const UDP: u16 = 5005;

/// Does something in the namespace: sockets stay there.
pub fn within<T: Send>(namespace: &Namespace, act: impl FnOnce() -> T + Send) -> T {
    let path = format!("/run/netns/{}", namespace.name());
    let file = std::fs::File::open(path).unwrap();
    std::thread::scope(|scope| {
        let entered = scope.spawn(move || {
            // SAFETY: an open descriptor, and a flag; only of this thread.
            let status = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
            act()
        });
        entered.join().unwrap()
    })
}

/// Runs `ip` there.
fn ip(namespace: &Namespace, words: &str) {
    let words: Vec<&str> = words.split(' ').collect();
    tool("ip", &[&["-n", namespace.name()], &words[..]].concat());
}

/// A namespace with loopback, more addresses on it, and ping for all.
pub fn loopback(name: &str) -> Namespace {
    let namespace = Namespace::bare(name);
    for address in HOSTS {
        ip(&namespace, &format!("addr add {address}/32 dev lo"));
    }
    ping_for_all(&namespace);
    namespace
}

/// The host, and the world that it is connected to.
pub struct Internet {
    host: Namespace,
    pub world: Namespace,
}

impl std::ops::Deref for Internet {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.host
    }
}

/// A host with an address of its own, and a world that has those of the internet.
pub fn internet(name: &str) -> Internet {
    let (host, world) = (
        Namespace::bare(name),
        Namespace::bare(&format!("{name}-world")),
    );
    let veth = ["link", "add", "wan", "netns", host.name(), "type", "veth"];
    let peer = ["peer", "name", "lan", "netns", world.name()];
    tool("ip", &[&veth[..], &peer].concat());
    ip(&host, &format!("addr add {OWN}/24 dev wan"));
    ip(&world, &format!("addr add {ROUTER}/24 dev lan"));
    ip(&host, "link set wan up");
    ip(&world, "link set lan up");
    ip(&host, &format!("route add default via {ROUTER}"));
    for address in HOSTS {
        ip(&world, &format!("addr add {address}/32 dev lo"));
    }
    ping_for_all(&host);
    Internet { host, world }
}

impl Internet {
    /// With IPv6, too.
    fn with_ipv6(self) -> Self {
        for words in [
            "addr add fe80::77/64 dev wan nodad",
            "addr add fd88::1/64 dev wan nodad",
            "-6 route add default via fd88::2",
        ] {
            ip(&self.host, words);
        }
        ip(&self.world, "addr add fd88::2/64 dev lan nodad");
        ip(&self.world, &format!("addr add {HOST_6}/128 dev lo nodad"));
        self
    }
}

fn ping_for_all(namespace: &Namespace) {
    let range = "echo 0 2147483647 > /proc/sys/net/ipv4/ping_group_range";
    tool(
        "ip",
        &["netns", "exec", namespace.name(), "sh", "-c", range],
    );
}

/// Servers of pages and names in the world, the host's pages, and its resolver on
/// loopback. They end with the process.
pub struct Servers {
    asked: Arc<Mutex<Vec<String>>>,
}

impl Servers {
    pub fn start(internet: &Internet) -> Self {
        let udp = within(&internet.world, || {
            UdpSocket::bind((HOSTS[0], UDP)).unwrap()
        });
        let dns = within(internet, || UdpSocket::bind(("127.0.0.1", 53)).unwrap());
        for namespace in [&internet.host, &internet.world] {
            for (port, serve) in [(WEB, serve_page as fn(TcpStream)), (NOTE, serve_note)] {
                let web = within(namespace, || TcpListener::bind(("::", port)).unwrap());
                std::thread::spawn(move || {
                    for client in web.incoming() {
                        let client = client.unwrap();
                        std::thread::spawn(move || serve(client));
                    }
                });
            }
        }
        let asked = Arc::new(Mutex::new(Vec::new()));
        for socket in [dns, udp] {
            let told = asked.clone();
            std::thread::spawn(move || {
                let mut data = [0; 2000];
                while let Ok((len, from)) = socket.recv_from(&mut data) {
                    let (name, answer) = resolve(&data[..len]);
                    told.lock().unwrap().push(name);
                    let _ = socket.send_to(&answer, from);
                }
            });
        }
        Servers { asked }
    }
}

/// Says at which address it was asked, and more.
fn page(address: IpAddr) -> String {
    let rest: String = (0..300_000).map(|number| format!("{number}\n")).collect();
    format!("page of {address}\n{rest}")
}

fn serve_note(mut client: TcpStream) {
    let address = client.local_addr().unwrap().ip().to_canonical();
    let _ = client.write_all(format!("note of {address}\n").as_bytes());
}

fn serve_page(mut client: TcpStream) {
    let address = client.local_addr().unwrap().ip().to_canonical();
    let _ = client.write_all(page(address).as_bytes());
}

/// `web.example` is the second address, `other.example` the third, `lan.example` private.
fn resolve(query: &[u8]) -> (String, Vec<u8>) {
    let mut labels = Vec::new();
    let mut at = 12;
    while query[at] != 0 {
        let end = at + 1 + usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..end]).into_owned());
        at = end;
    }
    let (name, is_a) = (labels.join("."), query[at + 1..at + 3] == [0, 1]);
    let address: Option<Ipv4Addr> = match name.as_str() {
        "udp.example" => Some(HOSTS[0].parse().unwrap()),
        "web.example" => Some(HOSTS[1].parse().unwrap()),
        "other.example" => Some(HOSTS[2].parse().unwrap()),
        "lan.example" => Some(Ipv4Addr::new(172, 16, 5, 5)),
        _ => None,
    };
    let mut answer = query[..at + 5].to_vec();
    answer[2..4].copy_from_slice(&[0x81, 0x80]);
    answer[6..12].fill(0);
    match address {
        Some(address) if is_a => {
            answer[7] = 1;
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4]);
            answer.extend(address.octets());
        }
        Some(_) => {}
        None => answer[3] |= 3,
    }
    (name, answer)
}

/// What a guest of these tests can do.
const TOOLS: &str = "
    page() { nc -w 30 $1 $2 </dev/null 2>/tmp/error | head -n 1; }
    note() { nc $1 8001 -e sh -c 'read line; echo $line >&2' 2>&1; }
    ask() { nslookup -type=a $1 $2 2>&1 | tr '\\n' ' '; }
    seconds() { cut -d. -f1 /proc/uptime; }
    await_ipv6() {
        until ip -6 addr show dev eth0 | grep -q 'inet6 fd6d.*global' &&
            ip -6 route | grep -q default && ! ip -6 addr | grep -q tentative; do sleep 1; done
    }
    while :; do nc -l -p 8080 -e cat; done &
    udp-echo 8081 &
";

/// A guest with them.
fn guest(script: &str) -> Guest {
    let script = format!("{TOOLS}\n{script}");
    Guest::with_archives("cloud-6.12", "vmlinux", &script, &["datagrams.cpio"])
}

/// Starts a guest whose network has these keys.
fn start(namespace: &Namespace, keys: &str, script: &str) -> Running {
    let guest = namespace.enter(guest(script));
    guest
        .args(["--net", &format!("user,dns=127.0.0.1{keys}")])
        .args(["--log", "info"])
        .start()
}

/// Sends a line to a port of the host's loopback, and returns what comes back.
fn published(namespace: &Namespace, port: u16, udp: bool) -> String {
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    let timeout = Some(Duration::from_secs(120));
    let mut back = String::new();
    within(namespace, || match udp {
        false => {
            let mut client = TcpStream::connect(to).unwrap();
            client.set_read_timeout(timeout).unwrap();
            client.write_all(b"knock knock").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            client.read_to_string(&mut back).unwrap();
        }
        true => {
            let client = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
            client.set_read_timeout(timeout).unwrap();
            client.send_to(b"knock knock", to).unwrap();
            let mut data = [0; 100];
            let (len, from) = client.recv_from(&mut data).unwrap();
            assert_eq!(from, to);
            back.push_str(std::str::from_utf8(&data[..len]).unwrap());
        }
    });
    back
}

/// The processes in the namespace.
fn processes(namespace: &Namespace) -> Vec<String> {
    let pids = tool("ip", &["netns", "pids", namespace.name()]);
    pids.lines()
        .filter_map(|pid| std::fs::read_to_string(format!("/proc/{}/comm", pid.trim())).ok())
        .map(|name| name.trim().to_owned())
        .collect()
}

fn passt(namespace: &Namespace) -> Option<u32> {
    let pids = tool("ip", &["netns", "pids", namespace.name()]);
    pids.lines()
        .filter_map(|pid| pid.trim().parse().ok())
        .find(|pid: &u32| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name.starts_with("passt"))
        })
}

/// Nothing is left there soon.
pub fn expect_empty(namespace: &Namespace) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !processes(namespace).is_empty() {
        assert!(Instant::now() < deadline, "{:?}", processes(namespace));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What the console shows behind a word.
fn told<'a>(console: &'a str, word: &str) -> &'a str {
    let line = console.lines().find_map(|line| line.strip_prefix(word));
    line.unwrap_or_else(|| panic!("no {word:?}: {console}"))
        .trim()
}

fn expect_lines(ended: &Ended, lines: &[&str]) {
    assert_eq!(ended.code(), Some(0), "{ended:?}");
    for line in lines {
        assert!(ended.stdout.contains(line), "no {line:?}: {ended:?}");
    }
}

const EVERYTHING: &str = "
    echo address: $(ip -4 addr show dev eth0 | grep -o 'inet [0-9./]*') $(cat /sys/class/net/eth0/mtu)
    echo resolver: $(cat /etc/resolv.conf)
    echo tcp: $(page 198.51.100.1 8000)
    nc 198.51.100.1 8000 -e dd of=/tmp/page bs=64k 2>/dev/null
    echo sum: $(md5sum </tmp/page)
    echo name: $(ask web.example)
    echo udp: $(ask udp.example 198.51.100.1:5005)
    ping -c 1 -W 30 198.51.100.1 >/dev/null && echo ping: ok
    echo loopback: $(timeout 10 nc -w 10 10.0.2.2 8000 </dev/null | head -n 1)
    echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet
    ip route del table local local 127.0.0.0/8 dev lo
    ip route del table local local 127.0.0.1 dev lo
    ip route add 127.0.0.0/8 via 10.0.2.2
    echo disguised: $(page 127.0.0.1 8000)
    echo ready: now
    sleep 100000
";

/// TCP, UDP, ping, names, and ports that are published, each with real peers.
#[test]
fn a_guest_reaches_the_host_and_is_reached_by_it() {
    let namespace = internet("user");
    let servers = Servers::start(&namespace);
    let keys = ",publish=18080:8080,publish=18081:8081/udp";
    let mut running = start(&namespace, keys, EVERYTHING);
    running.expect("ready: now");
    assert_eq!(published(&namespace, 18080, false), "knock knock");
    assert_eq!(published(&namespace, 18081, true), "knock knock");
    let console = running.console();
    let file = running.folder.path().join("page");
    std::fs::write(&file, page(HOSTS[0].parse().unwrap())).unwrap();
    let sum = tool("md5sum", &[file.to_str().unwrap()]);
    let sum = format!("sum: {}", sum.split(' ').next().unwrap());
    for line in [
        "address: inet 10.0.2.15/24 1500\n",
        "resolver: nameserver 10.0.2.2\n",
        "tcp: page of 198.51.100.1\n",
        &sum,
        "ping: ok\n",
        // It is none of the guest's business.
        "loopback:\n",
        "disguised:\n",
    ] {
        assert!(console.contains(line), "no {line:?}: {console}");
    }
    for (line, address) in [("name: ", HOSTS[1]), ("udp: ", HOSTS[0])] {
        let told = told(&console, line);
        assert!(told.ends_with(address), "{told:?}: {console}");
    }
    assert!(
        servers
            .asked
            .lock()
            .unwrap()
            .iter()
            .any(|name| name == "web.example")
    );
    // Only on loopback, and by no other protocol.
    let elsewhere = within(&namespace, || {
        let open = |address: &str, port| TcpStream::connect((address, port)).is_ok();
        [open(OWN, 18080), open("127.0.0.1", 18081)]
    });
    assert_eq!(elsewhere, [false, false]);
    running.signal(libc::SIGTERM);
    let ended = running.wait();
    let denied = "network: TCP to 127.0.0.1 port 8000 is not allowed";
    assert!(ended.stderr.contains(denied), "{ended:?}");
    assert_eq!(processes(&namespace), Vec::<String>::new());
}

/// How many clients come at once, and the time in which each is answered: passt resets
/// one that the guest has not answered for 10 s. In the lab a server takes ten in two
/// seconds, so that these are all taken before; without being asked again, twelve were.
const BURST: usize = 24;
const BURST_TIME: Duration = Duration::from_secs(30);

/// A burst of clients is answered, also if the server has room for ten that it has not
/// accepted yet.
#[test]
fn a_burst_of_clients_is_answered() {
    let namespace = internet("burst");
    let script = "echo answer >/tmp/page; httpd -p 8082 -h /tmp
        until grep -q ':1F92 ' /proc/net/tcp /proc/net/tcp6; do sleep 1; done
        echo up: now
        sleep 100000";
    let mut running = start(&namespace, ",publish=18082:8082", script);
    running.expect("up: now");
    let ask = || -> std::io::Result<String> {
        let mut client = TcpStream::connect(("127.0.0.1", 18082))?;
        client.set_read_timeout(Some(BURST_TIME))?;
        client.write_all(b"GET /page HTTP/1.0\r\n\r\n")?;
        let mut page = String::new();
        client.read_to_string(&mut page)?;
        Ok(page)
    };
    let namespace = &namespace;
    let started = Instant::now();
    let answers: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..BURST)
            .map(|_| scope.spawn(move || within(namespace, ask)))
            .collect();
        clients.into_iter().map(|it| it.join().unwrap()).collect()
    });
    let took = started.elapsed();
    let good = |answer: &&std::io::Result<String>| {
        answer.as_ref().is_ok_and(|page| page.ends_with("answer\n"))
    };
    let answered = answers.iter().filter(good).count();
    println!("{answered} of {BURST} clients were answered in {took:?}");
    let failed: Vec<_> = answers.iter().filter(|answer| !good(answer)).collect();
    assert!(failed.is_empty(), "{failed:?}");
    assert!(took < BURST_TIME, "{took:?}");
}

/// With rules, what they do not name is refused, and at once.
#[test]
fn a_guest_reaches_only_what_is_allowed() {
    let namespace = internet("allow");
    let servers = Servers::start(&namespace);
    let keys = ",allow=198.51.100.1:8000,allow=web.example,publish=18080:8080";
    let mut running = start(
        &namespace,
        keys,
        "echo allowed: $(page 198.51.100.1 8000)
         start=$(seconds)
         echo denied: $(page 198.51.100.3 8000) $(cat /tmp/error)
         echo port: $(page 198.51.100.1 8001) $(cat /tmp/error)
         echo early: $(page 198.51.100.2 8000) $(cat /tmp/error)
         echo loopback: $(page 127.0.0.1 8000) $(page 10.0.2.2 8000) $(cat /tmp/error)
         echo udp: $(ask udp.example 198.51.100.1:5005)
         echo other: $(ask other.example)
         [ $(($(seconds) - start)) -lt 60 ] && echo quick: yes
         echo name: $(ask web.example)
         echo opened: $(page 198.51.100.2 8000)
         ping -c 1 -W 30 198.51.100.2 >/dev/null && echo ping: ok
         echo still: $(page 198.51.100.3 8000) $(cat /tmp/error)
         echo ready: now
         sleep 100000",
    );
    running.expect("ready: now");
    assert_eq!(published(&namespace, 18080, false), "knock knock");
    let console = running.console();
    for (line, words) in [
        ("allowed: ", "page of 198.51.100.1"),
        ("denied: ", "Connection refused"),
        ("port: ", "Connection refused"),
        ("early: ", "Connection refused"),
        ("loopback: ", "Connection refused"),
        ("other: ", "REFUSED"),
        ("quick: ", "yes"),
        ("name: ", "198.51.100.2"),
        ("opened: ", "page of 198.51.100.2"),
        ("ping: ", "ok"),
        ("still: ", "Connection refused"),
    ] {
        let told = told(&console, line);
        assert!(told.contains(words), "{told:?}: {console}");
    }
    assert!(!told(&console, "udp: ").contains(HOSTS[0]), "{console}");
    let asked = servers.asked.lock().unwrap();
    assert!(asked.iter().all(|name| name == "web.example"), "{asked:?}");
}

/// Addresses, as far as a guest's reach goes: each has a listener.
struct Reach {
    /// The internet's.
    public: &'static str,
    /// The LAN's, and private ones behind it.
    private: &'static str,
    /// A link's, and reserved ones, at the router.
    special: &'static str,
    /// The host's own.
    own: &'static str,
}

const REACH: Reach = Reach {
    public: "198.51.100.1 2001:db8:77::1 64:ff9b::c633:6401",
    private: "10.77.1.2 10.5.5.5 172.16.5.5 192.168.5.5 100.64.5.5 203.0.113.2 fd12::5 fd88::2 \
              64:ff9b::a05:505",
    special: "169.254.169.254 169.254.5.5 169.254.170.2 100.100.100.200 192.0.0.192 \
              168.63.129.16 240.0.0.5 fd00:ec2::254 fd20:ce::254 64:ff9b::a9fe:a9fe \
              2002:a9fe:a9fe::1 2001:0:a9fe:a9fe::1",
    own: "10.77.1.1 203.0.113.1 198.51.100.77 192.168.5.77 fd88::1 2001:db8:77::77",
};
/// Reached on the host's link only.
const LINK: &str = "fe80::77";

impl Reach {
    fn give(internet: &Internet) {
        let give = |namespace: &Namespace, all: &str, device: &str| {
            for address in all.split_whitespace() {
                let nodad = if address.contains(':') { " nodad" } else { "" };
                let bits = if address.contains(':') { 128 } else { 32 };
                // Some are there.
                let words = format!("addr replace {address}/{bits} dev {device}{nodad}");
                ip(namespace, &words);
            }
        };
        ip(&internet.host, "addr add 203.0.113.1/24 dev wan");
        ip(&internet.world, "addr add 203.0.113.2/24 dev lan");
        for all in [REACH.public, REACH.private, REACH.special] {
            let elsewhere = |it: &&str| ![ROUTER, "203.0.113.2", "fd88::2"].contains(it);
            let all: Vec<&str> = all.split_whitespace().filter(elsewhere).collect();
            give(&internet.world, &all.join(" "), "lo");
        }
        give(
            &internet.host,
            "198.51.100.77 192.168.5.77 2001:db8:77::77",
            "lo",
        );
    }

    /// Answers datagrams, each from the address that it was for.
    fn serve(internet: &Internet) {
        let answer = |namespace: &Namespace, addresses: &[&str]| {
            for address in addresses {
                let socket = within(namespace, || UdpSocket::bind((*address, NOTE)).unwrap());
                std::thread::spawn(move || {
                    let mut data = [0; 100];
                    while let Ok((len, from)) = socket.recv_from(&mut data) {
                        let _ = socket.send_to(&data[..len], from);
                    }
                });
            }
        };
        let Reach {
            public,
            private,
            special,
            own,
        } = REACH;
        let world = [public, private, special].map(str::split_whitespace);
        let world: Vec<&str> = world.into_iter().flatten().collect();
        answer(&internet.world, &world);
        let own = own.split_whitespace().chain(["127.0.0.1", "::1"]);
        answer(&internet.host, &own.collect::<Vec<_>>());
    }

    /// From the host, all of them answer.
    fn check(internet: &Internet) {
        within(internet, || {
            for all in [REACH.public, REACH.private, REACH.special, REACH.own] {
                for address in all.split_whitespace() {
                    let to: IpAddr = address.parse().unwrap();
                    let mut line = [0; 8];
                    let mut client = TcpStream::connect((to, NOTE))
                        .unwrap_or_else(|error| panic!("{address}: {error}"));
                    client.read_exact(&mut line).unwrap();
                    assert_eq!(&line, b"note of ", "{address}");
                    let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
                    let client = UdpSocket::bind((any, 0)).unwrap();
                    client
                        .set_read_timeout(Some(Duration::from_secs(20)))
                        .unwrap();
                    client.connect((to, NOTE)).unwrap();
                    client.send(b"question").unwrap();
                    let answer = client.recv(&mut line);
                    answer.unwrap_or_else(|error| panic!("UDP to {address}: {error}"));
                }
            }
        });
    }
}

/// What `reach` says of an address: it answers, or is refused at once, which is
/// "administratively prohibited" (RFC 1812, RFC 4443).
fn is_answered(told: &str, address: &str) -> bool {
    let error = match address.contains(':') {
        true => "Permission denied",
        false => "No route to host",
    };
    let answers = told == "answered";
    assert!(answers || told.starts_with(error), "{address}: {told}");
    answers
}

/// The table of what a guest reaches, tried from inside, with listeners everywhere.
#[test]
fn what_a_guest_reaches_without_being_allowed() {
    let internet = internet("table").with_ipv6();
    let _servers = Servers::start(&internet);
    Reach::give(&internet);
    Reach::serve(&internet);
    Reach::check(&internet);
    let Reach {
        public,
        private,
        special,
        own,
    } = REACH;
    let inside = format!("{LINK}%eth0 10.0.2.2 fd6d:6179:666c::2");
    let script = format!(
        "try() {{
             for address in $*; do echo $address: $(note $address); done
             reach udp $*
             reach ping $*
         }}
         echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range
         echo name: $(ask lan.example)
         sleep 1
         await_ipv6
         try {public}; try {private}; try {special}; try {own}; try {inside}
         echo tried: all"
    );
    let open = |told: &str, address: &str, keys: &str| {
        let refused = told.contains("Connection refused");
        let reached = told.contains("note of");
        assert!(refused != reached, "{keys}: {address}: {told}");
        reached
    };
    let try_all = |keys: &str, expected: [bool; 5], named: &str| {
        let guest = start(&internet, keys, &script);
        let ended = guest.wait();
        assert!(ended.stdout.contains("tried: all"), "{ended:?}");
        let all = [public, private, special, own, &inside];
        for (addresses, expected) in all.into_iter().zip(expected) {
            for address in addresses.split_whitespace() {
                let named = named.split_whitespace().any(|it| it == address);
                let tcp = told(&ended.stdout, &format!("{address}:"));
                let reached = open(tcp, address, keys);
                assert_eq!(reached, expected || named, "{keys}: {address}: {ended:?}");
                for protocol in ["udp", "ping"] {
                    let got = told(&ended.stdout, &format!("{protocol} {address}:"));
                    let reached = is_answered(got, address);
                    // Rules with a port are for it alone.
                    let expected = expected || named && protocol == "udp";
                    assert_eq!(reached, expected, "{keys}: {protocol} {address}: {ended:?}");
                }
            }
        }
        ended
    };
    let ended = try_all(",isolated", [true, false, false, false, false], "");
    assert!(ended.stderr.contains("is not allowed: it is"), "{ended:?}");
    // Rules for all, and for some; a name that leads to the LAN opens nothing there.
    let named = "169.254.5.5 10.77.1.1 10.5.5.5 fd00:ec2::254";
    let mut keys = ",isolated,allow=0.0.0.0/0,allow=::/0,allow=lan.example".to_owned();
    for address in named.split(' ') {
        keys += &match address.contains(':') {
            true => format!(",allow=[{address}]:8001"),
            false => format!(",allow={address}:8001"),
        };
    }
    let ended = try_all(&keys, [true, false, false, false, false], named);
    let name = told(&ended.stdout, "name:");
    assert!(name.contains("172.16.5.5"), "{ended:?}");
    let why = "lan.example at 172.16.5.5 is not allowed: it is a private address";
    assert!(ended.stderr.contains(why), "{ended:?}");
}

/// Addresses that the host gets while the guest runs are closed then.
#[test]
fn the_host_s_new_address_is_closed() {
    let internet = internet("new").with_ipv6();
    let _servers = Servers::start(&internet);
    Reach::give(&internet);
    Reach::serve(&internet);
    Reach::check(&internet);
    let Reach {
        public,
        private,
        special,
        own,
    } = REACH;
    let script = format!(
        "try() {{
             for address in $*; do echo $address: $(note $address); done
             reach udp $*
             reach ping $*
         }}
         echo 0 2147483647 >/proc/sys/net/ipv4/ping_group_range
         await_ipv6
         try {public}; try {private}; try {special}; try {own}
         echo waits: now
         while note 198.51.100.2 | grep -q note; do sleep 1; done
         echo taken: $(note 198.51.100.2)"
    );
    let mut running = start(&internet, "", &script);
    running.expect("waits: now");
    let console = running.console();
    for (addresses, words) in [
        (public, "note of"),
        (private, "note of"),
        (special, "Connection refused"),
        (own, "Connection refused"),
    ] {
        for address in addresses.split_whitespace() {
            let tcp = told(&console, &format!("{address}:"));
            assert!(tcp.contains(words), "{address}: {tcp}: {console}");
            for protocol in ["udp", "ping"] {
                let got = told(&console, &format!("{protocol} {address}:"));
                let expected = words == "note of";
                assert_eq!(is_answered(got, address), expected, "{protocol} {address}");
            }
        }
    }
    ip(&internet.host, "addr add 198.51.100.2/32 dev lo");
    expect_lines(&running.wait(), &["taken: nc: ", "Connection refused"]);
}

/// What a command of mayfly prints.
fn tool_of_mayfly(words: &[&str]) -> String {
    tool(mayfly().to_str().unwrap(), words)
}

/// passt ends with its VM, also where that is killed; without it, the link is
/// down, and the VM goes on.
#[test]
fn passt_and_its_vm() {
    let namespace = internet("end");
    let _servers = Servers::start(&namespace);
    let ended = start(
        &namespace,
        ",host-loopback",
        "echo up: $(cat /sys/class/net/eth0/carrier)
         echo host: $(page 10.0.2.2 8000)",
    )
    .wait();
    expect_lines(&ended, &["up: 1", "host: page of 127.0.0.1"]);
    assert_eq!(processes(&namespace), Vec::<String>::new());

    let mut running = start(&namespace, "", "echo up: now; sleep 100000");
    running.expect("up: now");
    assert!(passt(&namespace).is_some());
    running.signal(libc::SIGKILL);
    running.child.wait().unwrap();
    expect_empty(&namespace);

    let script = "cd /proc/net
        until grep -q ':1F90 ' tcp tcp6 && grep -q ':1F91 ' udp; do sleep 1; done
        echo up: $(cat /sys/class/net/eth0/carrier)
        while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 1; done
        ping -c 1 -W 1 198.51.100.1
        echo down: $(cat /sys/class/net/eth0/carrier)
        sleep 100000";
    let mut running = start(&namespace, ",publish=8080,publish=8081/udp", script);
    running.expect("up: 1");
    let pid = running.child.id().to_string();
    let named = tool_of_mayfly(&["list"]);
    let line = named.lines().find(|line| line.contains(&pid)).unwrap();
    let name = line.split_whitespace().next().unwrap();
    // Ports that were chosen are told, and lead there.
    let ports = tool_of_mayfly(&["port", name]);
    let port = |key: &str| -> u16 {
        let line = ports.lines().find_map(|line| line.strip_prefix(key));
        let (_, port) = line.unwrap().rsplit_once(':').unwrap();
        port.parse().unwrap()
    };
    assert_eq!(
        published(&namespace, port("8080/tcp -> 127.0.0.1"), false),
        "knock knock"
    );
    assert_eq!(
        published(&namespace, port("8081/udp -> 127.0.0.1"), true),
        "knock knock"
    );
    kill(passt(&namespace).unwrap(), libc::SIGKILL);
    running.expect("down: 0");
    let info = tool_of_mayfly(&["ctl", name, "info"]);
    assert!(
        info.contains("network: passt was ended by signal 9"),
        "{info}"
    );
    let metrics = tool_of_mayfly(&["ctl", name, "metrics"]);
    let lost = "mayfly_device_link_losses_total{device=\"net0\"} 1";
    assert!(metrics.contains(lost), "{metrics}");
    running.signal(libc::SIGTERM);
    let ended = running.wait();
    assert_eq!(
        ended.stderr.matches("the link is down").count(),
        1,
        "{ended:?}"
    );

    // A port that is taken, and no passt at all.
    let _taken = within(&namespace, || {
        TcpListener::bind(("127.0.0.1", 18080)).unwrap()
    });
    let ended = start(&namespace, ",publish=18080:8080", "").wait();
    assert_eq!(ended.code(), Some(3), "{ended:?}");
    assert!(ended.stderr.contains("18080"), "{ended:?}");
    let mut guest = Guest::new("");
    guest.command.env("PATH", "/nonexistent");
    let ended = guest.args(["--net", "user"]).start().wait();
    assert_eq!(ended.code(), Some(3), "{ended:?}");
    assert!(ended.stderr.contains("apt install passt"), "{ended:?}");
}

/// The same as an ordinary user, and with IPv6 where the host has that.
#[test]
fn an_ordinary_user_and_ipv6() {
    let namespace = internet("user6").with_ipv6();
    let _servers = Servers::start(&namespace);
    let guest = guest(
        "echo tcp: $(page 198.51.100.1 8000)
         echo name: $(ask web.example)
         await_ipv6
         echo tcp6: $(page 2001:db8:77::1 8000)
         echo ready: now
         sleep 100000",
    );
    let (node, path) = (guest.path("kvm"), guest.path(""));
    tool("chmod", &["-R", "a+rX", path.to_str().unwrap()]);
    let runtime = guest.path("runtime");
    std::fs::create_dir(&runtime).unwrap();
    tool("chown", &["65534:65534", runtime.to_str().unwrap()]);
    tool("chmod", &["700", runtime.to_str().unwrap()]);
    let node = node.display();
    let prepare = format!(
        "set -e; mknod -m 666 {node} c 10 232; mount --bind {node} /dev/kvm
         exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\""
    );
    let mut guest = guest.args(["--net", "user,dns=127.0.0.1,publish=18080:8080"]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &prepare, "sh"]);
    // The caches may not be for all.
    let (cached, own) = (kernel("cloud-6.12", "vmlinux"), guest.path("vmlinux"));
    std::fs::copy(&cached, &own).unwrap();
    tool("chmod", &["644", own.to_str().unwrap()]);
    command.arg(guest.command.get_program());
    command.args(guest.command.get_args().map(|word| match word {
        word if word == cached => own.as_os_str(),
        word => word,
    }));
    command.env("MAYFLY_RUNTIME_DIR", &runtime);
    guest.command = command;
    let mut running = namespace.enter(guest).start();
    running.expect("ready: now");
    let console = running.console();
    for line in [
        "tcp: page of 198.51.100.1\n",
        "tcp6: page of 2001:db8:77::1\n",
    ] {
        assert!(console.contains(line), "no {line:?}: {console}");
    }
    let owner = tool(
        "stat",
        &["-c", "%u", &format!("/proc/{}", passt(&namespace).unwrap())],
    );
    assert_eq!(owner.trim(), "65534");
    assert_eq!(published(&namespace, 18080, false), "knock knock");
    drop(running);
    expect_empty(&namespace);
}
