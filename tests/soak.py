"""A hundred faults of all kinds in one run's folder, and then the bits of a run to which nothing happened.

    python -m tests.soak --faults 100 --seed 0 --out FOLDER

Two processes train a very small model. Each start of the run meets one fault, drawn by the seed (the moments, as clocks go,
differ from time to time), and the next start continues. In the end weights, moments and the loss of every step are compared,
bit for bit, with those of a run without faults. The exit code is 0 if all are equal and every process ended as it should.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastmae.images.recode import Recode
from fastmae.shards.build import write_shards
from tests.support import faults
from tests.support.crew import Crew
from tests.support.pictures import make_picture
from tests.support.runs import assert_same_bits

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
STEPS = 15  # of the run, per fault: more than one start makes
ANSWERED = 60.0  # seconds in which a process must end once another is gone


class Soak:
    """One run's folder, and the chance that decides what happens to it."""

    def __init__(self, out: Path, steps: int, seed: int):
        self.out, self.shards, self.random = out, out.parent / "shards", random.Random(seed)
        self.flags = ("--steps", steps, "--blr", "0.05", "--save-every", 5, "--keep", 3, "--timeout", 60, "--first-timeout", 90)
        if not self.shards.exists():
            for number in range(37):
                path = out.parent / "images" / f"photo-{number:03d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                make_picture(number, (40 + number, 64)).save(path, quality=90)
            write_shards(out.parent / "images", self.shards, Recode(resize=None), samples_per_shard=10)

    def start(self, *wrong: Callable[[int], None]) -> Crew:
        """The next start, in which loader and saves work in some way or other."""
        flags = ("--workers", self.random.randint(0, 2), self.random.choice(("--async-save", "--no-async-save")))
        watch = partial(faults.quick_watch, 10.0)
        return Crew(2, self.shards, self.out, *self.flags, *flags, fault=partial(faults.all_of, (watch, *wrong)))

    def let_train(self, crew: Crew, most: int = 15) -> int:
        """Wait until ``crew`` has done up to ``most`` steps, and a moment more; the step it is at."""
        wanted = self.random.randint(1, most)
        crew.wait_for(lambda: len(steps_of(crew)) >= wanted, 120)
        time.sleep(self.random.uniform(0, 0.05))
        return steps_of(crew)[-1]

    def checkpoints(self) -> list[Path]:
        """Newest last."""
        return sorted(self.out.glob("step-*"))


def steps_of(crew: Crew) -> list[int]:
    """The steps that this start has told of."""
    return [int(step) for step in re.findall(r"^step (\d+)/", crew.text(0), re.MULTILINE)]


def must_end(crew: Crew, *expected: list[int], timeout: float = ANSWERED) -> str:
    """How all processes of ``crew`` ended, which must be one of ``expected``."""
    codes = crew.end(timeout)
    assert codes in expected, f"ended with {codes}, not {expected}\n{crew.text()}"
    return ", ".join(map(str, codes))


def killed_process(soak: Soak, crew: Crew) -> str:
    rank, step = soak.random.randint(0, 1), soak.let_train(crew)
    crew.send(signal.SIGKILL, rank)
    codes = must_end(crew, [-9, 4] if rank == 0 else [4, -9])
    assert f"no heartbeat from rank {rank} for" in crew.text(1 - rank), crew.text()
    return f"rank {rank} at step {step}: {codes}"


def killed_job(soak: Soak, crew: Crew) -> str:
    step = soak.let_train(crew)
    crew.send(signal.SIGKILL, group=True)
    return f"at step {step}: {must_end(crew, [-9, -9])}"


def killed_in_save(soak: Soak, crew: Crew) -> str:
    soak.let_train(crew, 4)
    crew.wait_for(lambda: any(soak.out.glob(".step-*.partial")), 60)
    time.sleep(soak.random.uniform(0, 0.05))
    ranks = soak.random.choice(((), (0,), (1,)))
    crew.send(signal.SIGKILL, *ranks)
    return f"{'both' if not ranks else f'rank {ranks[0]}'}: {must_end(crew, [-9, -9], [-9, 4], [4, -9])}"


def killed_at_start(soak: Soak, crew: Crew) -> str:
    """The one that is left may wait for the other's start: a launcher ends it."""
    after, rank = soak.random.uniform(0, 2), soak.random.randint(0, 1)
    time.sleep(after)
    crew.send(signal.SIGKILL, rank)
    with contextlib.suppress(AssertionError):
        crew.end(20)
    crew.send(signal.SIGKILL)
    return f"rank {rank} after {after:.1f} s: {must_end(crew, [-9, -9], [-9, 4], [4, -9])}"


