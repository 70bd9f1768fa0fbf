//! `hmm info`: what this machine offers, and what to do about the rest.

use std::io::{self, Write};
use std::process::ExitCode;

use hmm::{
    AddressPolicy, ByteCount, Hmm, Machine, SoftwareOptions, VulkanChoice, VulkanError,
    VulkanOptions,
};
use serde::Serialize;

use crate::args::InfoOptions;
use crate::table::Table;

/// One line of the table, and one object of the JSON.
#[derive(Debug, Serialize)]
struct Line {
    what: String,
    value: String,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Line {
    fn good(what: &str, value: impl Into<String>) -> Self {
        Self {
            what: what.to_owned(),
            value: value.into(),
            ok: true,
            remedy: None,
        }
    }

    fn bad(what: &str, value: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            what: what.to_owned(),
            value: value.into(),
            ok: false,
            remedy: Some(remedy.into()),
        }
    }

    fn either(what: &str, ok: bool, [yes, no]: [&str; 2], remedy: &str) -> Self {
        if ok {
            Self::good(what, yes)
        } else {
            Self::bad(what, no, remedy)
        }
    }
}

/// Everything that is shown.
#[derive(Debug, Serialize)]
struct Information {
    findings: Vec<Line>,
    devices: Vec<Line>,
    engine: Vec<Line>,
    opens: bool,
    complete: bool,
}

