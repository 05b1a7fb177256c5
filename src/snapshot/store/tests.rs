//! Templates come whole, are used by many, and go when nobody uses them.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::key::tests::key;
use super::*;
use crate::failure::Failure;

struct Folder {
    root: tempfile::TempDir,
    templates: Templates,
}

impl Folder {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let templates = Templates::open(&root.path().join("templates")).unwrap();
        Folder { root, templates }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("templates").join(name)
    }

    fn of(&self, part: &str, key: &TemplateKey) -> PathBuf {
        self.path(part).join(key.digest().unwrap().hex())
    }

    /// What is not in its place for good.
    fn unfinished(&self) -> usize {
        fs::read_dir(self.path("tmp")).unwrap().count()
    }
}

fn numbered(number: u64) -> TemplateKey {
    let mut key = key();
    key.mayfly = number.to_string();
    key
}

/// Writes what a template has, with a number of bytes of memory.
fn fill(new: &NewTemplate, key: &TemplateKey, bytes: usize) {
    new.memory.set_len(key.machine.memory.size).unwrap();
    new.memory.write_all_at(&vec![1; bytes], 0).unwrap();
    (&new.state).write_all(b"state").unwrap();
}

/// What other tests fork has this process's locks for a moment.
pub fn eventually<T>(mut get: impl FnMut() -> Option<T>) -> T {
    let moments = (0..500).map(|_| std::thread::sleep(Duration::from_millis(10)));
    let tries = [()].into_iter().chain(moments);
    { tries }.find_map(|()| get()).unwrap()
}

fn begin<'a>(templates: &'a Templates, key: &TemplateKey) -> NewTemplate<'a> {
    eventually(|| templates.make(key).unwrap())
}

/// Waits until a number of them are in use.
fn until_busy(templates: &Templates, busy: usize) {
    let count = |all: Vec<Listed>| all.iter().filter(|it| it.busy).count();
    eventually(|| (count(templates.list().unwrap()) == busy).then_some(()));
}

fn make(templates: &Templates, key: &TemplateKey) -> Template {
    let new = begin(templates, key);
    fill(&new, key, 64 << 10);
    new.publish().unwrap()
}

fn told(result: Result<impl std::fmt::Debug, Failure>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_template_is_found_by_its_key_alone_and_a_miss_says_why() {
    let folder = Folder::new();
    let templates = &folder.templates;
    let key = key();
    assert!(matches!(templates.find(&key), Err(Miss::Empty)));
    let made = make(templates, &key);
    assert_eq!(made.manifest.key, key);
    drop(made);
    let found = templates.find(&key).unwrap();
    let mut state = String::new();
    std::io::Read::read_to_string(&mut &found.state, &mut state).unwrap();
    assert_eq!(
        (state.as_str(), found.manifest.memory_bytes),
        ("state", 1 << 20)
    );
    let mut byte = [0];
    found.memory.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [1]);
    // Nobody else may read it, and its user only reads.
    for name in ["memory", "state", "manifest.json"] {
        let mode = fs::metadata(folder.of("ready", &key).join(name))
            .unwrap()
            .mode();
        assert_eq!(mode & 0o777, 0o400, "{name}");
    }
    let mode = fs::metadata(folder.of("ready", &key)).unwrap().mode();
    assert_eq!(mode & 0o777, 0o700);
    assert!(templates.make(&key).unwrap().is_none());

    let mut far = numbered(2);
    far.machine.cpus = 2;
    far.host.kernel = "7.0".into();
    make(templates, &far);
    let mut other = key.clone();
    other.host.kernel = "6.13".into();
    let miss = templates.find(&other).unwrap_err().to_string();
    let expected = "no template fits; the nearest differs in the host's kernel";
    assert_eq!(miss, expected);
    assert_eq!(folder.unfinished(), 0);
}

