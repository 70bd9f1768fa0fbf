//! Instrumented kernels run on a CPU's Vulkan driver (lavapipe of Mesa 25 or
//! newer; `VK_DRIVER_FILES` chooses it). Each test runs in a process of its own:
//! a pointer that was not translated ends it.

mod host;

use std::process::{Command, Stdio};
use std::time::Duration;

use hmm_spirv::Variant;
use host::{Grain, Host, kernel};

/// Where the program's memory begins: across the border of two leaves of the
/// table, and where nothing is mapped.
const BASE: u64 = 0x0070_4000_0000 - (4 << 20);
/// The same for a window that is as large as its alignment.
const WINDOW: u64 = 0x0070_4000_0000;
const MIB: u64 = 1 << 20;

/// Runs `body` in a process of its own: this test again, told by its
/// environment.
fn isolated(test: &str, body: fn()) {
    if std::env::var("HMM_SPIRV_ROLE").as_deref() == Ok(test) {
        return body();
    }
    if let Err(why) = Host::new(BASE, MIB) {
        skip!("{test}: {why}");
    }
    let this = std::env::current_exe().expect("this test");
    let output = Command::new(this)
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("HMM_SPIRV_ROLE", test)
        .stdin(Stdio::null())
        .output()
        .expect("a process");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{test} ended with {}:\n{}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
}

fn open(base: u64, bytes: u64) -> Host {
    Host::new(base, bytes).expect("a device, as the parent found")
}

/// Every variant, small and large pages.
fn each(mut run: impl FnMut(Variant, Grain)) {
    for variant in Variant::ALL {
        for grain in [Grain::Large, Grain::Small] {
            eprintln!("{variant:?} {grain:?}");
            run(variant, grain);
        }
    }
}

fn push(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn word(value: u64) -> u32 {
    u32::try_from(value).expect("a small number")
}

fn base_for(variant: Variant) -> u64 {
    if variant == Variant::Masked {
        WINDOW
    } else {
        BASE
    }
}

#[test]
fn stream() {
    isolated("stream", || {
        each(|variant, grain| {
            let mut host = open(base_for(variant), 8 * MIB);
            host.grain = grain;
            let count = 1u32 << 20;
            let data = host.allocate(u64::from(count) * 4, 4);
            host.write_words(data, &(0..count).collect::<Vec<_>>());
            let pipeline = host.compile(&kernel("increment"), variant);
            let args = push(&[&data.to_le_bytes(), &(count - 5).to_le_bytes()]);
            let report = host.launch(&pipeline, variant, &args, count.div_ceil(64));
            eprintln!("  {report:?}");
            let after = host.words(data, u64::from(count));
            for (at, value) in (0..).zip(after) {
                assert_eq!(value, at + u32::from(at < count - 5), "element {at}");
            }
            assert_eq!((report.torn, report.unfinished), (0, 0));
        });
    });
}

/// Addresses that differ from one that is mapped in bits that no address of a program has.
#[test]
fn addresses_of_nobody_are_missed() {
    isolated("addresses_of_nobody_are_missed", || {
        for bit in [33, 46, 47, 48, 62, 63] {
            for (name, writes) in [("chase", false), ("scatter", true)] {
                let mut host = open(BASE, MIB);
                let node = host.allocate(16, 16);
                let nodes = host.allocate(16, 8);
                let sums = host.allocate(16, 8);
                // The first one's page is there before the second one's is missed.
                let astray = node ^ 1 << bit;
                host.write_longs(nodes, &[node, astray]);
                let pipeline = host.compile(&kernel(name), Variant::Checked);
                let nodes = nodes.to_le_bytes();
                let args = if writes {
                    push(&[&nodes, &2u32.to_le_bytes()])
                } else {
                    push(&[&nodes, &sums.to_le_bytes(), &2u32.to_le_bytes()])
                };
                let launch = || host.launch(&pipeline, Variant::Checked, &args, 1);
                let missed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(launch));
                let missed = missed.expect_err("it was taken for another address");
                let said = missed.downcast_ref::<String>().expect("a text");
                let asked = if writes { astray | 1 } else { astray + 8 };
                let address = format!("asked for {asked:#x}");
                assert!(said.contains(&address), "{said}, not {address}");
            }
        }
    });
}

