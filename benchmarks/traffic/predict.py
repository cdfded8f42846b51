"""``traffic``: what a training step launches and moves on a described GPU, by kind of kernel, and how long that would take.

Nothing is measured. Launches and bytes are counted in the graph that torch.compile makes of the real step (``lower``); times
are a model's (``cost``). AdamW is arithmetic: its bytes per parameter.
"""

import dataclasses
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from fastmae.benchmarks.scaling.collectives import trained_elements
from fastmae.benchmarks.traffic.contenders import Step, kernels_of
from fastmae.benchmarks.traffic.cost import Rates, seconds
from fastmae.benchmarks.traffic.gpus import GPUS
from fastmae.benchmarks.traffic.kernel import CHUNK, Kernel
from fastmae.benchmarks.training.contenders import MASK_RATIO
from fastmae.cores import usable_cores
from fastmae.model.config import FUSED, ModelConfig, preset
from fastmae.model.flops import training_flops

COUNTED_APART = ("products", "attention", "optimizer")  # in no total of bytes
# AdamW's bytes per parameter: fused, it reads weight, gradient and moments and writes all but the gradient; a norm reads the
# gradient once more. Otherwise each of its eight operations reads and writes, and a loss scaler has divided the gradient.
_ADAMW = {"fastmae": 32, "standard": 32, "rival": 28, "reference": 96}
_CHUNKS = 320  # blocks of a launch of torch's multi_tensor_apply


# A model small enough for a test to count again.
CHECK = Step(contender="fastmae", name="check", batch=8, gpu=GPUS["H100"],
             config=ModelConfig(img_size=64, embed_dim=128, depth=1, num_heads=2, decoder_embed_dim=64, decoder_depth=1,
                                decoder_num_heads=2, norm_pix_loss=True, fused=",".join(FUSED), attention="sdpa"))  # fmt: skip


def predict_traffic(models: Sequence[str], batch: int, gpus: Sequence[str], residuals: Sequence[str], contenders: Sequence[str],
                    image_size: int = 224, fused: str = ",".join(FUSED), attention: str = "short",
                    listed: bool = False) -> dict[str, object]:  # fmt: skip
    """The section ``traffic``: a row for each model, GPU, contender and, of fastmae, residual dtype. ``fused``, ``attention``:
    of ``ModelConfig``, for the contender ``fastmae``; ``listed``: rows hold every kernel."""
    kernels = {"fastmae": {"fused": fused, "attention": attention}}
    steps = [
        Step(contender=contender, batch=batch, gpu=GPUS[gpu], name=model,
             config=preset(model, norm_pix_loss=True, img_size=image_size, residual=residual,
                           **kernels.get(contender, {"fused": "off", "attention": "sdpa"})))
        for model in models for gpu in gpus for contender in contenders
        for residual in (residuals if contender in ("fastmae", "standard") else ("fp32",))
    ]  # fmt: skip
    rows = [row(step, found) | ({"kernels": kernel_list(found)} if listed else {})
            for step, found in zip(steps, lowered(steps), strict=True)]  # fmt: skip
    notes = ["predicted, not measured: launches and bytes are counted in the compiled graph, times follow from stated rates"]
    return {"rates": dataclasses.asdict(Rates()), "rows": rows, "notes": notes}


def lowered(steps: Sequence[Step]) -> list[list[Kernel]]:
    """The kernels of each step; each is lowered in a process of its own, which afterwards believes in a GPU."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(steps), usable_cores()), context, _quiet, max_tasks_per_child=1) as pool:
        return list(pool.map(kernels_of, steps))


def row(step: Step, kernels: list[Kernel], rates: Rates = Rates()) -> dict[str, object]:  # noqa: B008
    """A row of the section."""
    groups: dict[str, dict] = {}
    for kernel in kernels:
        found = groups.setdefault(kernel.group, {"launches": 0, "bytes": 0, "milliseconds": 0.0})
        found["launches"] += kernel.launches
        found["bytes"] += kernel.bytes
        found["milliseconds"] += 1e3 * seconds(kernel, step.gpu, rates)
    totals = {"launches": sum(g["launches"] for g in groups.values()),
              "bytes": sum(g["bytes"] for name, g in groups.items() if name not in COUNTED_APART)}  # fmt: skip
    trained = trained_elements(step.config)
    launches = -(-trained // (CHUNK * _CHUNKS)) * (8 if step.contender == "reference" else 1)
    adamw = Kernel(("multi_tensor_apply",) * launches, _ADAMW[step.contender] * trained)
    groups["optimizer"] = {"launches": launches, "bytes": adamw.bytes, "milliseconds": 1e3 * seconds(adamw, step.gpu, rates)}
    milliseconds = sum(g["milliseconds"] for g in groups.values())
    rate = 1e3 * step.batch / milliseconds
    flops = training_flops(step.config, MASK_RATIO)
    return {
        "model": step.name, "image_size": step.config.img_size[0], "batch": step.batch, "gpu": step.gpu.name,
        "contender": step.contender, "fused": step.config.fused, "attention": step.config.attention,
        "residual": step.config.residual if step.contender in ("fastmae", "standard") else "fp32",
        "groups": groups, "forward_backward": totals,
        "product_flops": sum(k.work.flops for k in kernels if hasattr(k.work, "flops")),
        "predicted_milliseconds": milliseconds, "predicted_images_per_second": rate,
        "predicted_mfu": rate * flops / step.gpu.flops,
    }  # fmt: skip


def kernel_list(kernels: list[Kernel]) -> list[dict[str, object]]:
    """Every kernel once, in the order of first launches."""
    times = Counter(kernel.without_number for kernel in kernels)
    return [{"times": n, "group": k.group, "launches": k.launches, "bytes": k.bytes, "names": k.names, "tensors": k.tensors,
             "is_backward": k.is_backward} for k, n in times.items()]  # fmt: skip


def _quiet() -> None:
    warnings.simplefilter("ignore")