#[test]
fn what_is_used_stays_and_what_was_used_last_goes_last() {
    let folder = Folder::new();
    let templates = &folder.templates;
    for number in 0..4 {
        make(templates, &numbered(number));
        let path = folder.of("ready", &numbered(number));
        let used = SystemTime::now() - Duration::from_secs(1000 - number);
        File::open(path).unwrap().set_modified(used).unwrap();
    }
    let each = templates.list().unwrap()[0].bytes;
    assert!((64 << 10..128 << 10).contains(&each), "{each}");
    // The oldest is used once more, and the next at present.
    drop(templates.find(&numbered(0)).unwrap());
    let held = templates.find(&numbered(1)).unwrap();
    let path = folder.of("ready", &numbered(1));
    let used = SystemTime::now() - Duration::from_secs(2000);
    File::open(path).unwrap().set_modified(used).unwrap();
    until_busy(templates, 1);
    let gone = templates.prune(2 * each).unwrap();
    let names = |gone: &[Listed]| -> Vec<_> { gone.iter().map(|it| it.name).collect() };
    let expected: Vec<_> = [2, 3]
        .map(|number| numbered(number).digest().unwrap())
        .into();
    assert_eq!(names(&gone), expected);
    assert!(templates.prune(2 * each).unwrap().is_empty());
    until_busy(templates, 1);
    let gone = templates.prune(0).unwrap();
    assert_eq!(names(&gone), [numbered(0).digest().unwrap()]);
    let name = numbered(1).digest().unwrap().hex();
    assert!(templates.list().unwrap()[0].busy);
    assert!(told(templates.remove(&name)).contains("a VM uses it"));
    drop(held);
    eventually(|| templates.remove(&name[..20]).ok());
    assert!(templates.list().unwrap().is_empty());
    assert!(told(templates.remove(&name)).contains("there is none"));
    assert!(told(templates.remove("")).contains("there is none"));
    assert_eq!(folder.unfinished(), 0);
}

#[test]
fn one_that_failed_is_neither_taken_nor_made_again_for_a_while() {
    let folder = Folder::new();
    let templates = &folder.templates;
    let key = key();
    let template = make(templates, &key);
    let other = templates.find(&key).unwrap();
    templates.set_aside(template, "it hung\x1b[2J").unwrap();
    // Another start found the same at the same time.
    templates.set_aside(other, "it hung, too").unwrap();
    let miss = templates.find(&key).unwrap_err().to_string();
    assert_eq!(miss, "its template was set aside: it hung?[2J");
    assert!(templates.make(&key).unwrap().is_none());
    let listed = templates.list().unwrap();
    assert_eq!(listed[0].failure.as_deref(), Some("it hung?[2J"));
    let failure = folder.of("failed", &key).join("failure");
    let long_ago = SystemTime::now() - Duration::from_secs(4000);
    { File::options().write(true).open(failure).unwrap() }
        .set_modified(long_ago)
        .unwrap();
    // The new one takes its place; a late word of the old one is not held against it.
    make(templates, &key);
    templates.find(&key).unwrap();
    assert_eq!(templates.list().unwrap().len(), 1);
    templates
        .set_aside(templates.find(&key).unwrap(), "no")
        .unwrap();
    until_busy(templates, 0);
    // What it took goes first; that it failed is not forgotten with it.
    assert_eq!(templates.prune(u64::MAX).unwrap().len(), 1);
    assert!(!folder.of("failed", &key).join("memory").exists());
    assert!(templates.prune(u64::MAX).unwrap().is_empty());
    assert!(matches!(templates.find(&key), Err(Miss::SetAside(_))));
    assert!(!templates.may_make(&key));
}

#[test]
fn one_that_cannot_be_used_does_not_stay_in_the_way() {
    let folder = Folder::new();
    let templates = &folder.templates;
    let key = key();
    make(templates, &key);
    let memory = folder.of("ready", &key).join("memory");
    fs::set_permissions(&memory, Permissions::from_mode(0o644)).unwrap();
    until_busy(templates, 0);
    assert!(matches!(templates.find(&key), Err(Miss::Unusable(_))));
    assert!(matches!(templates.find(&key), Err(Miss::SetAside(_))));
    assert!(!folder.of("ready", &key).exists());
    assert!(templates.make(&key).unwrap().is_none());
    let long_ago = SystemTime::now() - Duration::from_secs(4000);
    let failure = folder.of("failed", &key).join("failure");
    { File::options().write(true).open(failure).unwrap() }
        .set_modified(long_ago)
        .unwrap();
    assert!(templates.may_make(&key));
    make(templates, &key);
    templates.find(&key).unwrap();
}

