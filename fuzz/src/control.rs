//! The control socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use mayfly::control::{Ask, Reply, Server};
use mayfly::unix_socket;

/// A server that agrees to everything, of this process.
fn server() -> &'static PathBuf {
    static SERVER: OnceLock<PathBuf> = OnceLock::new();
    SERVER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let (listener, name) = unix_socket::listen(&path, "").unwrap();
        let server = Server::start(listener, name, |ask: Ask| {
            let _ = ask.reply.send(Reply::done());
        });
        // Both are there until the process ends.
        std::mem::forget((server.unwrap(), folder));
        path
    })
}

/// What a client sends: every line has one line as its answer.
pub fn client(text: &[u8]) {
    let mut client = UnixStream::connect(server()).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let _ = client.write_all(text);
    let _ = client.shutdown(Shutdown::Write);
    let lines = text.split(|&byte| byte == b'\n').count();
    let mut answers = 0;
    let mut reader = BufReader::new(client);
    let mut line = Vec::new();
    while let Ok(1..) = reader.by_ref().take(1 << 20).read_until(b'\n', &mut line) {
        serde_json::from_slice::<Reply>(&line).unwrap();
        line.clear();
        answers += 1;
    }
    assert!(answers <= lines, "{answers} answers");
}
