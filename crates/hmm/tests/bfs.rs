//! The example `bfs`, small: a graph that is larger than the device, so that pages are
//! evicted; and its arguments.
#[path = "../examples/bfs.rs"]
#[allow(dead_code, unreachable_pub, reason = "it is a program of its own")]
mod bfs;
mod common;

use bfs::Options;
use clap::Parser;
use common::watchdog;
use hmm::VulkanError;

fn options(arguments: &[&str]) -> Result<Options, clap::Error> {
    Options::try_parse_from(["bfs"].iter().chain(arguments))
}

#[test]
fn finds_what_the_cpu_finds() {
    let _dog = watchdog("bfs", 150);
    let options = options(&["--scale=16", "--device-memory=2"]).unwrap();
    let outcome = match bfs::search(&options) {
        Ok(outcome) => outcome,
        Err(error) => match error.downcast_ref::<hmm::Error>() {
            Some(hmm::Error::Vulkan(
                VulkanError::NoLoader { .. }
                | VulkanError::NoDevice { .. }
                | VulkanError::BadDriver { .. },
            )) => skip!("{error} (`cargo xtask vulkan` gets a driver)"),
            _ => panic!("{error}"),
        },
    };
    outcome.print(false).unwrap();
    assert!(outcome.is_right());
    assert!(outcome.bytes.get() > 4 * outcome.memory.get());
    assert!(outcome.levels.len() > 3);
    assert!(outcome.sum(|level| level.evicted_pages) > 0);
    // Most of the graph.
    assert!(outcome.sum(|level| level.vertices) > u64::from(outcome.vertices) / 2);
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    let nowhere = options(&["--scale=4", "--device=no such device"]).unwrap();
    let error = bfs::search(&nowhere).expect_err("there is none");
    assert!(
        matches!(error.downcast_ref(), Some(hmm::Error::Vulkan(_))),
        "{error}"
    );
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    for arguments in [
        &["--scale=24"][..],
        &["--scale=3"],
        &["--degree=0"],
        &["--device-memory=0"],
        &["--device-memory=much"],
        &["--scales=4"],
        &["20"],
    ] {
        let error = options(arguments).expect_err("no sense");
        assert_eq!(error.exit_code(), 2, "{arguments:?}: {error}");
    }
}
