//! Checks the documents against the code.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};

use crate::tables::{checked_table, code_spans, constant, enum_variants, local_links, number};
use crate::workspace::Workspace;

/// Where an enum is, and which column of which table has to list its variants.
struct Listed {
    name: &'static str,
    source: &'static str,
    document: &'static str,
    /// Whether the first column numbers the rows from 0.
    numbered: bool,
}

const LISTED: [Listed; 3] = [
    Listed {
        name: "Rank",
        source: "crates/hmm-sync/src/rank.rs",
        document: "docs/locking.md",
        numbered: true,
    },
    Listed {
        name: "PageState",
        source: "crates/hmm-core/src/page.rs",
        document: "docs/how-a-page-moves.md",
        numbered: false,
    },
    Listed {
        name: "StayReason",
        source: "crates/hmm-types/src/reason.rs",
        document: "docs/limits.md",
        numbered: false,
    },
];

/// The document whose table of bounds is compared with constants.
const LIMITS: &str = "docs/limits.md";

/// Fails with everything that is out of step. Says what was compared.
pub fn check(workspace: &Workspace) -> Result<String> {
    let mut faults = Vec::new();
    let mut compared = 0;
    for listed in &LISTED {
        match check_listed(workspace, listed) {
            Ok(rows) => compared += rows,
            Err(error) => faults.push(error),
        }
    }
    match check_bounds(workspace) {
        Ok(rows) => compared += rows,
        Err(error) => faults.push(error),
    }
    let links = check_links(workspace, &mut faults)?;
    if faults.is_empty() {
        return Ok(format!("{compared} table rows and {links} links agree"));
    }
    let text: Vec<_> = faults.iter().map(|fault| format!("  {fault:#}")).collect();
    bail!(
        "the documents are out of step with the code:\n{}",
        text.join("\n")
    );
}

fn read(workspace: &Workspace, path: &str) -> Result<String> {
    fs::read_to_string(workspace.path(path)).with_context(|| format!("cannot read {path}"))
}

fn check_listed(workspace: &Workspace, listed: &Listed) -> Result<usize> {
    let Listed {
        name,
        source,
        document,
        numbered,
    } = *listed;
    let in_code = enum_variants(&read(workspace, source)?, name).context(source)?;
    let rows = checked_table(&read(workspace, document)?, name).context(document)?;
    compare(&in_code, &rows, numbered)
        .map_err(|fault| anyhow!("{document} and enum {name} in {source}: {fault}"))?;
    Ok(rows.len())
}

/// The rows name the variants, all of them, in their order.
fn compare(in_code: &[String], rows: &[Vec<String>], numbered: bool) -> Result<()> {
    let column = usize::from(numbered);
    for (index, row) in rows.iter().enumerate() {
        let cell = row.get(column).map_or("", String::as_str);
        let named = code_spans(cell).next().unwrap_or(cell);
        if numbered && row.first().and_then(|cell| cell.parse().ok()) != Some(index) {
            bail!("the row of {named} should have the number {index}");
        }
        match in_code.get(index) {
            Some(variant) if variant == named => {}
            Some(variant) => bail!("row {index} is {named}, but the code has {variant} there"),
            None => bail!("the table lists {named}, which the code does not have"),
        }
    }
    match in_code.get(rows.len()) {
        Some(missing) => bail!("the table lacks {missing}"),
        None => Ok(()),
    }
}

/// Each row: what is bounded, the value, and where: `NAME` in `file`.
fn check_bounds(workspace: &Workspace) -> Result<usize> {
    let rows = checked_table(&read(workspace, LIMITS)?, "bounds").context(LIMITS)?;
    for row in &rows {
        let [what, value, place] = &row[..] else {
            bail!("{LIMITS}: a row of bounds has {} cells, not 3", row.len());
        };
        let spans: Vec<_> = code_spans(place).collect();
        let [name, file] = spans[..] else {
            bail!("{LIMITS}, {what}: the third cell should be `NAME` in `file`");
        };
        let code = constant(&read(workspace, file)?, name)
            .with_context(|| format!("{LIMITS}, {what}: no constant {name} in {file}"))?;
        let documented = value.split_whitespace().next().and_then(number);
        if documented.is_none() || documented != number(&code) {
            bail!("{LIMITS}, {what}: the document says {value}, {name} in {file} is {code}");
        }
    }
    Ok(rows.len())
}

/// Every link to a file of the project leads to one.
fn check_links(workspace: &Workspace, faults: &mut Vec<anyhow::Error>) -> Result<usize> {
    let mut documents = vec![workspace.path("README.md")];
    for entry in fs::read_dir(workspace.path("docs")).context("cannot read docs/")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "md") {
            documents.push(path);
        }
    }
    documents.sort();
    let mut links = 0;
    for document in &documents {
        let text = fs::read_to_string(document)
            .with_context(|| format!("cannot read {}", document.display()))?;
        let directory = document.parent().unwrap_or(Path::new("."));
        for link in local_links(&text) {
            links += 1;
            if !directory.join(link).exists() {
                let document = document.strip_prefix(workspace.root()).unwrap_or(document);
                faults.push(anyhow!("{}: {link} leads nowhere", document.display()));
            }
        }
    }
    Ok(links)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(names: &[&str]) -> Vec<Vec<String>> {
        let row = |(index, name): (usize, &&str)| vec![index.to_string(), format!("`{name}`")];
        names.iter().enumerate().map(row).collect()
    }

    #[test]
    fn every_difference_is_found() {
        let code = ["Gate", "Block"].map(str::to_owned);
        assert!(compare(&code, &rows(&["Gate", "Block"]), true).is_ok());
        for wrong in [
            &["Block", "Gate"][..],
            &["Gate"],
            &["Gate", "Block", "More"],
        ] {
            assert!(compare(&code, &rows(wrong), true).is_err(), "{wrong:?}");
        }
        let mut misnumbered = rows(&["Gate", "Block"]);
        misnumbered[1][0] = "2".to_owned();
        assert!(compare(&code, &misnumbered, true).is_err());
    }

    #[test]
    fn the_documents_agree_with_the_code() {
        let checked = check(&Workspace::find()).unwrap();
        println!("{checked}");
    }
}