/// While pages are made writable one by one, a kernel may see a group that may be read,
/// and a page of it that may be written: its neighbours may not.
#[test]
fn a_page_does_not_speak_for_its_group() {
    isolated("a_page_does_not_speak_for_its_group", || {
        for variant in [Variant::Checked, Variant::Stall] {
            let mut host = open(BASE, 8 * MIB);
            host.grain = Grain::Torn;
            // Four pages for each of 64 invocations.
            let data = host.allocate(MIB, 4096);
            let pipeline = host.compile(&kernel("contiguous"), variant);
            let args = push(&[&data.to_le_bytes(), &4096u32.to_le_bytes()]);
            let report = host.launch(&pipeline, variant, &args, 1);
            eprintln!("{variant:?} {report:?}");
            assert_eq!(host.asked.len(), 256, "pages were written that nobody gave");
        }
    });
}

#[test]
fn small_log() {
    isolated("small_log", || {
        for variant in [Variant::Checked, Variant::Stall] {
            let mut host = open(BASE, 8 * MIB);
            host.log_capacity = 4;
            host.grain = Grain::Small;
            let count = 1u32 << 20;
            let data = host.allocate(u64::from(count) * 4, 4);
            let pipeline = host.compile(&kernel("increment"), variant);
            let args = push(&[&data.to_le_bytes(), &count.to_le_bytes()]);
            let report = host.launch(&pipeline, variant, &args, count / 64);
            eprintln!("{variant:?} {report:?}");
            assert!(host.words(data, u64::from(count)).iter().all(|&it| it == 1));
        }
    });
}

#[test]
fn saxpy() {
    isolated("saxpy", || {
        each(|variant, grain| {
            let mut host = open(base_for(variant), 8 * MIB);
            host.grain = grain;
            let count = 300_000u32;
            let [x, y, z] = [(); 3].map(|()| host.allocate(u64::from(count) * 4, 4));
            let floats = |scale: f32| {
                (0..count)
                    .map(|it| (it as f32 * scale).to_bits())
                    .collect::<Vec<_>>()
            };
            host.write_words(x, &floats(0.5));
            host.write_words(y, &floats(2.0));
            let pipeline = host.compile(&kernel("saxpy"), variant);
            let args = push(&[
                &x.to_le_bytes(),
                &y.to_le_bytes(),
                &z.to_le_bytes(),
                &3.0f32.to_le_bytes(),
                &count.to_le_bytes(),
            ]);
            // Far fewer groups than elements: the stride is the launch's size.
            let report = host.launch(&pipeline, variant, &args, 96);
            eprintln!("  {report:?}");
            for (at, value) in (0..).zip(host.words(z, u64::from(count))) {
                assert_eq!(
                    f32::from_bits(value),
                    3.0 * (at as f32 * 0.5) + at as f32 * 2.0,
                    "element {at}"
                );
            }
        });
    });
}

/// Chains of nodes (next, value) in no order: where they begin, and the nodes in
/// their order.
fn chains(host: &mut Host, count: u64, length: u64) -> (u64, Vec<Vec<u64>>) {
    let nodes = count * length;
    let at = host.allocate(nodes * 16, 16);
    let mut order: Vec<u64> = (0..nodes).collect();
    let mut seed = 12345u64;
    for last in (1..order.len()).rev() {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        order.swap(
            last,
            usize::try_from((seed >> 33) % (last as u64 + 1)).expect("an index"),
        );
    }
    let chains: Vec<Vec<u64>> = order
        .chunks(usize::try_from(length).expect("a length"))
        .map(|chain| chain.iter().map(|it| at + it * 16).collect())
        .collect();
    for chain in &chains {
        for (step, &node) in chain.iter().enumerate() {
            let next = chain.get(step + 1).copied().unwrap_or(0);
            host.write_longs(node, &[next, (node - at) / 16 % 1000]);
        }
    }
    let heads = host.allocate(count * 8, 8);
    let firsts: Vec<u64> = chains.iter().map(|it| it[0]).collect();
    host.write_longs(heads, &firsts);
    (heads, chains)
}

