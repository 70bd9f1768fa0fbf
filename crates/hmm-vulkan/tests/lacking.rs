//! Devices that cannot be used: what is said of them, by a driver that lacks what it is told
//! to (`hmm-mock-icd`).

mod common;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use hmm_mock_icd::{LACKS, NAME};
use hmm_types::ByteCount;
use hmm_vulkan::{VulkanConfig, VulkanDevice, VulkanError};

/// Tells a child of a test to ask the driver.
const ROLE: &str = "HMM_VULKAN_TEST_ROLE";

/// What a process says that opens a device, and lists all that there are, with the mock
/// driver only. `Err`: why that cannot be seen here.
fn said(test: &str, lacks: &str) -> Result<String, String> {
    let this = std::env::current_exe().unwrap();
    let library = this.parent().unwrap().join("libhmm_mock_icd.so");
    assert!(library.exists(), "cargo has not made {}", library.display());
    let manifest: PathBuf =
        std::env::temp_dir().join(format!("hmm-mock-{}-{lacks}.json", std::process::id()));
    let text = hmm_mock_icd::manifest(library.to_str().unwrap());
    std::fs::write(&manifest, text).unwrap();
    let output = Command::new(this)
        .args(["--exact", test, "--nocapture"])
        .env(ROLE, "ask")
        .env(LACKS, lacks)
        .env("VK_DRIVER_FILES", &manifest)
        // What it was called before.
        .env("VK_ICD_FILENAMES", &manifest)
        .env("HMM_VULKAN_VALIDATION", "")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let _ = std::fs::remove_file(&manifest);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    match text.lines().find(|line| line.contains("no loader")) {
        Some(line) => Err(line.to_owned()),
        None => Ok(text),
    }
}

fn ask() {
    let config = VulkanConfig::new(ByteCount::mib(8));
    match VulkanDevice::open(config) {
        Err(error @ VulkanError::NoLoader { .. }) => println!("no loader: {error}"),
        opened => println!("opened: {}", opened.unwrap_err()),
    }
    for device in hmm_vulkan::list().unwrap_or_default() {
        let problem = device.problem.map(|problem| problem.to_string());
        println!("listed: {} {}: {problem:?}", device.name, device.api);
    }
}

#[test]
fn what_a_device_lacks_is_named() {
    if std::env::var_os(ROLE).is_some() {
        return ask();
    }
    for feature in ["shaderInt64", "timelineSemaphore", "bufferDeviceAddress"] {
        let text = match said("what_a_device_lacks_is_named", feature) {
            Ok(text) => text,
            Err(why) => skip!("{why}"),
        };
        let error = format!("{NAME} lacks {feature}, ");
        assert!(text.contains(&format!("opened: {error}")), "{text}");
        assert!(
            text.contains(&format!("listed: {NAME} 1.3.0: Some(\"{error}")),
            "{text}"
        );
    }
    let text = said("what_a_device_lacks_is_named", "queue").unwrap();
    let error = format!("opened: {NAME} lacks a queue for compute kernels, ");
    assert!(text.contains(&error), "{text}");
}

#[test]
fn a_device_that_is_too_old_says_what_it_knows() {
    if std::env::var_os(ROLE).is_some() {
        return ask();
    }
    let text = match said("a_device_that_is_too_old_says_what_it_knows", "1.2") {
        Ok(text) => text,
        Err(why) => skip!("{why}"),
    };
    let error = format!("{NAME} knows Vulkan 1.1.0; 1.2 is needed");
    assert!(text.contains(&format!("opened: {error}")), "{text}");
    assert!(
        text.contains(&format!("listed: {NAME} 1.1.0: Some(\"{error}")),
        "{text}"
    );
}

#[test]
fn a_driver_without_a_device_and_one_that_fails_are_told_apart() {
    const TEST: &str = "a_driver_without_a_device_and_one_that_fails_are_told_apart";
    if std::env::var_os(ROLE).is_some() {
        return ask();
    }
    let text = match said(TEST, "device") {
        Ok(text) => text,
        Err(why) => skip!("{why}"),
    };
    assert!(
        text.contains("opened: no Vulkan device can be used"),
        "{text}"
    );
    assert!(!text.contains("listed"), "{text}");
    // All is there, and it is lost when it is opened.
    let text = said(TEST, "").unwrap();
    assert!(text.contains("opened: vkCreateDevice failed"), "{text}");
    assert!(
        text.contains(&format!("listed: {NAME} 1.3.0: None")),
        "{text}"
    );
}
