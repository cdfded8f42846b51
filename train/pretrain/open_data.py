"""The data of a run: its loader, opened where the run stands, and its length in steps."""

from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from fastmae.data.source import Source
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.world import World

_OF_RUN = ("crop", "bad_budget", "workers", "prefetch", "allow_pipe")


def open_data(recipe: Recipe, run: Run, world: World, source: str, state: dict | None) -> tuple[Loader, int]:
    """This process's loader, going on from ``state`` (``Loader.state``), and the optimizer steps of the whole run.

    ``source``: where the data of the run are read: ``run.data``, or a staged copy of it.

    Raises InputError or DataError if the data cannot be read or is not that of ``state``.
    """
    opened = Source(source, world_size=world.size, allow_pipe=run.allow_pipe)
    total_steps = recipe.total_steps(opened.samples)
    config = LoaderConfig(
        image_size=recipe.model.img_size,
        sizes=recipe.sizes(total_steps),
        channels=recipe.model.in_chans,
        augment=recipe.augment,
        views=recipe.views,
        shuffle_window=recipe.shuffle_window,
        seed=recipe.seed,
        timeout=run.timeout / 2,  # a loader that is stuck knows more of it than the run's watch
        **{name: getattr(run, name) for name in _OF_RUN},
    )
    loader = Loader(
        opened, config, batch_size=run.batch_size, rank=world.rank, world_size=world.size, device=world.device, state=state
    )
    return loader, total_steps
