"""Everything of a run that must exist before its first step, made in the order in which one part needs another."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fastmae
from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from fastmae.data.source import Source
from fastmae.train.checkpoint.format import SCHEMA, Checkpoint
from fastmae.train.checkpoint.resume import check_resume, choose_checkpoint, plain_settings, restore
from fastmae.train.checkpoint.state import run_tensors
from fastmae.train.config.agreement import agree
from fastmae.train.config.precision import AUTOCAST, precision_of
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.watch import WATCHED
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.attention_choice import AttentionChoice, choose_attention
from fastmae.train.pretrain.previews import Drawing
from fastmae.train.pretrain.task import Pretraining, Task
from fastmae.train.step.allocator import keep_freed_memory
from fastmae.train.step.compile_cache import CompileCache
from fastmae.train.step.cuda_graph import GraphedStep
from fastmae.train.step.loss_scale import LossScale
from fastmae.train.step.optimizer import learning_rate, make_optimizer
from fastmae.train.step.parallelize import groups_of, parallelize
from fastmae.train.step.step import Step


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One rank of a run, ready for its next step."""

    recipe: Recipe
    run: Run
    world: World
    task: Task
    accumulate: int
    """Micro-batches per step."""
    precision: str
    """bf16, fp16 or fp32."""
    attention: AttentionChoice
    model: nn.Module
    step: Step
    tensors: dict[str, Tensor]
    """What a checkpoint holds, the tensors themselves."""
    loader: Loader
    """At the position of ``first_step``."""
    cache: CompileCache
    drawing: Drawing | None
    checkpoint: Checkpoint | None
    """The one that is resumed."""
    total_steps: int
    notes: list[str] = field(default_factory=list)
    """Lines for the log."""

    @property
    def first_step(self) -> int:
        """Steps done before."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def warmup_steps(self) -> float:
        """Steps of linear warm-up, possibly fractional."""
        return self.total_steps * self.recipe.warmup_epochs / self.recipe.epochs

    def learning_rate(self, step: int) -> float:
        """That of ``step``, counted from 0."""
        return learning_rate(step, self.total_steps, self.warmup_steps, self.recipe.lr, self.recipe.min_lr)

    def state(self, step: int) -> dict:
        """The plain numbers of the checkpoint after ``step`` steps: its ``state.json``."""
        return {
            "schema": SCHEMA,
            "step": step,
            "total_steps": self.total_steps,
            "data": self.loader.state(step * self.recipe.effective_batch),
            "schedule": {"lr": self.learning_rate(min(step, self.total_steps - 1)), "warmup_steps": self.warmup_steps},
            "model": self.recipe.model.to_json(),
            "recipe": plain_settings(self.recipe),
            "attention": self.attention.state(),
            "processes": self.world.size,
            "parallel": self.run.parallel,
            "versions": {"fastmae": fastmae.__version__, "torch": torch.__version__},
        }


def set_up(recipe: Recipe, run: Run, world: World, data: str) -> Setup:
    """All ranks together: choose the checkpoint, open the data where it stands, build model and step, and fill them from it.

    ``data``: where the run reads its data: ``run.data``, or a staged copy of it. Raises InputError on settings that contradict
    each other, the checkpoint or the data; DataError if data or checkpoint cannot be read.
    """
    accumulate = agree(recipe, run, world.size)
    precision = precision_of(run.precision, world.device.type)
    autocast = AUTOCAST[precision]
    checkpoint, notes = choose_checkpoint(run, world)
    if checkpoint:
        notes += [f"resumed from {checkpoint.folder}", *check_resume(checkpoint, recipe)]
    loader, total_steps = _open_data(recipe, run, world, data, checkpoint)
    attention = choose_attention(recipe, autocast or torch.float32, world, checkpoint, run.compile != "off")
    if world.device.type == "cpu":
        keep_freed_memory()
    task = Pretraining(recipe)
    torch.manual_seed(recipe.seed)
    model = task.make_model(world.device)
    module = parallelize(task.make_module(model), world, how=run.parallel, compile=run.compile, reduce=run.reduce)
    world.set_timeout(WATCHED, groups_of(module))
    optimizer = make_optimizer(task.parameter_groups(model), recipe.betas)
    scale = LossScale(world.device) if precision == "fp16" else None
    step = (GraphedStep if run.cuda_graphs else Step)(
        module, optimizer, task.loss, autocast=autocast, scale=scale, mean=world.mean, spike_z=run.spike_z,
        skip_spikes=run.skip_spikes,
    )  # fmt: skip
    tensors = run_tensors(model, optimizer, spikes=step.spikes.tensors(), step=step.tensors(),
                          **({"loss_scale": scale.tensors()} if scale else {}))  # fmt: skip
    cache = CompileCache(recipe, run, world)
    notes += [*cache.load(), *attention.notes]
    if checkpoint:
        restore(checkpoint, tensors, world)
    drawing = Drawing(data, model, world, recipe.mask_ratio, autocast) if run.draw_every else None
    return Setup(recipe=recipe, run=run, world=world, task=task, accumulate=accumulate, precision=precision,
                 attention=attention, model=model, step=step, tensors=tensors, loader=loader, cache=cache, drawing=drawing,
                 checkpoint=checkpoint, total_steps=total_steps, notes=notes)  # fmt: skip


def _open_data(recipe: Recipe, run: Run, world: World, data: str, checkpoint: Checkpoint | None) -> tuple[Loader, int]:
    """This rank's loader, at the position of ``checkpoint``, and the optimizer steps of the whole run."""
    source = Source(data, world_size=world.size, allow_pipe=run.allow_pipe)
    total_steps = recipe.total_steps(source.samples)
    config = LoaderConfig(
        image_size=recipe.model.img_size,
        sizes=recipe.sizes(total_steps),
        channels=recipe.model.in_chans,
        augment=recipe.augment,
        views=recipe.views,
        shuffle_window=recipe.shuffle_window,
        seed=recipe.seed,
        timeout=run.timeout / 2,  # a loader that is stuck knows more of it than the run's watch
        **{name: getattr(run, name) for name in ("crop", "bad_budget", "workers", "prefetch", "allow_pipe")},
    )
    state = checkpoint and checkpoint.state["data"]
    loader = Loader(source, config, batch_size=run.batch_size, rank=world.rank, world_size=world.size, device=world.device,
                    state=state)  # fmt: skip
    return loader, total_steps
