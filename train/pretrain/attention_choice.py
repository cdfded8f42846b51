"""Which attention a run computes with and what its blocks fuse: the same on all of its ranks, and again where it is resumed."""

import json
from dataclasses import asdict, dataclass, field

import torch

from fastmae.errors import InputError
from fastmae.model.attention.backends import Shape, prepare, refusal
from fastmae.model.attention.choice import adopt
from fastmae.model.attention.dot_product import resolve
from fastmae.model.attention.probe import notes, probe, why_not
from fastmae.model.block.trial import attention_of
from fastmae.model.config import BACKENDS, ModelConfig
from fastmae.train.checkpoint.format import Checkpoint
from fastmae.train.config.precision import AUTOCAST, precision_of
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.launcher import read_launcher
from fastmae.train.distributed.world import World, trains_on_gpu
from fastmae.train.pretrain.fused_choice import SavedFused, adopt_run, choose_fused, probe_fused, run_block_shapes


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """The backends of a run's shapes. As JSON it stands in ``state.json`` of each checkpoint, as ``attention``."""

    device: str
    dtype: str
    backends: dict[str, str]
    """A backend's name for each ``Shape``, written for people."""
    fused: dict[str, list[str]] = field(default_factory=dict)
    """What is fused in blocks of each ``BlockShape``, written for people; none unless it was measured or named."""
    xformers: str | None = None
    """Why xformers, the usual choice, was no candidate; None if it was, or another was asked for."""
    notes: tuple[str, ...] = ()
    """Lines for people: what differs from the checkpoint, and how backends were probed."""

    @property
    def text(self) -> str:
        """For people, with the reason if xformers cannot."""
        names = " and ".join(dict.fromkeys(self.backends.values()))
        names += f" (xformers does not work here: {self.xformers})" if self.xformers else ""
        fused = " or ".join(dict.fromkeys(", ".join(names) or "nothing" for names in self.fused.values()))
        return f"{names}, fused: {fused}" if self.fused else names

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"device": self.device, "dtype": self.dtype, "backends": self.backends, "fused": self.fused}


def probe_attention(recipe: Recipe, run: Run) -> None:
    """On a GPU, try the backends and fused operations that the run may use, in the process of rank 0 and before that opens its
    GPU: one in exclusive-process mode takes no second process. The results are kept for ``choose_attention``.

    Raises InputError on a device or launcher's environment that contradicts itself.
    """
    info = read_launcher()
    if info.rank != 0 or not trains_on_gpu(run.device):
        return
    dtype = AUTOCAST[precision_of(run.precision, "cuda")] or torch.float32
    wanted = recipe.model.attention
    shown = info.local_rank or 0
    number = shown if shown < torch.cuda.device_count() else 0  # a launcher may show each process one GPU only
    probe("cuda", dtype, run_shapes(recipe), BACKENDS if wanted == "auto" else (wanted,), number)
    probe_fused(recipe, "cuda", dtype, number)


def run_shapes(recipe: Recipe) -> list[Shape]:
    """The attention shapes of training, at all of its image sizes."""
    return list(dict.fromkeys(attention_of(shape) for shape in run_block_shapes(recipe)))


def choose_attention(recipe: Recipe, dtype: torch.dtype, world: World, checkpoint: Checkpoint | None = None,
                     compiles: bool = True) -> AttentionChoice:  # fmt: skip
    """Choose what ``attention`` and ``fused`` of ``recipe.model`` stand for on the run's shapes.

    ``checkpoint``: the one that is resumed. What auto chose then is used again, on whatever machine, unless it does not work
    there. ``compiles``: whether blocks are compiled, as they are measured then. Timings differ from rank to rank, so rank 0
    measures, and the others use its choice. Raises InputError, on every rank, if what is asked for by name cannot run.
    """
    device, shapes = world.device.type, run_shapes(recipe)
    chosen_json = world.by_main(lambda: json.dumps(asdict(_choose(recipe, device, dtype, checkpoint, compiles))))
    found = json.loads(chosen_json)
    choice = AttentionChoice(**{**found, "notes": tuple(found["notes"])})
    chosen = {shape: choice.backends[str(shape)] for shape in shapes}
    if recipe.model.attention == "auto":
        adopt(device, dtype, chosen)
    if recipe.model.fused == "auto":
        adopt_run(recipe, device, dtype, choice.fused)
    _prepare_everywhere(chosen, world)
    return choice


