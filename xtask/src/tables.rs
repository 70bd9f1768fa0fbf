//! Reading the few things in code and documents that are compared.

use anyhow::{Context, Result, bail};

/// The variants of an enum in Rust source text, in order. Reads what rustfmt
/// writes: the enum's items are indented by one level.
pub fn enum_variants(source: &str, name: &str) -> Result<Vec<String>> {
    let head = format!("enum {name} {{");
    let mut lines = source
        .lines()
        .skip_while(|line| !line.trim_end().ends_with(&head));
    lines
        .next()
        .with_context(|| format!("there is no `{head}`"))?;
    let mut variants = Vec::new();
    for line in lines {
        if line == "}" {
            return Ok(variants);
        }
        let item = line.strip_prefix("    ").unwrap_or(line);
        if item.starts_with(|letter: char| letter.is_ascii_uppercase()) {
            let end = item
                .find(|letter: char| !letter.is_alphanumeric())
                .unwrap_or(item.len());
            variants.push(item[..end].to_owned());
        }
    }
    bail!("`{head}` has no end");
}

/// The text of a constant's value: `const NAME: type = value;`.
pub fn constant(source: &str, name: &str) -> Option<String> {
    let head = format!("const {name}:");
    let line = source
        .lines()
        .map(str::trim)
        .find(|line| line.contains(&head) && line.ends_with(';'))?;
    let (_, value) = line.split_once('=')?;
    Some(value.trim_end_matches(';').trim().to_owned())
}

/// The value of a number as it stands in code: `1024`, `20_000`, `1 << 20`,
/// `PageCount::new(16)`.
pub fn number(text: &str) -> Option<u64> {
    let text = text.replace([',', '_'], "");
    let text = text
        .split_once('(')
        .and_then(|(_, rest)| rest.strip_suffix(')'))
        .unwrap_or(&text);
    match text.split_once("<<") {
        Some((base, shift)) => {
            let base: u64 = base.trim().parse().ok()?;
            base.checked_shl(shift.trim().parse().ok()?)
        }
        None => text.trim().parse().ok(),
    }
}

/// The table behind the line `<!-- checked: NAME -->`: its rows as cells,
/// without the head.
pub fn checked_table(document: &str, name: &str) -> Result<Vec<Vec<String>>> {
    let marker = format!("<!-- checked: {name} -->");
    let mut lines = document.lines().skip_while(|line| line.trim() != marker);
    lines
        .next()
        .with_context(|| format!("there is no `{marker}`"))?;
    let rows: Vec<Vec<String>> = lines
        .skip_while(|line| line.trim().is_empty())
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| {
            line.trim()
                .trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect()
        })
        .collect();
    if rows.is_empty() {
        bail!("no table follows `{marker}`");
    }
    Ok(rows)
}

/// What stands between backticks in a cell, item by item.
pub fn code_spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Where the links of a document lead, those to other places left out.
pub fn local_links(document: &str) -> Vec<&str> {
    document
        .match_indices("](")
        .filter_map(|(at, _)| document[at + 2..].split(')').next())
        .map(|link| link.split('#').next().unwrap_or(link))
        .filter(|link| !link.is_empty() && !link.contains("://"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_read_in_order() {
        let source = "/// One.\npub(crate) enum Other {\n    X,\n}\n\npub enum Kind {\n    /// A.\n    \
                      First = 0,\n    // note\n    Second { inner: Type },\n    Third(\n        \
                      Inside,\n    ),\n    #[doc(hidden)]\n    Fourth,\n}\nstruct After;\n";
        assert_eq!(
            enum_variants(source, "Kind").unwrap(),
            ["First", "Second", "Third", "Fourth"]
        );
        assert!(enum_variants(source, "Nothing").is_err());
    }

    #[test]
    fn numbers_as_code_writes_them() {
        assert_eq!(number("20_000"), Some(20_000));
        assert_eq!(number("1 << 20"), Some(1_048_576));
        assert_eq!(number("1,048,576"), Some(1_048_576));
        assert_eq!(number("PageCount::new(16)"), Some(16));
        assert_eq!(number("many"), None);
        let source = "    pub(crate) const LIMIT: u32 = 20_000;\n";
        assert_eq!(constant(source, "LIMIT").as_deref(), Some("20_000"));
        assert_eq!(constant(source, "LIM"), None);
    }

    #[test]
    fn tables_behind_a_marker() {
        let document = "text\n<!-- checked: Kind -->\n\n| a | b |\n|---|---|\n| 0 | `X` y |\n\nend";
        let rows = checked_table(document, "Kind").unwrap();
        assert_eq!(rows, [["0", "`X` y"]]);
        assert_eq!(code_spans(&rows[0][1]).collect::<Vec<_>>(), ["X"]);
        assert!(checked_table(document, "Other").is_err());
    }

    #[test]
    fn links_within_the_project() {
        let document = "[a](docs/a.md#part) [b](https://example.org) [c](#here) [d](../x.rs)";
        assert_eq!(local_links(document), ["docs/a.md", "../x.rs"]);
    }
}