def signalled(soak: Soak, crew: Crew) -> str:
    number, whom = soak.random.choice(SIGNALS), soak.random.choice(("rank 0", "rank 1", "both", "both and their loaders"))
    times = soak.random.choice((1, 1, 2))
    step = soak.let_train(crew)
    for _ in range(times):
        crew.send(number, *([int(whom[-1])] if whom[-1].isdigit() else []), group="loaders" in whom)
    return f"{signal.Signals(number).name}{' twice' * (times > 1)} to {whom} at step {step}: {must_end(crew, [0, 0])}"


def signalled_at_start(soak: Soak, crew: Crew) -> str:
    """Before a process listens a signal ends it, as any program; it is the job of nobody to save then."""
    after, number = soak.random.uniform(0, 2), soak.random.choice(SIGNALS)
    time.sleep(after)
    crew.send(number)
    return f"{signal.Signals(number).name} after {after:.1f} s: {must_end(crew, *_either([0, 0], 0, -number, 4, 130, 1))}"


def signalled_in_save(soak: Soak, crew: Crew) -> str:
    soak.let_train(crew, 4)
    crew.wait_for(lambda: any(soak.out.glob(".step-*.partial")), 60)
    crew.send(signal.SIGTERM, soak.random.randint(0, 1))
    return must_end(crew, [0, 0])


def stopped_process(soak: Soak, crew: Crew) -> str:
    rank, step = soak.random.randint(0, 1), soak.let_train(crew)
    crew.send(signal.SIGSTOP, rank)
    assert crew.end(ANSWERED, (1 - rank,)) == [4], crew.text()
    assert f"no heartbeat from rank {rank} for" in crew.text(1 - rank), crew.text()
    then = soak.random.choice((signal.SIGKILL, signal.SIGCONT))
    crew.send(then, rank)
    return f"rank {rank} at step {step}, then {then.name}: {must_end(crew, *_either([4, 4], 4, -9))}"


def suspended_job(soak: Soak, crew: Crew) -> str:
    step, seconds = soak.let_train(crew), soak.random.uniform(1, 14)
    crew.send(signal.SIGSTOP)
    time.sleep(seconds)
    crew.send(signal.SIGCONT)
    more = len(steps_of(crew)) + 5
    crew.wait_for(lambda: len(steps_of(crew)) >= more, 60)
    crew.send(signal.SIGTERM)
    return f"at step {step} for {seconds:.0f} s: {must_end(crew, [0, 0])}"


def killed_worker(soak: Soak, crew: Crew) -> str:
    step = soak.let_train(crew)
    rank = soak.random.randint(0, 1)
    pid = crew.processes[rank].pid
    workers = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for worker in workers[:1]:
        os.kill(worker, signal.SIGKILL)
    more = len(steps_of(crew)) + 8
    crew.wait_for(lambda: len(steps_of(crew)) >= more, 60)
    crew.send(signal.SIGTERM)
    return f"{'of' if workers else 'none of'} rank {rank} at step {step}: {must_end(crew, [0, 0])}"


def full_disk(soak: Soak, crew: Crew) -> str:
    """Of rank 1: some saves fail, and the run continues; or too many, and it ends."""
    with contextlib.suppress(AssertionError):  # ended by itself
        soak.let_train(crew, 40)
    crew.send(signal.SIGTERM)
    codes = must_end(crew, [0, 0], [5, 5])
    return f"{crew.text(0).count('no checkpoint could be written')} saves failed: {codes}"


