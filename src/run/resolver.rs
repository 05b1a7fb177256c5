//! How a guest looks names up: as the host does, unless the user says otherwise.

use std::fs::File;
use std::io::Read;

use mayfly_protocol::agent::Net;

use super::options::Options;
use crate::failure::Failure;

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// More than any such file.
const LEN_MAX: u64 = 64 << 10;
/// A search domain that stands for none.
const NO_SEARCH: &str = ".";

/// Gives a guest with resolvers the host's search domains and options, or the user's.
pub fn complete(net: &mut Net, options: &Options) -> Result<(), Failure> {
    words("--dns-search", &options.dns_search)?;
    words("--dns-option", &options.dns_options)?;
    if net.dns.is_empty() && options.dns_search.is_empty() && options.dns_options.is_empty() {
        // The image has its own.
        return Ok(());
    }
    let mut text = String::new();
    if let Ok(file) = File::open(RESOLV_CONF) {
        let _ = file.take(LEN_MAX).read_to_string(&mut text);
    }
    let (search, how) = of_host(&text);
    net.search = match options.dns_search.as_slice() {
        [] => search,
        [none] if none == NO_SEARCH => Vec::new(),
        given => given.to_vec(),
    };
    net.options = match options.dns_options.is_empty() {
        true => how,
        false => options.dns_options.clone(),
    };
    Ok(())
}

/// Each becomes a word of a line.
fn words(flag: &str, words: &[String]) -> Result<(), Failure> {
    let plain = |byte: u8| byte.is_ascii_graphic();
    match words
        .iter()
        .find(|word| word.is_empty() || !word.bytes().all(plain))
    {
        Some(word) => Err(Failure::config(format!(
            "{flag} {}: write one word",
            word.escape_debug()
        ))),
        None => Ok(()),
    }
}

/// The search domains and options of a `resolv.conf`: the last list of domains is the one
/// that counts, and all options do.
fn of_host(text: &str) -> (Vec<String>, Vec<String>) {
    let (mut search, mut options) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next();
        let rest = words.map(str::to_owned);
        match first {
            Some("search") => search = rest.collect(),
            Some("domain") => search = rest.take(1).collect(),
            Some("options") => options.extend(rest),
            _ => {}
        }
    }
    if search == [NO_SEARCH] {
        search.clear();
    }
    (search, options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_domains_and_all_options_count() {
        let text = "# search no\nsearch a.example\n; search no\nnameserver 1.1.1.1\n\
                    search  b.example\tc.example \noptions ndots:2\noptions edns0 rotate\n";
        let (search, options) = of_host(text);
        assert_eq!(search, ["b.example", "c.example"]);
        assert_eq!(options, ["ndots:2", "edns0", "rotate"]);
        assert_eq!(of_host("domain x.example y").0, ["x.example"]);
        assert_eq!(of_host("search .").0, [""; 0]);
        assert_eq!(of_host(""), (Vec::new(), Vec::new()));
    }

    #[test]
    fn the_user_s_words_win() {
        let mut net = Net {
            dns: vec!["10.0.2.2".parse().unwrap()],
            ..Net::default()
        };
        let mut options = Options {
            dns_search: vec!["own.example".into()],
            dns_options: vec!["ndots:3".into()],
            ..Options::default()
        };
        complete(&mut net, &options).unwrap();
        assert_eq!(
            (net.search.join(" "), net.options.join(" ")),
            ("own.example".into(), "ndots:3".into())
        );
        options.dns_search = vec![NO_SEARCH.into()];
        complete(&mut net, &options).unwrap();
        assert!(net.search.is_empty());
        for wrong in ["a b", "", "a\nnameserver", "ä"] {
            options.dns_search = vec![wrong.into()];
            let error = complete(&mut net, &options).unwrap_err().to_string();
            assert!(error.starts_with("--dns-search "), "{error}");
        }
        // Without resolvers, the image's file stays.
        let mut none = Net::default();
        complete(&mut none, &Options::default()).unwrap();
        assert_eq!(none, Net::default());
    }
}
