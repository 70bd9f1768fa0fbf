//! How many tests ran, from what test runners print.

use std::fmt;
use std::ops::AddAssign;

/// Tests by how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
}

impl Counts {
    /// Adds up all summaries in the output of cargo-nextest or cargo test.
    pub fn read(output: &str) -> Self {
        let mut total = Self::default();
        for line in output.lines() {
            if let Some(result) = line.trim_start().strip_prefix("test result:") {
                total += Self::of_libtest(result);
            } else if line.trim_start().starts_with("Summary [") {
                total += Self::of_nextest(line);
            }
        }
        total
    }

    /// `ok. 5 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; ...`
    fn of_libtest(line: &str) -> Self {
        let mut counts = Self::default();
        let line = line.split_once('.').map_or(line, |(_, rest)| rest);
        for (number, word) in line.split(';').filter_map(number_and_word) {
            match word {
                "passed" => counts.passed += number,
                "failed" => counts.failed += number,
                "ignored" => counts.skipped += number,
                _ => {}
            }
        }
        counts
    }

    /// `Summary [ 1.2s] 10 tests run: 8 passed (1 slow), 1 failed, 1 timed out, 2 skipped`
    fn of_nextest(line: &str) -> Self {
        let mut counts = Self::default();
        let Some((_, parts)) = line.split_once(" run: ") else {
            return counts;
        };
        // In brackets: which of the passed ones were slow, flaky or leaky.
        let mut depth = 0u32;
        let parts: String = parts
            .chars()
            .filter(|&letter| {
                depth += u32::from(letter == '(');
                let outside = depth == 0;
                depth -= u32::from(letter == ')');
                outside
            })
            .collect();
        for (number, word) in parts.split(',').filter_map(number_and_word) {
            match word {
                "passed" => counts.passed += number,
                "skipped" => counts.skipped += number,
                // failed, timed out, exec failed
                _ => counts.failed += number,
            }
        }
        counts
    }
}

fn number_and_word(part: &str) -> Option<(u64, &str)> {
    let (number, word) = part.trim().split_once(' ')?;
    Some((number.parse().ok()?, word.trim()))
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            passed,
            failed,
            skipped,
        } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// The tests that skipped themselves, each with its reason: a line of their
/// output says `SKIPPED: reason`. Read from nextest's JUnit report.
pub fn self_skipped(junit: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for case in junit.split("<testcase ").skip(1) {
        let case = case.split("</testcase>").next().unwrap_or(case);
        let name = attribute(case, "name").unwrap_or("?");
        if let Some(reason) = skip_reason(case) {
            found.push((name.to_owned(), unescape(reason)));
        }
    }
    found
}

/// The reason in the first line that says `SKIPPED: reason`, or `SKIPPED name: reason`.
pub fn skip_reason(output: &str) -> Option<&str> {
    output.lines().find_map(|line| {
        let at = ["SKIPPED:", "SKIPPED ", "skipped: "]
            .iter()
            .find_map(|mark| line.find(mark))?;
        let (_, reason) = line[at..].split_once(": ")?;
        Some(reason.split("</").next().unwrap_or(reason).trim())
    })
}

fn attribute<'a>(tag: &'a str, name: &str) -> Option<&'a str> {
    let from = tag.find(&format!("{name}=\""))? + name.len() + 2;
    tag[from..].split('"').next()
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&apos;", "'")
        .replace("&#39;", "'")
        .replace("&amp;", "&")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nextest_summaries() {
        let counts = Counts::read(
            "        PASS [   0.003s] a::b c\n------------\n     Summary [  61.234s] 12 tests run: \
             8 passed (1 slow, 1 leaky), 2 failed, 2 timed out, 3 skipped\n",
        );
        assert_eq!(counts.to_string(), "8 passed, 4 failed, 3 skipped");
        let counts =
            Counts::read("     Summary [   0.1s] 3/9 tests run: 2 passed, 1 failed, 0 skipped");
        assert_eq!(counts.to_string(), "2 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn libtest_summaries_add_up() {
        let counts = Counts::read(
            "running 2 tests\ntest result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 \
             filtered out; finished in 0.00s\n\ntest result: FAILED. 5 passed; 1 failed; 0 \
             ignored; 0 measured; 7 filtered out; finished in 1.00s\n",
        );
        assert_eq!(counts.to_string(), "7 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn tests_that_skipped_themselves() {
        let junit = "<testsuite name=\"x\"><testcase name=\"a\" classname=\"x\"><system-out>\n\
                     running 1 test\nSKIPPED: no &lt;THP&gt; here\ntest a ... ok</system-out>\
                     </testcase><testcase name=\"b\" classname=\"x\"></testcase></testsuite>";
        assert_eq!(
            self_skipped(junit),
            [("a".to_owned(), "no <THP> here".to_owned())]
        );
        let named = "running 1 test\nSKIPPED program::x: no device\ntest a ... ok";
        assert_eq!(skip_reason(named), Some("no device"));
        assert_eq!(skip_reason("test a ... ok\n2 filtered out"), None);
    }
}