fn chase(name: &str, count: u64, length: u64, value: fn(u64) -> u64) {
    each(|variant, grain| {
        let mut host = open(base_for(variant), 4 * MIB);
        host.grain = grain;
        let (heads, chains) = chains(&mut host, count, length);
        let sums = host.allocate(count * 8, 8);
        let wanted: Vec<u64> = chains
            .iter()
            .map(|chain| {
                chain
                    .iter()
                    .map(|&node| value(host.longs(node + 8, 1)[0]))
                    .sum()
            })
            .collect();
        let pipeline = host.compile(&kernel(name), variant);
        let args = push(&[
            &heads.to_le_bytes(),
            &sums.to_le_bytes(),
            &word(count).to_le_bytes(),
        ]);
        let report = host.launch(&pipeline, variant, &args, word(count).div_ceil(64));
        eprintln!("  {report:?}");
        assert_eq!(host.longs(sums, count), wanted);
    });
}

#[test]
fn one_chain() {
    isolated("one_chain", || chase("chase", 1, 1000, |value| value));
}

#[test]
fn many_chains() {
    isolated("many_chains", || chase("chase", 64, 500, |value| value));
}

#[test]
fn continue_construct() {
    isolated("continue_construct", || {
        chase("chase_continue", 200, 60, |value| match value {
            6 => 1,
            odd if odd % 2 == 1 => 0,
            even => even,
        });
    });
}

/// Not idempotent: right where nothing is run again.
#[test]
fn chain_that_is_written() {
    isolated("chain_that_is_written", || {
        each(|variant, grain| {
            if variant == Variant::Checked {
                return;
            }
            let mut host = open(base_for(variant), 4 * MIB);
            host.grain = grain;
            let (heads, chains) = chains(&mut host, 64, 500);
            let pipeline = host.compile(&kernel("walk_write"), variant);
            let args = push(&[&heads.to_le_bytes(), &64u32.to_le_bytes()]);
            let report = host.launch(&pipeline, variant, &args, 1);
            eprintln!("  {report:?}");
            for node in chains.iter().flatten() {
                let value = host.longs(node + 8, 1)[0];
                assert_eq!(value, (node - host.base) / 16 % 1000 + 1, "node {node:#x}");
            }
        });
    });
}

/// Everything is taken away from stalled kernels again and again.
#[test]
fn stall_under_eviction() {
    isolated("stall_under_eviction", || {
        for grain in [Grain::Large, Grain::Small] {
            let mut host = open(BASE, 4 * MIB);
            host.grain = grain;
            host.evict = true;
            let (heads, chains) = chains(&mut host, 1024, 40);
            let pipeline = host.compile(&kernel("walk_write"), Variant::Stall);
            let args = push(&[&heads.to_le_bytes(), &1024u32.to_le_bytes()]);
            let report = host.launch(&pipeline, Variant::Stall, &args, 16);
            eprintln!("{grain:?} {report:?}");
            assert!(report.evictions > 20, "{report:?}");
            for node in chains.iter().flatten() {
                let value = host.longs(node + 8, 1)[0];
                assert_eq!(value, (node - host.base) / 16 % 1000 + 1, "node {node:#x}");
            }
        }
    });
}

#[test]
fn histogram() {
    isolated("histogram", || {
        each(|variant, grain| {
            let mut host = open(base_for(variant), 4 * MIB);
            host.grain = grain;
            let count = 400_000u32;
            let data = host.allocate(u64::from(count) * 4, 4);
            let bins = host.allocate(5000 * 4, 4);
            let words: Vec<u32> = (0..count)
                .map(|it| it.wrapping_mul(2_654_435_761) >> 7)
                .collect();
            host.write_words(data, &words);
            let mut wanted = vec![0; 5000];
            for word in words {
                wanted[word as usize % 5000] += 1;
            }
            let pipeline = host.compile(&kernel("histogram"), variant);
            let args = push(&[
                &data.to_le_bytes(),
                &bins.to_le_bytes(),
                &count.to_le_bytes(),
            ]);
            let report = host.launch(&pipeline, variant, &args, count.div_ceil(64));
            eprintln!("  {report:?}");
            assert_eq!(host.words(bins, 5000), wanted);
        });
    });
}

#[test]
fn functions() {
    isolated("functions", || {
        each(|variant, grain| {
            let mut host = open(base_for(variant), 2 * MIB);
            host.grain = grain;
            let count = 20_000u32;
            let data = host.allocate(u64::from(count) * 4, 4);
            let results = host.allocate(u64::from(count) * 4, 4);
            let words: Vec<u32> = (0..count)
                .map(|it| it.wrapping_mul(2_654_435_761) >> 12)
                .collect();
            host.write_words(data, &words);
            let pipeline = host.compile(&kernel("functions"), variant);
            let args = push(&[
                &data.to_le_bytes(),
                &results.to_le_bytes(),
                &count.to_le_bytes(),
            ]);
            let report = host.launch(&pipeline, variant, &args, count.div_ceil(64));
            eprintln!("  {report:?}");
            let wanted: Vec<u32> = (0..count).map(|it| function_result(&words, it)).collect();
            assert_eq!(host.words(results, u64::from(count)), wanted);
        });
    });
}

