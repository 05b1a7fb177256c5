//! Asking a registry: manifests and blobs, over HTTP.

mod challenge;
mod credentials;
mod download;

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{RootCerts, TlsConfig, TlsProvider};
use ureq::{Agent, Body, Proxy};

use self::challenge::Challenge;
use self::credentials::Credentials;
use self::download::{Deadline, PACE_MIN, Pace, Target};
use super::config::{Descriptor, JSON_MAX};
use super::digest::Digest;
use super::json;
use super::progress::Task;
use super::reference::Reference;
use super::section::Section;
use crate::error::{Context, Error};

/// Where the registry of names that say none answers.
const DEFAULT_HOST: &str = "registry-1.docker.io";
/// The time without a byte after which a connection is given up.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long an answer may take to begin, and one of JSON to end.
const ANSWER_TIME: Duration = Duration::from_secs(60);
/// How often something is tried again that brought nothing new.
const TRIES: u32 = 4;
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";
const TOKEN_MAX: u64 = 1 << 20;

/// A repository of a registry.
pub struct Client {
    agent: Agent,
    /// `https://HOST`
    base: String,
    repository: String,
    registry: String,
    plain: bool,
    /// The header that the registry was content with.
    authorization: Mutex<Option<String>>,
    /// The time by which all must have come.
    deadline: Deadline,
}

/// Reads all of a small answer, however slowly it comes.
fn read_small(body: Body, most: u64) -> io::Result<Vec<u8>> {
    let end = Deadline::after(ANSWER_TIME);
    let mut reader = body.into_reader().take(most);
    let mut data = Vec::new();
    let mut buffer = vec![0; 16 << 10];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(data),
            Ok(count) => data.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if end.passed().is_some() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "comes too slowly"));
        }
    }
}

/// True if only this host is meant.
fn is_loopback(registry: &str) -> bool {
    let host = match registry.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => registry.split(':').next().unwrap_or_default(),
    };
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

fn agent(https_only: bool, proxy: Option<Proxy>) -> Agent {
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .root_certs(RootCerts::PlatformVerifier)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    Agent::config_builder()
        .http_status_as_error(false)
        .https_only(https_only)
        .proxy(proxy)
        .user_agent(concat!("mayfly/", env!("CARGO_PKG_VERSION")))
        .timeout_resolve(Some(TIMEOUT))
        .timeout_connect(Some(TIMEOUT))
        .timeout_recv_response(Some(ANSWER_TIME))
        .timeout_per_read(Some(TIMEOUT))
        .timeout_per_write(Some(TIMEOUT))
        .tls_config(tls)
        .build()
        .new_agent()
}

impl Client {
    /// For the repository of a reference.
    pub fn new(reference: &Reference, plain_http: bool, time: Duration) -> Result<Self, Error> {
        let deadline = Deadline::after(time);
        let registry = reference.registry.clone();
        let host = match registry.as_str() {
            "docker.io" => DEFAULT_HOST,
            host => host,
        };
        let loopback = is_loopback(&registry);
        let proxy = if loopback {
            None
        } else {
            Proxy::try_from_env()
        };
        let plain = plain_http || (loopback && speaks_plain(host));
        let scheme = if plain { "http" } else { "https" };
        Ok(Client {
            agent: agent(!plain, proxy),
            base: format!("{scheme}://{host}"),
            repository: reference.repository.clone(),
            registry,
            plain,
            authorization: Mutex::new(None),
            deadline,
        })
    }

    /// Reads a manifest or an index: its bytes and their digest.
    pub fn manifest(&self, wanted: &str) -> Result<(Vec<u8>, Digest), Error> {
        let what = format!("{}/{}:{wanted}", self.registry, self.repository);
        let expected: Option<Digest> = wanted.parse().ok();
        let data = self.small(&format!("manifests/{wanted}"), MANIFEST_TYPES, &what)?;
        let digest = Digest::of(&data);
        match expected.is_none_or(|expected| expected == digest) {
            true => Ok((data, digest)),
            false => Err(Error::registry(format!(
                "{what}: the registry sent {digest}"
            ))),
        }
    }

