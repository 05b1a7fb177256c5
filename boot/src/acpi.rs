//! ACPI tables of a hardware-reduced platform (ACPI 6.5, sections 4.1 and 5).

use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package,
    Path, ResourceTemplate, Scope, Store,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::acpi_table::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, SDT_HEADER_LEN, bytes_of};
use crate::layout::{
    ACPI_END, ACPI_TABLES, APIC, GED_EVENTS, GED_IRQ, GED_POWER_BUTTON, GED_VM_GENERATION, IOAPIC,
    PVPANIC_PORT, RESET, RESET_VALUE, RSDP, RTC_PORT, RTC_PORT_LEN, RTC_PRESENT, SERIAL_IRQ,
    SERIAL_PORT, SERIAL_PORT_LEN, SLEEP_CONTROL, SLEEP_STATUS, SLEEP_TYPE_S5, VIRTIO_MAX,
    VIRTIO_MMIO_SIZE, VM_GENERATION,
};
use crate::wdat::wdat;

/// Integers are 64-bit from revision 2 on.
const DSDT_REVISION: u8 = 2;
const IOAPIC_ID: u8 = 0;
const GSI_BASE: u32 = 0;
const TABLE_ALIGN: u64 = 16;

/// FADT `IAPC_BOOT_ARCH` (ACPI table 5.11). ISA devices, an 8042, and
/// absent MSI would be bits 0, 1 and 3.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// A virtio-mmio device as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// The address of its registers.
    pub addr: u64,
    /// Its interrupt: an input of the I/O APIC.
    pub irq: u32,
}

/// Why the ACPI tables could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// A machine without CPUs.
    #[error("a machine needs at least one CPU")]
    NoCpus,
    /// More devices than interrupts.
    #[error("{count} virtio devices were asked for; at most {VIRTIO_MAX} are possible")]
    TooManyDevices {
        /// The number that was asked for.
        count: usize,
    },
    /// A device above 4 GiB.
    #[error("the virtio device at {0:#x} does not lie below 4 GiB")]
    DeviceAddress(u64),
    /// The tables are larger than their area.
    #[error("the tables end at {0:#x}, beyond their area")]
    TooLarge(u64),
    /// Guest memory has no room.
    #[error("writing them to guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Writes all tables, and returns the address of the root pointer.
pub fn write_tables<M: GuestMemoryBackend>(
    mem: &M,
    cpus: u8,
    virtio: &[MmioDevice],
    watchdog: bool,
) -> Result<u64, AcpiError> {
    if cpus == 0 {
        return Err(AcpiError::NoCpus);
    }
    let mut area = Area {
        mem,
        next: ACPI_TABLES,
    };
    let dsdt = area.append(&dsdt(cpus, virtio, RTC_PRESENT)?)?;
    let fadt = area.append(&fadt(dsdt, RTC_PRESENT))?;
    let madt = area.append(&madt(cpus))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if watchdog {
        xsdt.add_entry(area.append(&wdat())?);
    }
    let xsdt = area.append(&bytes_of(&xsdt))?;
    mem.write_slice(&bytes_of(&Rsdp::new(OEM_ID, xsdt)), GuestAddress(RSDP))?;
    Ok(RSDP)
}

/// The area of guest memory that is filled with tables.
struct Area<'a, M> {
    mem: &'a M,
    next: u64,
}

impl<M: GuestMemoryBackend> Area<'_, M> {
    fn append(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let at = self.next;
        let end = at + table.len() as u64;
        if end > ACPI_END {
            return Err(AcpiError::TooLarge(end));
        }
        self.mem.write_slice(table, GuestAddress(at))?;
        self.next = end.next_multiple_of(TABLE_ALIGN);
        Ok(at)
    }
}

fn fadt(dsdt: u64, rtc: bool) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton) // no fixed-hardware buttons, …
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc) // … nor alarm status
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    let mut boot_arch = VGA_NOT_PRESENT;
    if !rtc {
        boot_arch |= CMOS_RTC_NOT_PRESENT;
    }
    fadt.iapc_boot_arch = boot_arch.into();
    fadt.reset_reg = port(RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    bytes_of(&fadt.finalize())
}

fn port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8, // bits
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}

fn madt(cpus: u8) -> Vec<u8> {
    // The flags stay 0: there is no pair of 8259 to mask (PCAT_COMPAT).
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(APIC),
    );
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IOAPIC_ID, IOAPIC, GSI_BASE));
    bytes_of(&madt)
}