/// What `functions.comp` computes.
fn function_result(words: &[u32], i: u32) -> u32 {
    let count = u32::try_from(words.len()).expect("a count");
    let get = |i: u32| words.get(i as usize).copied().unwrap_or(7);
    let row = |i: u32| {
        let mut sum = 0u32;
        for j in 0..4 {
            for k in 0..3 {
                let value = get((i + j * 1021 + k * 4099) % (count + 3));
                if value == 13 {
                    return sum;
                }
                if value.is_multiple_of(11) {
                    break;
                }
                if !value.is_multiple_of(7) {
                    sum = sum.wrapping_add(value);
                }
            }
        }
        sum
    };
    match get(i) % 5 {
        0 => row(i),
        1 => (1 + get(i * 3 % count)).wrapping_add(get(i * 5 % count)),
        2 => get(i * 5 % count),
        3 => 99,
        _ => row(i + 1).wrapping_add(get(0)),
    }
}

/// Scalar layout: an Inner takes 32 bytes, but the last of an array 28.
#[test]
fn structures() {
    isolated("structures", || {
        const INNER: usize = 32;
        const TURN: usize = 8 + INNER + 28;
        const RECORD: usize = 96;
        each(|variant, grain| {
            let mut host = open(base_for(variant), MIB);
            host.grain = grain;
            let count = 2000u32;
            // The record's place in the pages varies, and it straddles some.
            let bytes = u64::from(count) * RECORD as u64;
            let from = host.allocate(bytes, 8);
            let to = host.allocate(bytes, 8);
            let out = host.allocate(16, 8);
            let old: Vec<u8> = (0..bytes)
                .map(|it| u8::try_from(it * 7 % 251).expect("a byte") & 0x3f)
                .collect();
            host.write(from, &old);
            host.write_longs(out, &[to, 5]);
            let pipeline = host.compile(&kernel("structs"), variant);
            let args = push(&[
                &from.to_le_bytes(),
                &out.to_le_bytes(),
                &count.to_le_bytes(),
            ]);
            let report = host.launch(&pipeline, variant, &args, count.div_ceil(32));
            eprintln!("  {report:?}");
            let new = host.read(to, bytes).to_vec();
            for (at, (old, new)) in old
                .chunks_exact(RECORD)
                .zip(new.chunks_exact(RECORD))
                .enumerate()
            {
                let word = |bytes: &[u8], at: usize| {
                    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4"))
                };
                let float = |bytes: &[u8], at: usize| f32::from_bits(word(bytes, at));
                assert_eq!(word(new, 0), word(old, 0).wrapping_add(1), "record {at}");
                assert_eq!(new[8], old[8].wrapping_add(1));
                let second = 8 + INNER;
                let medium = |bytes: &[u8]| {
                    u16::from_le_bytes(bytes[second + 2..second + 4].try_into().expect("2"))
                };
                assert_eq!(medium(new), medium(old).wrapping_add(2));
                let large = |bytes: &[u8]| {
                    u64::from_le_bytes(bytes[second + 8..second + 16].try_into().expect("8"))
                };
                assert_eq!(large(new), large(old).wrapping_add(3));
                for axis in 0..3 {
                    let place = float(old, 8 + 16 + axis * 4) + [1.0, 2.0, 3.0][axis];
                    assert_eq!(float(new, 8 + 16 + axis * 4), place);
                    let column = TURN + 12 + axis * 4;
                    assert_eq!(float(new, column), float(old, column) + place);
                    assert_eq!(word(new, column - 12), word(old, column - 12));
                }
            }
        });
    });
}

