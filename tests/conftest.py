"""Fixtures: devices, images made on the spot, shards of them, and the real photographs where they are."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.support.pictures import make_picture

_OF_TERMINAL = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGQUIT: signal.SIG_DFL,
}

# Pillow and what reads data are imported where they are used: kernels are tested where only torch and triton are.


def pytest_addoption(parser):
    """``make gpu`` runs those worth most first, in processes of their own."""
    parser.addoption("--worth", metavar="N,...", help="of the gpu tests, only those of these numbers; 9: those without one")


def pytest_configure():
    """What the processes of tests inherit."""
    for number, handler in _OF_TERMINAL.items():
        if signal.getsignal(number) is signal.SIG_IGN:  # as nohup, or a shell's script starts what it puts in the background
            signal.signal(number, handler)
    if "PYTEST_XDIST_WORKER" in os.environ:  # two processes with two threads each wait for each other's cores
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Files that start processes come first: they are the longest. ``gpu`` tests come last, those worth most first.

    Where there is no CUDA device these are skipped, with the reason.
    """
    if wanted := config.getoption("--worth"):
        chosen = {int(number) for number in wanted.split(",")} | {0}
        config.hook.pytest_deselected(items=[item for item in items if _worth(item) not in chosen])
        items[:] = [item for item in items if _worth(item) in chosen]
    of_processes = {item.path for item in items if item.get_closest_marker("cluster")}
    items.sort(key=lambda item: (_worth(item), item.path not in of_processes))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _worth(item) -> int:
    """0 for a test that needs no GPU, else the number of its ``worth``, or a number above all."""
    if item.get_closest_marker("gpu") is None:
        return 0
    worth = item.get_closest_marker("worth")
    return worth.args[0] if worth else 9


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every device there is: kernels run on CUDA, twins on the CPU (or kernels, in Triton's interpreter)."""
    return request.param


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What tests measure under load stays out of the user's cache."""
    os.environ["FASTMAE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeded():
    """Random inputs are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_signals():
    """A run that was stopped by a signal ignores more of them for good; the next test, and its processes, must not."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """37 JPEGs in three classes."""
    root = tmp_path_factory.mktemp("images")
    for i in range(37):
        folder = root / ("ant", "bee", "cat")[i % 3]
        folder.mkdir(exist_ok=True)
        make_picture(i, (40 + i, 64)).save(folder / f"photo.{i:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def shard_folder(image_folder, tmp_path_factory) -> Path:
    """Shards of ``image_folder``, 10 to a shard, at their own size."""
    from fastmae.images.recode import Recode
    from fastmae.shards.build import write_shards

    out = tmp_path_factory.mktemp("shards")
    write_shards(image_folder, out, Recode(resize=None), samples_per_shard=10)
    return out


@pytest.fixture(scope="session")
def small_folder(image_folder, tmp_path_factory) -> Path:
    """Three shards that are verified in a few milliseconds."""
    from fastmae.images.recode import Recode
    from fastmae.shards.build import write_shards

    out = tmp_path_factory.mktemp("small")
    write_shards(image_folder / "ant", out, Recode(resize=16), samples_per_shard=5)
    return out


@pytest.fixture(scope="session")
def tar_folder(tmp_path_factory) -> Path:
    """Four tars of eight PNGs or JPEGs each, written by webdataset itself."""
    import webdataset as wds

    folder = tmp_path_factory.mktemp("tar_folder")
    for s in range(4):
        with wds.TarWriter(str(folder / f"part-{s}.tar")) as writer:
            for i in range(8):
                kind = "jpg" if i % 2 else "png"
                writer.write({"__key__": f"s{s}i{i}", kind: make_picture(s * 8 + i), "cls": i})
    return folder


@pytest.fixture
def copy(shard_folder, tmp_path) -> Path:
    """The shards of ``shard_folder``, to be damaged."""
    shutil.copytree(shard_folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def cluster(tmp_path) -> tuple[Path, dict[str, str]]:
    """A folder to work in, and the environment of a Slurm job."""
    from tests.support.slurm import environment_in

    return tmp_path, environment_in(tmp_path)


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of real photographs (webdataset tars): ``photos`` in the folder that FASTMAE_TEST_DATA names."""
    root = os.environ.get("FASTMAE_TEST_DATA")
    if not root or not (folder := Path(root) / "photos").is_dir():
        pytest.skip(f"no real photographs: FASTMAE_TEST_DATA is {root!r}, and names no folder with photos in it")
    return folder
