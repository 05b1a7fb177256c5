//! What an image is called: `[REGISTRY/]NAME[:TAG][@DIGEST]`, read as Docker reads it.

use std::fmt;
use std::str::FromStr;

use super::digest::Digest;

/// The registry of a name that says none, as everybody expects.
const DEFAULT_REGISTRY: &str = "docker.io";
/// Where that registry keeps images whose name is one word.
const DEFAULT_DIRECTORY: &str = "library/";
const DEFAULT_TAG: &str = "latest";
const NAME_MAX: usize = 255;
const TAG_MAX: usize = 128;

/// A complete name of an image.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// Host, and port if it is not the usual one.
    pub registry: String,
    /// The image's path there.
    pub repository: String,
    /// The tag: `latest` if neither a tag nor a digest is said.
    pub tag: Option<String>,
    /// The digest of the manifest that is meant.
    pub digest: Option<Digest>,
}

/// The reason why a text names no image.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is no image's name: {why}")]
pub struct BadReference {
    text: String,
    why: &'static str,
}

impl Reference {
    /// What a registry's API takes for a tag: the digest, if there is one.
    pub fn wanted(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }

    /// As people write it: without what goes without saying.
    pub fn familiar(&self) -> String {
        let mut text = match self.registry.as_str() {
            DEFAULT_REGISTRY => {
                let name = self.repository.strip_prefix(DEFAULT_DIRECTORY);
                let short = name.filter(|name| !name.contains('/'));
                let name = short.unwrap_or(&self.repository);
                match name.split_once('/') {
                    // Alone, it would name that host.
                    Some((first, _)) if is_host(first) => format!("{DEFAULT_REGISTRY}/{name}"),
                    _ => name.to_owned(),
                }
            }
            registry => format!("{registry}/{}", self.repository),
        };
        self.push_rest(&mut text);
        text
    }

    fn push_rest(&self, text: &mut String) {
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(&digest.to_string());
        }
    }

    fn parse(text: &str) -> Result<Self, &'static str> {
        let (rest, digest) = match text.split_once('@') {
            None => (text, None),
            Some((rest, digest)) => {
                let digest = digest.parse().map_err(|_| "the digest is not sha256:…")?;
                (rest, Some(digest))
            }
        };
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if tag.is_some_and(|tag| !valid_tag(tag)) {
            return Err("a tag has letters, digits, _ . and -, and up to 128 of them");
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, path)) if is_host(first) => (first, path),
            _ => (DEFAULT_REGISTRY, name),
        };
        let registry = match registry {
            "index.docker.io" => DEFAULT_REGISTRY,
            registry => registry,
        };
        if !valid_host(registry) {
            return Err("the registry is not HOST or HOST:PORT");
        }
        let repository = match registry == DEFAULT_REGISTRY && !path.contains('/') {
            true => format!("{DEFAULT_DIRECTORY}{path}"),
            false => path.to_owned(),
        };
        if !path.split('/').all(valid_component) {
            return Err("a name has small letters, digits, and . _ or - between them");
        }
        if registry.len() + 1 + repository.len() > NAME_MAX {
            return Err("it is too long");
        }
        // 64 hexadecimal digits are an image's ID.
        if Digest::from_hex(text).is_some() {
            return Err("it looks like an image's ID");
        }
        let tag = match (tag, &digest) {
            (None, None) => Some(DEFAULT_TAG.to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Reference {
            registry: registry.to_owned(),
            repository,
            tag,
            digest,
        })
    }
}

/// Whether the word before a name's first `/` is a registry, not a directory of the usual one.
fn is_host(word: &str) -> bool {
    word.contains(['.', ':']) || word == "localhost" || word != word.to_lowercase()
}

fn valid_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=TAG_MAX).contains(&tag.len())
        && tag.bytes().all(|byte| word(byte) || b".-".contains(&byte))
        && tag.bytes().next().is_some_and(word)
}

/// Words of small letters and digits, with `.`, `_`, `__` or dashes between them.
fn valid_component(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if !text
        .bytes()
        .all(|byte| word(byte) || b"._-".contains(&byte))
    {
        return false;
    }
    let mut rest = text;
    loop {
        let end = rest.find(['.', '_', '-']).unwrap_or(rest.len());
        let (first, others) = rest.split_at(end);
        if first.is_empty() {
            return false;
        }
        if others.is_empty() {
            return true;
        }
        let after = others.trim_start_matches(['.', '_', '-']);
        let between = others.strip_suffix(after).unwrap_or_default();
        let dashes = between.bytes().all(|byte| byte == b'-');
        if !dashes && ![".", "_", "__"].contains(&between) {
            return false;
        }
        rest = after;
    }
}

