//! `hmm info --memory`: a process's memory as the engine sees it.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Context;
use hmm::{ByteCount, MappedMemory, MemoryKind, StayReason};
use serde::Serialize;

use crate::table::Table;

/// One mapping, as JSON has it.
#[derive(Debug, Serialize)]
struct Entry<'a> {
    start: u64,
    end: u64,
    permissions: String,
    kind: &'static str,
    page_bytes: u64,
    dax: bool,
    resident_bytes: u64,
    huge_bytes: u64,
    swapped_bytes: u64,
    copied_bytes: u64,
    watched: bool,
    used_in_place: bool,
    stays: Option<String>,
    name: &'a str,
}

/// Runs the command.
pub fn run(pid: Option<u32>, json: bool) -> anyhow::Result<ExitCode> {
    let memory = hmm::memory_of(pid).with_context(|| match pid {
        Some(pid) => format!(
            "cannot look at the memory of process {pid}: is it there, and is it yours to trace?"
        ),
        None => "cannot look at this process's own memory".to_owned(),
    })?;
    let mut out = io::stdout().lock();
    if json {
        let entries: Vec<Entry<'_>> = memory.iter().map(entry).collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&entries)?)?;
    } else {
        print(&memory, &mut out)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn entry(mapped: &MappedMemory) -> Entry<'_> {
    Entry {
        start: mapped.range.start().get(),
        end: mapped.range.end().get(),
        permissions: permissions(mapped),
        kind: kind(mapped),
        page_bytes: mapped.page_size.get(),
        dax: mapped.dax,
        resident_bytes: mapped.resident.get(),
        huge_bytes: mapped.huge.get(),
        swapped_bytes: mapped.swapped.get(),
        copied_bytes: mapped.copied.get(),
        watched: mapped.watched,
        used_in_place: mapped.can_be_mirrored(),
        stays: mapped.stays().map(|reason| reason.to_string()),
        name: &mapped.name,
    }
}

fn kind(mapped: &MappedMemory) -> &'static str {
    match mapped.kind {
        MemoryKind::PrivateAnonymous => "anonymous",
        MemoryKind::File if mapped.dax => "DAX file",
        MemoryKind::File => "file",
        MemoryKind::Shared if mapped.shared_region => "shared region",
        MemoryKind::Shared => "shared",
        MemoryKind::HugeTlb => "hugetlbfs",
        _ => "special",
    }
}

fn permissions(mapped: &MappedMemory) -> String {
    let sharing = if mapped.shared { 's' } else { 'p' };
    format!("{:?}{sharing}", mapped.permissions)
}

/// What a device can do with it.
fn possible(mapped: &MappedMemory) -> &'static str {
    match (mapped.stays(), mapped.can_be_mirrored()) {
        (None, _) => "migrates",
        (Some(_), true) => "in place",
        (Some(_), false) => "no",
    }
}

/// Its name, and what its kind does not say already.
fn notes(mapped: &MappedMemory) -> String {
    let mut notes = vec![mapped.name.clone()];
    if let Some(reason @ (StayReason::Locked | StayReason::NoAccess)) = mapped.stays() {
        notes.push(reason.to_string());
    }
    if mapped.copied.get() > 0 {
        notes.push(format!("{} copied on write", mapped.copied));
    }
    if mapped.watched {
        notes.push("registered with a userfaultfd".to_owned());
    }
    notes.retain(|note| !note.is_empty());
    notes.join("; ")
}

fn print(memory: &[MappedMemory], out: &mut impl Write) -> io::Result<()> {
    let heads = [
        "START", "SIZE", "MODE", "KIND", "PAGE", "RESIDENT", "HUGE", "SWAP", "DEVICE", "NAME",
    ];
    let amount = |bytes: ByteCount| match bytes.get() {
        0 => "-".to_owned(),
        _ => bytes.to_string(),
    };
    let mut table = Table::new(heads);
    for mapped in memory {
        table.row([
            format!("{:x}", mapped.range.start().get()),
            mapped.range.bytes().to_string(),
            permissions(mapped),
            kind(mapped).to_owned(),
            mapped.page_size.to_string(),
            amount(mapped.resident),
            amount(mapped.huge),
            amount(mapped.swapped),
            possible(mapped).to_owned(),
            notes(mapped),
        ]);
    }
    table.print(out)?;
    let sum = |wanted: &dyn Fn(&MappedMemory) -> bool| {
        let resident = memory
            .iter()
            .filter(|mapped| wanted(mapped))
            .map(|mapped| mapped.resident.get());
        ByteCount::new(resident.sum())
    };
    writeln!(
        out,
        "\nOf what is resident, {} can migrate and {} more can be used in place by a device.\n\
         What is on a device is neither resident nor in swap here; the process itself can ask\n\
         (`Hmm::residency`).",
        sum(&|mapped| mapped.stays().is_none()),
        sum(&|mapped| mapped.stays().is_some() && mapped.can_be_mirrored()),
    )
}
