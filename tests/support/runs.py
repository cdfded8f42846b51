"""Small runs, inside this process and as processes of their own, and what they leave behind: shared by tests of training."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastmae import ModelConfig
from fastmae.train.checkpoint.format import TENSORS
from fastmae.train.checkpoint.tensors import describe_tensors, read_tensors
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.pretrain.log import RunLog

MODEL = ModelConfig(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, norm_pix_loss=True,
                    decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)  # fmt: skip
RECIPE = Recipe(model=MODEL, steps=6, epochs=10, warmup_epochs=1, effective_batch=8, blr=0.05)

# Flags of a model so small that a run takes seconds.
FLAGS = ["--img-size", "32", "--patch-size", "8", "--effective-batch", "8", "--workers", "1", "--device", "cpu", "--log-every",
         "1"]  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def run_of(shards, out, **fields):
    """Where and how fast: in this process, on the CPU, every step logged."""
    return Run(data=str(shards), out=Path(out), **{"batch_size": 8, "workers": 0, "device": "cpu", "log_every": 1, **fields})


def records(out) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(out) -> dict[int, float]:
    """The last loss that was logged of each step."""
    return {r["step"]: r["loss"] for r in records(out) if "loss" in r}


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    shapes = describe_tensors(checkpoint / TENSORS)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    read_tensors(checkpoint / TENSORS, tensors)
    return tensors


def assert_same_bits(one: Path, two: Path) -> None:
    """Two checkpoints hold the same tensors, bit for bit."""
    a, b = tensors_of(one), tensors_of(two)
    assert a.keys() == b.keys()
    bits = {name: (a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)) for name in a}
    assert [name for name, (x, y) in bits.items() if not torch.equal(x, y)] == []


def start(arguments, launcher=(), program=("-m", "fastmae.train"), **environment) -> subprocess.Popen:
    """A run of the tiny model as a process of its own; ``launcher``: what of Python starts it, torchrun say."""
    command = [sys.executable, *launcher, *program, "pretrain", "tiny", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})  # fmt: skip


def finish(process, timeout=120) -> tuple[int, str]:
    """Exit code and everything it has said."""
    try:
        text, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, text


def wait_for(path: Path, process, seconds=120) -> None:
    """Until something of the name ``path``, wildcards in it, is there."""
    end = time.monotonic() + seconds
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def signal_after(patch, steps, times=1):
    """Send this process SIGTERMs, as a cluster would, once it has done ``steps`` steps."""
    advance, done = RunLog.advance, []

    def advance_then_signal(self):
        advance(self)
        done.append(1)
        if len(done) == steps:
            for _ in range(times):
                signal.raise_signal(signal.SIGTERM)

    patch.setattr(RunLog, "advance", advance_then_signal)
