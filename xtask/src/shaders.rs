//! The workspace's shaders: what a compiler makes of them is committed, so that programs
//! and tests need none.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::packages::{self, Package};
use crate::process::Invocation;
use crate::workspace::Workspace;

/// A folder of compiled shaders.
struct Folder {
    path: &'static str,
    /// For which Vulkan they are.
    version: &'static str,
    /// Where sources are that do not lie beside them.
    others: Option<&'static str>,
    /// A source is compiled once for each of these names, which it finds defined; or once.
    variants: &'static [&'static str],
}

const FOLDERS: [Folder; 6] = [
    Folder::plain("crates/hmm-cli/src/bench"),
    Folder::plain("crates/hmm-cli/src/demo"),
    Folder::plain("crates/hmm/examples/bfs"),
    Folder {
        others: Some(TESTS_OF_THE_PASS),
        ..Folder::plain("crates/hmm/tests/kernels")
    },
    Folder {
        version: "vulkan1.3",
        ..Folder::plain(TESTS_OF_THE_PASS)
    },
    Folder {
        variants: &["checked", "stall", "table"],
        ..Folder::plain("crates/hmm-vulkan/tests/kernels")
    },
];
const TESTS_OF_THE_PASS: &str = "crates/hmm-spirv/tests/kernels";

impl Folder {
    const fn plain(path: &'static str) -> Self {
        Self {
            path,
            version: "vulkan1.2",
            others: None,
            variants: &[],
        }
    }

    /// What is committed here, and what should be.
    fn shaders(&self, workspace: &Workspace) -> Result<Vec<Shader>> {
        let folder = workspace.path(self.path);
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", self.path))? {
            let path = entry?.path();
            let extension = path.extension().and_then(|it| it.to_str());
            let stem = path.file_stem().and_then(|it| it.to_str());
            if let (Some("comp" | "spv"), Some(stem)) = (extension, stem) {
                let variant = self.variants.iter().find_map(|variant| {
                    let source = stem.strip_suffix(variant)?;
                    source.strip_suffix('-')
                });
                names.insert(variant.unwrap_or(stem).to_owned());
            }
        }
        let mut shaders = Vec::new();
        for name in names {
            let places = [Some(self.path), self.others].into_iter().flatten();
            let mut sources =
                places.map(|place| workspace.path(place).join(&name).with_extension("comp"));
            let Some(source) = sources.find(|source| source.exists()) else {
                bail!("{}/{name}.spv has no source", self.path);
            };
            let shader = |made: String, variant| Shader {
                source: source.clone(),
                made: folder.join(made).with_extension("spv"),
                version: self.version,
                variant,
            };
            match self.variants {
                [] => shaders.push(shader(name, None)),
                variants => shaders.extend(
                    variants
                        .iter()
                        .map(|variant| shader(format!("{name}-{variant}"), Some(*variant))),
                ),
            }
        }
        Ok(shaders)
    }
}

struct Shader {
    source: PathBuf,
    made: PathBuf,
    version: &'static str,
    variant: Option<&'static str>,
}

impl Shader {
    /// Compiles it to a file, which is then found valid.
    fn compile(&self, to: &Path) -> Result<()> {
        // Variants are of one large source, of which each uses a part.
        let variant = self.variant.map(|variant| {
            let define = format!("-D{}", variant.to_uppercase());
            ["-Os".to_owned(), define]
        });
        Invocation::new("glslangValidator")
            .args(["--quiet", "-V", "--target-env", self.version])
            .args(variant.into_iter().flatten())
            .args([self.source.as_os_str(), "-o".as_ref(), to.as_os_str()])
            .output()?;
        Invocation::new("spirv-val")
            .args(["--target-env", self.version, "--scalar-block-layout"])
            .args([to])
            .output()?;
        Ok(())
    }
}

fn all(workspace: &Workspace) -> Result<Vec<Shader>> {
    let mut shaders = Vec::new();
    for folder in &FOLDERS {
        shaders.extend(folder.shaders(workspace)?);
    }
    Ok(shaders)
}

fn provide() -> Result<()> {
    packages::SHADERS.iter().try_for_each(Package::provide)
}

/// Compiles all of them.
pub fn make(workspace: &Workspace) -> Result<()> {
    provide()?;
    let shaders = all(workspace)?;
    for shader in &shaders {
        shader.compile(&shader.made)?;
    }
    println!("{} shaders", shaders.len());
    Ok(())
}

/// Fails with those that are not what their sources say. `Err` in the answer: why that
/// cannot be told here.
pub fn check(workspace: &Workspace) -> Result<Result<String, String>> {
    if let Err(missing) = provide() {
        return Ok(Err(format!("{missing:#}")));
    }
    let shaders = all(workspace)?;
    let made = workspace.target().join("shader.spv");
    fs::create_dir_all(workspace.target())?;
    let mut wrong = Vec::new();
    let mut others = 0;
    for shader in &shaders {
        shader.compile(&made)?;
        let new = fs::read(&made)?;
        let name = shader.made.strip_prefix(workspace.root());
        let name = name.unwrap_or(&shader.made).display();
        let committed = fs::read(&shader.made);
        let committed = committed.with_context(|| format!("{name}: run `cargo xtask shaders`"))?;
        // Word 2 is the compiler's version: another one may choose other ids.
        if committed.get(8..12) != new.get(8..12) {
            others += 1;
        } else if committed != new {
            wrong.push(name.to_string());
        }
    }
    fs::remove_file(&made)?;
    if !wrong.is_empty() {
        let wrong = wrong.join(", ");
        bail!("not what their sources say: {wrong}; run `cargo xtask shaders`");
    }
    if others > 0 {
        let all = shaders.len();
        return Ok(Err(format!(
            "{others} of {all} shaders were compiled by another version of glslang"
        )));
    }
    Ok(Ok(format!("{} shaders", shaders.len())))
}
