"""The page about a run: true to its log, safe whatever is in it, and shown by a real browser as it is meant."""

import html
import json
import random
import re
import shutil
import subprocess
import time
from xml.etree import ElementTree

import pytest
from PIL import Image

from fastmae.errors import InputError
from fastmae.train.report.report import write_report
from tests.support.pictures import make_picture

HOSTILE = "</td><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>\"'&\ud800\0\x1b[31m"
MODEL = {"img_size": [224, 224], "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "norm_pix_loss": True}


def start(step=0, time=0.0, **more):
    recipe = {"seed": 0, "augment": {"scale": [0.2, 1.0]}, "model": MODEL}
    environment = {"python": "3.11.7", "torch": "2.11.0", "host": "a-host", "device": "8 x A Device"}
    return {"event": "start", "schema": 1, "step": step, "time": time, "total_steps": 400, "recipe": recipe,
            "run": {"workers": 4}, "world": 8, "environment": environment, "resumed_from": None, **more}  # fmt: skip


def measured(step, **more):
    return {"step": step, "time": 10.0 * step, "epoch": step / 40, "lr": 1e-4, "loss": 1 / (1 + step / 50), "grad_norm": 0.3,
            "images_per_second": 1000.0 + step, "seconds_per_step": 2.0, "data_wait": 0.01, "mfu": 0.4,
            "memory_bytes": 2**34, **more}  # fmt: skip


def write(run, *records, tail=""):
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return run


def page_of(run, **options):
    return write_report(run, **options).read_text(encoding="utf-8")


def section(page, name):
    return re.search(rf'<section id="{name}".*?</section>', page, re.S)[0]


def tree(page):
    """The page as XML; raises unless it is well-formed."""
    return ElementTree.fromstring(page)


@pytest.fixture(scope="module")
def rich_run(tmp_path_factory):
    """A run that was killed, stopped by a signal, and is under way again, with everything in its log that there can be."""
    run = tmp_path_factory.mktemp("runs") / f"rich {HOSTILE[5:13]}"
    pictures = run / "reconstructions"
    pictures.mkdir(parents=True)
    events = []
    for step in range(20, 400, 20):
        make_picture(step, (60, 96)).save(pictures / f"step-{step:07d}.png")
        events.append({"event": "reconstruction", "step": step, "file": f"reconstructions/step-{step:07d}.png"})
    log = [start(), *[measured(s) for s in range(10, 210, 10)],
           {"event": "checkpoint", "step": 200, "time": 2001.0, "folder": "step-0000200", "seconds": 3.5, "bytes": 2**31},
           measured(210), measured(220), start(200, 2400.0, resumed_from="step-0000200", run={"workers": 2}),
           *[measured(s, time=400.0 + 10 * s, loss=None if s == 250 else 0.2) for s in range(210, 310, 10)],
           {"event": "stopped", "step": 300, "time": 3400.0, "reason": "SIGTERM"},
           {"event": "end", "step": 300, "time": 3401.0},
           start(300, time.time() - 700, resumed_from="step-0000300"),
           *[measured(s, time=time.time() - 1000 + s) for s in range(310, 400, 10)],
           *events, *[{"event": "replaced", "step": 300, "sample": f"{n % 30} {HOSTILE}"} for n in range(31)],
           {"event": "worker_died", "step": 310, "worker": HOSTILE}, {"event": "skipped", "step": 320, "updates": 3},
           {"event": "spike", "step": 330, "loss": 2.5, "z": 9.0, "skipped": True},
           {"event": "checkpoint_failed", "step": 340, "error": HOSTILE}]  # fmt: skip
    return write(run, *log, tail='{"step": 400, "lo')


def test_the_head_says_how_the_run_stands(rich_run):
    words = " ".join(" ".join(tree(page_of(rich_run)).itertext()).split())
    assert "MAE ViT-base/16, images 224 × 224" in words and "running The last record is" in words
    loss = f"loss {1 / (1 + 390 / 50):.4f}"
    for said in ("steps 390 of 400", loss, "images/s 1,390.0 median", "epochs 9.75", "time left about 20 s"):
        assert said in words, said


def test_restarts_errors_and_checkpoints_are_listed(rich_run):
    page = page_of(rich_run)
    told = {name: html.unescape(re.sub(r"<[^>]+>+", " ", section(page, name))) for name in
            ("restarts", "errors", "checkpoints", "configuration")}  # fmt: skip
    assert "2 restarts; at least 20 steps repeated (3 min), 2 measurements discarded" in told["restarts"]
    assert "killed, or crashed" in told["restarts"] and "stopped: SIGTERM" in told["restarts"]
    assert "step-0000200" in told["restarts"] and "step-0000300" in told["restarts"]
    assert "30 replaced samples, 3 skipped updates, 1 loss spike, 1 dead worker." in told["errors"]
    assert "10 more not shown." in told["errors"]
    assert "1 saved, in 3.5 s on average; 1 failed" in told["checkpoints"] and "2 GiB" in told["checkpoints"]
    changed = " ".join(told["configuration"].split())
    assert "2 run: workers 4 2 3 run: workers 2 4" in changed and "augment.scale 0.2, 1" in changed
    assert "host a-host" in changed and "processes 8" in changed


def test_curves_show_what_holds(rich_run):
    curves = section(page_of(rich_run), "curves")
    names = re.findall(r'<figure id="([a-z-]+)"', curves)
    assert names == ["loss", "lr", "grad-norm", "throughput", "data-wait", "mfu", "memory"]
    assert "1 of 39 not finite" in curves and curves.count("data:image/svg+xml;base64,") == 7
    for legend in ("Dashed lines are restarts", "Circles are loss spikes", "Red strokes"):
        assert legend in curves


def test_whatever_a_file_holds_is_escaped(rich_run):
    page = page_of(rich_run)
    assert "evil.example" in page and "\0" not in page and "\x1b" not in page
    for element in tree(page).iter():
        assert not element.tag.endswith("script")
        for name, value in element.attrib.items():
            assert not name.startswith("on") and name not in ("style", "href"), (element.tag, name)
            assert name != "src" or re.fullmatch(r"data:image/(jpeg|svg\+xml);base64,[A-Za-z0-9+/=]+", value)


def test_hostile_text_is_escaped_wherever_a_log_can_hold_it(tmp_path):
    recipe = {HOSTILE: HOSTILE, "deep": {HOSTILE: [HOSTILE, {HOSTILE: 1}]}, "model": dict.fromkeys(MODEL, HOSTILE)}
    hostile = dict.fromkeys(("reason", "file", "sample", "worker", "error", "folder", "updates", "loss", "z", "skipped",
                             "seconds", "bytes"), HOSTILE)  # fmt: skip
    names = ("checkpoint", "checkpoint_failed", "replaced", "worker_died", "skipped", "spike", "reconstruction", "diverged")
    begin = start(recipe=recipe, run={"a": HOSTILE}, environment={HOSTILE: HOSTILE}, world=HOSTILE, resumed_from=HOSTILE)
    log = [begin, measured(1), start(1, 2.0), {**begin, "step": 1}, *({"event": n, "step": 1, **hostile} for n in names)]
    page = page_of(write(tmp_path / HOSTILE[5:13], *log))
    assert "<script" not in page and "image/jpeg" not in page and "alert(&#39;x&#39;)" in page
    assert not any(name.startswith("on") for element in tree(page).iter() for name in element.attrib)
    assert "diverged" in page and "http-equiv" in page


def test_reconstructions_are_evenly_chosen_and_made_small(tmp_path):
    log = [start()]
    for step in range(100, 1100, 100):
        log.append({"event": "reconstruction", "step": step, "file": f"{step}.png"})
    run = write(tmp_path, *log)
    noise = Image.effect_noise((1500, 3000), 90)
    for step in range(100, 1100, 100):
        noise.save(run / f"{step}.png")
    page = page_of(run)
    assert re.findall(r"<b>Step ([\d,]+)</b>", page) == ["100", "300", "500", "600", "800", "1,000"]
    assert "6 of 10, evenly over the run" in page and "no loss is put on visible patches" in " ".join(page.split())
    assert len(page) < 6 << 20


def test_a_picture_that_cannot_be_shown_is_named(tmp_path):
    make_picture(0).save(tmp_path / "secret.png")
    run = write(tmp_path / "run", start(), *({"event": "reconstruction", "step": n, "file": file} for n, file in enumerate(
        ("../secret.png", str(tmp_path / "secret.png"), "absent.png", "text.png", "link.png", 7))))  # fmt: skip
    (run / "text.png").write_text("<svg/>")
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    page = page_of(run)
    assert "image/jpeg" not in page and page.count("lies outside the run") == 3 and "absent.png: missing" in page
    assert "text.png: cannot be read as a PNG" in page and "the log names no file" in page
    for n, file in enumerate(("a\0b", "x" * 5000, "\ud800", "loop")):
        (run / "loop").is_symlink() or (run / "loop").symlink_to("loop")
        assert "<img" not in page_of(write(run, start(), {"event": "reconstruction", "step": n, "file": file}))


def test_damaged_pictures_never_stop_the_page(tmp_path):
    run = write(tmp_path, start(), {"event": "reconstruction", "step": 1, "file": "a.png"})
    make_picture(0, (16, 16)).save(run / "a.png")
    whole, rng = (run / "a.png").read_bytes(), random.Random(0)
    assert "data:image/jpeg" in page_of(run)
    for _ in range(150):
        data = bytearray(whole[: rng.randrange(8, len(whole) + 1)])
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(8, len(data))] = rng.randrange(256) if len(data) > 8 else 0
        (run / "a.png").write_bytes(data)
        assert "<b>Step 1</b>" in page_of(run)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ([start()], "No measurement with a finite value"),
        ([start(), measured(10)], 'id="loss"'),
        ([start(), measured(10, loss=None), measured(20, loss=None)], "not finite"),
        ([start(), {"event": "end", "step": 400}], "All 400 steps are done."),
        ([measured(10), {"event": "end", "step": 10}], "Stopped after step 10"),
        ([start(), measured(10), {"event": "diverged", "step": 10, "reason": "no"}], "Gave up at step 10: no"),
        ([start(), measured(10), {"event": "end", "step": 10}], "Stopped after step 10"),
        ([{"step": 1}], "masked autoencoder"),
        (
            [{"event": "start", "schema": 1, "time": 1e11, "recipe": "x", "run": 3, "environment": [], "total_steps": "many"}],
            "silent",
        ),
    ],
)
def test_a_log_that_says_little_makes_a_page(log, said, tmp_path):
    page = page_of(write(tmp_path, *log))
    tree(page)
    assert said in page


