//! `WWW-Authenticate`: how a registry wants to know who asks.

/// The authentication that a registry asks for (RFC 9110, 11.6.1).
#[derive(Debug, PartialEq, Eq)]
pub enum Challenge {
    /// A name and a password.
    Basic,
    /// A token, and where to get it.
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// Reads a header.
    pub fn parse(header: &str) -> Option<Self> {
        let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Challenge::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service, mut scope) = (None, None, None);
        let mut rest = rest.trim_start();
        while let Some((key, after)) = rest.split_once('=') {
            let (value, after) = value(after)?;
            match key.trim().to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value),
                "service" => service = Some(value),
                "scope" => scope = Some(value),
                _ => {}
            }
            rest = after
                .trim_start()
                .strip_prefix(',')
                .unwrap_or_default()
                .trim_start();
        }
        Some(Challenge::Bearer {
            realm: realm?,
            service,
            scope,
        })
    }
}

/// A word, or a text in quotes; and what follows.
fn value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        return Some((word.to_owned(), rest));
    };
    let mut value = String::new();
    let mut chars = quoted.chars();
    loop {
        match chars.next()? {
            '"' => return Some((value, chars.as_str())),
            '\\' => value.push(chars.next()?),
            char => value.push(char),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read() {
        assert_eq!(
            Challenge::parse("Basic realm=\"x\""),
            Some(Challenge::Basic)
        );
        let header = r#"Bearer realm="https://a.example/t?x=1,2",service="s", scope="repository:a/b:pull,push",x=y"#;
        assert_eq!(
            Challenge::parse(header),
            Some(Challenge::Bearer {
                realm: "https://a.example/t?x=1,2".into(),
                service: Some("s".into()),
                scope: Some("repository:a/b:pull,push".into()),
            })
        );
        for bad in [
            "",
            "Negotiate",
            "Bearer",
            "Bearer service=s",
            "Bearer realm=\"x",
        ] {
            assert_eq!(Challenge::parse(bad), None, "{bad}");
        }
    }
}