/// So many accesses that a driver which nests a condition for each has trouble.
#[test]
fn many_accesses() {
    isolated("many_accesses", || {
        each(|variant, grain| {
            let mut host = open(base_for(variant), 2 * MIB);
            host.grain = grain;
            let count = 10_000u32;
            let data = host.allocate(u64::from(count) * 4, 4);
            let results = host.allocate(u64::from(count) * 4, 4);
            let words: Vec<u32> = (0..count)
                .map(|it| it.wrapping_mul(2_654_435_761))
                .collect();
            host.write_words(data, &words);
            // No more are allowed to stall.
            let (name, accesses) = match variant {
                Variant::Stall => ("wide40", 40),
                _ => ("wide", 100),
            };
            let pipeline = host.compile(&kernel(name), variant);
            let args = push(&[
                &data.to_le_bytes(),
                &results.to_le_bytes(),
                &count.to_le_bytes(),
            ]);
            let report = host.launch(&pipeline, variant, &args, count.div_ceil(64));
            eprintln!("  {report:?}");
            let result = |i: u32| {
                (0..accesses).fold(0u32, |sum, k| {
                    sum.wrapping_add(words[((i * (k * 2 + 1) + k * 977) % count) as usize])
                })
            };
            let wanted: Vec<u32> = (0..count).map(result).collect();
            assert_eq!(host.words(results, u64::from(count)), wanted);
        });
    });
}

#[test]
fn barriers() {
    isolated("barriers", || {
        each(|variant, grain| {
            if variant == Variant::Checked {
                return;
            }
            let mut host = open(base_for(variant), 2 * MIB);
            host.grain = grain;
            let groups = 1000u32;
            let data = host.allocate(u64::from(groups) * 256, 4);
            let sums = host.allocate(u64::from(groups) * 4, 4);
            let words: Vec<u32> = (0..groups * 64)
                .map(|it| it.wrapping_mul(2_654_435_761))
                .collect();
            host.write_words(data, &words);
            let pipeline = host.compile(&kernel("barrier"), variant);
            let args = push(&[&data.to_le_bytes(), &sums.to_le_bytes()]);
            let report = host.launch(&pipeline, variant, &args, groups);
            eprintln!("  {report:?}");
            let wanted: Vec<u32> = words
                .chunks(64)
                .map(|it| it.iter().fold(0, |sum: u32, &it| sum.wrapping_add(it)))
                .collect();
            assert_eq!(host.words(sums, u64::from(groups)), wanted);
        });
    });
}

/// A loop without an end is left when the host says so.
#[test]
fn runaway() {
    isolated("runaway", || {
        for name in ["runaway", "circle", "detour"] {
            for variant in [Variant::Checked, Variant::Stall] {
                let mut host = open(BASE, MIB);
                host.stop_after = Some(Duration::from_millis(50));
                let data = host.allocate(4096, 8);
                // A circle of one.
                host.write_longs(data, &[data]);
                let pipeline = host.compile(&kernel(name), variant);
                let report = host.launch(&pipeline, variant, &data.to_le_bytes(), 2);
                eprintln!("{name} {variant:?} {report:?}");
                // It is the host that ended it, not a miss.
                assert_eq!(report.unfinished, 128, "{name}: {report:?}");
                let torn = if variant == Variant::Checked { 128 } else { 0 };
                assert_eq!(report.torn, torn, "{name}: {report:?}");
            }
        }
    });
}

/// Nor does a loop hold up who wants to unmap, although nothing in it misses.
#[test]
fn makes_way() {
    isolated("makes_way", || {
        for name in ["runaway", "circle", "detour"] {
            let mut host = open(BASE, MIB);
            host.evict_after = Some(Duration::from_millis(100));
            host.stop_after = Some(Duration::from_millis(200));
            let data = host.allocate(4096, 8);
            host.write_longs(data, &[data]);
            let pipeline = host.compile(&kernel(name), Variant::Stall);
            let report = host.launch(&pipeline, Variant::Stall, &data.to_le_bytes(), 2);
            eprintln!("{name} {report:?}");
            assert!(
                report.evictions == 1 && report.unfinished == 128,
                "{name}: {report:?}"
            );
        }
    });
}

/// A host that never answers lets a stalled kernel reach its bound.
#[test]
fn bound() {
    isolated("bound", || {
        let mut host = open(BASE, MIB);
        host.stall_polls = 0;
        let data = host.allocate(65536, 4);
        let pipeline = host.compile(&kernel("increment"), Variant::Stall);
        let args = push(&[&data.to_le_bytes(), &640u32.to_le_bytes()]);
        let report = host.launch(&pipeline, Variant::Stall, &args, 10);
        eprintln!("{report:?}");
        assert!(report.unfinished > 0 && report.torn == 0, "{report:?}");
    });
}