def test_a_run_of_many_records_makes_a_small_page(tmp_path):
    log = [start()]
    for step in range(10, 100_000, 10):
        log += [measured(step, loss=0.5 + 0.1 * (step % 70 == 0))]
        log += [{"event": "checkpoint", "step": step, "time": step, "folder": "f"}] if step % 50 == 0 else []
        log += [{"event": "spike", "step": step, "loss": 3.0, "z": 8.0, "skipped": False}] if step % 30 == 0 else []
        log += [start(step, 10.0 * step)] if step % 500 == 0 else []
    page = page_of(write(tmp_path, *log))
    assert len(page) < 1 << 20 and "1,989 earlier not shown" in page


def test_the_page_goes_where_it_is_told(tmp_path):
    run = write(tmp_path / "run", start())
    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "page.html").read_text() and [p.name for p in tmp_path.glob("*.html")] == ["page.html"]
    with pytest.raises(InputError, match="is a folder; give the page's file name"):
        write_report(run, tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        write_report(run, tmp_path / "absent" / "page.html")
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)


# In a browser.

FRAMES = """<!DOCTYPE html><meta charset="utf-8"><title>frames</title>
<iframe srcdoc="{page}" width="400" height="900"></iframe><iframe srcdoc="{page}" width="1400" height="900"></iframe>
<script>
addEventListener('load', () => {{
  const found = [...document.querySelectorAll('iframe')].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement, window_ = frame.contentWindow;
    return {{
      width: window_.innerWidth, needed: root.scrollWidth,
      headings: [...page.querySelectorAll('h2')].map(e => e.textContent),
      curves: [...page.querySelectorAll('.chart img')].map(e => [e.naturalWidth, e.getBoundingClientRect().width]),
      images: [...page.querySelectorAll('.pictures img')].map(e => [e.complete, e.naturalWidth]),
      fetched: window_.performance.getEntriesByType('resource').map(e => e.name),
      background: window_.getComputedStyle(page.body).backgroundColor, scripts: page.scripts.length,
    }};
  }});
  document.documentElement.dataset.found = JSON.stringify(found);
}});
</script>"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """``browse(path, *flags)`` opens a page in headless Chromium and gives its DOM and what it said on the console."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser: install Debian's package chromium")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
             "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0",
             "--dump-dom", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")  # fmt: skip

    def open_page(path, *more):
        done = subprocess.run([program, *flags, *more, path.as_uri()], capture_output=True, timeout=120, check=True)
        console = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
        return done.stdout.decode(), console

    return open_page


