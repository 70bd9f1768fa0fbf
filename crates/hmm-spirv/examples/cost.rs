//! What translation costs when everything is mapped: each kernel, in each
//! variant, against the same kernel without instrumentation on plain buffers.
//! Ratios above 1 are slower. `cargo run --release --example cost`.

#[path = "../tests/host/mod.rs"]
mod host;

use std::time::Duration;

use hmm_spirv::Variant;
use host::{Grain, Host, kernel};

const BASE: u64 = 0x0070_4000_0000;
const MIB: u64 = 1 << 20;
const ROUNDS: usize = 11;

type Setup = fn(&mut Host) -> Case;
type Relocate = Box<dyn Fn(&mut Host, u64)>;

/// A kernel with its arguments for memory that is moved by some bytes.
struct Case {
    groups: u32,
    args: Box<dyn Fn(u64) -> Vec<u8>>,
    /// Moves the pointers in memory.
    relocate: Relocate,
}

fn plain(groups: u32, args: impl Fn(u64) -> Vec<u8> + 'static) -> Case {
    let (args, relocate) = (Box::new(args), Box::new(|_: &mut Host, _| {}));
    Case {
        groups,
        args,
        relocate,
    }
}

fn increment(host: &mut Host) -> Case {
    let count = 4u32 << 20;
    let data = host.allocate(u64::from(count) * 4, 4096);
    plain(count / 64, move |by| {
        [
            &(data.wrapping_add(by)).to_le_bytes()[..],
            &count.to_le_bytes(),
        ]
        .concat()
    })
}

fn contiguous(host: &mut Host) -> Case {
    let data = host.allocate(1024 * 4096 * 4, 4096);
    plain(16, move |by| {
        [
            &(data.wrapping_add(by)).to_le_bytes()[..],
            &4096u32.to_le_bytes(),
        ]
        .concat()
    })
}

fn sum(host: &mut Host) -> Case {
    let data = host.allocate(1024 * 4096 * 4, 4096);
    let sums = host.allocate(1024 * 4, 4096);
    plain(16, move |by| {
        let [data, sums] = [data, sums].map(|it| it.wrapping_add(by).to_le_bytes());
        [&data[..], &sums, &4096u32.to_le_bytes()].concat()
    })
}

fn saxpy(host: &mut Host) -> Case {
    let count = 1u32 << 20;
    let arrays = [(); 3].map(|()| host.allocate(u64::from(count) * 4, 4096));
    plain(16, move |by| {
        let mut args: Vec<u8> = arrays
            .iter()
            .flat_map(|it| it.wrapping_add(by).to_le_bytes())
            .collect();
        args.extend(3.0f32.to_le_bytes());
        args.extend(count.to_le_bytes());
        args
    })
}

fn chase(host: &mut Host) -> Case {
    let (chains, length) = (512u64, 1000u64);
    let nodes = chains * length;
    let at = host.allocate(nodes * 16, 4096);
    let heads = host.allocate(chains * 8, 8);
    let sums = host.allocate(chains * 8, 8);
    let mut order: Vec<u64> = (0..nodes).collect();
    let mut seed = 1u64;
    for last in (1..order.len()).rev() {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        order.swap(
            last,
            usize::try_from((seed >> 33) % (last as u64 + 1)).expect("an index"),
        );
    }
    let relocate = move |host: &mut Host, by: u64| {
        for (chain, nodes) in (0..).zip(order.chunks(1000)) {
            host.write_longs(
                heads + chain * 8,
                &[at.wrapping_add(nodes[0] * 16).wrapping_add(by)],
            );
            for (step, node) in nodes.iter().enumerate() {
                let next = nodes
                    .get(step + 1)
                    .map_or(0, |next| at.wrapping_add(next * 16).wrapping_add(by));
                host.write_longs(at + node * 16, &[next, 1]);
            }
        }
    };
    let args = move |by: u64| {
        let [heads, sums] = [heads, sums].map(|it| it.wrapping_add(by).to_le_bytes());
        [&heads[..], &sums, &512u32.to_le_bytes()].concat()
    };
    Case {
        groups: 8,
        args: Box::new(args),
        relocate: Box::new(relocate),
    }
}

