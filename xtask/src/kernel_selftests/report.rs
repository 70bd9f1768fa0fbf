//! What became of the tests, for people and for programs.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

use super::harness::Outcome;
use super::runner::Ran;
use crate::counts::Counts;

/// A failed test may print a line for each of its pages.
const LINES: usize = 8;

pub fn counts(all: &[Ran]) -> Counts {
    let mut counts = Counts::default();
    for ran in all {
        match ran.test.outcome {
            Outcome::Passed => counts.passed += 1,
            Outcome::Skipped(_) => counts.skipped += 1,
            Outcome::Failed(_) => counts.failed += 1,
        }
    }
    counts
}

/// A row for each test, a column for each variant; then what there is to say
/// about some of them.
pub fn text(all: &[Ran]) -> String {
    let mut text = table(all);
    let mut reasons = BTreeMap::<&str, Vec<String>>::new();
    for ran in all {
        if let Outcome::Skipped(reason) = &ran.test.outcome {
            reasons.entry(reason).or_default().push(ran.test.name.row());
        }
    }
    for (reason, tests) in reasons {
        let _ = match &tests[..] {
            [test] => writeln!(text, "\nskipped: {test}: {reason}"),
            tests => writeln!(text, "\nskipped: {} tests: {reason}", tests.len()),
        };
    }
    for Ran { test, log } in all {
        let log = log.display();
        let is_benchmark = test.name.row().contains("benchmark");
        let (what, lines) = match &test.outcome {
            Outcome::Failed(lines) => ("failed", shown(lines)),
            Outcome::Passed if is_benchmark => {
                ("figures", test.printed.iter().map(String::as_str).collect())
            }
            Outcome::Passed | Outcome::Skipped(_) => continue,
        };
        let _ = writeln!(text, "\n{what}: {} ({log})", test.name);
        for line in lines {
            let _ = writeln!(text, "  {line}");
        }
    }
    text
}

/// What went wrong is said first, and last how it ended.
fn shown(lines: &[String]) -> Vec<&str> {
    let mut shown: Vec<&str> = lines.iter().take(LINES).map(String::as_str).collect();
    if let [.., last] = &lines[shown.len()..] {
        shown.extend(["...", last]);
    }
    shown
}

fn table(all: &[Ran]) -> String {
    let mut rows = Vec::new();
    let mut columns = Vec::new();
    let mut cells = BTreeMap::new();
    for Ran { test, .. } in all {
        let (row, column) = (test.name.row(), test.name.variant());
        if !rows.contains(&row) {
            rows.push(row.clone());
        }
        if !columns.contains(&column) {
            columns.push(column);
        }
        cells.insert((row, column), word(&test.outcome));
    }
    let width = rows.iter().map(String::len).max().unwrap_or(0);
    let mut line = format!("{:width$}", "test");
    let mut text = String::new();
    for column in &columns {
        line += &format!("  {column:8}");
    }
    let _ = writeln!(text, "{}", line.trim_end());
    for row in rows {
        line = format!("{row:width$}");
        for column in &columns {
            let cell = cells.get(&(row.clone(), *column)).unwrap_or(&"");
            line += &format!("  {cell:8}");
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn word(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "pass",
        Outcome::Skipped(_) => "skip",
        Outcome::Failed(_) => "FAIL",
    }
}

/// One test as an object.
pub fn object(version: &str, Ran { test, log }: &Ran) -> Value {
    let mut object = json!({
        "linux": version,
        "test": test.name.row(),
        "variant": test.name.variant(),
        "result": word(&test.outcome).to_lowercase(),
        "seconds": test.time.as_secs_f64(),
        "printed": test.printed,
        "log": log,
    });
    match &test.outcome {
        Outcome::Passed => {}
        Outcome::Skipped(reason) => object["reason"] = json!(reason),
        Outcome::Failed(lines) => object["lines"] = json!(lines),
    }
    object
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::kernel_selftests::harness::Finished;

    fn ran(name: &str, outcome: Outcome, printed: &[&str]) -> Ran {
        let test = Finished {
            name: name.into(),
            outcome,
            printed: printed.iter().map(|line| (*line).to_owned()).collect(),
            time: Duration::from_millis(1500),
        };
        let log = "a.log".into();
        Ran { test, log }
    }

    fn some() -> [Ran; 4] {
        let failure = vec!["# here:1:b:Expected 1 == 2".to_owned()];
        [
            ran("f.f_private.a", Outcome::Passed, &["text"]),
            ran("f.f_private.b", Outcome::Failed(failure), &[]),
            ran("f.f_coherent.a", Outcome::Skipped("none".into()), &[]),
            ran("f.f_private.benchmark", Outcome::Passed, &["9 GB/s"]),
        ]
    }

    #[test]
    fn a_table_and_remarks() {
        let expected = "\
test         private   coherent
f.a          pass      skip
f.b          FAIL
f.benchmark  pass

skipped: f.a: none

failed: f.f_private.b (a.log)
  # here:1:b:Expected 1 == 2

figures: f.f_private.benchmark (a.log)
  9 GB/s
";
        assert_eq!(text(&some()), expected);
        let counts = counts(&some()).to_string();
        assert_eq!(counts, "2 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn of_many_lines_the_ends_are_shown() {
        let lines: Vec<_> = (1..=20).map(|number| number.to_string()).collect();
        let text = |count| shown(&lines[..count]).join(" ");
        assert_eq!(text(0), "");
        assert_eq!(text(8), "1 2 3 4 5 6 7 8");
        assert_eq!(text(9), "1 2 3 4 5 6 7 8 ... 9");
        assert_eq!(text(20), "1 2 3 4 5 6 7 8 ... 20");
    }

    #[test]
    fn an_object_for_each() {
        let object = object("7.3", &some()[2]).to_string();
        let expected = r#"{"linux":"7.3","log":"a.log","printed":[],"reason":"none","result":"skip","seconds":1.5,"test":"f.a","variant":"coherent"}"#;
        assert_eq!(object, expected);
    }
}
