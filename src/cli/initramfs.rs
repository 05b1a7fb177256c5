//! `mayfly initramfs`

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::ExitCode;

use mayfly_boot::initramfs::{DEFAULT_MODULES, Initramfs, LATER_MODULES, ModuleForm};

use super::output;
use crate::failure::{Failure, OrFail};

const EXAMPLES: &str = "\
Examples:
  mayfly initramfs --modules /lib/modules/6.12.0 --init mayfly-init \\
      --add /bin/busybox=/bin/busybox --output initramfs.cpio";

/// Raw flags.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A kernel's module folder, such as /lib/modules/6.12.0
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// A module to pack beside those for mayfly's devices (repeatable)
    #[arg(long, value_name = "NAME", requires = "modules")]
    module: Vec<String>,
    /// Pack no modules but those
    #[arg(long, requires = "module")]
    no_default_modules: bool,
    /// Keep the modules' signatures, for a kernel that insists on them; the guest
    /// loads such modules more slowly
    #[arg(long, requires = "modules")]
    signed: bool,
    /// The program that becomes /init
    #[arg(long, value_name = "FILE")]
    init: Option<PathBuf>,
    /// A file to add, and its path in the guest (repeatable)
    #[arg(long, value_name = "SRC=DST")]
    add: Vec<String>,
    /// The archive to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Builds the archive.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let mut archive = Initramfs::new(Vec::new()).or_internal("initramfs")?;
    if let Some(init) = &args.init {
        let data = fs::read(init).or_config(format_args!("--init {}", init.display()))?;
        archive.file("init", 0o755, &data).or_config("--init")?;
    }
    if let Some(folder) = &args.modules {
        let (mut names, later) = match args.no_default_modules {
            true => (Vec::new(), &[][..]),
            false => (DEFAULT_MODULES.to_vec(), &LATER_MODULES[..]),
        };
        names.extend(args.module.iter().map(String::as_str));
        let form = match args.signed {
            true => ModuleForm::Signed,
            false => ModuleForm::Slim,
        };
        archive
            .modules(folder, &names, later, form)
            .or_config(format_args!("--modules {}", folder.display()))?;
    }
    for pair in &args.add {
        let flag = format!("--add {pair}");
        let (source, target) = pair
            .split_once('=')
            .ok_or_else(|| Failure::config(format!("{flag}: write SOURCE=TARGET")))?;
        let data = fs::read(source).or_config(&flag)?;
        let mode = fs::metadata(source).or_config(&flag)?.permissions().mode();
        archive.file(target, mode, &data).or_config(&flag)?;
    }
    let data = archive.finish().or_internal("initramfs")?;
    output::replace(&args.output, &data)
        .or_host(format_args!("--output {}", args.output.display()))?;
    Ok(ExitCode::SUCCESS)
}