fn dsdt(cpus: u8, virtio: &[MmioDevice], rtc: bool) -> Result<Vec<u8>, AcpiError> {
    if virtio.len() > VIRTIO_MAX {
        let count = virtio.len();
        return Err(AcpiError::TooManyDevices { count });
    }
    let mut devices = Vec::new();
    for cpu in 0..cpus {
        devices.extend(processor(cpu));
    }
    devices.extend(serial());
    if rtc {
        devices.extend(clock());
    }
    devices.extend(power_button());
    devices.extend(generation_id());
    devices.extend(events());
    devices.extend(panic_device());
    for (uid, device) in (0u8..).zip(virtio) {
        devices.extend(virtio_mmio(uid, device)?);
    }

    let mut aml = bytes_of(&Name::new(
        "_S5_".into(),
        &Package::new(vec![&SLEEP_TYPE_S5]),
    ));
    aml.extend(bytes_of(&Scope::new("_SB_".into(), vec![&Raw(devices)])));

    let mut dsdt = Sdt::new(
        *b"DSDT",
        SDT_HEADER_LEN,
        DSDT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&aml);
    Ok(dsdt.as_slice().to_vec())
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn processor(cpu: u8) -> Vec<u8> {
    bytes_of(&Device::new(
        Path::new(&format!("C{cpu:03}")),
        vec![
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &cpu),
        ],
    ))
}

fn serial() -> Vec<u8> {
    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORT_LEN);
    bytes_of(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&ports, &interrupt(SERIAL_IRQ)]),
            ),
        ],
    ))
}

fn clock() -> Vec<u8> {
    let ports = IO::new(RTC_PORT, RTC_PORT, 1, RTC_PORT_LEN);
    bytes_of(&Device::new(
        "RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
        ],
    ))
}

const POWER_BUTTON: &str = "PWRB";
const GENERATION_ID: &str = "VGEN";

/// A control-method power button (ACPI 6.5, 4.8.2.2.1.2).
fn power_button() -> Vec<u8> {
    bytes_of(&Device::new(
        POWER_BUTTON.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &0u8),
        ],
    ))
}

/// Microsoft's "Virtual Machine Generation ID": drivers know it by its
/// compatible IDs, and `ADDR` tells them the address in two halves.
fn generation_id() -> Vec<u8> {
    let [a, b, c, d, e, f, g, h] = VM_GENERATION.to_le_bytes();
    let (low, high) = (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    );
    bytes_of(&Device::new(
        GENERATION_ID.into(),
        vec![
            &Name::new("_HID".into(), &"MFLY0001"),
            &Name::new(
                "_CID".into(),
                &Package::new(vec![&"VMGENCTR", &"VM_Gen_Counter"]),
            ),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    ))
}

/// The generic event device (ACPI 6.5, 5.6.9): tells of what its register
/// says has happened.
fn events() -> Vec<u8> {
    /// Device-specific: the button is pressed, the identifier has changed.
    const HAPPENED: u8 = 0x80;
    let (button, generation) = (Path::new(POWER_BUTTON), Path::new(GENERATION_ID));
    let register = Path::new("EVTS");
    let pressed = And::new(&Local(1), &Local(0), &GED_POWER_BUTTON);
    let renewed = And::new(&Local(1), &Local(0), &GED_VM_GENERATION);
    bytes_of(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&interrupt(GED_IRQ)]),
            ),
            &OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &GED_EVENTS, &1u8),
            &Field::new(
                "EREG".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", u8::BITS as usize)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    // The one read, as it clears.
                    &Store::new(&Local(0), &register),
                    &If::new(&pressed, vec![&Notify::new(&button, &HAPPENED)]),
                    &If::new(&renewed, vec![&Notify::new(&generation, &HAPPENED)]),
                ],
            ),
        ],
    ))
}

/// QEMU's `docs/specs/pvpanic`.
fn panic_device() -> Vec<u8> {
    let port = IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1);
    bytes_of(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    ))
}

fn virtio_mmio(uid: u8, device: &MmioDevice) -> Result<Vec<u8>, AcpiError> {
    let addr = u32::try_from(device.addr).map_err(|_| AcpiError::DeviceAddress(device.addr))?;
    let registers = Memory32Fixed::new(true, addr, VIRTIO_MMIO_SIZE);
    Ok(bytes_of(&Device::new(
        Path::new(&format!("V{uid:03}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &uid),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&registers, &interrupt(device.irq)]),
            ),
        ],
    )))
}

