//! The command as a user runs it.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

fn hmm(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hmm"))
        .args(arguments)
        .output()
        .expect("the command starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!(
            "{error} in: {}\n{}",
            text(&output.stdout),
            text(&output.stderr)
        )
    })
}

/// A file that is gone when the test ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("hmm-cli-{}-{name}", std::process::id()));
        fs::write(&path, bytes).expect("the file can be written");
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("the path is text")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// False, and a line that says so, where no engine can work.
fn engine_opens() -> bool {
    let opens = json(&hmm(&["info", "--json"]))["opens"] == true;
    if !opens {
        eprintln!("skipped: the engine does not open here, see `hmm info`");
    }
    opens
}

#[test]
fn info_says_what_there_is() {
    let output = hmm(&["info"]);
    let shown = text(&output.stdout);
    println!("{shown}");
    assert!(shown.contains("kernel") && shown.contains("software device"));
    let value = json(&hmm(&["info", "--json"]));
    assert_eq!(output.status.success(), value["opens"] == true);
    for group in ["findings", "devices", "engine"] {
        for line in value[group].as_array().expect("a list") {
            assert!(line["what"].is_string() && line["value"].is_string());
            assert_eq!(line["ok"] == false, line["remedy"].is_string(), "{line}");
        }
    }
}

#[test]
fn info_shows_a_processs_memory() {
    let shown = text(&hmm(&["info", "--memory"]).stdout);
    assert!(
        shown.contains("[heap]") && shown.contains("migrates"),
        "{shown}"
    );
    // This test's own, by its number: it may be looked at by its child.
    let own = std::process::id().to_string();
    let value = json(&hmm(&["info", "--json", "--memory", &own]));
    let mapped = value.as_array().expect("a list");
    let kinds = ["anonymous", "file", "special"];
    for kind in kinds {
        assert!(mapped.iter().any(|entry| entry["kind"] == kind), "{kind}");
    }
    for entry in mapped {
        assert!(entry["start"].as_u64() < entry["end"].as_u64());
        assert_eq!(
            entry["stays"].is_null(),
            entry["kind"] == "anonymous" && entry["permissions"] != "---p",
            "{entry}"
        );
    }
    let gone = hmm(&["info", "--memory", "4194305"]);
    assert!(!gone.status.success());
    assert!(text(&gone.stderr).contains("4194305"));
}

#[test]
fn demo_is_right_on_its_own_executable() {
    if !engine_opens() {
        return;
    }
    let output = hmm(&["demo"]);
    let shown = text(&output.stdout);
    println!("{shown}{}", text(&output.stderr));
    assert!(output.status.success());
    for part in ["this program", "before", "during", "after", "home", "RIGHT"] {
        assert!(shown.contains(part), "no {part:?}");
    }
}

#[test]
fn demo_is_right_on_small_files() {
    if !engine_opens() {
        return;
    }
    let poem = "Whose woods these are I think I know. ".repeat(500);
    for (name, bytes) in [("byte", b"x".as_slice()), ("poem", poem.as_bytes())] {
        let file = Scratch::new(name, bytes);
        let output = hmm(&["demo", "--json", file.path()]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let value = json(&output);
        assert_eq!(value["right"], true, "{value}");
        assert_eq!(value["file_bytes"], bytes.len());
        assert!(value["pages_to_device"].as_u64() > Some(0), "{value}");
        assert_eq!(value["residency"]["home"]["device_pages"], 0, "{value}");
    }
}

#[test]
fn demo_is_right_on_a_device_that_is_too_small() {
    if !engine_opens() {
        return;
    }
    let mut number = 1u32;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        number.to_be_bytes()
    })
    .take(1 << 18)
    .flatten()
    .collect();
    let file = Scratch::new("random", &bytes);
    let output = hmm(&["demo", "--json", "--device-memory", "2", file.path()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let value = json(&output);
    assert_eq!(value["right"], true, "{value}");
    assert!(
        value["statistics"]["evicted_pages"].as_u64() > Some(0),
        "{value}"
    );
}

#[test]
fn demo_refuses_what_it_cannot_index() {
    let empty = Scratch::new("empty", b"");
    let huge = Scratch::new("huge", b"");
    let file = fs::OpenOptions::new().write(true).open(&huge.0);
    let sized = file.and_then(|file| file.set_len((1 << 30) + 1));
    sized.expect("a file with a hole takes no space");
    for (path, message) in [
        ("/no/such/file", "No such file"),
        ("/", "is a directory"),
        ("/dev/null", "no regular file"),
        (empty.path(), "is empty"),
        (huge.path(), "too large"),
    ] {
        let output = hmm(&["demo", path]);
        let shown = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{path}: {shown}");
        assert!(
            shown.starts_with("hmm: ") && shown.contains(message),
            "{path}: {shown}"
        );
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn bench_lists_its_rows() {
    let output = hmm(&["bench", "--list"]);
    assert!(output.status.success());
    let shown = text(&output.stdout);
    for row in [
        "fault_4k_p50",
        "fault_4k_p99",
        "to_device_256m",
        "to_system_256m",
        "to_device_256m_thp",
        "to_system_256m_thp",
        "scan_256m",
        "fault_disjoint_2t",
        "device_stream",
        "device_chase",
        "metadata_idle",
        "metadata_resident",
    ] {
        let listed = shown
            .lines()
            .any(|line| line.split_whitespace().next() == Some(row));
        assert!(listed, "{row} is not listed");
    }
}

#[test]
fn bench_prints_an_object_per_row() {
    if !engine_opens() {
        return;
    }
    let output = hmm(&["bench", "--json", "metadata_resident"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let value = json(&output);
    let keys: Vec<_> = value
        .as_object()
        .expect("an object")
        .keys()
        .cloned()
        .collect();
    let mut wanted = ["name", "value", "unit", "floor", "ratio", "target", "ok"];
    wanted.sort_unstable();
    assert_eq!(keys, wanted);
    assert!(value["value"].as_f64() > Some(0.0), "{value}");
}

#[test]
fn bench_names_the_rows_it_knows() {
    let output = hmm(&["bench", "no_such_row"]);
    let shown = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        shown.contains("no_such_row") && shown.contains("metadata_idle"),
        "{shown}"
    );
}

#[test]
fn help_teaches() {
    for arguments in [
        &["--help"][..],
        &["info", "--help"],
        &["demo", "--help"],
        &["bench", "--help"],
    ] {
        let output = hmm(arguments);
        assert!(output.status.success());
        assert!(text(&output.stdout).contains("Examples:"), "{arguments:?}");
    }
}
