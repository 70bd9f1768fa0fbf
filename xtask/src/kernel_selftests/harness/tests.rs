use super::*;

/// The tests that a run ends, in order.
fn read(output: &str) -> (Reader, Vec<Finished>) {
    let mut reader = Reader::new();
    let finished = output.lines().filter_map(|line| reader.line(line));
    let finished = finished.collect();
    (reader, finished)
}

#[test]
fn a_test_passes() {
    let (reader, finished) = read(
        "\
TAP version 13
1..1
# Starting 1 tests from 1 test cases.
#  RUN           f.f_private.a ...
#            OK  f.f_private.a
ok 1 f.f_private.a
# PASSED: 1 / 1 tests passed.
# Totals: pass:1 fail:0 xfail:0 xpass:0 skip:0 error:0
",
    );
    assert_eq!(finished.len(), 1);
    assert_eq!(finished[0].outcome, Outcome::Passed);
    assert_eq!(finished[0].name, "f.f_private.a".into());
    assert_eq!((reader.planned, reader.is_running()), (1, false));
}

#[test]
fn a_test_skips_itself() {
    let reason = Outcome::Skipped("no device # 2".into());
    let (_, newer) = read(
        "\
#  RUN           f.f_private.a ...
#      SKIP      no device # 2
#            OK  f.f_private.a
ok 1 f.f_private.a # SKIP no device # 2
",
    );
    assert_eq!(newer[0].outcome, reason);
    let (_, older) = read(
        "\
#  RUN           f.f_private.a ...
could not open it
#      SKIP      no device # 2
#            OK  f.f_private.a
ok 1 f.f_private.a
#  RUN           f.f_private.b ...
#            OK  f.f_private.b
ok 2 f.f_private.b
",
    );
    assert_eq!(older[0].outcome, reason);
    assert_eq!(older[1].outcome, Outcome::Passed);
}

#[test]
fn a_failure_keeps_its_lines() {
    let (_, finished) = read(
        "\
noise from before
#  RUN           f.f_private.a ...
could not open it
# tests.c:9:a:Expected x (1) == y (2)
# a: Test terminated by assertion
#          FAIL  f.f_private.a
not ok 1 f.f_private.a
# FAILED: 0 / 1 tests passed.
",
    );
    let expected = [
        "could not open it",
        "# tests.c:9:a:Expected x (1) == y (2)",
        "# a: Test terminated by assertion",
    ];
    let expected = Outcome::Failed(expected.map(str::to_owned).to_vec());
    assert_eq!(finished[0].outcome, expected);
}

#[test]
fn a_run_breaks_off() {
    let (mut reader, finished) = read(
        "\
1..3
#  RUN           f.f_private.a ...
ok 1 f.f_private.a
#  RUN           f.f_private.b ...
# tests.c:9:b:Expected x (1) == y (2)
",
    );
    assert_eq!(finished.len(), 1);
    assert_eq!((reader.planned, reader.is_running()), (3, true));
    let mut broken = reader.broken_off("none");
    broken.fail("killed".into());
    assert_eq!(broken.name, "f.f_private.b".into());
    let lines = ["# tests.c:9:b:Expected x (1) == y (2)", "killed"];
    let expected = Outcome::Failed(lines.map(str::to_owned).to_vec());
    assert_eq!(broken.outcome, expected);

    let (mut reader, _) = read("hmm: no such thing\n");
    let never = reader.broken_off("f.f_private.c");
    assert_eq!(never.name, "f.f_private.c".into());
    let expected = Outcome::Failed(vec!["hmm: no such thing".into()]);
    assert_eq!(never.outcome, expected);
}

#[test]
fn figures_are_printed_for_people() {
    let (_, finished) = read(
        "\
#  RUN           f.f_private.benchmark ...

=== Some pages (2.0 MB) ===
               | With            | Without         | Improvement
--------------------------------------------------------------
Out            | 1.250 ms        | 2.500 ms        | 50.0%
# a remark
#            OK  f.f_private.benchmark
ok 1 f.f_private.benchmark
",
    );
    let expected = [
        "=== Some pages (2.0 MB) ===",
        "               | With            | Without         | Improvement",
        "--------------------------------------------------------------",
        "Out            | 1.250 ms        | 2.500 ms        | 50.0%",
    ];
    assert_eq!(finished[0].printed, expected);
    assert_eq!(finished[0].outcome, Outcome::Passed);
}
