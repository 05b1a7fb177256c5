//! What users write: files, flags, names.

use std::str::FromStr;

use clap::Parser;
use mayfly::config::{
    BalloonConfig, ChannelConfig, ConsoleConfig, DiskConfig, FromKeys, GuestFiles, HostFacts, Keys,
    NetConfig, RawConfig, VsockConfig, parse_size,
};
use mayfly::logging::LogConfig;
use mayfly::net::cidr::Cidr;
use mayfly::net::egress::rule::Rule;
use mayfly::net::publish::Publish;
use mayfly::run::{Options, Plan};
use mayfly::spec::{MemorySpec, WatchdogAction};
use mayfly_image::{ImageConfig, Reference, RunConfig, fuzzing};

/// A file of `--config`.
pub fn toml(text: &str) {
    match RawConfig::from_toml(text) {
        Ok(raw) => {
            let guest = GuestFiles::named("k".as_ref(), None);
            if let Ok(options) = raw.parse() {
                let _ = options.validate(guest, &HostFacts::default());
            }
        }
        Err(refusal) => assert!(!refusal.contains('\n'), "{refusal:?}"),
    }
}

fn parse<T: FromStr>(text: &str) {
    let _ = text.parse::<T>();
}

/// The value of a flag, of whichever; in lines, those of `mayfly run`.
pub fn flags(text: &str) {
    parse::<BalloonConfig>(text);
    parse::<ChannelConfig>(text);
    parse::<Cidr>(text);
    parse::<ConsoleConfig>(text);
    parse::<DiskConfig>(text);
    parse::<LogConfig>(text);
    let _ = MemorySpec::from_text(text.as_ref());
    parse::<NetConfig>(text);
    parse::<Publish>(text);
    parse::<Rule>(text);
    parse::<VsockConfig>(text);
    let _ = WatchdogAction::from_text(text.as_ref());
    let _ = parse_size(text, 20);
    let kept = Keys::parse(&format!("key={}", text.replace(',', ",,")), "").value("key");
    // An empty value is refused.
    assert!(text.is_empty() || kept.unwrap().as_deref() == Some(text));
    run(text);
}

/// The arguments of `mayfly run`.
#[derive(clap::Parser)]
struct Run {
    #[command(flatten)]
    options: Options,
}

/// A line each: arguments, or what an image says.
fn run(text: &str) {
    let mut image = RunConfig::default();
    let mut arguments = vec!["run"];
    for line in text.lines() {
        let (word, value) = line.split_once(' ').unwrap_or((line, ""));
        let value = value.to_owned();
        match word {
            "CMD" => image.cmd.push(value),
            "ENV" => image.env.push(value),
            "USER" => image.user = value,
            "HOSTNAME" => image.hostname = value,
            "STOPSIGNAL" => image.stop_signal = value,
            "VOLUME" => image.volumes.push(value),
            "WORKDIR" => image.working_dir = value,
            _ => arguments.push(line),
        }
    }
    if let Ok(Run { mut options }) = Run::try_parse_from(arguments) {
        // They would be read, whatever they are.
        options.environment_files.clear();
        let _ = Plan::new(&options, &image);
    }
}

/// An image's name, its configuration, or its manifest.
pub fn image_texts(text: &[u8]) {
    if let Ok(name) = std::str::from_utf8(text)
        && let Ok(reference) = name.parse::<Reference>()
    {
        for name in [reference.to_string(), reference.familiar()] {
            assert_eq!(name.parse::<Reference>().unwrap(), reference, "{name}");
        }
        // It becomes part of URLs and of paths.
        assert!(
            !reference
                .repository
                .split('/')
                .any(|part| matches!(part, "" | "." | ".."))
        );
    }
    fuzzing::is_manifest(text);
    if let Ok(config) = serde_json::from_slice::<ImageConfig>(text) {
        let again = serde_json::to_vec(&config).unwrap();
        assert_eq!(
            serde_json::from_slice::<ImageConfig>(&again).unwrap(),
            config
        );
        let options = Options::default();
        let _ = Plan::new(&options, &config.config);
    }
}
