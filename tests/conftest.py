"""Fixtures: devices, images made on the spot, shards of them, and the real photographs where they are."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

# Pillow and what reads data are imported where they are used: kernels are tested where only torch and triton are.


def pytest_collection_modifyitems(items):
    """``gpu`` tests are skipped, with the reason, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


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
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def make_picture(number: int, size: tuple[int, int] = (48, 64)):
    """A smooth picture with a shape in it, (height, width), different for each number; a Pillow image."""
    from PIL import Image

    rng = np.random.default_rng(number)
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / max(size)
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    pixels = np.stack(waves, -1) * 90 + 128
    cy, cx, r = rng.uniform(0.2, 0.6, 3)
    pixels[(y - cy) ** 2 + (x - cx) ** 2 < (r / 3) ** 2] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


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
    from fastmae.data.recode import Recode
    from fastmae.data.write import write_shards

    out = tmp_path_factory.mktemp("shards")
    write_shards(image_folder, out, Recode(resize=None), samples_per_shard=10)
    return out


@pytest.fixture(scope="session")
def small_folder(image_folder, tmp_path_factory) -> Path:
    """Three shards that are verified in a few milliseconds."""
    from fastmae.data.recode import Recode
    from fastmae.data.write import write_shards

    out = tmp_path_factory.mktemp("small")
    write_shards(image_folder / "ant", out, Recode(resize=16), samples_per_shard=5)
    return out


@pytest.fixture(scope="session")
def foreign(tmp_path_factory) -> Path:
    """Four tars of eight PNGs or JPEGs each, written by webdataset itself."""
    import webdataset as wds

    folder = tmp_path_factory.mktemp("foreign")
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
    from tests.slurm import environment_in

    return tmp_path, environment_in(tmp_path)


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder of real photographs (webdataset tars), outside the project."""
    root = Path(os.environ.get("FASTMAE_TEST_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data")).resolve()
    if not (root / "photos").is_dir():
        pytest.skip(f"no real photographs at {root}; set FASTMAE_TEST_DATA")
    return root / "photos"
