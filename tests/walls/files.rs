//! Which files of a crate import from which: by what stands in them, so that an import by
//! way of a `mod.rs` counts as one from there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A file, as the path of its module.
pub type File = Vec<String>;
/// Files, and those that they import from.
pub type Imports = BTreeMap<File, BTreeSet<File>>;

/// Files of a crate's folder, without those that are only for tests.
pub fn imports(source: &Path) -> Imports {
    let mut texts = BTreeMap::new();
    collect(source, &mut Vec::new(), &mut texts);
    let files: BTreeSet<File> = texts.keys().cloned().collect();
    let of = |(file, text): (&File, &String)| (file.clone(), imported(file, text, &files));
    texts.iter().map(of).collect()
}

fn collect(folder: &Path, module: &mut File, texts: &mut BTreeMap<File, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            module.push(name);
            collect(&path, module, texts);
            module.pop();
        } else if name != "main" && !name.ends_with("tests") {
            let mut file = module.clone();
            if !["lib", "mod"].contains(&name.as_str()) {
                file.push(name);
            }
            texts.insert(file, code(&fs::read_to_string(&path).unwrap()));
        }
    }
}

/// A file's text without comments and unit tests.
fn code(text: &str) -> String {
    let mut lines = Vec::new();
    let mut rest = text.lines().peekable();
    while let Some(line) = rest.next() {
        let tests = |next: &&str| next.contains("mod ") && next.ends_with('{');
        if line == "#[cfg(test)]" && rest.peek().is_some_and(tests) {
            break;
        }
        lines.push(line.split("//").next().unwrap_or_default());
    }
    lines.join("\n")
}

fn imported(file: &File, text: &str, files: &BTreeSet<File>) -> BTreeSet<File> {
    let is_word = |it: char| it.is_alphanumeric() || it == '_' || it == ':';
    let mut paths = Vec::new();
    for (at, _) in text.match_indices("use ") {
        let alone = !text[..at].ends_with(is_word);
        if let (true, Some(tree)) = (alone, text[at + 4..].split(';').next()) {
            let tree: String = tree
                .split(char::is_whitespace)
                .collect::<Vec<_>>()
                .join(" ");
            expand(&tree, "", &mut paths);
        }
    }
    // And paths that are written out.
    let words = text.split(|it| !is_word(it));
    let whole = words.filter(|it| it.contains("::") && !it.ends_with("::"));
    paths.extend(whole.map(str::to_owned));
    let found = paths.iter().filter_map(|path| resolved(file, path, files));
    found.filter(|it| it != file).collect()
}

/// `a::{b, c::d}` is `a::b` and `a::c::d`.
fn expand(tree: &str, before: &str, paths: &mut Vec<String>) {
    let tree = tree.trim();
    let Some((start, inner)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default();
        paths.push(format!("{before}{path}"));
        return;
    };
    let inner = inner.rsplit_once('}').map_or(inner, |(inner, _)| inner);
    let before = format!("{before}{}", start.trim());
    let (mut depth, mut from) = (0, 0);
    for (at, it) in inner.char_indices().chain([(inner.len(), ',')]) {
        match it {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !inner[from..at].trim().is_empty() {
                    expand(&inner[from..at], &before, paths);
                }
                from = at + 1;
            }
            _ => {}
        }
    }
}

/// The file that a path leads to, if it is one of the crate.
fn resolved(file: &File, path: &str, files: &BTreeSet<File>) -> Option<File> {
    let mut names = path.split("::").map(str::trim).peekable();
    let mut module = match *names.peek()? {
        "crate" => {
            names.next();
            Vec::new()
        }
        "self" => {
            names.next();
            file.clone()
        }
        "super" => {
            let mut module = file.clone();
            while names.next_if_eq(&"super").is_some() {
                module.pop();
            }
            module
        }
        child => {
            let mut module = file.clone();
            module.push(child.to_owned());
            return files
                .contains(&module)
                .then(|| deepest(file.clone(), names, files));
        }
    };
    module = deepest(module, names, files);
    files.contains(&module).then_some(module)
}

fn deepest<'a>(
    mut module: File,
    names: impl Iterator<Item = &'a str>,
    files: &BTreeSet<File>,
) -> File {
    for name in names {
        module.push(name.to_owned());
        if !files.contains(&module) {
            module.pop();
            break;
        }
    }
    module
}

/// Files that import from each other, by whatever way, with those that they import from.
pub fn circles(imports: &Imports) -> Vec<String> {
    let mut reach = imports.clone();
    loop {
        let before = reach.clone();
        for files in reach.values_mut() {
            let more = files.iter().filter_map(|it| before.get(it)).flatten();
            let more: Vec<File> = more.cloned().collect();
            files.extend(more);
        }
        if reach == before {
            break;
        }
    }
    let circular = |file: &File| reach[file].contains(file);
    let shown = |file: &File| match file.is_empty() {
        true => "lib".to_owned(),
        false => file.join("/"),
    };
    let told = imports.iter().filter(|(file, _)| circular(file));
    told.map(|(file, from)| {
        let from = from
            .iter()
            .filter(|it| circular(it) && reach[*it].contains(file));
        let from: Vec<String> = from.map(shown).collect();
        format!("{} imports from {}", shown(file), from.join(", "))
    })
    .collect()
}

#[test]
fn a_circle_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    fs::create_dir(folder.path().join("a")).unwrap();
    write("lib.rs", "mod a;\npub use a::X;\n");
    write(
        "a/mod.rs",
        "mod b;\npub use self::b::{Y as X};\nstruct Z;\n",
    );
    write(
        "a/b.rs",
        "// use super::Z;\npub struct Y;\n#[cfg(test)]\nmod tests {\nuse super::super::X;\n}\n",
    );
    assert_eq!(circles(&imports(folder.path())), [""; 0]);
    write("a/b.rs", "use super::{c::D, Z};\npub struct Y;\n");
    let expected = ["a imports from a/b", "a/b imports from a"];
    assert_eq!(circles(&imports(folder.path())), expected);
    write("a/b.rs", "fn f(_: crate::X) {}\n");
    let told = circles(&imports(folder.path()));
    assert_eq!(told.len(), 3, "{told:?}");
}