    /// Reads a blob of JSON.
    pub fn json_blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        let what = format!("{}: blob {}", self.registry, descriptor.digest);
        let data = self.small(&format!("blobs/{}", descriptor.digest), "*/*", &what)?;
        match Digest::of(&data) == descriptor.digest {
            true => Ok(data),
            false => Err(Error::registry(format!(
                "{what}: the registry sent something else"
            ))),
        }
    }

    fn small(&self, path: &str, accept: &str, what: &str) -> Result<Vec<u8>, Error> {
        let mut tries = 0;
        loop {
            tries += 1;
            if let Some(why) = self.deadline.passed() {
                return Err(Error::registry(format!("{what}: {why}")));
            }
            let error = match self.get(path, accept, 0) {
                Ok(response) if response.status().is_server_error() && tries < TRIES => {
                    response.status().to_string()
                }
                Ok(response) if response.status() == StatusCode::OK => {
                    match read_small(response.into_body(), JSON_MAX + 1) {
                        Ok(data) if data.len() as u64 > JSON_MAX => {
                            return Err(Error::registry(format!(
                                "{what}: more than 8 MiB of JSON"
                            )));
                        }
                        Ok(data) => return Ok(data),
                        Err(error) => error.to_string(),
                    }
                }
                Ok(response) => return Err(self.told(response, what)),
                Err(RequestError::Asking(failure)) => return Err(failure),
                Err(RequestError::Http(error)) => self.explain(&error),
            };
            if tries >= TRIES {
                return Err(Error::registry(format!("{what}: {error}")));
            }
            pause(tries);
        }
    }

    /// Brings a blob into a file that is locked, and may have its start already; with the
    /// blob the lock goes. `stop` is asked again and again.
    pub fn blob(
        &self,
        descriptor: &Descriptor,
        (file, path): (File, &Path),
        task: &dyn Task,
        stop: &dyn Fn() -> bool,
    ) -> Result<Section, Error> {
        let what = format!("{}: blob {}", self.registry, descriptor.digest);
        let mut target = Target::resume(file, path, descriptor.size).or_host(&what)?;
        task.advance(target.have);
        let mut resumed = target.have > 0;
        let mut tries = 0;
        loop {
            let before = target.have;
            let error = match self.more(descriptor, &mut target, task, stop, &what)? {
                Some(error) => error,
                None if target.have < descriptor.size => "it ends too early".to_owned(),
                None => {
                    let digest = target.hasher.clone().finish();
                    if digest == descriptor.digest {
                        return target.finish().or_host(&what);
                    }
                    target.restart().or_host(&what)?;
                    // What an earlier pull left may be no good: of a host that crashed.
                    if !std::mem::take(&mut resumed) {
                        return Err(Error::registry(format!(
                            "{what}: the registry sent {digest}"
                        )));
                    }
                    continue;
                }
            };
            // A byte at each try would do for ever.
            let brought = target.have.saturating_sub(before);
            tries = if brought >= PACE_MIN { 1 } else { tries + 1 };
            if tries >= TRIES || stop() {
                return Err(Error::registry(format!("{what}: {error}")));
            }
            pause(tries);
        }
    }

    /// One request for what is missing; an error that may pass is returned as text.
    fn more(
        &self,
        descriptor: &Descriptor,
        target: &mut Target,
        task: &dyn Task,
        stop: &dyn Fn() -> bool,
        what: &str,
    ) -> Result<Option<String>, Error> {
        if target.have >= descriptor.size {
            return Ok(None);
        }
        let response = match self.get(&format!("blobs/{}", descriptor.digest), "*/*", target.have) {
            Ok(response) => response,
            Err(RequestError::Asking(failure)) => return Err(failure),
            Err(RequestError::Http(error)) => return Ok(Some(self.explain(&error))),
        };
        match response.status() {
            StatusCode::OK if target.have > 0 => target.restart().or_host(what)?,
            StatusCode::OK => {}
            StatusCode::PARTIAL_CONTENT => {
                let range = response.headers().get(header::CONTENT_RANGE);
                let range = range
                    .and_then(|range| range.to_str().ok())
                    .unwrap_or_default();
                if !range.starts_with(&format!("bytes {}-", target.have)) {
                    target.restart().or_host(what)?;
                    return Ok(Some("the registry sent another part".into()));
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                target.restart().or_host(what)?;
                return Ok(Some("the registry has less of it".into()));
            }
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Ok(Some(status.to_string()));
            }
            _ => return Err(self.told(response, what)),
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; 256 << 10];
        let mut pace = Pace::new(Instant::now());
        loop {
            if stop() {
                return Err(Error::registry(format!("{what}: given up")));
            }
            if let Some(why) = self.deadline.passed() {
                return Err(Error::registry(format!("{what}: {why}")));
            }
            match body.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(count) => {
                    let data = buffer.get(..count).unwrap_or_default();
                    if target.have.saturating_add(count as u64) > descriptor.size {
                        target.restart().or_host(what)?;
                        return Err(Error::registry(format!(
                            "{what}: the registry sent too much"
                        )));
                    }
                    target.write(data).or_host(what)?;
                    task.advance(count as u64);
                    if !pace.goes_on(count as u64, Instant::now()) {
                        return Ok(Some("comes too slowly".into()));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Ok(Some(error.to_string())),
            }
        }
    }

    /// Asks for something, with what the registry needs to know of who asks.
    fn get(&self, path: &str, accept: &str, from: u64) -> Result<Response<Body>, RequestError> {
        let url = format!("{}/v2/{}/{path}", self.base, self.repository);
        let mut asked = false;
        loop {
            let mut request = self.agent.get(&url).header(header::ACCEPT, accept);
            if from > 0 {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            let used = self.authorization();
            if let Some(authorization) = &used {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            let response = request.call().map_err(RequestError::Http)?;
            if response.status() != StatusCode::UNAUTHORIZED || asked {
                return Ok(response);
            }
            asked = true;
            let mut held = self
                .authorization
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            // Another thread may have asked meanwhile.
            if *held == used {
                *held = self.authorize(&response)?;
            }
        }
    }

    fn authorization(&self) -> Option<String> {
        self.authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The header that the registry asks for.
    fn authorize(&self, response: &Response<Body>) -> Result<Option<String>, RequestError> {
        let headers = response.headers().get_all(header::WWW_AUTHENTICATE);
        let challenge = headers
            .iter()
            .find_map(|header| Challenge::parse(header.to_str().ok()?));
        let credentials = Credentials::of(&self.registry).map_err(RequestError::Asking)?;
        match challenge {
            Some(Challenge::Basic) => Ok(credentials.as_ref().and_then(Credentials::basic)),
            Some(Challenge::Bearer {
                realm,
                service,
                scope,
            }) => {
                let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
                let token = self.token(&realm, service.as_deref(), &scope, credentials.as_ref())?;
                Ok(Some(format!("Bearer {token}")))
            }
            None => Ok(None),
        }
    }

    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: &str,
        credentials: Option<&Credentials>,
    ) -> Result<String, RequestError> {
        #[derive(Deserialize)]
        struct Token {
            #[serde(default)]
            token: String,
            /// Some registries send it beside the other, some instead of it.
            #[serde(default)]
            access_token: String,
        }
        let failed = |why: String| RequestError::Asking(Error::registry(format!("{realm}: {why}")));
        if !self.plain && !realm.starts_with("https://") {
            return Err(failed(
                "the registry wants a password sent in plain text".into(),
            ));
        }
        let response = match credentials {
            Some(Credentials::Identity(token)) => {
                let form = [
                    ("grant_type", "refresh_token"),
                    ("refresh_token", token),
                    ("service", service.unwrap_or_default()),
                    ("scope", scope),
                    ("client_id", "mayfly"),
                ];
                self.agent.post(realm).send_form(form)
            }
            credentials => {
                let mut request = self.agent.get(realm).query("scope", scope);
                if let Some(service) = service {
                    request = request.query("service", service);
                }
                if let Some(basic) = credentials.and_then(Credentials::basic) {
                    request = request.header(header::AUTHORIZATION, basic);
                }
                request.call()
            }
        };
        let response = response.map_err(|error| failed(self.explain(&error)))?;
        if response.status() != StatusCode::OK {
            return Err(failed(match response.status() {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    "access denied; log in (docker login), or check the name".into()
                }
                status => status.to_string(),
            }));
        }
        let text = read_small(response.into_body(), TOKEN_MAX);
        let text = text.map_err(|error| failed(error.to_string()))?;
        let sent: Token = json::from_slice(&text).map_err(|_| failed("sent no token".into()))?;
        let token = match sent.token.is_empty() {
            true => sent.access_token,
            false => sent.token,
        };
        match !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()) {
            true => Ok(token),
            false => Err(failed("sent no token".into())),
        }
    }

    /// What a registry says of why it does not give something.
    fn told(&self, response: Response<Body>, what: &str) -> Error {
        #[derive(Deserialize)]
        struct Errors {
            errors: Vec<One>,
        }
        #[derive(Deserialize)]
        struct One {
            #[serde(default)]
            message: String,
        }
        let status = response.status();
        let text = read_small(response.into_body(), 64 << 10).unwrap_or_default();
        let said = json::from_slice::<Errors>(&text).ok();
        let said = said
            .and_then(|said| said.errors.into_iter().next())
            .map(|one| one.message);
        let said: String = said
            .unwrap_or_default()
            .chars()
            .filter(|char| !char.is_control())
            .take(200)
            .collect();
        let hint = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                "access denied; log in (docker login), or check the name"
            }
            StatusCode::NOT_FOUND => "no such image there",
            _ => "",
        };
        let why: Vec<&str> = [hint, said.as_str()]
            .into_iter()
            .filter(|text| !text.is_empty())
            .collect();
        match why.is_empty() {
            true => Error::registry(format!("{what}: {status}")),
            false => Error::registry(format!("{what}: {} ({status})", why.join(": "))),
        }
    }

    fn explain(&self, error: &ureq::Error) -> String {
        let refused = |error: &io::Error| {
            use io::ErrorKind::{ConnectionReset, InvalidData, UnexpectedEof};
            matches!(error.kind(), ConnectionReset | InvalidData | UnexpectedEof)
        };
        match error {
            ureq::Error::Io(error) if self.plain || !refused(error) => error.to_string(),
            ureq::Error::Io(error) => {
                format!("{error}; if the registry speaks plain HTTP, say --plain-http")
            }
            ureq::Error::Rustls(_) | ureq::Error::Tls(_) => {
                format!("{error}; if the registry speaks plain HTTP, say --plain-http")
            }
            ureq::Error::RequireHttpsOnly(_) => {
                "leads to plain HTTP; say --plain-http to allow that".into()
            }
            error => error.to_string(),
        }
    }
}

enum RequestError {
    /// It may pass.
    Http(ureq::Error),
    /// The request could not be authenticated.
    Asking(Error),
}

/// A registry on this host is asked in both ways. One that wants TLS answers plain
/// text with an error.
fn speaks_plain(host: &str) -> bool {
    let ask = |scheme, agent: Agent| agent.get(format!("{scheme}://{host}/v2/")).call();
    let plain = |response: Response<Body>| response.status() != StatusCode::BAD_REQUEST;
    ask("https", agent(true, None)).is_err() && ask("http", agent(false, None)).is_ok_and(plain)
}

fn pause(tries: u32) {
    thread::sleep(Duration::from_millis(250 << tries.min(4)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_loopback() {
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:80",
            "127.9.9.9",
            "[::1]:5000",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "localhost.example",
            "128.0.0.1",
            "[::2]",
            "h.example:80",
            "127.0.0.1.example",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
