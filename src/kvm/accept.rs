//! `--accept-kvm`: the user vouches for a KVM that the probe finds to emulate.

use clap::builder::FalseyValueParser;

/// Whether a KVM that seems to emulate guest code is used all the same.
#[derive(clap::Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AcceptKvm {
    /// Use this host's KVM even if it seems to emulate guest code, for hosts whose KVM
    /// runs certain guest kernels natively (PVM)
    #[arg(long, env = "MAYFLY_ACCEPT_KVM", hide_env_values = true, value_parser = FalseyValueParser::new())]
    pub accept_kvm: bool,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Words {
        #[command(flatten)]
        accept: AcceptKvm,
    }

    #[test]
    fn the_flag_stands_alone() {
        let accepts = |words: &[&str]| {
            let words = Words::try_parse_from([&["mayfly"], words].concat());
            words.map(|words| words.accept.accept_kvm)
        };
        assert!(accepts(&["--accept-kvm"]).unwrap());
        assert!(accepts(&["--accept-kvm=0"]).is_err());
    }
}