@pytest.mark.parametrize(("scheme", "background"), [(1, "rgb(255, 255, 255)"), (0, "rgb(14, 17, 22)")])
def test_a_browser_shows_the_page_at_any_width(rich_run, tmp_path, browse, scheme, background):
    page = page_of(rich_run, out=tmp_path / "page.html")
    (tmp_path / "frames.html").write_text(FRAMES.format(page=html.escape(page)))
    dom, console = browse(tmp_path / "frames.html", f"--blink-settings=preferredColorScheme={scheme}")
    assert console == []
    for width, found in zip((400, 1400), json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1])), strict=True):
        assert found["width"] == width and found["needed"] <= width  # nothing but tables scrolls sideways, inside the page
        assert found["headings"] == ["Curves", "Reconstructions", "Restarts", "Errors", "Checkpoints", "Configuration"]
        assert len(found["curves"]) == 7 and all(natural > 500 and shown > 400 for natural, shown in found["curves"])
        assert len(found["images"]) == 6 and all(complete and size == 96 for complete, size in found["images"])
        assert found["fetched"] == [] and found["scripts"] == 0
        assert found["background"] == background


def test_the_page_by_itself_says_nothing_on_the_console_and_its_policy_stops_all_else(rich_run, tmp_path, browse):
    page = page_of(rich_run, out=tmp_path / "page.html")
    dom, console = browse(tmp_path / "page.html")
    assert console == [] and dom.count("<h2") == 6 and dom.count("data:image/svg+xml") == 7
    injected = '<script>document.title = "taken over"</script><img src="http://127.0.0.1:9/a.png" onerror="document.title = 1">'
    (tmp_path / "injected.html").write_text(page.replace("<main>", f"<main>{injected}"), encoding="utf-8")
    dom, console = browse(tmp_path / "injected.html")
    assert "taken over" not in re.search("<title>.*?</title>", dom)[0]
    assert sum("Content Security Policy" in line for line in console) == 3  # the script, the picture, its handler
