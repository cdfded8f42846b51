"""Time and memory of things that do the same work: in one run, in turns, so that a busy machine slows them alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


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


def interleave(runs: dict[str, Callable[[int], float]], *, rounds: int, calls: int, warm_up: int) -> dict[str, Times]:
    """Time ``runs`` in turns: ``rounds`` rounds of ``calls`` calls each, after ``warm_up`` calls.

    Each run is told how many calls to make, and returns the mean seconds of one.
    """
    for run in runs.values():
        run(warm_up)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        # Every other round backwards, so that none always runs after the same neighbour.
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(runs[name](calls))
    return {name: Times(tuple(s)) for name, s in seconds.items()}


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
