//! Text as a terminal has it: columns, wrapped lines, colours.

use super::units::{columns, shorten, wrap};
use crate::model::Mark;

/// Between columns.
pub const GAP: usize = 2;

/// Rows of cells: names at the left, numbers at the right.
pub struct Grid {
    pub title: &'static str,
    pub note: Option<String>,
    pub heads: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Grid {
    /// How wide each column is. A name may have half of the page.
    pub fn widths(&self, page: usize) -> Vec<usize> {
        let widest = |place: usize| {
            let cells = self.rows.iter().filter_map(|it| it.get(place));
            cells
                .chain(self.heads.get(place))
                .map(|it| columns(it))
                .max()
                .unwrap_or(0)
        };
        let limit = |place| {
            if place == 0 {
                page / 2
            } else {
                page - page / 2 - GAP
            }
        };
        (0..self.heads.len())
            .map(|it| widest(it).min(limit(it)))
            .collect()
    }
}

/// How many columns fit beside the first one, from `from` on: up to which, and how wide
/// all are then. One always does.
pub fn fitting(widths: &[usize], from: usize, page: usize) -> (usize, usize) {
    let mut used = widths.first().copied().unwrap_or(0);
    let mut to = from;
    for wide in widths.iter().skip(from) {
        if to > from && used + GAP + wide > page {
            break;
        }
        used += GAP + wide;
        to += 1;
    }
    (to, used)
}

/// Escapes, or none.
#[derive(Clone, Copy)]
pub struct Style(pub bool);

impl Style {
    pub fn put(self, code: &str, text: &str) -> String {
        match self.0 {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }

    pub fn bold(self, text: &str) -> String {
        self.put("1", text)
    }

    pub fn dim(self, text: &str) -> String {
        self.put("2", text)
    }

    pub fn phase(self, mark: Option<Mark>, text: &str) -> String {
        let code = match mark {
            Some(Mark::Launched) => "34",
            Some(Mark::Built) => "36",
            Some(Mark::Kernel) => "37",
            Some(Mark::Init) => "33",
            Some(Mark::Command) => "31",
            Some(Mark::Exit | Mark::Gone) => "2",
            None => "35",
        };
        self.put(code, text)
    }
}

/// Text as it grows.
pub struct Page {
    pub text: String,
    pub width: usize,
    pub style: Style,
}

impl Page {
    pub fn line(&mut self, text: &str) {
        self.text.push_str(text.trim_end());
        self.text.push('\n');
    }

    pub fn blank(&mut self) {
        self.line("");
    }

    /// In one line as it is styled, or else in several, plain.
    pub fn wrapped(&mut self, indent: &str, styled: &str, plain: &str) {
        if columns(plain) + indent.len() <= self.width {
            return self.line(&format!("{indent}{styled}"));
        }
        for line in wrap(plain, self.width - indent.len()) {
            self.line(&format!("{indent}{line}"));
        }
    }

    pub fn paragraph(&mut self, text: &str) {
        self.wrapped("", text, text);
    }

    pub fn dim_paragraph(&mut self, text: &str) {
        for line in wrap(text, self.width) {
            self.line(&self.style.dim(&line));
        }
    }

    pub fn heading(&mut self, text: &str) {
        for line in wrap(text, self.width) {
            self.line(&self.style.bold(&line));
        }
    }

    /// A name, and what is said of it beside it, or below.
    pub fn hanging(&mut self, name: &str, text: &str) {
        self.wrapped(
            "  ",
            &format!("{}: {text}", self.style.bold(name)),
            &format!("{name}: {text}"),
        );
    }

    pub fn warn(&mut self, text: &str) {
        let plain = format!("warning: {text}");
        for (place, line) in wrap(&plain, self.width).into_iter().enumerate() {
            match (place, line.strip_prefix("warning:")) {
                (0, Some(rest)) => {
                    self.line(&format!("{}{rest}", self.style.put("1;33", "warning:")))
                }
                _ => self.line(&line),
            }
        }
    }

    /// All columns, in several blocks where the page is too narrow for one.
    pub fn grid(&mut self, grid: &Grid) {
        let widths = grid.widths(self.width);
        let mut from = 1;
        while from < grid.heads.len() {
            let (to, _) = fitting(&widths, from, self.width);
            self.heads(grid, &widths, from..to);
            for row in &grid.rows {
                self.row(row, &widths, from..to);
            }
            from = to;
            if from < grid.heads.len() {
                self.blank();
            }
        }
    }

    pub fn heads(&mut self, grid: &Grid, widths: &[usize], shown: std::ops::Range<usize>) {
        let line = cells(&grid.heads, widths, shown, |text| text);
        self.line(&self.style.dim(line.trim_end()));
    }

    pub fn row(&mut self, row: &[String], widths: &[usize], shown: std::ops::Range<usize>) {
        let style = self.style;
        let line = cells(row, widths, shown, |name| style.bold(&name));
        self.line(&line);
    }
}

/// A line of cells: the first, and those that are shown.
fn cells(
    row: &[String],
    widths: &[usize],
    shown: std::ops::Range<usize>,
    name: impl Fn(String) -> String,
) -> String {
    let cell = |place: usize| -> (String, usize) {
        let wide = widths.get(place).copied().unwrap_or(0);
        let text = shorten(row.get(place).map_or("", String::as_str), wide);
        let pad = wide.saturating_sub(columns(&text));
        (text, pad)
    };
    let (first, pad) = cell(0);
    let mut line = name(first) + &" ".repeat(pad);
    for place in shown {
        let (text, pad) = cell(place);
        line.push_str(&" ".repeat(GAP + pad));
        line.push_str(&text);
    }
    line
}
