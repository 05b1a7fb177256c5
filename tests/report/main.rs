//! The page of a comparison, in a real browser: light, dark, and as wide as a telephone.
//!
//! `record.json` is a record whose figures are made up.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod browser;

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mayfly_compare::model::Report;
use mayfly_compare::report;
use serde_json::{Value, json};

use browser::Browser;

/// What a page is asked, and what must not come back.
const FAULTS: &str = include_str!("faults.js");

fn record() -> Report {
    serde_json::from_str(include_str!("record.json")).unwrap()
}

/// A file beside those of other tests.
fn file(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    fs::create_dir_all(&folder).unwrap();
    folder.join(name)
}

fn written(report: &Report, name: &str) -> String {
    let path = file(name);
    fs::write(&path, report::html(report).unwrap()).unwrap();
    format!("file://{}", path.display())
}

struct Form {
    name: &'static str,
    width: u32,
    height: u32,
    scheme: &'static str,
}

const FORMS: [Form; 5] = [
    Form {
        name: "light",
        width: 1200,
        height: 900,
        scheme: "light",
    },
    Form {
        name: "dark",
        width: 1200,
        height: 900,
        scheme: "dark",
    },
    Form {
        name: "phone",
        width: 360,
        height: 800,
        scheme: "light",
    },
    Form {
        name: "phone-dark",
        width: 360,
        height: 800,
        scheme: "dark",
    },
    Form {
        name: "tablet",
        width: 768,
        height: 1024,
        scheme: "light",
    },
];

/// Shows a page in a form, and fails on whatever is wrong with it.
fn show(browser: &mut Browser, url: &str, form: &Form, picture: &str) {
    let phone = form.width < 600;
    let metrics = json!({
        "width": form.width, "height": form.height, "mobile": phone,
        "deviceScaleFactor": if phone { 2 } else { 1 },
    });
    browser.call("Emulation.setDeviceMetricsOverride", metrics);
    let scheme = json!({"features": [{"name": "prefers-color-scheme", "value": form.scheme}]});
    browser.call("Emulation.setEmulatedMedia", scheme);
    browser.open(url);

    let faults = browser.evaluate(FAULTS);
    let shot = json!({"format": "png", "captureBeyondViewport": true, "clip": {
        "x": 0, "y": 0, "width": form.width, "scale": 1,
        "height": browser.evaluate("document.documentElement.scrollHeight"),
    }});
    let shot = browser.call("Page.captureScreenshot", shot);
    let shot = STANDARD.decode(shot["data"].as_str().unwrap()).unwrap();
    fs::write(file(&format!("{picture}.png")), shot).unwrap();
    assert_eq!(faults, json!([]), "{picture}");
    quiet(browser, url);
}

/// Nothing was complained of, and nothing asked for.
fn quiet(browser: &Browser, url: &str) {
    for event in browser.events() {
        let method = event["method"].as_str().unwrap_or_default();
        match method {
            "Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded" => {
                panic!("{event}")
            }
            "Network.requestWillBeSent" => assert_eq!(event["params"]["request"]["url"], url),
            _ => {}
        }
    }
}

#[test]
fn a_page_is_sound_in_all_its_forms() {
    let url = written(&record(), "page.html");
    let mut browser = Browser::start();
    for form in &FORMS {
        show(&mut browser, &url, form, form.name);
        let sections =
            browser.evaluate("[...document.querySelectorAll('main section')].map(it => it.id)");
        let all = [
            "meaning",
            "start",
            "spread",
            "load",
            "memory",
            "steady",
            "isolation",
            "missing",
            "how",
        ];
        assert_eq!(sections, json!(all));
        let embedded =
            browser.evaluate("JSON.parse(document.getElementById('record').textContent)");
        assert_eq!(embedded["order"], json!(record().order));
    }
}