/// An interrupt that is edge-triggered, active high and exclusive.
fn interrupt(gsi: u32) -> Interrupt {
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge, active_low, shared, gsi)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::tests::memory;
    use crate::layout::{virtio_address, virtio_irq};
    use vm_memory::GuestMemoryMmap;

    fn devices(count: usize) -> Vec<MmioDevice> {
        (0..count)
            .map(|i| MmioDevice {
                addr: virtio_address(i).unwrap(),
                irq: virtio_irq(i).unwrap(),
            })
            .collect()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn read(mem: &GuestMemoryMmap, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    fn table(mem: &GuestMemoryMmap, addr: u64) -> Vec<u8> {
        let len: u32 = mem.read_obj(GuestAddress(addr + 4)).unwrap();
        read(mem, addr, len as usize)
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn all_tables_are_found_from_the_root_and_sum_to_zero() {
        let mem = memory(1 << 20);
        let rsdp = write_tables(&mem, 32, &devices(VIRTIO_MAX), true).unwrap();
        let root = read(&mem, rsdp, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));

        let xsdt = table(&mem, u64_at(&root, 24));
        let fadt = table(&mem, u64_at(&xsdt, 36));
        let madt = table(&mem, u64_at(&xsdt, 44));
        let wdat = table(&mem, u64_at(&xsdt, 52));
        let dsdt = table(&mem, u64_at(&fadt, 140));
        for (table, signature) in [
            (&xsdt, b"XSDT"),
            (&fadt, b"FACP"),
            (&madt, b"APIC"),
            (&wdat, b"WDAT"),
            (&dsdt, b"DSDT"),
        ] {
            assert_eq!(&table[..4], signature);
            assert_eq!(sum(table), 0);
        }
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        assert_eq!((fadt.len(), fadt[8]), (276, 6));
        assert_eq!(u64_at(&fadt, 116 + 4), u64::from(RESET));
        assert_eq!(u64_at(&fadt, 244 + 4), u64::from(SLEEP_CONTROL));
        assert_eq!(u64_at(&fadt, 256 + 4), u64::from(SLEEP_STATUS));
        // For a look at them with iasl -d.
        if let Ok(folder) = std::env::var("MAYFLY_DUMP_ACPI") {
            for (name, table) in [
                ("xsdt", xsdt),
                ("facp", fadt),
                ("apic", madt),
                ("wdat", wdat),
                ("dsdt", dsdt),
            ] {
                std::fs::write(format!("{folder}/{name}.aml"), table).unwrap();
            }
        }
    }

    #[test]
    fn without_a_watchdog_there_is_no_table_for_it() {
        let mem = memory(1 << 20);
        let rsdp = write_tables(&mem, 1, &[], false).unwrap();
        let xsdt = table(&mem, u64_at(&read(&mem, rsdp, 36), 24));
        assert_eq!(xsdt.len(), 36 + 2 * 8);
    }

    #[test]
    fn the_event_method_reads_once_and_notifies() {
        let bytes = events();
        let holds = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        // Store (EVTS, Local0); If (And (Local0, 1, Local1)) Notify (PWRB, 0x80) …
        assert!(holds(b"\x70EVTS\x60\xa0"));
        assert!(holds(b"\x7b\x60\x01\x61\x86PWRB\x0a\x80"));
        assert!(holds(b"\x7b\x60\x0a\x02\x61\x86VGEN\x0a\x80"));
        assert_eq!(
            bytes.windows(4).filter(|window| window == b"EVTS").count(),
            2
        );
    }

    #[test]
    fn refuses_impossible_machines() {
        let mem = memory(1 << 20);
        assert!(matches!(
            write_tables(&mem, 0, &[], false),
            Err(AcpiError::NoCpus)
        ));
        let many = vec![devices(1)[0]; VIRTIO_MAX + 1];
        assert!(matches!(
            write_tables(&mem, 1, &many, false),
            Err(AcpiError::TooManyDevices { .. })
        ));
        let high = MmioDevice {
            addr: 1 << 32,
            irq: 5,
        };
        assert!(matches!(
            write_tables(&mem, 1, &[high], false),
            Err(AcpiError::DeviceAddress(_))
        ));
        assert!(write_tables(&memory(0x1000), 1, &[], false).is_err());
        assert!(write_tables(&mem, u8::MAX, &devices(VIRTIO_MAX), true).is_ok());
    }
}
