//! `mayfly port`: where the host listens for a VM's ports.

use std::time::Duration;

use super::output;
use crate::config::parse_ports;
use crate::control::{Client, Command, Folder};
use crate::failure::{Class, Failure, OrFail};
use crate::net::publish::Publish;
use crate::run::record::VmDir;

/// A VM answers in this time.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Prints all ports, or those of the host that lead to one of the guest.
pub fn port(vm: &str, wanted: Option<&str>) -> Result<(), Failure> {
    let lines = lines(vm, &published(vm)?, wanted)?;
    lines.iter().try_for_each(|line| output::print(line))
}

/// Those of a VM of `run`, or of any that runs.
fn published(vm: &str) -> Result<Vec<Publish>, Failure> {
    let texts: Vec<String> = match VmDir::find(vm) {
        Ok(vm_dir) => vm_dir.record()?.ports,
        Err(none) => {
            let client = Client::connect(&Folder::locate().socket(vm), TIMEOUT);
            let info = client.and_then(|mut client| client.ask(&Command::Info {}));
            let ports = info.map_err(|_| none)?.get("ports").cloned();
            serde_json::from_value(ports.unwrap_or_default()).or_internal("ports")?
        }
    };
    parse_ports(&texts).map_err(|why| Failure::new(Class::Internal, why))
}

fn lines(vm: &str, all: &[Publish], wanted: Option<&str>) -> Result<Vec<String>, Failure> {
    let key = |publish: &Publish| format!("{}/{}", publish.guest, publish.protocol);
    let host = |publish: &Publish| {
        publish
            .address()
            .map_or_else(String::new, |it| it.to_string())
    };
    let Some(wanted) = wanted else {
        let line = |it: &Publish| format!("{} -> {}", key(it), host(it));
        return Ok(all.iter().map(line).collect());
    };
    let wanted = match wanted.contains('/') {
        true => wanted.to_ascii_lowercase(),
        false => format!("{wanted}/tcp"),
    };
    let found = all.iter().filter(|it| key(it) == wanted).map(host);
    let found: Vec<String> = found.collect();
    match found.is_empty() {
        true => Err(Failure::config(format!(
            "{vm}: {wanted} is not published; mayfly port {vm} lists what is"
        ))),
        false => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_told_as_docker_does() {
        let all = [
            "8080:80".to_owned(),
            "0.0.0.0:53:53/udp".into(),
            "[::1]:81:80".into(),
        ];
        let all = parse_ports(&all).unwrap();
        let told = |wanted| lines("web", &all, wanted).map_err(|it| it.to_string());
        let every = [
            "80/tcp -> 127.0.0.1:8080",
            "53/udp -> 0.0.0.0:53",
            "80/tcp -> [::1]:81",
        ];
        assert_eq!(told(None).unwrap(), every);
        assert_eq!(told(Some("80")).unwrap(), ["127.0.0.1:8080", "[::1]:81"]);
        assert_eq!(told(Some("53/UDP")).unwrap(), ["0.0.0.0:53"]);
        let none = told(Some("53")).unwrap_err();
        assert!(none.contains("53/tcp is not published"), "{none}");
    }
}
