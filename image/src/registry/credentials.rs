//! What Docker's `config.json` knows of a registry's users.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::error::{Context, Error};
use crate::json;

/// The name that Docker gives its own registry there.
const DOCKERS_OWN: &str = "index.docker.io";
/// A helper that answers so has a token, no password.
const TOKEN_USER: &str = "<token>";
/// What a helper says if it knows nothing.
const UNKNOWN: &str = "credentials not found";

/// A user's credentials for a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A name and a password.
    Password { user: String, password: String },
    /// An identity token, for which an access token is got.
    Identity(String),
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct DockerConfig {
    auths: BTreeMap<String, Auth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "lowercase")]
struct Auth {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

impl Credentials {
    /// Those for a registry (`HOST[:PORT]`), if there are any.
    pub fn of(registry: &str) -> Result<Option<Self>, Error> {
        let directory = env::var_os("DOCKER_CONFIG").map(PathBuf::from);
        let directory =
            directory.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".docker")));
        let Some(path) = directory.map(|directory| directory.join("config.json")) else {
            return Ok(None);
        };
        let what = path.display();
        let data = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.or_invalid(&what)?,
        };
        let config: DockerConfig = json::from_slice(&data).or_invalid(&what)?;
        config.find(registry)
    }

    /// The value of an HTTP `Authorization` header.
    pub fn basic(&self) -> Option<String> {
        match self {
            Credentials::Password { user, password } => Some(format!(
                "Basic {}",
                STANDARD.encode(format!("{user}:{password}"))
            )),
            Credentials::Identity(_) => None,
        }
    }
}

/// The host in a key of Docker's, which may be a URL.
fn host(key: &str) -> &str {
    let key = key
        .strip_prefix("https://")
        .or(key.strip_prefix("http://"))
        .unwrap_or(key);
    let host = key.split('/').next().unwrap_or_default();
    match host {
        DOCKERS_OWN => "docker.io",
        host => host,
    }
}

impl DockerConfig {
    fn find(&self, registry: &str) -> Result<Option<Credentials>, Error> {
        // A helper of its own, else the store for all.
        let own = self
            .cred_helpers
            .iter()
            .find(|(key, _)| host(key) == registry);
        let helper = own.map(|(_, helper)| helper).or(Some(&self.creds_store));
        if let Some(helper) = helper.filter(|helper| !helper.is_empty()) {
            let key = self.auths.keys().find(|key| host(key) == registry);
            let key = match (key, registry) {
                (Some(key), _) => key.clone(),
                (None, "docker.io") => format!("https://{DOCKERS_OWN}/v1/"),
                (None, registry) => registry.to_owned(),
            };
            if let Some(found) = ask(helper, &key)? {
                return Ok(Some(found));
            }
        }
        let Some((_, auth)) = self.auths.iter().find(|(key, _)| host(key) == registry) else {
            return Ok(None);
        };
        auth.credentials()
    }
}

impl Auth {
    fn credentials(&self) -> Result<Option<Credentials>, Error> {
        if !self.identitytoken.is_empty() {
            return Ok(Some(Credentials::Identity(self.identitytoken.clone())));
        }
        if self.auth.is_empty() {
            return Ok((!self.username.is_empty()).then(|| Credentials::Password {
                user: self.username.clone(),
                password: self.password.clone(),
            }));
        }
        let bad = || {
            Error::invalid("Docker's config.json: an entry of auths is not USER:PASSWORD in base64")
        };
        let text = STANDARD.decode(&self.auth).map_err(|_| bad())?;
        let text = String::from_utf8(text).map_err(|_| bad())?;
        let (user, password) = text.split_once(':').ok_or_else(bad)?;
        Ok(Some(Credentials::Password {
            user: user.to_owned(),
            // Docker has padded it in the past.
            password: password.trim_end_matches('\0').to_owned(),
        }))
    }
}

/// Asks a program of Docker's kind.
fn ask(helper: &str, key: &str) -> Result<Option<Credentials>, Error> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !helper.bytes().all(plain) {
        return Err(Error::invalid(
            "Docker's config.json: a credential helper's name",
        ));
    }
    let program = format!("docker-credential-{helper}");
    let child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.or_invalid(&program)?;
    if let Some(mut input) = child.stdin.take() {
        // One that ends early says why.
        let _ = input.write_all(key.as_bytes());
    }
    let output = child.wait_with_output().or_invalid(&program)?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        return match text.contains(UNKNOWN) {
            true => Ok(None),
            false => {
                let text: String = text.trim().chars().take(200).collect();
                Err(Error::invalid(format!("{program}: {text}")))
            }
        };
    }
    let answer: Answer = json::from_slice(&output.stdout).or_invalid(&program)?;
    Ok(Some(match answer.username == TOKEN_USER {
        true => Credentials::Identity(answer.secret),
        false => Credentials::Password {
            user: answer.username,
            password: answer.secret,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_is_found_by_its_host() {
        let auth = STANDARD.encode("me:se:cret");
        let text = format!(
            r#"{{"auths":{{"https://index.docker.io/v1/":{{"auth":"{auth}"}},
                "h.example:5000":{{"username":"a","password":"b"}},
                "t.example":{{"auth":"","identitytoken":"tok"}},"bad.example":{{"auth":"!"}}}}}}"#
        );
        let config: DockerConfig = serde_json::from_str(&text).unwrap();
        let password = |user: &str, password: &str| {
            Some(Credentials::Password {
                user: user.into(),
                password: password.into(),
            })
        };
        assert!(config.find("docker.io").unwrap() == password("me", "se:cret"));
        assert!(config.find("h.example:5000").unwrap() == password("a", "b"));
        assert!(config.find("h.example").unwrap().is_none());
        assert!(config.find("t.example").unwrap() == Some(Credentials::Identity("tok".into())));
        assert!(config.find("bad.example").is_err());
    }

    #[test]
    fn a_helpers_name_is_no_path() {
        let config: DockerConfig =
            serde_json::from_str(r#"{"credsStore":"/../../tmp/x"}"#).unwrap();
        assert!(config.find("h.example").is_err());
    }
}
