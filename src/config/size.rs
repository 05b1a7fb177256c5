//! Sizes: `512M`, `2G`.

/// Reads a size in bytes; a plain number counts units of `1 << plain_shift`.
pub fn parse_size(text: &str, plain_shift: u32) -> Result<u64, String> {
    let unit = text.trim_start_matches(|it: char| it.is_ascii_digit());
    let digits = text.strip_suffix(unit).unwrap_or(text);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" => plain_shift,
        "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        unit if !digits.is_empty() && unit.bytes().all(|byte| byte.is_ascii_alphabetic()) => {
            return Err("unknown unit; write 512M or 2G".into());
        }
        _ => return Err("not a size; write 512M or 2G".into()),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("not a size; write 512M or 2G".into());
    }
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "too large".into())
}

/// A size as a user would write it: in the largest unit that it is a multiple of.
pub fn size_text(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let fits = |(shift, _): &(u32, &str)| bytes != 0 && bytes.is_multiple_of(1 << shift);
    match units.into_iter().find(fits) {
        Some((shift, unit)) => format!("{}{unit}", bytes >> shift),
        None => bytes.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_docker_s_units() {
        for (text, size) in [
            ("5", 5 << 20),
            ("5b", 5),
            ("64m", 64 << 20),
            ("64MB", 64 << 20),
            ("64MiB", 64 << 20),
            ("2g", 2 << 30),
            ("1Kb", 1 << 10),
        ] {
            assert_eq!(parse_size(text, 20), Ok(size), "{text}");
        }
        for text in [
            "", "M", "x", "1X", "1 M", "-1", "1.5G", "1Mi", "1MM", "\u{fc}1", "1\u{fc}",
        ] {
            assert!(parse_size(text, 20).is_err(), "{text}");
        }
    }

    #[test]
    fn a_size_is_shown_as_it_was_written() {
        for text in ["1000T", "3G", "512M", "32772K"] {
            assert_eq!(size_text(parse_size(text, 20).unwrap()), text);
        }
        assert_eq!((size_text(0), size_text(1025)), ("0".into(), "1025".into()));
    }
}
