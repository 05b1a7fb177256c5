//! State files, exports, and what their manifests say.

use mayfly::snapshot::format::{FormatError, Reader, Section, Writer};
use mayfly::snapshot::kvm::KvmState;
use mayfly::snapshot::mailbox::{deliver, room};
use mayfly::snapshot::store::{TemplateManifest, parse_export, parse_manifest};
use mayfly_protocol::mailbox::{Mail, PAGE};
use ring::digest::{SHA256, digest};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

// The layout, from the module's table.
const HEADER: usize = 16;
const ENTRY: usize = 64;
const ENTRY_LEN: usize = 28;
const ENTRY_SUM: usize = 32;
const SUM: usize = 32;

/// A file as it is, and with the digests that it should have.
pub fn state_file(bytes: &[u8]) {
    // By chance none has the digests of anything.
    let _ = read(bytes);
    let mut repaired = bytes.to_vec();
    repair(&mut repaired);
    if let Ok(state) = read(&repaired) {
        let mut writer = Writer::new();
        writer.add(&state).unwrap();
        let again = read(&writer.finish()).unwrap();
        assert_eq!(
            again, state,
            "it is another when it was written and read again"
        );
    }
    let mut writer = Writer::new();
    if writer
        .add_content(KvmState::NAME, KvmState::VERSION, bytes)
        .is_ok()
    {
        let _ = read(&writer.finish());
    }
}

fn read(bytes: &[u8]) -> Result<KvmState, FormatError> {
    let mut reader = Reader::parse(bytes)?;
    let state = reader.take()?;
    reader.finish()?;
    Ok(state)
}

/// Puts the right digests into what may be a state file.
fn repair(bytes: &mut [u8]) {
    let Some(count) = bytes.get(10..12) else {
        return;
    };
    let count = usize::from(u16::from_le_bytes([count[0], count[1]]));
    let table = HEADER + count * ENTRY;
    let mut content = table + SUM;
    for entry in (0..count).map(|entry| HEADER + entry * ENTRY) {
        let Some(len) = bytes.get(entry + ENTRY_LEN..entry + ENTRY_SUM) else {
            return;
        };
        let end = content + u32::from_le_bytes(len.try_into().unwrap()) as usize;
        put_digest(bytes, content..end, entry + ENTRY_SUM);
        content = end;
    }
    put_digest(bytes, 0..table, table);
}

fn put_digest(bytes: &mut [u8], of: std::ops::Range<usize>, at: usize) {
    let Some(sum) = bytes.get(of).map(|content| digest(&SHA256, content)) else {
        return;
    };
    if let Some(place) = bytes.get_mut(at..at + SUM) {
        place.copy_from_slice(sum.as_ref());
    }
}

/// A guest whose memory has numbers in one of its pages, and mail for it.
pub fn mailbox(address: u64, numbers: &[u64], frames: Vec<u8>) {
    const AT: u64 = 0x3000;
    const SIZE: usize = 0x10000;
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE)]).unwrap();
    let header = [u64::from_le_bytes(*b"mayfly-m"), 1];
    // Most have a good beginning.
    let header = header.iter().take(if address & 1 == 0 { 2 } else { 0 });
    for (number, at) in header.chain(numbers).take(PAGE / 8).zip((AT..).step_by(8)) {
        memory.write_obj(*number, GuestAddress(at)).unwrap();
    }
    let address = if address & 2 == 0 { AT } else { address };
    let mail = Mail {
        frames,
        ..Mail::default()
    };
    let room = room(&memory, address).ok();
    let delivered = deliver(&memory, address, Some(&mail));
    let len = mail.to_bytes().unwrap().len();
    assert!(delivered.is_err() || room.is_some_and(|room| len <= room));
}

/// An export as it is, and one whose manifest has the right digest: what is before the first
/// NUL is the manifest, and what is behind it the blocks.
pub fn export(bytes: &[u8]) {
    let _ = parse_export(bytes);
    let _ = parse_manifest::<TemplateManifest>(bytes, 1);
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let (manifest, blocks) = (parts.next().unwrap(), parts.next().unwrap_or_default());
    let Ok(taken) = parse_export(&forged(manifest, blocks)) else {
        return;
    };
    taken.check().unwrap();
    for (name, part) in taken.parts() {
        assert!(!name.contains('/') && !name.starts_with('.'), "{name}");
        assert!(name != "state" || part.bytes <= 16 << 20);
    }
    let text = serde_json::to_vec(&taken).unwrap();
    let again = parse_export(&forged(&text, blocks)).unwrap();
    assert_eq!(
        again, taken,
        "it is another when it was written and read again"
    );
}

fn forged(manifest: &[u8], blocks: &[u8]) -> Vec<u8> {
    let mut file = b"mayflySN\x01\0\0\0".to_vec();
    file.extend((manifest.len() as u32).to_le_bytes());
    file.extend(manifest);
    let sum = digest(&SHA256, &file);
    [&file, sum.as_ref(), blocks].concat()
}
