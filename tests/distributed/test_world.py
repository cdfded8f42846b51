"""What the processes of a run exchange, on one machine and on several."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch

from fastmae import InputError
from fastmae.train.distributed.join import join_world, leave_world
from fastmae.train.distributed.world import World
from tests.support.forked import run_together
from tests.support.runs import free_port


def hear_process(environment: dict[str, str], out: Path) -> None:
    """What one process receives, written to ``out``."""
    os.environ |= environment
    world = join_world("cpu", 60)
    world.set_timeout(30)
    received = {
        "machine": world.machine is not None,
        "local_size": world.local_size,
        "room": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    received["any"] = [world.any(world.rank == r, world.rank != r, False) for r in range(world.size)]
    received["gather"] = world.gather([f"from {world.rank}"] * (world.rank % 2))
    received["main"] = world.from_main(f"rank {world.rank}")
    received["by_main"] = world.by_main(lambda: f"done by {world.rank}")
    try:
        world.by_main(refuse)
    except InputError as error:
        received["refused"] = str(error)
    try:
        world.by_main(lambda: Path("/dev/null/lock").touch())
    except (InputError, OSError) as error:
        received["failed"] = str(error)
    out.write_text(json.dumps(received))
    leave_world()


def refuse():
    raise InputError("no")


def exchange(size: int, local_size: int | None, folder: Path) -> list[dict]:
    """What each of ``size`` processes receives, as if ``local_size`` of them shared a machine; None: they count it."""
    port, arguments = free_port(), []
    for rank in range(size):
        variables = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables |= {"LOCAL_RANK": rank % local_size, "LOCAL_WORLD_SIZE": local_size} if local_size else {}
        arguments.append(({name: str(value) for name, value in variables.items()}, folder / str(rank)))
    run_together(hear_process, arguments)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(size)]


@pytest.mark.cluster
@pytest.mark.parametrize(("size", "local_size"), [(2, 2), (4, 2), (3, 1), (2, None)])
def test_every_process_hears_the_same(size, local_size, tmp_path):
    for received in exchange(size, local_size, tmp_path):
        assert received["local_size"] == (local_size or size) and received["machine"] == (1 < received["local_size"] < size)
        assert received["any"] == [[True, True, False]] * size
        assert received["gather"] == [f"from {r}" for r in range(1, size, 2)]
        assert received["main"] == "rank 0" and received["by_main"] == "done by 0" and received["refused"] == "no"
        assert "/dev/null/lock" in received["failed"] and "Not a directory" in received["failed"]
        assert received["room"] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_a_run_of_one_asks_nobody():
    world = World(0, 1, torch.device("cpu"))
    assert world.any(True, False) == [True, False]
    assert world.gather(["a"]) == ["a"] and world.from_main(None) is None and world.by_main(lambda: "b") == "b"


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="device must be auto, cpu or cuda, got 'tpu'"):
        join_world("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device cuda was asked for, but torch sees no CUDA device"):
            join_world("cuda")