fn valid_host(text: &str) -> bool {
    let port = |port: &str| port.parse::<u16>().is_ok() && !port.starts_with('+');
    if let Some(rest) = text.strip_prefix('[') {
        let Some((address, rest)) = rest.split_once(']') else {
            return false;
        };
        let rest = rest.strip_prefix(':').map_or(rest.is_empty(), port);
        return address.parse::<std::net::Ipv6Addr>().is_ok() && rest;
    }
    let (host, number) = match text.split_once(':') {
        Some((host, number)) => (host, Some(number)),
        None => (text, None),
    };
    let label = |label: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty()
            && label.bytes().all(plain)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.split('.').all(label) && number.is_none_or(port)
}

impl FromStr for Reference {
    type Err = BadReference;

    fn from_str(text: &str) -> Result<Self, BadReference> {
        Reference::parse(text).map_err(|why| BadReference {
            text: text.chars().take(100).collect(),
            why,
        })
    }
}

impl fmt::Display for Reference {
    /// In full.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = format!("{}/{}", self.registry, self.repository);
        self.push_rest(&mut text);
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_read_as_docker_reads_them() {
        let digest = Digest::of(b"x").to_string();
        for (text, full, familiar) in [
            ("alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("alpine:3", "docker.io/library/alpine:3", "alpine:3"),
            ("a/b", "docker.io/a/b:latest", "a/b:latest"),
            ("docker.io/b", "docker.io/library/b:latest", "b:latest"),
            ("index.docker.io/b:1", "docker.io/library/b:1", "b:1"),
            ("localhost/b", "localhost/b:latest", "localhost/b:latest"),
            (
                "localhost:5000/b:t",
                "localhost:5000/b:t",
                "localhost:5000/b:t",
            ),
            (
                "h.example/a/b/c",
                "h.example/a/b/c:latest",
                "h.example/a/b/c:latest",
            ),
            ("Host/b", "Host/b:latest", "Host/b:latest"),
            ("[::1]:5000/b:1", "[::1]:5000/b:1", "[::1]:5000/b:1"),
            (
                "a__b/c-d--e.f_g",
                "docker.io/a__b/c-d--e.f_g:latest",
                "a__b/c-d--e.f_g:latest",
            ),
            (
                "library/a/b",
                "docker.io/library/a/b:latest",
                "library/a/b:latest",
            ),
            (
                "docker.io/h.example/b",
                "docker.io/h.example/b:latest",
                "docker.io/h.example/b:latest",
            ),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.to_string(), full, "{text}");
            assert_eq!(reference.familiar(), familiar, "{text}");
        }
        let pinned: Reference = format!("alpine@{digest}").parse().unwrap();
        assert_eq!(pinned.tag, None);
        assert_eq!(pinned.wanted(), digest);
        let both: Reference = format!("alpine:3@{digest}").parse().unwrap();
        assert_eq!((both.tag.as_deref(), both.wanted()), (Some("3"), digest));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let id = Digest::of(b"x").hex();
        for text in [
            "",
            "A",
            "a/",
            "/a",
            "a//b",
            "a:",
            "a:b c",
            "a@",
            "a@sha256:1",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a/../b",
            "../a",
            "a:-x",
            "h.x:99999/a",
            "h.x:/a",
            "h..x/a",
            "-h.x/a",
            "[::1/a",
            "[x]:1/a",
            "a b",
            "ä",
            "a\n",
            "h.x:+1/a",
            &id,
            &"a".repeat(256),
            &format!("a:{}", "t".repeat(129)),
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_name_or_refused_and_a_name_says_the_same_again(text in "[a-zA-Z0-9.:/@_\\[\\]é-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(&reference.to_string().parse::<Reference>().unwrap(), &reference);
                prop_assert_eq!(&reference.familiar().parse::<Reference>().unwrap(), &reference);
            }
        }

        #[test]
        fn what_is_well_formed_is_read(
            host in "([a-z]{1,5}\\.[a-z]{1,5}(:[1-9][0-9]{0,3})?)?",
            name in "[a-z0-9]{1,8}([_-][a-z0-9]{1,8}){0,2}(/[a-z0-9]{1,8}([._-][a-z0-9]{1,4})?){0,3}",
            tag in "([A-Za-z0-9_][A-Za-z0-9_.-]{0,20})?",
        ) {
            let (slash, colon) = (if host.is_empty() { "" } else { "/" }, if tag.is_empty() { "" } else { ":" });
            let reference: Reference = format!("{host}{slash}{name}{colon}{tag}").parse().unwrap();
            let registry = if host.is_empty() { DEFAULT_REGISTRY } else { &host };
            prop_assert_eq!(&reference.registry, registry);
            prop_assert_eq!(reference.repository.strip_prefix(DEFAULT_DIRECTORY).unwrap_or(&reference.repository), &name);
            prop_assert_eq!(reference.tag.as_deref(), Some(if tag.is_empty() { DEFAULT_TAG } else { &tag }));
        }
    }
}