/// Runs the command.
pub fn run(options: &InfoOptions) -> anyhow::Result<ExitCode> {
    if let Some(pid) = options.memory {
        return crate::memory::run(pid, options.json);
    }
    let information = gather();
    let mut out = io::stdout().lock();
    if options.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&information)?)?;
    } else {
        print(&information, &mut out)?;
    }
    Ok(if information.opens {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn gather() -> Information {
    let machine = Machine::probe();
    let findings: Vec<Line> = machine
        .findings
        .into_iter()
        .map(|finding| Line {
            what: finding.name,
            value: finding.value,
            ok: finding.ok,
            remedy: finding.remedy,
        })
        .collect();
    // What it says of itself is what it does.
    let opened = Hmm::open();
    let (mut devices, engine, opens) = match &opened {
        Ok(hmm) => (vec![software_device(hmm)], abilities(hmm), true),
        Err(error) => {
            let remedy = "see what is missing above; nothing works without it";
            let line = Line::bad("engine", format!("does not open: {error}"), remedy);
            (Vec::new(), vec![line], false)
        }
    };
    devices.extend(vulkan_devices(opened.as_ref().ok()));
    if let Ok(Err(error)) = opened.map(Hmm::shutdown) {
        eprintln!("hmm: {error}");
    }
    let mut all = findings.iter().chain(&devices).chain(&engine);
    let complete = all.all(|line| line.ok);
    Information {
        findings,
        devices,
        engine,
        opens,
        complete,
    }
}

/// The Vulkan devices, usable or not. That there is none is nothing to repair.
fn vulkan_devices(hmm: Option<&Hmm>) -> Vec<Line> {
    let all = match hmm::list_vulkan() {
        Ok(all) if !all.is_empty() => all,
        Ok(_) => return vec![Line::good("Vulkan device", "none")],
        Err(why) => return vec![Line::good("Vulkan device", format!("none: {why}"))],
    };
    let all = all.into_iter().enumerate();
    all.flat_map(|(index, device)| vulkan_device(hmm, index, device))
        .collect()
}

fn vulkan_device(hmm: Option<&Hmm>, index: usize, device: hmm::VulkanDescription) -> Vec<Line> {
    let what = format!("Vulkan device {}", device.name);
    if let Some(problem) = device.problem {
        let remedy = format!("{problem}; another driver may have it");
        return vec![Line::bad(&what, device.driver, remedy)];
    }
    let waits = match device.no_stall {
        None => "kernels wait for them, or begin again".to_owned(),
        Some(why) => format!("kernels begin again; they cannot wait ({why})"),
    };
    let in_place = if device.imports_pages() {
        format!(
            "can be (imports, aligned to {}), where it is mapped as shared",
            device.import_alignment
        )
    } else if device.imports_host {
        format!(
            "no: it imports only what is aligned to {}",
            device.import_alignment
        )
    } else {
        "no: it does not import any (VK_EXT_external_memory_host)".to_owned()
    };
    let (driver, api, memory) = (device.driver, device.api, device.memory);
    let mut lines = vec![Line::good(
        &what,
        format!("{driver}, Vulkan {api}, {memory}"),
    )];
    if let Some(hmm) = hmm {
        lines.extend(pointers(hmm, index));
    }
    lines.extend([
        Line::good("  pages that are missing", waits),
        Line::good("  memory used in place", in_place),
    ]);
    lines
}

/// How pointers become a Vulkan device's: asked of the device itself, opened with little
/// memory.
fn pointers(hmm: &Hmm, index: usize) -> Vec<Line> {
    let options = VulkanOptions::new(ByteCount::mib(8)).device(VulkanChoice::Index(index));
    let device = match hmm.add_vulkan_device(options) {
        Ok(device) => device,
        Err(error) => {
            let remedy = "another driver, or an update of this one, may work";
            return vec![Line::bad("  opens", format!("no: {error}"), remedy)];
        }
    };
    let policy = match device.policy() {
        AddressPolicy::Table => "Table",
        _ => "Table; where a launch names its memory also Delta (a constant)",
    };
    let identity = match device.offers_identity() {
        Ok(()) => "can be: Identity there (map_identical)".to_owned(),
        Err(VulkanError::NoIdentity { reason, .. }) => format!("no: {reason}"),
        Err(error) => format!("no: {error}"),
    };
    if let Err(error) = device.remove() {
        eprintln!("hmm: {error}");
    }
    vec![
        Line::good("  its pointers", policy),
        Line::good("  memory at its own addresses", identity),
    ]
}

fn software_device(hmm: &Hmm) -> Line {
    let options = SoftwareOptions::new(ByteCount::mib(1));
    match hmm.add_software_device(options) {
        Ok(_) => Line::good(
            "software device",
            "always there; 4 KiB to 2 TiB, 1 to 64 workers",
        ),
        Err(error) => Line::bad(
            "software device",
            "cannot be made",
            format!("{error}; free memory, or see `ulimit -v`"),
        ),
    }
}

/// What the engine can do here.
fn abilities(hmm: &Hmm) -> Vec<Line> {
    vec![
        Line::either(
            "pages leave and come home by",
            hmm.moves_pages(),
            ["moving (UFFDIO_MOVE)", "copying twice: slower"],
            "Linux 6.8 or later",
        ),
        Line::either(
            "faults inside of system calls",
            hmm.serves_kernel_faults(),
            [
                "served",
                "not served: read(2) into a page on a device fails",
            ],
            "run as root, `chmod 666 /dev/userfaultfd`, or `sysctl vm.unprivileged_userfaultfd=1`",
        ),
    ]
}

fn print(information: &Information, out: &mut impl Write) -> io::Result<()> {
    let mut table = Table::new(["WHAT", "VALUE", "OK, OR WHAT TO DO"]);
    let groups = [
        &information.findings,
        &information.devices,
        &information.engine,
    ];
    for line in groups.into_iter().flatten() {
        let state = if line.ok {
            "ok".to_owned()
        } else {
            let remedy = line.remedy.as_deref().unwrap_or("");
            format!("missing: {remedy}")
        };
        table.row([line.what.clone(), line.value.clone(), state]);
    }
    table.print(out)?;
    writeln!(out)?;
    writeln!(
        out,
        "{}",
        match (information.opens, information.complete) {
            (true, true) => "Everything is there: the engine works at its best here.",
            (true, false) =>
                "The engine works here; what is marked missing makes it weaker or slower.",
            (false, _) => "The engine does not work here.",
        }
    )
}
