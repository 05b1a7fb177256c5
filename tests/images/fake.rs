//! A registry that behaves as some do: tokens, redirects, broken connections.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::common::{Made, User, assert_same};

type Answer = Box<dyn Fn(&Request) -> Reply + Send + Sync>;

struct Request {
    path: String,
    headers: BTreeMap<String, String>,
}

struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Of the body, so much is sent.
    cut: Option<usize>,
    /// It comes a byte at a time, until the client has gone.
    slow: bool,
}

impl Reply {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Reply {
            status,
            headers: Vec::new(),
            body: body.into(),
            cut: None,
            slow: false,
        }
    }

    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

fn serve(answer: Answer) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let answer = Arc::new(answer);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let answer = Arc::clone(&answer);
            thread::spawn(move || converse(&stream.unwrap(), &answer));
        }
    });
    port
}

fn converse(stream: &TcpStream, answer: &Answer) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let path = line.split(' ').nth(1)?.to_owned();
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim().split_once(": ") else {
                break;
            };
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        let mut body = Vec::new();
        let len = headers
            .get("content-length")
            .map_or(0, |len| len.parse().unwrap());
        (&mut reader).take(len).read_to_end(&mut body).ok()?;
        let reply = answer(&Request { path, headers });
        let mut head = format!(
            "HTTP/1.1 {} X\r\nContent-Length: {}\r\n",
            reply.status,
            reply.body.len()
        );
        for (name, value) in &reply.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let mut writer = stream;
        writer.write_all(format!("{head}\r\n").as_bytes()).ok()?;
        if reply.slow {
            for byte in &reply.body {
                writer.write_all(&[*byte]).ok()?;
                thread::sleep(std::time::Duration::from_millis(20));
            }
            return None;
        }
        writer
            .write_all(&reply.body[..reply.cut.unwrap_or(reply.body.len())])
            .ok()?;
        if reply.cut.is_some() {
            stream.shutdown(std::net::Shutdown::Both).ok()?;
        }
    }
}

/// The blob or manifest that a path asks for, from an OCI layout.
fn stored(made: &Made, path: &str) -> Option<Vec<u8>> {
    let hex = path.rsplit("sha256:").next()?;
    fs::read(made.path("oci/blobs/sha256").join(hex)).ok()
}

/// An index of two platforms, above the layout's manifest.
fn index(made: &Made) -> Vec<u8> {
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(made.path("oci/index.json")).unwrap()).unwrap();
    let ours = index["manifests"].as_array().unwrap().iter();
    let ours = ours
        .clone()
        .find(|one| one["annotations"]["org.opencontainers.image.ref.name"] == "t");
    let mut ours = ours.unwrap().clone();
    ours["platform"] = serde_json::json!({"os": "linux", "architecture": "amd64"});
    let mut other = ours.clone();
    other["platform"]["architecture"] = "arm64".into();
    other["digest"] = format!("sha256:{}", "0".repeat(64)).into();
    serde_json::to_vec(&serde_json::json!({"schemaVersion": 2, "manifests": [other, ours]}))
        .unwrap()
}

