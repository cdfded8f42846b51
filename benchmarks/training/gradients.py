"""``gradients``: compiled gradients against eager ones, parameter by parameter, on photographs.

    error(g) = |g - exact| / |exact|,      wanted: error(compiled) <= 2 error(eager) + u

|.| is the L2 norm over one parameter. Compiled and eager gradients are computed under autocast to bf16, the exact ones by eager
mode in float32. u = 2**-9 allows one rounding where eager mode happens to be exact: to bf16 that moves a tensor by
2**-9.4 of its length. None may be off by half its length, however far off eager mode is: one of zeros is off by all of it.

Every compile mode of a run is tried with and without Inductor's mix-order reduction, which computes a LayerNorm's sums over
rows and over columns in one kernel: versions of it have given wrong gradients. And each once more with everything fused that a
block can fuse (``config.FUSED``), and our own attention, whether a measurement has chosen them or not.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastmae.benchmarks.timing import LossesDiffer
from fastmae.benchmarks.training.contenders import MASK_RATIO, choose
from fastmae.benchmarks.training.photographs import photographs
from fastmae.model.attention.dot_product import attention_shapes
from fastmae.model.attention.probe import why_not
from fastmae.model.config import FUSED, ModelConfig, kept_patches, preset
from fastmae.model.mae import MAE
from fastmae.model.masking import Masking, random_masking
from fastmae.train.step.loss_module import LossModule, compiled

ROUNDING = 2**-9
MOST = 0.5
AUTOCAST = torch.bfloat16
MODES = ("model", "blocks")  # of those of ``fastmae.train.step.loss_module``, what compiles
_CHUNK = 32  # images whose exact gradients are computed at a time: in float32 a full batch may not fit
_SHOWN = 5  # parameters with the largest errors, named in a row

Gradients = dict[str, Tensor]
Errors = dict[str, float]


def measure_gradients(
    name: str,
    batch: int | None,
    device: torch.device,
    *,
    data: Path | None = None,
    image_size: int = 224,
    modes: Iterable[str] = MODES,
    mix_orders: Iterable[bool] = (True, False),
    fused: Iterable[str] = ("auto", "all"),
) -> dict[str, object]:
    """The section ``gradients`` of a result: a row for each mode with and without mix-order reduction, and in ``wrong`` a line
    for each parameter whose gradient is. ``fused``: auto, as a run chooses on a GPU, and all, by name; that as Inductor reduces
    by default.

    ``batch`` None: 256 on a GPU, enough for Inductor to reduce in mixed order (5 * 2**20 values); 8 on a CPU, where it never
    does. Raises InputError on an unknown model or on ``data`` that cannot be read.
    """
    from torch._inductor import config as inductor  # with it comes the compiler, in two seconds
    from torch._inductor import metrics

    batch = batch or (256 if device.type == "cuda" else 8)
    config = preset(name, norm_pix_loss=True, img_size=image_size)
    weights = moved_weights(config)
    chosen = choose(config, device)
    images, source = photographs(MAE(config), batch, data)
    images = images.to(device)
    masking = random_masking(batch, config.patches, MASK_RATIO, seed=0, device=device)
    plain = dataclasses.replace(config, fused="off", attention="sdpa" if config.attention == "auto" else config.attention)
    exact = exact_gradients(plain, weights, images, masking)
    eager = errors(autocast_gradients(plain, weights, images, masking, "off"), exact)
    rows, wrong = [], []
    variants = [*itertools.product(mix_orders, ["auto"]), (inductor.triton.mix_order_reduction, "all")]
    for mode, (mix_order, kind) in itertools.product(modes, [v for v in variants if v[1] in fused]):
        torch._dynamo.reset()
        tried = everything_fused(config, device) if kind == "all" else config
        metrics.codegen_mix_order_reduction = 0
        with inductor.patch("triton.mix_order_reduction", mix_order):
            found = errors(autocast_gradients(tried, weights, images, masking, mode), exact)
        kernels = metrics.codegen_mix_order_reduction
        bad = wrong_parameters(found, eager)
        rows.append({"compile": mode, "fused": kind, "mix_order": mix_order, "mix_order_kernels": kernels, "wrong": len(bad),
                     "errors": found})  # fmt: skip
        how = f"--compile {mode}, mix-order reduction {'on' if mix_order else 'off'}"
        wrong += [f"{how}{', everything fused' if kind == 'all' else ''}: {line}" for line in bad]
    notes = [
        f"gradients on {source}",
        f"fused, auto: {chosen}",
        "kernels counts those compiled in this process, 0 if Inductor's cache had them",
    ]
    return {"model": name, "image_size": image_size, "batch": batch, "mask_ratio": MASK_RATIO, "eager_errors": eager,
            "rows": rows, "wrong": wrong, "notes": notes}  # fmt: skip


def check_gradients(name: str, batch: int, device: torch.device, *, image_size: int, mode: str) -> list[str]:
    """Raise LossesDiffer if the compiled step to be timed has other gradients than eager mode.

    Returns notes: none, or that memory was too small to compare.
    """
    from torch._inductor import config as inductor

    try:
        found = measure_gradients(name, batch, device, image_size=image_size, modes=[mode],
                                  mix_orders=[inductor.triton.mix_order_reduction], fused=["auto"])  # fmt: skip
    except torch.OutOfMemoryError:
        return [f"compiled gradients of {name} at batch {batch} were not compared with eager ones: out of memory"]
    finally:
        torch.cuda.empty_cache()  # leaves room for what is timed
    if wrong := found["wrong"]:
        raise LossesDiffer(
            f"{len(wrong)} compiled gradients of {name} are wrong, `fastmae bench gradients` lists them: {wrong[0]}"
        )
    return []


def everything_fused(config: ModelConfig, device: torch.device) -> ModelConfig:
    """``config`` with all that a block can fuse, by name, and our own attention where it works."""
    K = kept_patches(config.patches, MASK_RATIO)
    shapes = attention_shapes(config, K, config.patches - K)
    works = not any(why_not("short", device.type, AUTOCAST, shape) for shape in shapes)
    return dataclasses.replace(config, fused=",".join(FUSED), attention="short" if works else config.attention)


def moved_weights(config: ModelConfig) -> dict[str, Tensor]:
    """A new model's weights, each trained parameter perturbed: with every scale 1 and every bias 0, as initialised, a gradient
    that ignores them would be right."""
    torch.manual_seed(0)
    model = MAE(config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.002))
    return model.state_dict()


def exact_gradients(config: ModelConfig, weights: dict[str, Tensor], images: Tensor, masking: Masking) -> Gradients:
    """In float32, by eager mode and explicit attention."""
    model = _model(dataclasses.replace(config, attention="math"), weights, images.device)
    chunks = list(zip(images.split(_CHUNK), *(ids.split(_CHUNK) for ids in masking), strict=True))
    for chunk, *ids in chunks:
        (LossModule(model)(chunk, *ids) * (len(chunk) / len(images))).backward()
    return _gradients(model)


def autocast_gradients(config: ModelConfig, weights: dict[str, Tensor], images: Tensor, masking: Masking,
                       mode: str) -> Gradients:  # fmt: skip
    """Under autocast, compiled by ``mode``, as in a step of a run."""
    model = _model(config, weights, images.device)
    module = compiled(LossModule(model), mode)
    with torch.autocast(images.device.type, dtype=AUTOCAST):
        loss = module(images, *masking)
    loss.backward()
    return _gradients(model)


def _model(config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> MAE:
    model = MAE(config).to(device)
    model.load_state_dict(weights)
    return model


def _gradients(model: MAE) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def errors(found: Gradients, exact: Gradients) -> Errors:
    """Of each parameter the distance to ``exact`` over its length; infinite where only one of the two is there."""
    if found.keys() != exact.keys():
        raise ValueError(f"gradients are of other parameters: {sorted(found.keys() ^ exact.keys())}")
    return {name: _error(found[name], exact[name]) for name in exact}


def _error(found: Tensor | None, exact: Tensor | None) -> float:
    if found is None or exact is None:
        return 0.0 if found is exact else float("inf")
    difference, length = ((found.double() - exact.double()).norm().item(), exact.double().norm().item())
    return difference / length if length else (0.0 if difference == 0 else float("inf"))


def wrong_parameters(found: Errors, eager: Errors) -> list[str]:
    """A line for each parameter whose error is above twice eager mode's and one rounding, above ``MOST``, or NaN."""
    limits = {name: min(MOST, 2 * eager[name] + ROUNDING) for name in found}
    return [f"{name} has a relative error of {error:.2g}, eager mode {eager[name]:.2g}, allowed {limits[name]:.2g}"
            for name, error in found.items() if not error <= limits[name]]  # fmt: skip


def table(section: dict) -> list[list[str]]:
    """The section's table: errors are relative, those of the parameter where compiled over eager is largest."""
    lines = [
        ["model", "batch", "compile", "fused", "mix-order", "kernels", "parameters", "wrong", "error", "eager", "parameter"]
    ]
    eager = section["eager_errors"]
    for r in section["rows"]:
        found = r["errors"]
        worst = max(found, key=lambda name: found[name] / (2 * eager[name] + ROUNDING))
        lines.append([section["model"], str(section["batch"]), r["compile"], r["fused"], "on" if r["mix_order"] else "off",
                      str(r["mix_order_kernels"]), str(len(found)), str(r["wrong"]), f"{found[worst]:.4f}",
                      f"{eager[worst]:.4f}", worst])  # fmt: skip
    return lines
