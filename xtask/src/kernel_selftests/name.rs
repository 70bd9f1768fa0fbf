//! The names of tests, and the list of them that the harness prints.

use std::fmt;

/// A test of a fixture's variant: `hmm.hmm_device_private.anon_read`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    /// The test without the variant: `hmm.anon_read`.
    pub fn row(&self) -> String {
        match (self.0.split_once('.'), self.0.rsplit_once('.')) {
            (Some((fixture, _)), Some((_, test))) => format!("{fixture}.{test}"),
            _ => self.0.clone(),
        }
    }

    /// The last word of the variant: `private`. Empty without a variant.
    pub fn variant(&self) -> &str {
        let mut parts = self.0.split('.').skip(1);
        match (parts.next(), parts.next()) {
            (Some(variant), Some(_)) => variant.rsplit('_').next().unwrap_or(variant),
            _ => "",
        }
    }

    /// Whether this is meant by `anon_read`, `hmm.anon_read` or the whole name.
    pub fn is_meant_by(&self, given: &str) -> bool {
        let row = self.row();
        given == self.0 || given == row || row.split('.').next_back() == Some(given)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Name {
    fn from(name: &str) -> Self {
        Self(name.to_owned())
    }
}

/// The names in what `-l` prints: of each fixture a column of variants and one
/// of tests, next to each other. Every variant runs every test.
pub fn listed(text: &str) -> Vec<Name> {
    let mut names = Vec::new();
    for block in text.split("\n---") {
        let (mut fixture, mut variants, mut tests) = ("", Vec::new(), Vec::new());
        let rows = block.lines().filter(|line| !line.starts_with(['#', '-']));
        for row in rows {
            let cell = |from, to| row.get(from..to).unwrap_or_default().trim();
            let middle = row.len().min(46);
            match cell(0, row.len().min(20)) {
                "" => {}
                name => fixture = name,
            }
            variants.extend(Some(cell(20, middle)).filter(|name| !name.is_empty()));
            tests.extend(Some(cell(middle, row.len())).filter(|name| !name.is_empty()));
        }
        if variants.is_empty() {
            names.extend(tests.iter().map(|test| Name(format!("{fixture}.{test}"))));
        }
        for variant in variants {
            let name = |test| Name(format!("{fixture}.{variant}.{test}"));
            names.extend(tests.iter().map(name));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
# FIXTURE            VARIANT                   TEST
global                                         
--------------------------------------------------------------------------------
hmm                  hmm_device_private        first
                     hmm_device_coherent       second
                                               third
--------------------------------------------------------------------------------
hmm2                 hmm2_device_private       only
                     hmm2_device_coherent      
--------------------------------------------------------------------------------
plain                                          alone
# [INFO] a page size was found
";

    #[test]
    fn each_variant_runs_each_test() {
        let names: Vec<_> = listed(LIST).iter().map(Name::to_string).collect();
        let expected = [
            "hmm.hmm_device_private.first",
            "hmm.hmm_device_private.second",
            "hmm.hmm_device_private.third",
            "hmm.hmm_device_coherent.first",
            "hmm.hmm_device_coherent.second",
            "hmm.hmm_device_coherent.third",
            "hmm2.hmm2_device_private.only",
            "hmm2.hmm2_device_coherent.only",
            "plain.alone",
        ];
        assert_eq!(names, expected);
        assert_eq!(listed(""), []);
    }

    #[test]
    fn a_name_has_parts() {
        let name = Name::from("hmm2.hmm2_device_private.only");
        assert_eq!(name.row(), "hmm2.only");
        assert_eq!(name.variant(), "private");
        for given in ["only", "hmm2.only", "hmm2.hmm2_device_private.only"] {
            assert!(name.is_meant_by(given), "{given}");
        }
        assert!(!name.is_meant_by("hmm.only"));
        assert!(!name.is_meant_by("on"));
        let name = Name::from("plain.alone");
        assert_eq!((name.row().as_str(), name.variant()), ("plain.alone", ""));
    }
}
