"""``kernels``: each op by its Triton kernel, by its plain twin, and by the twin through torch.compile.

Time is the device's alone: on a GPU the calls are one CUDA graph. A backward pass is the difference of both passes and the
forward one. Bytes are the fewest that the op must move (each input read once, each output written once), compared with a
copy measured in the same run. Inputs rotate through more memory than the cache holds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastmae import kernels
from fastmae.benchmarks.machine import copy_bytes
from fastmae.benchmarks.timing import LossesDiffer, device_seconds
from fastmae.kernels.dispatch import use_triton
from fastmae.model.config import ModelConfig, kept_patches, preset
from fastmae.model.masking import random_masking

_CPU_CACHE = 64 * 2**20  # bytes, assumed
_MOST_SETS = 32
_TOLERANCE = 1e-2  # relative, of bf16 results that were rounded in different places


@dataclass(frozen=True)
class Sizes:
    """Letters of the ops: B images, L patches, K kept, Q predicted, P values of a patch, D and E encoder and decoder width."""

    B: int
    L: int
    K: int
    Q: int
    P: int
    D: int
    E: int
    config: ModelConfig

    @classmethod
    def of(cls, config: ModelConfig, batch: int, mask_ratio: float = 0.75) -> "Sizes":
        """Those of a training step."""
        L, K = config.patches, kept_patches(config.patches, mask_ratio)
        return cls(batch, L, K, L - K, config.patch_values, config.embed_dim, config.decoder_embed_dim, config)


@dataclass(frozen=True)
class Case:
    """An op as a step uses it: its inputs, its two bodies, which inputs get gradients, and its least traffic in bytes."""

    name: str
    inputs: Callable[[Sizes, torch.device, torch.dtype], tuple]
    op: Callable[..., Tensor]
    twin: Callable[..., Tensor]
    forward_bytes: Callable[[Sizes, int], int]
    """From sizes and the compute dtype's bytes."""
    backward_bytes: Callable[[Sizes, int], int] | None = None
    differentiable: tuple[int, ...] = ()
    """Indices of the inputs that get gradients."""
    compiles: bool = True
    """Whether the twin is worth compiling: not where it would be compiled again for every image's size."""


