//! What stands behind `--` on the kernel's command line, which is for init.
//!
//! Linux itself gives init no more than 32 words, and none behind a second `--`: PID 1
//! reads the line instead, in which all of them stand. Words are what Linux makes of
//! them (`next_arg` in its `lib/cmdline.c`).

/// How many words Linux gives init; with more, it panics (`MAX_INIT_ARGS`).
pub const WORDS_MAX: usize = 32;
const END: &[u8] = b"--";

/// The words behind the first `--`, if there is one. A `--` right behind it hides them
/// from Linux, and is none of them.
pub fn behind(line: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut words = split(line).skip_while(|word| word != END);
    words.next()?;
    let mut words = words.peekable();
    words.next_if(|word| word == END);
    Some(words.collect())
}

/// How many words Linux itself gives init.
pub fn count(line: &[u8]) -> usize {
    let words = split(line).skip_while(|word| word != END).skip(1);
    words.take_while(|word| word != END).count()
}

/// The line with its words for init hidden from Linux.
pub fn hidden(line: &str) -> String {
    let (mut quoted, mut start) = (false, 0);
    for (at, byte) in line.bytes().chain([b' ']).enumerate() {
        quoted ^= byte == b'"';
        if quoted || !byte.is_ascii_whitespace() {
            continue;
        }
        if line
            .get(start..at)
            .is_some_and(|word| word.as_bytes() == END)
            && let Some((before, behind)) = line.split_at_checked(at)
        {
            return format!("{before} --{behind}");
        }
        start = at + 1;
    }
    line.to_owned()
}

fn split(line: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let mut quoted = false;
    let blank = move |&byte: &u8| {
        quoted ^= byte == b'"';
        !quoted && byte.is_ascii_whitespace()
    };
    line.split(blank)
        .filter(|raw| !raw.is_empty())
        .map(unquoted)
}

/// A word without the quotes around it, or around the value in it.
fn unquoted(raw: &[u8]) -> Vec<u8> {
    let inner = |text: &[u8]| text.strip_suffix(b"\"").unwrap_or(text).to_vec();
    if let Some(rest) = raw.strip_prefix(b"\"") {
        return inner(rest);
    }
    let equals = raw.iter().position(|&byte| byte == b'=');
    let parts = equals.and_then(|at| raw.split_at_checked(at + 1));
    match parts.and_then(|(name, value)| Some((name, value.strip_prefix(b"\"")?))) {
        Some((name, value)) => [name, &inner(value)].concat(),
        None => raw.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        let words = behind(line.as_bytes()).unwrap();
        let text = |word| String::from_utf8(word).unwrap();
        words.into_iter().map(text).collect()
    }

    #[test]
    fn words_are_linux_s_and_all_there() {
        assert_eq!(behind(b"quiet a--b x=-- --y"), None);
        assert_eq!(words("quiet --"), [""; 0]);
        assert_eq!(
            words("a -- run echo a -- b\n"),
            ["run", "echo", "a", "--", "b"]
        );
        assert_eq!(words("-- -- run a"), ["run", "a"]);
        assert_eq!(
            words("-- a  \"b c\" d=\"e f\" g\"h i"),
            ["a", "b c", "d=e f", "g\"h i"]
        );
        assert_eq!(words("a=\"b -- c\" -- d"), ["d"]);
    }

    #[test]
    fn linux_sees_none_of_what_is_hidden() {
        let many = format!("quiet -- run {}", "x ".repeat(40));
        assert_eq!(count(many.as_bytes()), 41);
        let line = hidden(&many);
        assert_eq!(count(line.as_bytes()), 0);
        assert_eq!(behind(line.as_bytes()), behind(many.as_bytes()));
        assert_eq!(hidden("a --"), "a -- --");
        assert_eq!(hidden("a=\"b -- c\" -- d"), "a=\"b -- c\" -- -- d");
        assert_eq!(count(b"a -- b -- c"), 1);
    }
}
