//! The guest's first file system: an archive that the kernel unpacks itself
//! (cpio, format "newc"; the kernel's Documentation/driver-api/early-userspace).

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const DEVICE: u32 = 0o020_600;
/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive that is being written. Paths are relative to the root.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    directories: BTreeSet<String>,
    entries: u32,
}

impl<W: Write> Archive<W> {
    pub fn new(out: W) -> Self {
        Self {
            out,
            directories: BTreeSet::new(),
            entries: 0,
        }
    }

    /// Adds a directory, and those above it.
    pub fn directory(&mut self, path: &str) -> Result<()> {
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            if self.directories.insert(path[..end].to_owned()) {
                self.entry(&path[..end], DIRECTORY, (0, 0), &[])?;
            }
        }
        Ok(())
    }

    /// Adds a file that may be run.
    pub fn file(&mut self, path: &str, content: &[u8]) -> Result<()> {
        if let Some((directory, _)) = path.rsplit_once('/') {
            self.directory(directory)?;
        }
        self.entry(path, PROGRAM, (0, 0), content)
    }

    /// Adds a copy of a file.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(path, &content)
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, (major, minor): (u32, u32)) -> Result<()> {
        self.entry(path, DEVICE, (major, minor), &[])
    }

    /// Writes what ends the archive.
    pub fn finish(mut self) -> Result<()> {
        self.entry(TRAILER, 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(())
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        self.entries += 1;
        let links = 1;
        let size = u32::try_from(content.len()).with_context(|| format!("{path} is too large"))?;
        let name_size = u32::try_from(path.len() + 1)?;
        let fields = [
            self.entries,
            mode,
            0, // user
            0, // group
            links,
            0, // time
            size,
            0, // the device that the file is on
            0,
            device.0,
            device.1,
            name_size,
            0, // checksum, not used
        ];
        let mut header = "070701".to_owned();
        header.extend(fields.map(|field| format!("{field:08x}")));
        header += path;
        header.push('\0');
        self.padded(header.as_bytes())?;
        self.padded(content)
    }

    /// Names and contents end on multiples of four.
    fn padded(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes)?;
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        self.out.write_all(&[0; 4][..padding])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_as_the_kernel_wants_them() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.file("a/b/c", b"hello").unwrap();
        archive.directory("a/b").unwrap();
        archive.finish().unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let names: Vec<_> = text
            .split("070701")
            .skip(1)
            .map(|entry| &entry[104..])
            .collect();
        assert_eq!(
            names,
            [
                "a\0",
                "a/b\0\0\0",
                "a/b/c\0hello\0\0\0",
                "TRAILER!!!\0\0\0\0"
            ]
        );
        let file = text.split("070701").nth(3).unwrap();
        assert_eq!(&file[8..16], "000081ed");
        assert_eq!(&file[48..56], "00000005");
        assert_eq!(text.len() % 4, 0);
    }
}
