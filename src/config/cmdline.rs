//! The kernel's command line.

use mayfly_boot::cmdline;
use mayfly_protocol::init_words;

use super::console::HostEnd;
use super::host_ends::{Host, HostNet};
use super::options::MachineOptions;
use crate::failure::{Failure, OrFail};

/// For a quick and quiet boot of any VM: the clock is known and steady, a panic ends it. The
/// initcalls that are left out are a third of what Debian's kernel does before its init:
///
/// - `jent_mod_init`: the crypto API's jitter generator, and its test of itself. The kernel's
///   own random generator does not use it; the crypto API's does without it outside FIPS mode.
/// - `ftrace_check_for_weak_functions`, and `ftrace_check_sync`, which waits for it: names of
///   functions that do not exist are sorted out when the list of ftrace is read, too.
/// - `trace_eval_init`: names of enumerations in the formats of trace events become numbers.
pub const CMDLINE_QUICK: &str = "quiet loglevel=3 panic=-1 tsc=reliable no_timer_check cryptomgr.notests \
                                 rcupdate.rcu_expedited=1 initcall_blacklist=jent_mod_init,\
                                 ftrace_check_for_weak_functions,ftrace_check_sync,trace_eval_init";
/// What we have: one serial port and no PCI; a restart is ACPI's.
const CMDLINE_DEVICES: &str = "reboot=acpi pci=off 8250.nr_uarts=1";
const CMDLINE_SERIAL: &str = "console=ttyS0";
/// The driver of the virtio console comes late, by module: until then messages
/// go to the serial port, whose output goes the same way.
const CMDLINE_VIRTIO: &str = "console=hvc0 earlyprintk=ttyS0";

impl MachineOptions {
    /// The whole command line. mayfly's own init takes any number of words behind `--`.
    pub(super) fn cmdline(
        &self,
        nets: &[Host<HostNet>],
        own_init: bool,
    ) -> Result<String, Failure> {
        let mut parts: Vec<&str> = Vec::new();
        let own = self.cmdline.as_deref();
        let mut addresses = None;
        if !self.no_default_cmdline {
            parts.extend([CMDLINE_QUICK, CMDLINE_DEVICES]);
            // Where nobody sees it, too: what a kernel that panics says last is kept.
            parts.push(
                match self.console.virtio && self.console.end != HostEnd::None {
                    true => CMDLINE_VIRTIO,
                    false => CMDLINE_SERIAL,
                },
            );
            addresses = self::addresses(nets, own.unwrap_or_default());
        }
        parts.extend(addresses.as_deref());
        parts.extend(own);
        let whole = for_init(parts.join(" "), own_init)?;
        cmdline::validate(&whole).or_config("--cmdline")?;
        Ok(whole)
    }
}

/// What the guest's network of sockets needs of the kernel's command line, if
/// that says nothing of addresses.
fn addresses(nets: &[Host<HostNet>], cmdline: &str) -> Option<String> {
    let mut words = cmdline.split_whitespace().take_while(|&word| word != "--");
    if words.any(|word| word.starts_with("ip=")) {
        return None;
    }
    let user = |(index, net): (usize, &Host<HostNet>)| {
        let user = net.config.user.as_ref()?;
        Some(user.cmdline(&format!("eth{index}")))
    };
    nets.iter().enumerate().find_map(user)
}

/// Sees to it that Linux takes a command line with all its words for init.
fn for_init(cmdline: String, own_init: bool) -> Result<String, Failure> {
    match init_words::count(cmdline.as_bytes()) {
        ..=init_words::WORDS_MAX => Ok(cmdline),
        _ if own_init => Ok(init_words::hidden(&cmdline)),
        number => Err(Failure::config(format!(
            "--cmdline: {number} words behind -- are too many: Linux gives init at most {}; \
             mayfly's own init reads all that stand behind -- --",
            init_words::WORDS_MAX
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::machine::testing::{refusal, validate};
    use super::super::{ConsoleConfig, FromKeys, NetConfig};
    use super::*;

    #[test]
    fn the_command_line_is_appended_or_replaced() {
        let config = |cmdline: &str, no_default_cmdline, console: &str| {
            validate(MachineOptions {
                cmdline: Some(cmdline.into()),
                no_default_cmdline,
                console: ConsoleConfig::from_text(console.as_ref()).unwrap(),
                ..MachineOptions::default()
            })
            .map(|config| config.spec.cmdline)
        };
        let line = config("debug", false, "stdio").unwrap();
        assert!(line.starts_with("quiet ") && line.ends_with(" console=ttyS0 debug"));
        let none = config("", false, "none").unwrap();
        assert!(none.contains("console=ttyS0"), "{none}");
        let line = config("", false, "virtio").unwrap();
        assert!(line.contains("console=hvc0") && !line.contains("console=ttyS0"));
        assert_eq!(config("debug", true, "stdio").unwrap(), "debug");
        assert!(refusal(config(&"x".repeat(2048), true, "none")).starts_with("--cmdline"));
    }

    #[test]
    fn linux_is_given_no_more_words_than_it_takes() {
        let words = |number: usize| format!("quiet -- run{}", " x".repeat(number - 1));
        for own_init in [false, true] {
            assert_eq!(for_init(words(32), own_init).unwrap(), words(32));
        }
        assert!(refusal(for_init(words(33), false)).contains("33 words behind -- are too many"));
        let hidden = for_init(words(33), true).unwrap();
        assert!(hidden.starts_with("quiet -- -- run x "), "{hidden}");
        let hidden = words(33).replacen("--", "-- --", 1);
        assert_eq!(for_init(hidden.clone(), false).unwrap(), hidden);
    }

    #[test]
    fn a_network_of_sockets_gives_its_addresses() {
        let config = |nets: &[&str], cmdline: &str, no_default_cmdline| {
            let nets = nets.iter().map(|net| NetConfig::from_text(net.as_ref()));
            let options = MachineOptions {
                nets: nets.collect::<Result<_, _>>().unwrap(),
                cmdline: Some(cmdline.into()),
                no_default_cmdline,
                ..MachineOptions::default()
            };
            validate(options).map(|config| config.spec.cmdline)
        };
        let own = "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth1:off:9.9.9.9";
        let nets = ["tap=a", "user,dns=9.9.9.9"];
        let given = config(&nets, "-- ip=x", false).unwrap();
        assert!(given.ends_with(&format!("{own} -- ip=x")), "{given}");
        assert!(!config(&nets, "ip=off", false).unwrap().contains(own));
        assert_eq!(config(&nets, "quiet", true).unwrap(), "quiet");
        assert!(!config(&nets[..1], "", false).unwrap().contains("ip="));
    }
}