@dataclass(frozen=True)
class _Saved:
    """What a checkpoint says of the attention that its run computed with."""

    is_auto: bool
    """Whether that was auto's choice."""
    where: str
    """Dtype and device."""
    backends: dict[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint | None) -> "_Saved | None":
        """None if there is no checkpoint, or none of its backends is known here."""
        if checkpoint is None:
            return None
        state, saved = checkpoint.state, checkpoint.state["attention"]
        backends = saved.get("backends")
        known = {s: b for s, b in backends.items() if b in BACKENDS} if isinstance(backends, dict) else {}
        if not known:
            return None
        is_auto = ModelConfig.from_json(state["model"]).attention == "auto"
        return cls(is_auto, f"{saved.get('dtype')} on {saved.get('device')}", known)


def _choose(recipe: Recipe, device: str, dtype: torch.dtype, checkpoint: Checkpoint | None, compiles: bool) -> AttentionChoice:
    """By rank 0: attention, and what is fused around it, as part of which it may be chosen again."""
    shapes, name, saved = run_shapes(recipe), recipe.model.attention, _Saved.of(checkpoint)
    broken: dict[Shape, str] = {}
    if name == "auto":
        wanted, lines, broken = _of_checkpoint(shapes, device, dtype, saved)
    else:
        wanted, lines = dict.fromkeys(shapes, name), _check_named(name, shapes, device, dtype, saved)
    fused, of_fused = choose_fused(recipe, device, dtype, wanted, SavedFused.of(checkpoint), compiles)
    chosen = {shape: resolve(name, device, dtype, shape) for shape in shapes}
    for shape, reason in broken.items():
        lines.append(f"attention {reason}; {chosen[shape]} is used for {shape}")
    xformers = why_not("xformers", device, dtype, shapes[0]) if device == "cuda" and name == "auto" else None
    return AttentionChoice(device=device, dtype=_name(dtype), backends={str(s): b for s, b in chosen.items()}, fused=fused,
                           xformers=xformers, notes=(*lines, *of_fused, *notes()))  # fmt: skip


def _of_checkpoint(shapes: list[Shape], device: str, dtype: torch.dtype,
                   saved: _Saved | None) -> tuple[dict[Shape, str], list[str], dict[Shape, str]]:  # fmt: skip
    """Of each shape the backend that auto chose for the checkpoint's run, or auto; lines for people; and of the shapes whose
    backend does not work here, which and why."""
    here, lines, before = f"{_name(dtype)} on {device}", [], {}
    saved = saved if saved and saved.is_auto else None
    if saved and saved.where != here:
        lines.append(f"attention is chosen again: {here}, and the checkpoint's was chosen for {saved.where}")
    elif saved:
        before = {shape: saved.backends[str(shape)] for shape in shapes if str(shape) in saved.backends}
    reasons = {shape: why_not(backend, device, dtype, shape) for shape, backend in before.items()}
    works = {shape: before[shape] for shape, reason in reasons.items() if reason is None}
    adopt(device, dtype, works)
    broken = {shape: f"{before[shape]} of the checkpoint does not work here, {reason}" for shape, reason in reasons.items()
              if reason is not None}  # fmt: skip
    return dict.fromkeys(shapes, "auto") | works, lines, broken


def _check_named(name: str, shapes: list[Shape], device: str, dtype: torch.dtype, saved: _Saved | None) -> list[str]:
    """Lines for people about the backend ``name`` for all shapes. Raises InputError if it does not work on them."""
    for shape in shapes:
        if reason := why_not(name, device, dtype, shape):
            probe(device, dtype, shapes)
            others = [b for b in BACKENDS if not any(why_not(b, device, dtype, s) for s in shapes)]
            raise InputError(
                f"attention {name} does not work here for {shape}, {reason}; choose auto or {' or '.join(others) or 'another'}"
            )
    before = sorted({b for s, b in saved.backends.items() if s in map(str, shapes)} - {name}) if saved else []
    return [f"attention {name} is used as given, the checkpoint's was {' and '.join(before)}"] if before else []


def _prepare_everywhere(chosen: dict[Shape, str], world: World) -> None:
    """Import what the backends need. Raises InputError, on every rank, if a rank lacks something."""
    wrong = None
    try:
        for shape, backend in chosen.items():
            if reason := refusal(backend, world.device.type, shape):
                raise InputError(f"attention {backend} does not work on rank {world.rank}, {reason}; choose another one")
            prepare(backend)
    except InputError as error:
        wrong = error
    if world.any(wrong is not None)[0]:
        raise wrong or InputError("attention does not work on another rank, whose output has the reason; choose another")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
