//! Foreign text on its way to a terminal: what an image, a guest or a VMM process that
//! was taken over says must not move the cursor, hide text or type answers.

/// The longest line that is shown of what others say, in characters.
const LINE_MAX: usize = 200;

/// A text whose control characters are question marks.
pub fn text(text: &str) -> String {
    let plain = |it: char| if is_harmful(it) { '?' } else { it };
    text.chars().map(plain).collect()
}

/// A text's first line, shortened, with its control characters as question marks.
pub fn line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    self::text(&line.chars().take(LINE_MAX).collect::<String>())
}

/// A document of JSON whose control characters are written as JSON may write them: its
/// own writer leaves some as they are.
pub fn json(document: &str) -> String {
    let mut out = String::with_capacity(document.len());
    for it in document.chars() {
        match it {
            '\n' => out.push(it),
            _ if is_harmful(it) => out.push_str(&format!("\\u{:04x}", u32::from(it))),
            _ => out.push(it),
        }
    }
    out
}

/// Some lines with their ends, whose other control characters are question marks.
pub fn lines(bytes: &[u8]) -> String {
    let plain = |it: char| match it {
        '\n' | '\t' => it,
        _ if is_harmful(it) => '?',
        _ => it,
    };
    String::from_utf8_lossy(bytes).chars().map(plain).collect()
}

/// Control characters, and those that change the direction of what is around them.
fn is_harmful(it: char) -> bool {
    it.is_control()
        || matches!(it, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_a_terminal() {
        let evil = "a\x1b[2J\u{9b}1m\u{202e}é\t\r\nb\n";
        assert_eq!(text(evil), "a?[2J?1m?é???b?");
        assert_eq!(line(evil), "a?[2J?1m?é?");
        assert_eq!(lines(evil.as_bytes()), "a?[2J?1m?é\t?\nb\n");
        assert_eq!(lines(b"\xff\x1b"), "\u{fffd}?");
        let value = serde_json::json!({ "a\u{9b}": "\x1b\u{7f}\u{202e}é" });
        let document = json(&serde_json::to_string_pretty(&value).unwrap());
        assert_eq!(document, "{\n  \"a\\u009b\": \"\\u001b\\u007f\\u202eé\"\n}");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&document).unwrap(),
            value
        );
        assert_eq!(line(&"x".repeat(500)).len(), LINE_MAX);
        assert_eq!(line(""), "");
    }
}