#[test]
fn one_that_could_not_be_made_is_not_tried_again_at_once() {
    let folder = Folder::new();
    let templates = &folder.templates;
    let key = key();
    assert!(templates.may_make(&key));
    begin(templates, &key).fail("the machine ended").unwrap();
    assert!(!templates.may_make(&key));
    assert!(templates.make(&key).unwrap().is_none());
    let miss = templates.find(&key).unwrap_err().to_string();
    assert_eq!(miss, "its template was set aside: the machine ended");
    let name = key.digest().unwrap().hex();
    templates.remove(&name).unwrap();
    assert!(templates.may_make(&key));
}

#[test]
fn one_is_made_at_a_time_and_what_is_given_up_leaves_nothing() {
    let folder = Folder::new();
    let templates = &folder.templates;
    let key = key();
    let new = begin(templates, &key);
    assert!(templates.make(&numbered(2)).unwrap().is_none());
    fill(&new, &key, 4096);
    assert_eq!(folder.unfinished(), 1);
    drop(new);
    assert_eq!(folder.unfinished(), 0);
    // Nothing half is let in.
    let new = begin(templates, &key);
    (&new.state).write_all(b"state").unwrap();
    assert!(told(new.publish()).contains("another size"));
    let new = begin(templates, &key);
    new.memory.set_len(1 << 20).unwrap();
    assert!(told(new.publish()).contains("a state file of 0 bytes"));
    assert_eq!(folder.unfinished(), 0);
    assert!(templates.list().unwrap().is_empty());
    // What a killed one left goes with the next.
    fs::create_dir(folder.path("tmp/left")).unwrap();
    fs::write(folder.path("tmp/left/memory"), "x").unwrap();
    make(templates, &key);
    eventually(|| {
        templates.prune(u64::MAX).unwrap();
        (folder.unfinished() == 0).then_some(())
    });
}

/// What happens to a template's folder.
type Damage = fn(&Path);

#[test]
fn what_is_damaged_or_not_its_user_s_alone_is_not_taken() {
    let key = key();
    let damage: [(&str, Damage); 9] = [
        ("mode 0700", |path| chmod(path, 0o755)),
        ("yours alone", |path| {
            chmod(&path.join("manifest.json"), 0o644)
        }),
        ("yours alone", |path| chmod(&path.join("memory"), 0o660)),
        ("yours alone", |path| chmod(&path.join("state"), 0o404)),
        ("another size", |path| {
            rewrite(&path.join("memory"), b"short")
        }),
        ("another length", |path| {
            rewrite(&path.join("state"), b"longer than it was")
        }),
        ("version 2", |path| {
            rewrite(
                &path.join("manifest.json"),
                br#"{"version":2,"more":"than before"}"#,
            );
        }),
        ("manifest", |path| {
            rewrite(&path.join("manifest.json"), b"{")
        }),
        ("symbolic link", |path| {
            fs::rename(path.join("memory"), path.join("other")).unwrap();
            std::os::unix::fs::symlink("other", path.join("memory")).unwrap();
        }),
    ];
    for (expected, damage) in damage {
        let folder = Folder::new();
        make(&folder.templates, &key);
        damage(&folder.of("ready", &key));
        let miss = folder.templates.find(&key).unwrap_err().to_string();
        assert!(miss.starts_with("its template cannot be used: "), "{miss}");
        assert!(miss.contains(expected), "{expected}: {miss}");
        // It can be removed all the same.
        let name = key.digest().unwrap().hex();
        eventually(|| folder.templates.remove(&name).ok());
    }
    // A folder with another's name.
    let folder = Folder::new();
    make(&folder.templates, &key);
    let other = numbered(2);
    fs::rename(folder.of("ready", &key), folder.of("ready", &other)).unwrap();
    let miss = folder.templates.find(&other).unwrap_err().to_string();
    assert!(miss.contains("another key"), "{miss}");
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn rewrite(path: &Path, content: &[u8]) {
    chmod(path, 0o600);
    fs::write(path, content).unwrap();
    chmod(path, 0o400);
}
