//! Sends datagrams back to whom they came from, in the guests of tests.
//!
//!     udp-echo PORT

use std::net::UdpSocket;

fn main() -> std::io::Result<()> {
    let port = std::env::args().nth(1).and_then(|word| word.parse().ok());
    let socket = UdpSocket::bind(("0.0.0.0", port.unwrap_or(7)))?;
    let mut data = [0; 1 << 16];
    loop {
        let (len, from) = socket.recv_from(&mut data)?;
        socket.send_to(data.get(..len).unwrap_or_default(), from)?;
    }
}