fn histogram(host: &mut Host) -> Case {
    let count = 1u32 << 20;
    let data = host.allocate(u64::from(count) * 4, 4096);
    let bins = host.allocate(5000 * 4, 4096);
    let words: Vec<u32> = (0..count)
        .map(|it| it.wrapping_mul(2_654_435_761) >> 7)
        .collect();
    host.write_words(data, &words);
    plain(count / 64, move |by| {
        let [data, bins] = [data, bins].map(|it| it.wrapping_add(by).to_le_bytes());
        [&data[..], &bins, &count.to_le_bytes()].concat()
    })
}

fn main() {
    let cases: [(&str, Setup); 6] = [
        ("increment", increment),
        ("contiguous", contiguous),
        ("sum", sum),
        ("saxpy", saxpy),
        ("chase", chase),
        ("histogram", histogram),
    ];
    let only: Vec<String> = std::env::args().skip(1).collect();
    let mut named = false;
    for (name, setup) in cases {
        if !only.is_empty() && !only.iter().any(|it| it == name) {
            continue;
        }
        let mut host = match Host::new(BASE, 32 * MIB) {
            Ok(host) => host,
            Err(why) => return eprintln!("SKIPPED cost: {why}"),
        };
        if !named {
            println!(
                "{}; processor time, best of many, all resident",
                host.gpu.name
            );
            println!(
                "{:12} {:>10} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}",
                "kernel",
                "native",
                "again",
                "delta",
                "masked",
                "table",
                "checked",
                "4 KiB",
                "stall"
            );
            named = true;
        }
        let case = setup(&mut host);
        let words = kernel(name);
        let push = hmm_spirv::analyse(&words)
            .expect("a kernel")
            .push_constant_bytes;
        let native = host.gpu.pipeline(&words, 0, push);
        let mut row = vec![Measure {
            pipeline: native,
            variant: None,
            grain: Grain::Large,
            took: Vec::new(),
        }];
        row.push(Measure {
            pipeline: host.gpu.pipeline(&words, 0, push),
            variant: None,
            grain: Grain::Large,
            took: Vec::new(),
        });
        for (variant, grain) in [
            (Variant::Delta, Grain::Large),
            (Variant::Masked, Grain::Large),
            (Variant::Table, Grain::Large),
            (Variant::Checked, Grain::Large),
            (Variant::Checked, Grain::Small),
            (Variant::Stall, Grain::Large),
        ] {
            let pipeline = host.compile(&words, variant);
            row.push(Measure {
                pipeline,
                variant: Some(variant),
                grain,
                took: Vec::new(),
            });
        }
        // Turn by turn: what disturbs the machine disturbs all.
        for _ in 0..ROUNDS {
            for measure in &mut row {
                host.grain = measure.grain;
                host.bring_home();
                // Without translation, pointers are the device's.
                let by = match measure.variant {
                    None => host.first_frame().wrapping_sub(BASE),
                    Some(_) => 0,
                };
                (case.relocate)(&mut host, by);
                host.prepare(measure.variant, case.groups);
                let args = (case.args)(by);
                // The first is for the caches.
                for round in 0..3 {
                    let took = host.time(&measure.pipeline, measure.variant, &args, case.groups);
                    if round > 0 {
                        measure.took.push(took);
                    }
                }
            }
        }
        let base = best(&row[0].took);
        let ratios: Vec<String> = row[1..]
            .iter()
            .map(|it| format!("{:8.2}", best(&it.took).as_secs_f64() / base.as_secs_f64()))
            .collect();
        println!("{name:12} {:>7} us {}", base.as_micros(), ratios.join(" "));
    }
}

struct Measure {
    pipeline: host::vulkan::Pipeline,
    variant: Option<Variant>,
    grain: Grain,
    took: Vec<Duration>,
}

/// The best of all: what else runs on the machine makes the others slower.
fn best(all: &[Duration]) -> Duration {
    all.iter().copied().min().unwrap_or_default()
}
