//! Listens for the power button: the kernel multicasts ACPI's events over
//! generic netlink (Linux' `drivers/acpi/event.c`).

#![allow(unsafe_code, reason = "netlink")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::system;

/// `genlmsghdr` behind `nlmsghdr`, and the attributes behind both.
const HEADER_LEN: usize = 16;
const ATTRIBUTES: usize = HEADER_LEN + 4;
const ATTRIBUTE_HEADER_LEN: usize = 4;
const ALIGN: usize = 4;
/// Flags of an attribute's type.
const TYPE_MASK: u16 = 0x3fff;

const FAMILY: &[u8] = b"acpi_event\0";
const ACPI_GENL_ATTR_EVENT: u16 = 1;
/// What `acpi_genl_event` begins with, for the button.
const DEVICE_CLASS: &[u8] = b"button/power";

/// Shuts down when the button is pressed. Returns if there can be none: the
/// kernel is without ACPI.
pub fn watch() {
    let Ok(socket) = subscribe() else { return };
    let mut buffer = [0; 1024];
    loop {
        match receive(&socket, &mut buffer) {
            Ok(message) if is_power_button(message) => system::shut_down(),
            Ok(_) => {}
            // Interrupted, or there were more events than the kernel keeps.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ENOBUFS)) => {}
            Err(_) => return,
        }
    }
}

fn is_power_button(message: &[u8]) -> bool {
    attribute(message.get(ATTRIBUTES..), ACPI_GENL_ATTR_EVENT)
        .is_some_and(|event| event.starts_with(DEVICE_CLASS))
}

/// Joins the kernel's group for ACPI events.
fn subscribe() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_GENERIC)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, that nothing else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let group = group(&socket)?;
    // SAFETY: passes a live integer and its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_NETLINK,
            libc::NETLINK_ADD_MEMBERSHIP,
            (&raw const group).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Asks the kernel for the group's number.
fn group(socket: &OwnedFd) -> io::Result<u32> {
    let request = family_request();
    // SAFETY: the buffer is live; without an address, the kernel is meant.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            request.as_ptr().cast(),
            request.len(),
            0,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut buffer = [0; 4096];
    let answer = receive(socket, &mut buffer)?;
    group_of(answer).ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn family_request() -> Vec<u8> {
    let attribute_len = ATTRIBUTE_HEADER_LEN + FAMILY.len();
    let len = ATTRIBUTES + attribute_len.next_multiple_of(ALIGN);
    let mut request = Vec::with_capacity(len);
    request.extend((len as u32).to_ne_bytes());
    request.extend((libc::GENL_ID_CTRL as u16).to_ne_bytes());
    request.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request.extend([0; 8]); // sequence number and port
    request.extend([libc::CTRL_CMD_GETFAMILY as u8, 1, 0, 0]);
    request.extend((attribute_len as u16).to_ne_bytes());
    request.extend((libc::CTRL_ATTR_FAMILY_NAME as u16).to_ne_bytes());
    request.extend(FAMILY);
    request.resize(len, 0);
    request
}

/// The number of the family's first group, which is its only one.
fn group_of(answer: &[u8]) -> Option<u32> {
    const FIRST: u16 = 1;
    let groups = attribute(
        answer.get(ATTRIBUTES..),
        libc::CTRL_ATTR_MCAST_GROUPS as u16,
    );
    let group = attribute(groups, FIRST);
    let number = attribute(group, libc::CTRL_ATTR_MCAST_GRP_ID as u16)?;
    Some(u32::from_ne_bytes(number.try_into().ok()?))
}

/// The content of the first attribute of a type.
fn attribute(attributes: Option<&[u8]>, wanted: u16) -> Option<&[u8]> {
    let mut rest = attributes?;
    loop {
        let [a, b, c, d] = *rest.first_chunk::<ATTRIBUTE_HEADER_LEN>()?;
        let len = usize::from(u16::from_ne_bytes([a, b]));
        let kind = u16::from_ne_bytes([c, d]) & TYPE_MASK;
        let content = rest.get(ATTRIBUTE_HEADER_LEN..len)?;
        if kind == wanted {
            return Some(content);
        }
        rest = rest.get(len.next_multiple_of(ALIGN)..)?;
    }
}

fn receive<'a>(socket: &OwnedFd, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    // SAFETY: writes at most as much as the live buffer holds.
    let len = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            0,
        )
    };
    match usize::try_from(len) {
        Ok(len) => Ok(buffer.get(..len).unwrap_or_default()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(kind: u16, content: &[u8]) -> Vec<u8> {
        let len = ATTRIBUTE_HEADER_LEN + content.len();
        let mut bytes = (len as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(content);
        bytes.resize(len.next_multiple_of(ALIGN), 0);
        bytes
    }

    #[test]
    fn attributes_are_found_and_their_lengths_checked() {
        let all = [put(1, b"a"), put(2 | 0x8000, b"bcdef"), put(3, b"")].concat();
        assert_eq!(attribute(Some(&all), 1), Some(&b"a"[..]));
        assert_eq!(attribute(Some(&all), 2), Some(&b"bcdef"[..]));
        assert_eq!(attribute(Some(&all), 3), Some(&b""[..]));
        assert_eq!(attribute(Some(&all), 4), None);
        for wrong in [&[0; 4][..], &[3, 0, 1, 0], &[9, 0, 1, 0, 0], &[4, 0]] {
            assert_eq!(attribute(Some(wrong), 1), None);
        }
    }

    #[test]
    fn the_button_is_told_from_others() {
        let event = |class: &[u8]| {
            let mut content = class.to_vec();
            content.resize(44, 0);
            [vec![0; ATTRIBUTES], put(ACPI_GENL_ATTR_EVENT, &content)].concat()
        };
        assert!(is_power_button(&event(b"button/power")));
        assert!(!is_power_button(&event(b"button/lid")));
        assert!(!is_power_button(b"short"));
    }

    /// Any Linux has the control family; one without ACPI refuses this one.
    #[test]
    fn the_kernel_understands_the_request() {
        let number = put(libc::CTRL_ATTR_MCAST_GRP_ID as u16, &7u32.to_ne_bytes());
        let groups = put(libc::CTRL_ATTR_MCAST_GROUPS as u16, &put(1, &number));
        let answer = [vec![0; ATTRIBUTES], groups].concat();
        assert_eq!(group_of(&answer), Some(7));
        if let Err(error) = subscribe() {
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
        }
    }
}
