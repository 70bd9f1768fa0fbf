//! The kernels of `tests/kernels`: what is found out about them, that they are
//! what their sources say, and that what is made of them is valid.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hmm_spirv::{Capability, Op, Options, SpirvError, Variant, analyse, instrument};

macro_rules! skip {
    ($($why:tt)*) => {{
        eprintln!("SKIPPED {}: {}", module_path!(), format_args!($($why)*));
        return;
    }};
}

const SPEC_ID: u32 = 1000;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels")
}

fn kernel(name: &str) -> Vec<u32> {
    let path = folder().join(name).with_extension("spv");
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let words = bytes.chunks_exact(4);
    words
        .map(|it| u32::from_le_bytes([it[0], it[1], it[2], it[3]]))
        .collect()
}

fn names() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder())
        .expect("the kernels")
        .map(|entry| entry.expect("a kernel").path())
        .filter(|path| path.extension().is_some_and(|it| it == "comp"))
        .map(|path| {
            path.file_stem()
                .expect("a name")
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    assert!(names.len() > 10, "{names:?}");
    names
}

fn has(tool: &str) -> bool {
    let command = Command::new(tool)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    command.is_ok_and(|status| status.success())
}

/// Runs a tool on a module: what it complains about.
fn complaint(tool: &str, args: &[&str], words: &[u32], name: &str) -> Option<String> {
    let file = std::env::temp_dir().join(format!("hmm-spirv-{}-{name}.spv", std::process::id()));
    let bytes: Vec<u8> = words.iter().flat_map(|it| it.to_le_bytes()).collect();
    std::fs::write(&file, bytes).expect("a temporary file");
    let output = Command::new(tool)
        .args(args)
        .arg(&file)
        .output()
        .expect("a tool that is there");
    let _ = std::fs::remove_file(&file);
    (!output.status.success()).then(|| {
        String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout)
    })
}

fn options(variant: Variant) -> Options {
    Options {
        variant,
        control_spec_id: SPEC_ID,
    }
}

#[test]
fn stay_valid() {
    if !has("spirv-val") {
        skip!("no spirv-val (Debian: spirv-tools)");
    }
    let args = ["--target-env", "vulkan1.3", "--scalar-block-layout"];
    for name in names() {
        let words = kernel(&name);
        assert_eq!(
            complaint("spirv-val", &args, &words, &name),
            None,
            "{name} as compiled"
        );
        for variant in Variant::ALL {
            match instrument(&words, options(variant)) {
                Ok(made) => {
                    let label = format!("{name}-{variant:?}");
                    assert_eq!(
                        complaint("spirv-val", &args, &made.words, &label),
                        None,
                        "{label}"
                    );
                }
                Err(SpirvError::Together { .. })
                    if name == "barrier" && variant == Variant::Checked => {}
                Err(SpirvError::TooManyStalls { .. }) if name == "wide" => {}
                Err(error) => panic!("{name} {variant:?}: {error}"),
            }
        }
    }
}

/// Optimised modules have phis, merged blocks and other shapes of loops.
#[test]
fn stay_valid_when_optimised() {
    if !(has("spirv-val") && has("spirv-opt")) {
        skip!("no spirv-opt or spirv-val (Debian: spirv-tools)");
    }
    let mut refused = Vec::new();
    for name in names() {
        let to =
            std::env::temp_dir().join(format!("hmm-spirv-{}-{name}-opt.spv", std::process::id()));
        let status = Command::new("spirv-opt")
            .args(["-O", "--target-env=vulkan1.3", "--scalar-block-layout"])
            .arg(folder().join(&name).with_extension("spv"))
            .arg("-o")
            .arg(&to)
            .status()
            .expect("an optimiser that is there");
        assert!(status.success(), "{name} is not optimised");
        let bytes = std::fs::read(&to).expect("what was optimised");
        let _ = std::fs::remove_file(&to);
        let words: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|it| u32::from_le_bytes([it[0], it[1], it[2], it[3]]))
            .collect();
        let args = ["--target-env", "vulkan1.3", "--scalar-block-layout"];
        for variant in Variant::ALL {
            match instrument(&words, options(variant)) {
                Ok(made) => {
                    let label = format!("{name}-{variant:?}-optimised");
                    assert_eq!(
                        complaint("spirv-val", &args, &made.words, &label),
                        None,
                        "{label}"
                    );
                }
                Err(SpirvError::Together { .. }) if name == "barrier" => {}
                Err(SpirvError::TooManyStalls { .. }) if name == "wide" => {}
                Err(error) => refused.push(format!("{name} {variant:?}: {error}")),
            }
        }
    }
    assert!(refused.is_empty(), "{refused:#?}");
}

#[test]
fn are_known() {
    let info = analyse(&kernel("saxpy")).expect("a kernel");
    assert_eq!(info.entry_points.len(), 1);
    assert_eq!(info.entry_points[0].name, "main");
    assert_eq!(info.entry_points[0].local_size, [64, 1, 1]);
    assert_eq!(info.push_constant_bytes, 32);
    assert_eq!(info.accesses, 3);
    assert!(!info.control_barriers && !info.subgroup_operations);
    assert!(
        info.capabilities
            .contains(&Capability::PhysicalStorageBufferAddresses)
    );
    assert!(info.extensions.is_empty());
    assert!(info.spec_ids.is_empty());
    assert!(
        analyse(&kernel("barrier"))
            .expect("a kernel")
            .control_barriers
    );
    assert_eq!(analyse(&kernel("runaway")).expect("a kernel").spec_ids, [3]);
}

#[test]
fn tell_what_may_be_repeated() {
    // An access after a write in some order of control flow.
    let repeats = ["contiguous", "saxpy", "walk_write"];
    for name in names() {
        let info = analyse(&kernel(&name)).expect("a kernel");
        assert_eq!(
            info.may_fault_after_write,
            repeats.contains(&name.as_str()),
            "{name}"
        );
    }
}

#[test]
fn need_what_their_variant_needs() {
    let words = kernel("sum");
    for variant in Variant::ALL {
        let made = instrument(&words, options(variant)).expect("a kernel");
        let stalls = variant == Variant::Stall;
        assert_eq!(
            made.capabilities.contains(&Capability::GroupNonUniformVote),
            stalls,
            "{variant:?}"
        );
        assert!(made.capabilities.contains(&Capability::Int64));
        let again = analyse(&made.words).expect("a module as any other");
        assert_eq!(again.spec_ids, [SPEC_ID]);
        assert!(again.accesses >= made.info.accesses);
    }
}

#[test]
fn are_refused_with_a_reason() {
    let barrier = instrument(&kernel("barrier"), options(Variant::Checked));
    assert!(
        matches!(
            barrier,
            Err(SpirvError::Together {
                op: Op::ControlBarrier,
                ..
            })
        ),
        "{barrier:?}"
    );
    let taken = Options {
        variant: Variant::Table,
        control_spec_id: 3,
    };
    assert_eq!(
        instrument(&kernel("runaway"), taken),
        Err(SpirvError::SpecIdTaken(3))
    );
    let mut other = kernel("sum");
    other[1] = 0x0001_0700;
    assert_eq!(
        analyse(&other),
        Err(SpirvError::Version { major: 1, minor: 7 })
    );
    let words = kernel("sum");
    assert!(matches!(
        analyse(&words[..words.len() - 1]),
        Err(SpirvError::Malformed { .. } | SpirvError::Invalid { .. })
    ));
    assert!(matches!(
        analyse(&[]),
        Err(SpirvError::Malformed { word: 0, .. })
    ));
}