#[test]
fn tokens_redirects_indexes_and_broken_connections() {
    let made = Arc::new(Made::image(2));
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    // Where blobs really are: nobody there may learn the token.
    let (files, cuts) = (
        Arc::clone(&made),
        Arc::new(Mutex::new(BTreeMap::<String, u32>::new())),
    );
    let told = Arc::clone(&seen);
    let elsewhere = serve(Box::new(move |request| {
        let mut told = told.lock().unwrap();
        told.push(format!(
            "authorization: {:?}",
            request.headers.get("authorization")
        ));
        let data = stored(&files, &request.path).unwrap();
        let from = request.headers.get("range").map_or(0, |range| {
            range
                .strip_prefix("bytes=")
                .unwrap()
                .trim_end_matches('-')
                .parse()
                .unwrap()
        });
        let mut reply = match from {
            0 => Reply::new(200, data),
            from => {
                told.push("range".into());
                let range = format!("bytes {from}-{}/{}", data.len() - 1, data.len());
                Reply::new(206, &data[from..]).with("Content-Range", range)
            }
        };
        // Large ones break off twice.
        let mut cuts = cuts.lock().unwrap();
        let count = cuts.entry(request.path.clone()).or_default();
        *count += 1;
        if reply.body.len() > 100_000 && *count < 3 {
            reply.cut = Some(reply.body.len() / 3);
        }
        reply
    }));
    let files = Arc::clone(&made);
    let told = Arc::clone(&seen);
    let port = Arc::new(Mutex::new(0_u16));
    let own = Arc::clone(&port);
    *port.lock().unwrap() = serve(Box::new(move |request| {
        let own = *own.lock().unwrap();
        if request.path == "/v2/" {
            return Reply::new(401, "");
        }
        if request.path.starts_with("/token") {
            told.lock().unwrap().push(format!(
                "{} {:?}",
                request.path,
                request.headers.get("authorization")
            ));
            // As Docker's own: the same twice.
            return Reply::new(200, r#"{"token":"t0k3n","access_token":"t0k3n"}"#);
        }
        if request.headers.get("authorization").map(String::as_str) != Some("Bearer t0k3n") {
            let challenge = format!(
                r#"Bearer realm="http://127.0.0.1:{own}/token",service="s",scope="repository:a/b:pull""#
            );
            return Reply::new(401, "").with("WWW-Authenticate", challenge);
        }
        if request.path == "/v2/a/b/manifests/latest" {
            return Reply::new(200, index(&files));
        }
        if let Some(name) = request.path.strip_prefix("/v2/a/b/blobs/") {
            return Reply::new(307, "")
                .with("Location", format!("http://127.0.0.1:{elsewhere}/{name}"));
        }
        match stored(&files, &request.path) {
            Some(data) => Reply::new(200, data),
            None => Reply::new(404, r#"{"errors":[{"code":"X","message":"not here"}]}"#),
        }
    }));
    let user = User::root();
    let host = format!("127.0.0.1:{}", *port.lock().unwrap());
    let name = format!("{host}/a/b");
    fs::create_dir(user.home.path().join(".docker")).unwrap();
    let config = format!(r#"{{"auths":{{"{host}":{{"auth":"bWU6c2VjcmV0"}}}}}}"#);
    fs::write(user.home.path().join(".docker/config.json"), config).unwrap();
    user.ok(&["pull", &name]);
    assert_same(&user.fingerprint(&name), &made.fingerprint());
    let seen = seen.lock().unwrap();
    let token = "/token?scope=repository%3Aa%2Fb%3Apull&service=s Some(\"Basic bWU6c2VjcmV0\")";
    assert_eq!(
        seen.iter()
            .filter(|line| line.starts_with("/token"))
            .collect::<Vec<_>>(),
        [token]
    );
    assert!(!seen.iter().any(|line| line.contains("t0k3n")), "{seen:?}");
    assert!(
        seen.iter().filter(|line| *line == "range").count() >= 4,
        "{seen:?}"
    );
    drop(seen);
    let (_, text) = user.fails(&["pull", &format!("{name}:other")]);
    assert!(text.contains("not here"), "{text}");
}

#[test]
fn plain_http_is_for_this_host_or_a_flag() {
    let port = serve(Box::new(|_| Reply::new(404, "")));
    let user = User::root();
    // Another name of this host, that is not known to be one.
    let name = format!("0.0.0.0:{port}/a");
    let (_, text) = user.fails(&["pull", &name]);
    assert!(text.contains("--plain-http"), "{text}");
    let (_, text) = user.fails(&["pull", "--plain-http", &name]);
    assert!(text.contains("no such image there"), "{text}");
}

/// Its layers come, but a byte at a time: no connection is ever silent.
#[test]
fn a_download_ends_when_its_time_is_over() {
    let made = Arc::new(Made::image(1));
    let files = Arc::clone(&made);
    let port = serve(Box::new(move |request| {
        if request.path == "/v2/a/manifests/latest" {
            return Reply::new(200, index(&files));
        }
        let Some(data) = stored(&files, &request.path) else {
            return Reply::new(404, "");
        };
        let slow = data.len() > 100_000;
        Reply {
            slow,
            ..Reply::new(200, data)
        }
    }));
    let user = User::root();
    let name = format!("127.0.0.1:{port}/a");
    let (code, text) = user.fails(&["pull", "--timeout", "1s", &name]);
    assert_eq!((code, text.lines().count()), (3, 1), "{text}");
    assert!(text.contains("took more than 1 s (--timeout"), "{text}");
    // What came is kept.
    assert!(!user.files(&["partial"]).is_empty());
    user.assert_empty();
    // A limit of the user's for what an image has, which is told of before it comes.
    let (code, text) = user.fails(&["pull", "--max-size", "100k", &name]);
    assert_eq!((code, text.lines().count()), (2, 1), "{text}");
    assert!(
        text.contains("more than 100 KiB") && text.contains("--max-size"),
        "{text}"
    );
}
