"""Times of contenders that do the same work: checked first, then timed in turns, so that a busy machine slows them alike."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

FP32_TOLERANCE, LOW_TOLERANCE = 1e-5, 1e-2  # relative difference of losses, in float32 and in the precision that is timed


class LossesDiffer(Exception):
    """Contenders do not do the same work, so their times mean nothing."""


def check_losses(found: dict[str, tuple[float, float]], device: torch.device, other_loss: Collection[str] = ()) -> None:
    """Raise LossesDiffer unless all losses, (float32, as timed), are the first contender's within the tolerances.

    Of the contenders in ``other_loss`` the second loss is that of another objective, and need only be finite.
    """
    exact, timed = next((losses for name, losses in found.items() if name not in other_loss), next(iter(found.values())))
    tolerance = LOW_TOLERANCE if device.type == "cuda" else FP32_TOLERANCE
    for name, (own_exact, own_timed) in found.items():
        if not abs(own_exact - exact) <= FP32_TOLERANCE * exact:
            raise LossesDiffer(f"{name} computes another loss, {own_exact}, not {exact}")
        is_equal = math.isfinite(own_timed) if name in other_loss else abs(own_timed - timed) <= tolerance * timed
        if not is_equal:
            raise LossesDiffer(f"{name} trains on another loss, {own_timed}, not {timed}")


@dataclass(frozen=True)
class Times:
    """Seconds of one call, in each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest less fastest round, over the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def over(self, other: "Times") -> float:
        """How many times as fast this is as ``other``: the median over rounds of the ratio within a round."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(runs: dict[str, Callable[[int], float]], *, rounds: int | None, calls: int, warm_up: int,
               seconds: float | None = None) -> dict[str, Times]:  # fmt: skip
    """Time ``runs`` in turns: ``rounds`` rounds of ``calls`` calls each, after ``warm_up`` calls.

    Each run is given the number of calls to make, and returns the mean seconds of one. With ``seconds`` no round after the
    first begins that would end later, warm-up included; ``rounds`` None leaves their number to it alone.
    """
    if rounds is None and seconds is None:
        raise ValueError("rounds or seconds must be given, got neither")
    began = time.perf_counter()
    for run in runs.values():
        run(warm_up)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in itertools.count() if rounds is None else range(rounds):
        round_began = time.perf_counter()
        # Every other round backwards, so that none always runs after the same neighbour.
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(runs[name](calls))
        now = time.perf_counter()
        if seconds is not None and now - began + (now - round_began) > seconds:
            break
    return {name: Times(tuple(s)) for name, s in found.items()}


def seconds_per_call(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Mean seconds of one of ``calls`` calls, the device's work included."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / calls


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_seconds(calls: list[Callable[[], object]], device: torch.device, replays: int = 20) -> float:
    """Mean seconds of one of ``calls``, run one after the other; on a GPU as one CUDA graph, so without launches.

    Give calls that read different memory, together more than the cache holds, to measure memory and not the cache.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        return statistics.median(seconds_per_call(lambda: [c() for c in calls], device, 1) for _ in range(5)) / len(calls)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # alive until the capture ends, so that no output takes another's memory
    del kept
    graph.replay()
    return statistics.median(seconds_per_call(graph.replay, device, replays) for _ in range(5)) / len(calls)
