"""The clock of a report: which items run, in which order, for how long, and what each leaves when it ends.

Items of a part run by ``worth``. One whose expected ``seconds`` are not left is skipped with a reason; one that takes longer is
ended at 1.6 times them, or with its part. Each writes ``items/<name>.json`` as it ends, and the archive is packed again,
also when the report is interrupted by Ctrl-C, or by SIGTERM from a batch system.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.archive import pack
from benchmarks.gpu.checkout import environment
from benchmarks.gpu.item import Item

MINUTES = {1: 8.0, 2: 4.0}
_SPARE = 6.0  # seconds of a part for stacks of what hangs, and for packing
_OVERRUN = {False: 1.6, True: 4.0}  # times what is expected: a compiler on slower cores; a dry run on a busy machine
_PATIENCE = 60  # seconds in which a driver must answer
_SEES = ("import torch; c = torch.cuda; g = c.is_available(); "
         "print(torch.__version__, c.get_device_properties(0).total_memory >> 30 if g else 0)")  # fmt: skip
_MARKERS = (
    "part(number): 1 or 2",
    "worth(number): 1 runs first",
    "seconds(gpu, tiny): what the item is expected to take on an H100, and in a dry run on a CPU",
    "needs(*packages): which must be importable",
)
_items = pytest.StashKey[Item]()


def pytest_addoption(parser):
    """What `make gpu` passes on."""
    group = parser.getgroup("report of a GPU")
    group.addoption("--part", type=int, choices=sorted(MINUTES), help="1 or 2 (default: both)")
    group.addoption("--minutes", type=float, help="for each part (default: 8 and 4)")
    group.addoption("--results", type=Path, default=Path("runs/gpu"), help="folder to write, with caches that later parts use")
    group.addoption("--archive", type=Path, help="folder of the archive (default: that of the results)")
    group.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    group.addoption("--tiny", action="store_true", help="the smallest shapes, for a dry run")
    group.addoption("--data", type=Path, help="shards (default: generated ones)")
    group.addoption("--reference", type=Path, help="a clone of facebookresearch/mae (needs timm)")


def pytest_configure(config):
    """Markers, and the clock."""
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    config.pluginmanager.register(Clock(config), "clock")


class Clock:
    """Of one report."""

    def __init__(self, config: pytest.Config):
        self.options = config.option
        self.part_began: dict[int, float] = {}
        self.results = config.option.results.resolve()
        self.archive = (config.option.archive or self.results).resolve()
        self.why_not: str | None = None
        self.memory = 0
        self.terminal = self.capture = None

    def pytest_sessionstart(self, session):
        """Folders and environment; whether there is a device, asked of a process of its own."""
        self.part_began[self.options.part or 1] = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
        for folder in (self.results / "items", self.archive):
            folder.mkdir(parents=True, exist_ok=True)
        self.environment = environment(self.results)
        self.terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        self.capture = session.config.pluginmanager.get_plugin("capturemanager")
        if self.options.device == "cuda":
            self.memory, self.why_not = _device(self.environment)

    def pytest_collection_modifyitems(self, config, items):
        """Those of the part, by worth."""
        items[:] = [i for i in items if self.options.part in (None, _number(i, "part"))]
        items.sort(key=lambda i: (_number(i, "part"), _number(i, "worth")))

    def pytest_runtest_setup(self, item):
        """Skip what cannot run, or would not end in time."""
        part, now = _number(item, "part"), time.monotonic()
        began = self.part_began.setdefault(part, now)
        end = began + 60 * (self.options.minutes or MINUTES[part]) - _SPARE
        if self.why_not:
            pytest.skip(self.why_not)
        needed = [name for marker in item.iter_markers("needs") for name in marker.args]
        if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
            packages = " ".join({"PIL": "pillow"}.get(name, name) for name in missing)
            pytest.skip(f"needs {', '.join(missing)}: pip install -c constraints.txt {packages}")
        expected = item.get_closest_marker("seconds").args[1 if self.options.tiny else 0]
        if now + expected > end:
            pytest.skip(f"expected to take {expected} s, and {max(0, end - now):.0f} s of part {part} are left")
        patience = _OVERRUN[self.options.tiny] * expected * max(1, (self.options.minutes or 0) / MINUTES[part])
        o = self.options
        item.stash[_items] = Item(
            name=_name(item), results=self.results, device=o.device, memory=self.memory, tiny=o.tiny,
            data=o.data and o.data.resolve(), reference=o.reference and o.reference.resolve(),
            deadline=min(end, now + patience), environment=self.environment,
        )  # fmt: skip
        self._print(f"{_name(item)}: at most {min(end - now, patience):.0f} s")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """The item's file and its line, as it ends."""
        report = yield
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self._keep(item, report, call)
        return report

    def pytest_report_teststatus(self, report):
        """No dots: each item has its line."""
        return (report.outcome, "", "") if report.when == "call" or report.outcome != "passed" else ("", "", "")

    def pytest_sessionfinish(self):
        """Where the results are."""
        dropped = self._pack()
        self._print(
            f"{self._archive()} ({self._archive().stat().st_size / 1e6:.1f} MB); to commit: {self.results}/<device>-<date>*"
        )
        if dropped:
            self._print(f"not in the archive, which would pass 16 MB: {', '.join(dropped)}")

    def _keep(self, item, report, call) -> None:
        running = item.stash.get(_items, None)
        reason = str(call.excinfo.value).strip() if call.excinfo else ""
        status = {"passed": "ok", "skipped": "skipped"}.get(report.outcome, "failed")
        if status == "failed" and reason.startswith("timeout: "):
            status, reason = "timeout", reason.removeprefix("timeout: ")
        outcomes = running.outcomes if running else []
        found = {
            "name": _name(item), "what": (item.obj.__doc__ or "").strip(), "part": _number(item, "part"),
            "worth": _number(item, "worth"), "status": status, "reason": reason, "seconds": round(call.duration, 1),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "device": self.options.device, "tiny": self.options.tiny,
            "values": running.values if running else {}, "programs": [o.to_json() for o in outcomes],
            "documents": [o.document for o in outcomes if o.document],
        }  # fmt: skip
        path = self.results / "items" / f"{_name(item)}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(path)
        self._print(f"{_name(item)}: {status} after {call.duration:.0f} s{': ' + reason if reason else ''}")
        self._pack()

    def _pack(self) -> list[str]:
        return pack(self.results, self._archive())

    def _archive(self) -> Path:
        return self.archive / f"gpu{f'-part{self.options.part}' if self.options.part else ''}.tar.gz"

    def _print(self, line: str) -> None:
        with self.capture.global_and_fixture_disabled():  # what an item prints while it is set up is kept from the terminal
            self.terminal.ensure_newline()
            self.terminal.write_line(line, flush=True)


@pytest.fixture
def report(request) -> Item:
    """The running item."""
    return request.node.stash[_items]


def _number(item: pytest.Item, marker: str) -> int:
    return item.get_closest_marker(marker).args[0]


def _name(item: pytest.Item) -> str:
    return f"part{_number(item, 'part')}-{item.name.removeprefix('test_').replace('_', '-')}"


def _device(variables: dict[str, str]) -> tuple[int, str | None]:
    """GiB of the CUDA device, and why there is none."""
    try:
        found = subprocess.run([sys.executable, "-c", _SEES], env=variables, capture_output=True, text=True, check=False,
                               timeout=_PATIENCE)  # fmt: skip
    except subprocess.TimeoutExpired:
        return 0, f"the CUDA device does not answer: torch has looked for it for {_PATIENCE} s"
    if found.returncode:
        return 0, f"torch cannot be used: {found.stderr.strip().rpartition(chr(10))[2][:200]}"
    version, memory = found.stdout.split()[-2:]
    return int(memory), None if int(memory) else f"no CUDA device: torch {version} sees none"
