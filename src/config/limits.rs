//! Rates: `bw=10M,bw-burst=50M,iops=500,iops-burst=1000`.

use std::num::NonZeroU64;

use mayfly_devices::rate_limiter::{Limits, Rate};

use super::keys::Keys;
use super::size::parse_size;

/// Takes the keys of limits. Bandwidth is in bytes, with the units of sizes;
/// operations are called `iops` on disks and `pps` on networks.
pub fn take_limits(keys: &mut Keys, operations: &str) -> Result<Limits, String> {
    let bytes = |text: &str| parse_size(text, 0);
    let count = |text: &str| text.parse().map_err(|_| "not a number".to_owned());
    Ok(Limits {
        bandwidth: take_rate(keys, "bw", bytes)?,
        operations: take_rate(keys, operations, count)?,
    })
}

fn take_rate(
    keys: &mut Keys,
    key: &str,
    parse: impl Fn(&str) -> Result<u64, String>,
) -> Result<Option<Rate>, String> {
    let burst_key = format!("{key}-burst");
    let mut take = |key: &str| -> Result<Option<u64>, String> {
        let value = keys.value(key)?;
        let number = value.as_deref().map(&parse).transpose();
        number.map_err(|error| format!("{key}={}: {error}", value.unwrap_or_default()))
    };
    let (per_second, burst) = (take(key)?, take(&burst_key)?);
    match (per_second.map(NonZeroU64::new), burst) {
        (Some(Some(per_second)), burst) => Ok(Some(Rate {
            per_second,
            burst: burst.unwrap_or(0),
        })),
        (Some(None), _) => Err(format!(
            "{key}=0 would stop the device; leave {key} out for no limit"
        )),
        (None, Some(_)) => Err(format!("{burst_key} needs {key}")),
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(text: &str) -> Result<Limits, String> {
        let mut keys = Keys::parse(text, "bw=10M");
        let limits = take_limits(&mut keys, "iops")?;
        keys.finish().map(|()| limits)
    }

    #[test]
    fn rates_have_units_and_bursts() {
        let all = limits("bw=10M,iops=500,iops-burst=7").unwrap();
        let (bandwidth, operations) = (all.bandwidth.unwrap(), all.operations.unwrap());
        assert_eq!((bandwidth.per_second.get(), bandwidth.burst), (10 << 20, 0));
        assert_eq!((operations.per_second.get(), operations.burst), (500, 7));
        let one = limits("bw=1000,bw-burst=1G").unwrap();
        assert_eq!(one.bandwidth.unwrap().burst, 1 << 30);
        assert_eq!(one.operations, None);
        for (text, reason) in [
            ("bw=0", "would stop"),
            ("iops=0", "would stop"),
            ("bw-burst=1M", "needs bw"),
            ("iops-burst=1", "needs iops"),
            ("iops=1K", "not a number"),
            ("iops=-1", "not a number"),
            ("bw=fast", "bw=fast: "),
            ("bw", "no value"),
            ("pps=1", "not understood"),
        ] {
            let message = limits(text).unwrap_err();
            assert!(message.contains(reason), "{text}: {message}");
        }
    }
}
