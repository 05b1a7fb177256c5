//! Errors as text.

use std::error::Error;

/// A message about an error, with the error's causes behind it.
pub fn with_causes(mut message: String, error: &dyn Error) -> String {
    let mut cause = error.source();
    while let Some(error) = cause {
        // Some errors tell their cause themselves.
        let text = error.to_string();
        if !message.ends_with(&text) {
            message.push_str(&format!(": {text}"));
        }
        cause = error.source();
    }
    message
}