/// The choice needs no script, and holds whatever the system says.
#[test]
fn colours_can_be_chosen() {
    let url = written(&record(), "choice.html");
    let mut browser = Browser::start();
    browser.open(&url);
    let mut paper = |choice: &str| {
        browser.evaluate(&format!(
            "document.querySelector('[for=theme-{choice}]').click()"
        ));
        browser.evaluate("getComputedStyle(document.body).backgroundColor")
    };
    let (light, dark) = (paper("light"), paper("dark"));
    assert_ne!(light, dark);
    assert_eq!(paper("light"), light);
}

/// A record may come from elsewhere, and names in it from anywhere.
#[test]
fn foreign_text_does_nothing() {
    const EVIL: &str = "</script></style></title><script>window.hacked = 1</script>\
        <img src='https://example.invalid/' onerror='window.hacked = 1'>\
        \"'><svg onload='window.hacked = 1'>";
    let mut report = record();
    report.host.virtualised = Some(EVIL.to_owned());
    for text in [
        &mut report.mayfly,
        &mut report.workload.image,
        &mut report.host.cpu,
        report.host.governor.as_mut().unwrap(),
    ] {
        *text = EVIL.to_owned();
    }
    let digest = || (EVIL.to_owned(), EVIL.to_owned());
    report.workload.guest.extend([digest()]);
    report.warnings.push(EVIL.to_owned());
    report.workload.command.push(EVIL.to_owned());
    for engine in &mut report.engines {
        engine.name.push_str(EVIL);
        engine.version = Some(EVIL.to_owned());
        engine.notes.push(EVIL.to_owned());
        let held = json!({ EVIL: [EVIL, "\u{1b}[2J"] });
        engine.settings.insert(EVIL.to_owned(), held);
        engine.command_line.push(EVIL.to_owned());
        engine.network.push_str(EVIL);
        engine.missing.iter_mut().for_each(|it| it.push_str(EVIL));
        engine
            .steady
            .iter_mut()
            .for_each(|it| it.name.push_str(EVIL));
        if let Some(it) = &mut engine.isolation {
            it.kernel.push_str(EVIL);
            it.devices.push(EVIL.to_owned());
            it.sees_of_host.push(EVIL.to_owned());
            it.namespaces.insert(EVIL.to_owned(), EVIL.to_owned());
        }
    }
    let url = written(&report, "foreign.html");
    let mut browser = Browser::start();
    for form in &FORMS[1..3] {
        show(&mut browser, &url, form, &format!("foreign-{}", form.name));
        assert_eq!(browser.evaluate("typeof window.hacked"), "undefined");
        let heading = browser.evaluate("document.querySelector('h1').textContent");
        assert!(heading.as_str().unwrap().starts_with(EVIL));
        let embedded =
            browser.evaluate("JSON.parse(document.getElementById('record').textContent)");
        assert_eq!(embedded["mayfly"], EVIL);
    }
}

/// Of what was ended early there is a page, too.
#[test]
fn a_page_of_little_is_sound() {
    let mut report = record();
    report.interrupted = true;
    report.host.virtualised = Some("kvm".to_owned());
    report.order.clear();
    for engine in &mut report.engines {
        *engine = mayfly_compare::model::EngineReport {
            samples: Vec::new(),
            warmups: Vec::new(),
            phases: Default::default(),
            start: None,
            total: None,
            memory: Vec::new(),
            load: None,
            steady: Vec::new(),
            tcp: None,
            isolation: None,
            ..engine.clone()
        };
    }
    let url = written(&report, "little.html");
    let mut browser = Browser::start();
    show(&mut browser, &url, &FORMS[2], "little");
    let sections: Value =
        browser.evaluate("[...document.querySelectorAll('main section')].map(it => it.id)");
    assert_eq!(sections, json!(["meaning", "missing", "how"]));
    let text = browser.evaluate("document.querySelector('.notice').textContent");
    let text = text.as_str().unwrap();
    assert!(
        text.contains("Interrupted.") && text.contains("virtual host (kvm)"),
        "{text}"
    );
}
