//! What all ACPI tables have in common (ACPI 6.5, section 5.2.6).

use acpi_tables::Aml;

pub(crate) const OEM_ID: [u8; 6] = *b"MAYFLY";
pub(crate) const OEM_TABLE_ID: [u8; 8] = *b"MAYFLYVM";
pub(crate) const OEM_REVISION: u32 = 1;
/// The length of a table's header in bytes.
pub(crate) const SDT_HEADER_LEN: u32 = 36;

/// A table as it lies in memory.
pub(crate) fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}