def damaged_checkpoint(soak: Soak, crew: None) -> str:
    """Of several the newest, with no process there; an older one is gone on from."""
    whole = soak.checkpoints()
    if len(whole) < 2:
        return "none"
    path = soak.random.choice([p for p in whole[-1].rglob("*") if p.is_file() and p.stat().st_size])
    data, at = bytearray(path.read_bytes()), soak.random.randrange(path.stat().st_size)
    if how := soak.random.choice(("truncated", "flipped", "")):
        path.write_bytes(data[:at] if how == "truncated" else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        path.unlink()
    with soak.start() as crew:
        soak.let_train(crew)
        crew.send(signal.SIGTERM)
        codes = must_end(crew, [0, 0])
        assert f"skipped a damaged checkpoint: {whole[-1]}" in crew.text(0), crew.text()
    return f"{path.relative_to(soak.out)} {how or 'removed'}: {codes}"


def leftovers(soak: Soak, crew: None) -> str:
    """Of processes that were killed where no test has killed them."""
    for name in (".step-0000003.partial", ".step-0000001.removed", "step-0000002"):
        (soak.out / name / "tensors").mkdir(parents=True, exist_ok=True)
        (soak.out / name / "tensors" / "__0_0.distcp").write_bytes(b"half")
    (soak.out / ".state.json.partial").write_text("{")
    with (soak.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    with soak.start() as crew:
        soak.let_train(crew)
        crew.send(signal.SIGTERM)
        return must_end(crew, [0, 0])


KINDS: dict[Callable, tuple] = {
    killed_process: (4, ()),
    killed_job: (2, ()),
    killed_in_save: (4, (partial(faults.slow_save, 0.05),)),
    killed_at_start: (2, ()),
    signalled: (4, ()),
    signalled_at_start: (1, ()),
    signalled_in_save: (2, (partial(faults.slow_save, 0.3),)),
    stopped_process: (1, ()),
    suspended_job: (1, ()),
    killed_worker: (2, ()),
    full_disk: (2, (partial(faults.small_files, 0.5, 1),)),
    damaged_checkpoint: (3, None),
    leftovers: (1, None),
}
"""How often each comes, against the others, and what the processes do by themselves; None: it starts its own."""


def _either(first: list[int], *codes: int) -> list[list[int]]:
    return [first, *([a, b] for a in codes for b in codes)]


def losses(out: Path) -> dict[int, float]:
    """The last loss that was logged of each step; lines that a kill has cut are none."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if "loss" in record:
                found[record["step"]] = record["loss"]
    return found


def soak(folder: Path, count: int, seed: int) -> int:
    """Meet ``count`` faults; returns how many things were not as they should be."""
    steps, began, counts, wrong = count * STEPS, time.monotonic(), Counter(), 0
    calm = Soak(folder / "calm", steps, seed)
    with Crew(2, calm.shards, calm.out, *calm.flags) as crew:
        must_end(crew, [0, 0], timeout=3600)
    print(f"{steps} steps without a fault: {time.monotonic() - began:.0f} s", flush=True)
    stormy = Soak(folder / "stormy", steps, seed)
    kinds, weights = list(KINDS), [weight for weight, _ in KINDS.values()]
    for number in range(1, count + 1):
        (kind,) = stormy.random.choices(kinds, weights)
        counts[kind.__name__] += 1
        since, own = time.monotonic(), KINDS[kind][1]
        try:
            with contextlib.nullcontext() if own is None else stormy.start(*own) as crew:
                told = kind(stormy, crew)
        except AssertionError as error:
            wrong, told = wrong + 1, f"WRONG: {error}"
        newest = stormy.checkpoints()[-1].name if stormy.checkpoints() else "no checkpoint"
        name = kind.__name__.replace("_", " ")
        print(f"{number:3}/{count}  {time.monotonic() - since:5.1f} s  {newest}  {name}: {told}", flush=True)
    with stormy.start() as crew:
        must_end(crew, [0, 0], timeout=3600)
    for kind, often in counts.most_common():
        print(f"{often:4} {kind.replace('_', ' ')}")
    last = f"step-{steps:07d}"
    try:
        assert_same_bits(stormy.out / last, calm.out / last)
        print("weights, moments and all other tensors: the same bits")
    except AssertionError as error:
        wrong += 1
        print(f"WRONG: other tensors {error}")
    same = losses(stormy.out) == losses(calm.out)
    print(f"losses of {len(losses(stormy.out))} steps: {'the same' if same else 'WRONG: others'}")
    print(f"{count} faults, {wrong + (not same)} wrong, {time.monotonic() - began:.0f} s")
    return wrong + (not same)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder to keep; by default one that is removed if all is well")
    options = parser.parse_args()
    place = options.out or Path(tempfile.mkdtemp(prefix="soak-"))
    shutil.rmtree(place / "stormy", ignore_errors=True)
    shutil.rmtree(place / "calm", ignore_errors=True)
    failures = soak(place, options.faults, options.seed)
    if options.out is None and not failures:
        shutil.rmtree(place)
    sys.exit(failures > 0)
