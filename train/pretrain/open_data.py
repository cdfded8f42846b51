"""The data of a run: its loader, opened where the run stands, and its length in steps."""

from dataclasses import replace

from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.world import World

_OF_RUN = ("crop", "bad_budget", "workers", "prefetch", "allow_pipe")


def open_data(recipe: Recipe, run: Run, world: World, source: str, state: dict | None) -> tuple[Loader, int]:
    """This process's loader, going on from ``state`` (``Loader.state``), and the optimizer steps of the whole run.

    ``source``: where the data of the run are read: ``run.data``, or a staged copy of it.

    Raises InputError or DataError if the data cannot be read or is not that of ``state``.
    """
    config = LoaderConfig(
        image_size=recipe.model.img_size,
        channels=recipe.model.in_chans,
        augment=recipe.augment,
        views=recipe.views,
        shuffle_window=recipe.shuffle_window,
        seed=recipe.seed,
        timeout=run.timeout / 2,  # a loader that is stuck says more of it than the run's watch
        **{name: getattr(run, name) for name in _OF_RUN},
    )
    data = Loader(
        source, config, batch_size=run.batch_size, rank=world.rank, world_size=world.size, device=world.device, state=state
    )
    total_steps = recipe.total_steps(data.samples)
    # A progressive run's image sizes are given as shares of its length, which only the opened data can tell.
    data.config = replace(config, sizes=recipe.sizes(total_steps))
    return data, total_steps
