//! What the calls cost, for `docs/`: `cargo test -p hmm-os --release --test
//! costs -- --ignored --nocapture`.

mod common;

use std::time::Instant;

use common::{Area, done, open};
use hmm_hal::AddressSpace;

const ROUNDS: u32 = 200;

fn report(what: &str, mut call: impl FnMut()) {
    let mut times: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed().as_nanos()
        })
        .collect();
    times.sort_unstable();
    println!("{what:48} median {:8} ns", times[times.len() / 2]);
}

#[test]
#[ignore = "a measurement, not a check"]
fn costs() {
    let Some(os) = open() else { return };
    let area = Area::new(512, false);
    area.fill();
    os.space.register(area.range).unwrap();
    let slot = os.small_slot(0);
    report("mappings of one page", || {
        os.space.mappings(area.page(7), &mut |_| {}).unwrap();
    });
    report("presence of 2 MiB", || {
        os.space.presence(area.range, &mut |_, _| {}).unwrap();
    });
    report("explain_refusal", || {
        os.space.explain_refusal(area.page(7));
    });
    report("move 2 MiB of small pages out and back", || {
        assert_eq!(os.space.move_pages(area.range, slot.start()), done(512));
        assert_eq!(os.space.move_pages(slot, area.range.start()), done(512));
    });
    report("move 64 KiB out and back", || {
        let part = area.range.slice(16, 16);
        assert_eq!(os.space.move_pages(part, slot.start()), done(16));
        assert_eq!(
            os.space.move_pages(slot.slice(0, 16), part.start()),
            done(16)
        );
    });
    let to = hmm_mem::boxed([0u64; 512 * 64]);
    report("read_pages, 256 KiB", || {
        let to = hmm_types::VirtAddr::of(&*to);
        assert_eq!(os.space.read_pages(area.range.slice(0, 64), to), done(64));
    });
    report("wait(0) with nothing there", || {
        os.space.wait(Some(0));
    });
    let slots = os.space.staging().small.pages().get() / 512;
    let mut next = 1;
    report("provision a small slot (8 slots at most)", || {
        if next < slots {
            os.space.provision(os.small_slot(next));
            next += 1;
        }
    });
}
