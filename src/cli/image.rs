//! `mayfly image`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::SystemTime;

use clap::Subcommand;
use mayfly_image::{Image, Limits, PullOptions, Reference, RunConfig, Store};
use serde_json::json;

use super::output;
use crate::config::parse_size;
use crate::data_folder::data_folder;
use crate::failure::{Failure, OrFail};
use crate::progress_bars::Bars;

const EXAMPLES: &str = "\
Examples:
  mayfly image pull alpine
  mayfly image load saved.tar
  docker save app | mayfly image load
  mayfly image import rootfs.tar demo --cmd /bin/sh
  mayfly image ls
  mayfly image rm demo";

/// Raw flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Bring an image from a registry
    Pull {
        /// [REGISTRY/]NAME[:TAG][@DIGEST]
        #[arg(value_name = "IMAGE")]
        name: String,
        /// Ask the registry without encryption (one on this host may always be)
        #[arg(long)]
        plain_http: bool,
        /// How long it may take: 90s, 30m, 2h. What has come is kept for the next pull
        #[arg(long, value_name = "TIME", default_value = "2h")]
        timeout: String,
        #[command(flatten)]
        size: MaxSize,
    },
    /// Make an image of a root file system: a tar archive or a folder
    Import(Box<Import>),
    /// Add the images in an archive of `docker save` or `podman save`, or in an OCI layout
    Load {
        /// The archive (plain or compressed), or the layout's folder; `-`, or nothing, for
        /// standard input
        source: Option<PathBuf>,
        /// The archive, as `docker load` takes it
        #[arg(long, short, value_name = "FILE", conflicts_with = "source")]
        input: Option<PathBuf>,
        /// What the image is called, if it is the only one there
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        #[command(flatten)]
        size: MaxSize,
    },
    /// List images
    #[command(alias = "list")]
    Ls {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
        /// Print IDs only
        #[arg(long, short, conflicts_with = "json")]
        quiet: bool,
    },
    /// Print all there is to know about images, as JSON
    Inspect {
        /// Names or IDs
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Remove names, and images with their last name
    Rm {
        /// Names or IDs
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Remove images without a name, and what is left of pulls that were given up
    Prune {},
}

#[derive(clap::Args)]
struct Import {
    /// A tar archive (plain or compressed; `-` for standard input), or a folder
    source: PathBuf,
    /// What the image is called: NAME or NAME:TAG
    name: String,
    /// What runs if nothing else is said: a line for the shell, or a JSON list of words
    #[arg(long, value_name = "CMD")]
    cmd: Option<String>,
    /// What always runs
    #[arg(long, value_name = "CMD")]
    entrypoint: Option<String>,
    /// A variable of the environment (repeatable)
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Where it runs
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
    /// As whom: USER or USER:GROUP, names or numbers
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// A port that it serves, such as 80/tcp (repeatable)
    #[arg(long, value_name = "PORT")]
    expose: Vec<String>,
    /// A folder that holds data (repeatable)
    #[arg(long, value_name = "DIR")]
    volume: Vec<String>,
    /// The signal that asks it to end
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    /// A label (repeatable)
    #[arg(long, value_name = "NAME=VALUE")]
    label: Vec<String>,
    #[command(flatten)]
    size: MaxSize,
}

#[derive(clap::Args)]
struct MaxSize {
    /// What an image's files may have together, such as 200G [default: 64G, and 200 times
    /// an archive's size where that unpacks to more than 1G of other than zeroes]
    #[arg(long, value_name = "SIZE")]
    max_size: Option<String>,
}

impl MaxSize {
    /// The store, with this limit.
    fn limit(&self, store: Store, limits: Limits) -> Result<Store, Failure> {
        let Some(text) = &self.max_size else {
            return Ok(store.with_limits(limits));
        };
        let size = parse_size(text, 0);
        let size = size.map_err(|error| Failure::config(format!("--max-size {text}: {error}")))?;
        Ok(store.with_limits(limits.with_size(size)))
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let store = Store::open(&data_folder()?)?;
    match args.verb {
        Verb::Pull {
            name,
            plain_http,
            timeout,
            size,
        } => {
            let reference = name.parse().or_config("image pull")?;
            let limits = Limits::default().with_time(crate::run::time(&timeout)?);
            let store = size.limit(store, limits)?;
            let image = store.pull(&reference, &PullOptions { plain_http }, &Bars::new())?;
            output::print(&image.id.to_string())?;
        }
        Verb::Import(args) => {
            let store = args.size.limit(store, Limits::default())?;
            import(&store, *args)?;
        }
        Verb::Load {
            source,
            input,
            name,
            size,
        } => {
            let store = size.limit(store, Limits::default())?;
            let source = source.or(input).unwrap_or_else(|| "-".into());
            let name: Option<Reference> = name
                .map(|name| name.parse().or_config("--name"))
                .transpose()?;
            let images = store.load(&source, name.as_ref(), &Bars::new())?;
            images.iter().try_for_each(added)?;
        }
        Verb::Ls { json, quiet } => list(&store, json, quiet)?,
        Verb::Inspect { images } => inspect(&store, &images)?,
        Verb::Rm { images } => {
            for name in images {
                store
                    .remove(&name)?
                    .iter()
                    .try_for_each(|line| output::print(line))?;
            }
        }
        Verb::Prune {} => {
            let pruned = store.prune()?;
            for id in &pruned.images {
                output::print(&format!("removed {id}"))?;
            }
            output::print(&format!("freed {}", bytes(pruned.bytes)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Words as Docker takes them: a JSON list, or a line for the shell.
fn words(flag: &str, text: &str) -> Result<Vec<String>, Failure> {
    match text.trim_start().starts_with('[') {
        true => serde_json::from_str(text).or_config(format_args!("{flag} {text}")),
        false => Ok(vec!["/bin/sh".into(), "-c".into(), text.into()]),
    }
}

fn pair(flag: &str, text: String) -> Result<String, Failure> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text),
        _ => Err(Failure::config(format!("{flag} {text}: write NAME=VALUE"))),
    }
}

fn import(store: &Store, args: Import) -> Result<(), Failure> {
    let name: Reference = args.name.parse().or_config("image import")?;
    if name.digest.is_some() {
        return Err(Failure::config(format!(
            "{name}: a digest cannot be given to an image"
        )));
    }
    let list = |flag, text: Option<String>| text.map_or(Ok(Vec::new()), |text| words(flag, &text));
    let pairs = |flag, all: Vec<String>| -> Result<Vec<String>, Failure> {
        all.into_iter().map(|text| pair(flag, text)).collect()
    };
    let labels = pairs("--label", args.label)?;
    let config = RunConfig {
        user: args.user.unwrap_or_default(),
        exposed_ports: args.expose,
        env: pairs("--env", args.env)?,
        entrypoint: list("--entrypoint", args.entrypoint)?,
        cmd: list("--cmd", args.cmd)?,
        volumes: args.volume,
        working_dir: args.workdir.unwrap_or_default(),
        labels: labels
            .iter()
            .filter_map(|label| label.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        stop_signal: args.stop_signal.unwrap_or_default(),
        ..RunConfig::default()
    };
    let image = store.import(&args.source, Some(&name), config, &Bars::new())?;
    added(&image)
}

/// Tells of an image that came.
fn added(image: &Image) -> Result<(), Failure> {
    output::print(&image.id.to_string())?;
    let mut names = image.names.keys();
    names.try_for_each(|name| output::print(&format!("named {}", name.familiar())))
}

fn list(store: &Store, json: bool, quiet: bool) -> Result<(), Failure> {
    let images = store.list()?;
    if json {
        let all: Vec<_> = images.iter().map(brief).collect();
        return output::print_json(&all);
    }
    if quiet {
        return images
            .iter()
            .try_for_each(|image| output::print(&image.id.to_string()));
    }
    output::print(&format!(
        "{:<40} {:<12} {:>6} {:>10} {:>8}",
        "NAME", "ID", "LAYERS", "SIZE", "STORED"
    ))?;
    let mut rows: Vec<(String, &Image)> = Vec::new();
    for image in &images {
        match image.names.is_empty() {
            true => rows.push(("<none>".into(), image)),
            false => rows.extend(image.names.keys().map(|name| (name.familiar(), image))),
        }
    }
    rows.sort_by(|one, other| one.0.cmp(&other.0));
    for (name, image) in rows {
        output::print(&format!(
            "{name:<40} {:<12} {:>6} {:>10} {:>8}",
            image.id.hex().get(..12).unwrap_or_default(),
            image.config.rootfs.diff_ids.len(),
            bytes(image.size),
            age(image.stored),
        ))?;
    }
    Ok(())
}

fn brief(image: &Image) -> serde_json::Value {
    let seconds = image.stored.duration_since(SystemTime::UNIX_EPOCH);
    json!({
        "id": image.id,
        "names": image.names.keys().map(Reference::familiar).collect::<Vec<_>>(),
        "size": image.size,
        "stored": seconds.map_or(0, |time| time.as_secs()),
    })
}

fn inspect(store: &Store, names: &[String]) -> Result<(), Failure> {
    let mut all = Vec::new();
    for name in names {
        let image = find(store, name)?;
        let manifests: Vec<String> = image
            .names
            .iter()
            .filter_map(|(name, digest)| {
                Some(format!(
                    "{}/{}@{}",
                    name.registry,
                    name.repository,
                    digest.as_ref()?
                ))
            })
            .collect();
        let mut value = brief(&image);
        if let Some(fields) = value.as_object_mut() {
            fields.insert("manifests".into(), json!(manifests));
            fields.insert("layers".into(), json!(image.layers));
            let config = serde_json::to_value(store.raw_config(&image)?);
            fields.insert("config".into(), config.or_internal("configuration")?);
        }
        all.push(value);
    }
    output::print_pretty_json(&all)
}

/// An image that must be there.
fn find(store: &Store, name: &str) -> Result<Image, Failure> {
    store
        .find(name)?
        .ok_or_else(|| Failure::config(format!("{name}: no such image (mayfly image ls)")))
}

/// Bytes for people.
pub fn bytes(count: u64) -> String {
    let mut value = count as f64;
    for unit in ["B", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return match unit {
                "B" => format!("{count} B"),
                _ => format!("{value:.1} {unit}"),
            };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// How long ago, for people.
pub fn age(time: SystemTime) -> String {
    let seconds = time.elapsed().map_or(0, |age| age.as_secs());
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}
