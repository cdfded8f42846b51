"""The step as one CUDA graph: recorded once, then replayed without launching its kernels one by one.

Images, sample ids, epochs and the learning rate are read from buffers that stay where they are, so a replay trains on new
images with new masks. Worth it where launches take longer than kernels: small batches, small models. Source: PyTorch's
"CUDA semantics", section "CUDA Graphs", for the rules of warm-up and capture.
"""

from collections.abc import Sequence

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fastmae.errors import InputError
from fastmae.train.step.step import MicroBatch, Step, StepResult

_WARM_UP = 3  # steps run plainly, on a side stream, before the capture


class GraphedStep(Step):
    """A ``Step`` that is captured after a few calls. Every batch must have the sizes of the first.

    Raises InputError on a CPU, or for a module of several ranks, whose collectives are not captured.
    """

    def __init__(self, module, optimizer, loss, **settings):
        super().__init__(module, optimizer, loss, **settings)
        if self.device.type != "cuda":
            raise InputError(f"cuda graphs need a CUDA device, and this run is on {self.device.type}; remove --cuda-graphs")
        if isinstance(module, DistributedDataParallel | FSDPModule):
            raise InputError("cuda graphs work with one rank only; remove --cuda-graphs")
        self.stream = torch.cuda.Stream(self.device)  # one for all: the allocator keeps what a stream frees for that stream
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batches: list[MicroBatch] = []
        self.result: StepResult | None = None

    def __call__(self, batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """As ``Step``; the first calls run plainly, then one records, and all later ones replay."""
        self._fill(batches)
        self.lr.fill_(lr)
        self.calls += 1
        if self.calls <= _WARM_UP:
            result = self._run_aside()
        else:
            if self.graph is None:
                self._capture()
            self.graph.replay()
            result = self.result
        return StepResult(*(t.clone() for t in result))

    def _fill(self, batches: Sequence[MicroBatch]) -> None:
        if not self.batches:
            self.batches = [MicroBatch(*(t.clone() for t in batch)) for batch in batches]
        for static, batch in zip(self.batches, batches, strict=True):
            for buffer, new in zip(static, batch, strict=True):
                if buffer.shape != new.shape:
                    raise ValueError(f"batches must keep the shape {tuple(buffer.shape)}, got {tuple(new.shape)}")
                buffer.copy_(new, non_blocking=True)

    def _run_aside(self) -> StepResult:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            result = self.run(self.batches)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return result

    def _capture(self) -> None:
        for group in self.optimizer.param_groups:
            group["capturable"] = True  # torch asks for the word; fused AdamW always is
        graph = torch.cuda.CUDAGraph()
        # Recorded, not run. Only this thread is watched: a loader's may pin memory meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.result = self.run(self.batches)
        self.graph = graph
