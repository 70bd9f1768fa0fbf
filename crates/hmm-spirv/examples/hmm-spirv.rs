//! Instruments a module on the command line:
//! `cargo run --example hmm-spirv -- checked kernel.spv instrumented.spv`.

use hmm_spirv::{Options, Variant, analyse, instrument};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [variant, from, to] = args.as_slice() else {
        return Err("usage: hmm-spirv delta|masked|table|checked|stall FROM TO".into());
    };
    let named = |it: &Variant| format!("{it:?}").eq_ignore_ascii_case(variant);
    let variant = Variant::ALL.into_iter().find(named);
    let variant = variant.ok_or("no such variant")?;
    let bytes = std::fs::read(from)?;
    let words: Vec<u32> = bytes
        .chunks_exact(4)
        .map(|it| u32::from_le_bytes([it[0], it[1], it[2], it[3]]))
        .collect();
    println!("{:#?}", analyse(&words)?);
    let options = Options {
        variant,
        control_spec_id: 1000,
    };
    let words = instrument(&words, options)?.words;
    let bytes: Vec<u8> = words.iter().flat_map(|it| it.to_le_bytes()).collect();
    std::fs::write(to, bytes)?;
    Ok(())
}
