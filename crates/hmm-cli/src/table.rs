//! Aligned tables on standard output.

use std::io::{self, Write};

/// Width that text in the last column is wrapped to.
const LINE_WIDTH: usize = 100;
/// Narrowest last column.
const LEAST_LAST: usize = 30;

/// Rows of text; the last column is wrapped, all others are as wide as needed.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column heads.
    pub fn new<const N: usize>(heads: [&str; N]) -> Self {
        Self {
            rows: vec![heads.map(str::to_owned).to_vec()],
        }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.to_vec());
    }

    /// Writes it.
    pub fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns.saturating_sub(1)).map(width).collect();
        let indent: usize = widths.iter().map(|width| width + 2).sum();
        let last = LINE_WIDTH.saturating_sub(indent).max(LEAST_LAST);
        for row in &self.rows {
            for (cell, width) in row.iter().zip(&widths) {
                write!(out, "{cell:width$}  ")?;
            }
            let text = row.last().map_or("", String::as_str);
            for (number, line) in wrap(text, last).iter().enumerate() {
                let margin = if number == 0 { 0 } else { indent };
                writeln!(out, "{:margin$}{line}", "")?;
            }
        }
        Ok(())
    }
}

/// Breaks text at spaces; always at least one line.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always a line");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_the_last_one_wraps() {
        let mut table = Table::new(["what", "note"]);
        table.row(["a long name".to_owned(), "word ".repeat(30)]);
        let mut out = Vec::new();
        table.print(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("what         note\na long name  word word"));
        assert!(text.lines().count() == 3 && text.lines().all(|line| line.len() <= LINE_WIDTH));
    }

    #[test]
    fn no_text_is_one_line() {
        assert_eq!(wrap("", 10), [""]);
    }
}
