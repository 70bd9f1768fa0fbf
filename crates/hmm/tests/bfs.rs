//! The example `bfs`, small: a graph that is larger than the device, so that pages are
//! evicted; and its arguments, and its shader.
#[path = "../examples/bfs.rs"]
#[allow(dead_code, unreachable_pub, reason = "it is a program of its own")]
mod bfs;
mod common;

use std::path::Path;
use std::process::Command;

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
    // Not a test of its own, beside this one or before it: a graph in a heap of glibc's
    // that another engine's driver has had can stay where it is (docs/vulkan.md).
    let nowhere = self::options(&["--scale=4", "--device=no such device"]).unwrap();
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

#[test]
fn the_shader_is_its_source() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/bfs");
    let made = std::env::temp_dir().join(format!("hmm-bfs-{}.spv", std::process::id()));
    let compiled = Command::new("glslangValidator")
        .args(["--quiet", "-V", "--target-env", "vulkan1.2"])
        .arg(folder.join("level.comp"))
        .arg("-o")
        .arg(&made)
        .status();
    let Ok(status) = compiled else {
        skip!("no glslangValidator (Debian: glslang-tools)");
    };
    assert!(status.success(), "level.comp does not compile");
    let new = std::fs::read(&made).unwrap();
    std::fs::remove_file(&made).unwrap();
    let old = include_bytes!("../examples/bfs/level.spv");
    // Word 2 is the compiler's version: another one may choose other ids.
    if old[8..12] != new[8..12] {
        skip!("the shader was compiled by another version of glslang");
    }
    assert!(
        old[..] == new[..],
        "level.spv is not what level.comp says: run examples/shaders.sh"
    );
}
