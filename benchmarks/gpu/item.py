"""An item of the report: runs programs within its own time limit and its part's, and keeps how each ended."""

import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.gpu.checkout import ROOT
from benchmarks.gpu.command import Outcome, run

FASTMAE = (sys.executable, "-m", "fastmae.train")
BENCH = (sys.executable, "-m", "fastmae.benchmarks")
_NO_TESTS = 5  # pytest's exit code where none was selected
_PER_TEST = 60  # seconds after which a test's stacks are written: none should take so long


@dataclass(kw_only=True)
class Item:
    """A running item."""

    name: str
    results: Path
    device: str
    """cuda, or cpu for a dry run."""
    memory: int
    """GiB of the device."""
    tiny: bool
    """Whether shapes are as small as can be: a dry run."""
    data: Path | None
    reference: Path | None
    deadline: float
    """On the monotonic clock: no program of the item continues after it."""
    environment: dict[str, str]
    outcomes: list[Outcome] = field(default_factory=list)
    values: dict[str, object] = field(default_factory=dict)
    """What the item found, beside what its programs print."""

    def run(self, *command: str | Path, meanwhile: Callable[[subprocess.Popen], None] | None = None) -> Outcome:
        """Run a program. Fails the item unless it exits with 0 within the time that is left."""
        outcome = self._run([str(word) for word in command], str(len(self.outcomes) + 1), meanwhile)
        if outcome.status == "timeout":
            pytest.fail(f"timeout: ended after {outcome.seconds:.0f} s", pytrace=False)
        if outcome.status == "failed":
            pytest.fail(f"exit code {outcome.exit_code}: {reason_in(outcome.text)[:300]}", pytrace=False)
        return outcome

    def bench(self, name: str, *flags: object) -> Outcome:
        """Run a benchmark that writes its section to the day's result file. Fails the item unless fastmae was measured."""
        outcome = self.run(*BENCH, name, "--device", self.device, "--out", self.results, *map(str, flags))
        if not outcome.document:
            pytest.fail("it ended without a result", pytrace=False)
        for section, found in outcome.document.items():
            if not any(row.get("contender", "fastmae") == "fastmae" for row in found["rows"]):
                pytest.fail(f"{section}: fastmae was not measured: {'; '.join(found['notes'])[:300]}", pytrace=False)
        return outcome

    def test(self, *worths: int, together: int = 1, before: Sequence[str] = ()) -> None:
        """Run the ``gpu`` tests of these ``worth``, a process for each file: an illegal access breaks those after it.

        ``together``: files to run at the same time. ``before``: a program that runs pytest.
        """
        files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if worths_of(p) & set(worths)]
        files = files[:2] if self.tiny else files  # a dry run: that they are found and started
        flags = ("-m", "gpu", "--worth", ",".join(map(str, worths)), "-vv", "-rf", "--tb=short", "--durations=5",
                 # Warnings of this machine's versions are read in the log; here they should not cost a test.
                 "-W", "default", "-o", f"faulthandler_timeout={_PER_TEST}", "--import-mode=append")  # fmt: skip

        interrupted = threading.Event()

        def end(process: subprocess.Popen) -> None:
            if interrupted.is_set():
                process.kill()

        def run_file(path: Path) -> Outcome:
            command = [*before, sys.executable, "-m", "pytest", *flags, str(path)]
            return self._run(command, path.stem, end, fine=(0, _NO_TESTS))

        with ThreadPoolExecutor(together) as pool:
            try:
                outcomes = list(pool.map(run_file, files))
            except BaseException:
                interrupted.set()  # the pool waits for those that run, and starts no others
                raise
        named = {path.stem: outcome for path, outcome in zip(files, outcomes, strict=True)}
        self.values["tests"] = {name: {"status": o.status, **counts_of(o.text)} for name, o in named.items()}
        if wrong := [f"{name}: {o.status}{_within(o)}" for name, o in named.items() if o.status != "ok"]:
            late = "" if any(o.status == "failed" for o in outcomes) else "timeout: "
            pytest.fail(f"{late}{'; '.join(wrong)}", pytrace=False)
        if self.device == "cuda" and not any("passed" in counts for counts in self.values["tests"].values()):
            pytest.fail(f"no test ran: {', '.join(f'{name}{_within(o)}' for name, o in named.items())}", pytrace=False)

    def _run(self, command: list[str], name: str, meanwhile: Callable | None = None, fine: Sequence[int] = (0,)) -> Outcome:
        limit = max(0.0, self.deadline - time.monotonic())
        log = self.results / "items" / f"{self.name}.{name}.log"
        outcome = run(command, limit=limit, log=log, environment=self.environment, folder=ROOT, meanwhile=meanwhile, fine=fine)
        self.outcomes.append(outcome)
        return outcome


def worths_of(path: Path) -> set[int]:
    """The ``worth`` of the ``gpu`` tests in a file, without importing it; 9 where it states none."""
    text = path.read_text()
    # The fixture ``device`` has a GPU's case, in a test or in a fixture of its own.
    if not re.search(r"mark\.gpu|(def test_\w+|@pytest\.fixture\ndef \w+)\((.*, )?device[,)]", text):
        return set()
    return {int(number) for number in re.findall(r"mark\.worth\((\d)\)", text)} or {9}


def reason_in(text: str) -> str:
    """Why a program has failed: the last line of what it wrote that names an exception, for advice may follow; or the last."""
    lines = text.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])


def counts_of(text: str) -> dict[str, object]:
    """Passed, failed, skipped and so on in what ``pytest -vv`` printed; ``running``: the test that it did not end."""
    found, running = Counter(), None
    for line in text.splitlines():
        word = re.search(r"(?:^| )(PASSED|FAILED|SKIPPED|ERROR|XFAIL)(?= |$)", line)
        if begins := re.match(r"\S*test_\w+\.py::", line):
            running = re.split(r" (?:Fatal Python|Timeout \()", line)[0].strip()
        if word and running and (begins or word.start() == 0):
            found[word[1].lower()] += 1
            running = None
    return {**found, **({"running": running} if running else {})}


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def _within(outcome: Outcome) -> str:
    counts = counts_of(outcome.text)
    words = [f"{n} {word}" for word, n in counts.items() if word != "running"]
    return f" ({', '.join(words)}{', in ' + counts['running'] if 'running' in counts else ''})"