def _images(s: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.randint(0, 256, (s.B, s.config.in_chans, *s.config.img_size), dtype=torch.uint8, device=device)
    return images, *(torch.tensor(v, device=device) for v in (s.config.pixel_mean, s.config.pixel_std))


def _masking(s: Sizes, device: torch.device):
    return random_masking(s.B, s.L, 0.75, seed=0, device=device)


def _gather_inputs(s, device, dtype):
    images, mean, std = _images(s, device)
    return images, _masking(s, device).ids_keep, s.config.patch_size, mean, std, dtype


def _loss_inputs(s, device, dtype):
    images, mean, std = _images(s, device)
    pred = torch.randn(s.B, s.Q, s.P, device=device, dtype=dtype, requires_grad=True)
    return pred, images, _masking(s, device).ids_predict, s.config.patch_size, True, mean, std


def _rows_inputs(s, device, dtype):
    masking = _masking(s, device)
    return torch.randn(s.B, s.L, s.D, device=device, dtype=dtype, requires_grad=True), masking.ids_keep, masking.ids_restore


def _decoder_inputs(s, device, dtype):
    masking = _masking(s, device)
    x = torch.randn(s.B, 1 + s.K, s.E, device=device, dtype=dtype, requires_grad=True)
    token = torch.randn(s.E, device=device, requires_grad=True)
    return x, token, torch.randn(1 + s.L, s.E, device=device), masking.ids_keep, masking.ids_predict, torch.float32


def _masking_inputs(s, device, dtype):
    ids = torch.arange(s.B, device=device)
    return 0, torch.zeros_like(ids), ids, s.L, s.K, s.Q


def _boxes(s: Sizes) -> Tensor:
    """The same for every set: sides of 45% to 100% of an image of 256 x 256 pixels, as for a fifth to all of its area."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(115, 257, (s.B, 2), generator=generator)
    corners = (torch.rand(s.B, 2, generator=generator) * (257 - sides)).long()
    return torch.cat([corners, sides], 1).int()


def _crop_inputs(s, device, dtype):
    """Tensors on the device, the crops' size, and what the twin reads on the host, for which a CUDA graph cannot wait."""
    image = 256 * 256 * s.config.in_chans
    pixels = torch.randint(0, 256, (s.B * image,), dtype=torch.uint8, device=device)
    host = (torch.arange(s.B) * image, torch.full((s.B,), 256).int(), _boxes(s), torch.arange(s.B) % 2 == 0)
    return pixels, *(t.to(device) for t in host), s.config.img_size, s.config.in_chans, host


def _encoder_attention_inputs(s, device, dtype):
    H = s.config.num_heads
    return (torch.randn(s.B, 1 + s.K, 3, H, s.D // H, device=device, dtype=dtype, requires_grad=True),)


def _decoder_attention_inputs(s, device, dtype):
    H = s.config.decoder_num_heads
    return (torch.randn(s.B, 1 + s.L, 3, H, s.E // H, device=device, dtype=dtype, requires_grad=True),)


def _attention_by_torch(packed: Tensor) -> Tensor:
    """What a step would use otherwise, faster than the explicit twin: its gradient is concatenated of three."""
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _crop_bytes(s: Sizes, width: int) -> int:
    out = s.B * math.prod(s.config.img_size)
    return s.config.in_chans * (int(_boxes(s)[:, 2:].prod(1).sum()) + out)


CASES = (
    Case("gather_patches", _gather_inputs, kernels.gather_patches, kernels.gather_patches_ref,
         lambda s, width: s.B * s.K * s.P * (1 + width)),
    Case("masked_mse", _loss_inputs, kernels.masked_mse, lambda *a: kernels.masked_mse_ref(*a)[0].mean(),
         lambda s, width: s.B * s.Q * (s.P * (1 + width) + 12), lambda s, width: s.B * s.Q * s.P * (1 + 2 * width), (0,)),
    Case("take_rows", _rows_inputs, kernels.take_rows, lambda *a: kernels.take_rows_ref(*a, None),
         lambda s, width: 2 * s.B * s.K * s.D * width, lambda s, width: s.B * (s.K + s.L) * s.D * width, (0,)),
    Case("decoder_input", _decoder_inputs, kernels.decoder_input, kernels.decoder_input_ref,
         lambda s, width: s.B * s.E * ((1 + s.K) * width + (1 + s.K + s.Q) * 4),
         lambda s, width: s.B * s.E * ((1 + s.K) * width + (1 + s.K + s.Q) * 4), (0, 1)),
    Case("random_masking", _masking_inputs, lambda *a: kernels.random_masking(*a)[0],
         lambda *a: kernels.random_masking_ref(*a)[0], lambda s, width: s.B * (16 + 8 * s.L)),
    Case("resized_crop", _crop_inputs, lambda *a: kernels.resized_crop(*a[:7]),
         lambda *a: kernels.resized_crop_ref(a[0], *a[7], *a[5:7]), _crop_bytes, compiles=False),
    Case("short_attention encoder", _encoder_attention_inputs, kernels.short_attention, _attention_by_torch,
         lambda s, width: 4 * s.B * (1 + s.K) * s.D * width, lambda s, width: 8 * s.B * (1 + s.K) * s.D * width, (0,)),
    Case("short_attention decoder", _decoder_attention_inputs, kernels.short_attention, _attention_by_torch,
         lambda s, width: 4 * s.B * (1 + s.L) * s.E * width, lambda s, width: 8 * s.B * (1 + s.L) * s.E * width, (0,)),
)  # fmt: skip


def measure_kernels(models: list[str], batch: int | None, device: torch.device) -> dict[str, object]:
    """The section ``kernels`` of a result: the copy rate, and a row for each op, model and body."""
    on_gpu = device.type == "cuda"
    batch = batch or (256 if on_gpu else 16)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    copy, rows, notes = copy_bytes(device), [], []
    if not use_triton(torch.empty(0, device=device)):
        notes.append("no row for Triton: its kernels need a CUDA device")
    for model in models:
        sizes = Sizes.of(preset(model), batch)
        for case in CASES:
            for body, function in bodies(case, device).items():
                check_equal(case, body, function, case.inputs(sizes, device, dtype))
                rows += [r | {"model": model, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
                         for r in _rows(case, body, function, sizes, device, dtype, copy)]  # fmt: skip
    return {"copy_bytes_per_second": copy, "rows": rows, "notes": notes}


def bodies(case: Case, device: torch.device) -> dict[str, Callable]:
    """What can run the op here: Triton's kernel, the twin, the twin compiled."""
    found = {"triton": case.op} if use_triton(torch.empty(0, device=device)) else {}
    found["twin"] = case.twin
    return {**found, "compiled twin": torch.compile(case.twin, dynamic=False)} if case.compiles else found


def check_equal(case: Case, body: str, function: Callable, inputs: tuple) -> None:
    """Raise LossesDiffer unless ``function`` gives the values and gradients of the twin, up to rounding."""
    found, expected = (_both(case, f, inputs)() if case.differentiable else [f(*inputs)] for f in (function, case.twin))
    for one, two in zip(found, expected, strict=True):
        if not (one.double() - two.double()).norm() <= _TOLERANCE * two.double().norm():
            raise LossesDiffer(f"{case.name} by {body} differs from its twin")


def input_sets(case: Case, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[tuple]:
    """Inputs that together are four times what the cache holds: at least two sets, at most ``_MOST_SETS``."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE
    count = math.ceil(4 * cache / case.forward_bytes(sizes, dtype.itemsize))
    return [case.inputs(sizes, device, dtype) for _ in range(min(_MOST_SETS, max(2, count)))]


def _rows(case: Case, body: str, function: Callable, sizes: Sizes, device: torch.device, dtype: torch.dtype,
          copy: float) -> list[dict]:  # fmt: skip
    sets = input_sets(case, sizes, device, dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        seconds = {"forward": device_seconds([_forward(function, s) for s in sets], device)}
    traffic = {"forward": case.forward_bytes(sizes, dtype.itemsize)}
    if case.differentiable:
        seconds["both"] = device_seconds([_both(case, function, s) for s in sets], device)
        seconds["backward"] = seconds["both"] - seconds["forward"]
        traffic["backward"] = case.backward_bytes(sizes, dtype.itemsize)
        traffic["both"] = traffic["forward"] + traffic["backward"]
    return [
        {
            "op": case.name,
            "body": body,
            "pass": name,
            "microseconds": 1e6 * s,
            "bytes": traffic[name],
            "bytes_per_second": traffic[name] / s,
            "share_of_copy": traffic[name] / s / copy,
        }
        for name, s in seconds.items()
        if s > 0
    ]


def _forward(function: Callable, inputs: tuple) -> Callable[[], Tensor]:
    return lambda: function(*inputs)


def _both(case: Case, function: Callable, inputs: tuple) -> Callable[[], list[Tensor]]:
    wanted = [inputs[i] for i in case.differentiable]
    with torch.no_grad():
        out = function(*inputs)
    generator = torch.Generator(out.device).manual_seed(0)  # the same for every body
    gradient = torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)

    def run() -> list[Tensor]:
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, wanted, gradient)]

    return run


def table(section: dict) -> list[list[str]]:
    """The section's table."""
    lines = [["model", "batch", "op", "body", "pass", "us", "GB/s", "of a copy"]]
    for r in section["rows"]:
        lines.append([r["model"], str(r["batch"]), r["op"], r["body"], r["pass"], f"{r['microseconds']:.1f}",
                      f"{r['bytes_per_second'] / 1e9:.1f}", f"{r['share_of_copy']:.0%}"])  # fmt: skip
    return lines
