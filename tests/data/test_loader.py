"""Batches: every sample once per epoch, the same whatever the ranks and workers, and from any place on."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmae import InputError
from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from fastmae.images.recode import Recode
from fastmae.shards.build import write_shards
from fastmae.shards.index import Index
from tests.support.batches import N, equal, joined, joined_batch, take
from tests.support.processes import workers_of

pytestmark = pytest.mark.worth(3)


def test_every_sample_comes_once_per_epoch_and_epochs_differ(shard_folder):
    batches = take(shard_folder, 19)  # three epochs and a bit
    ids, epochs = joined(batches, "sample_ids"), joined(batches, "epochs")
    orders = [ids[epochs == e].tolist() for e in range(3)]
    assert all(sorted(o) == list(range(N)) for o in orders)
    assert orders[0] != orders[1] != orders[2]


@pytest.fixture(scope="module")
def whole(shard_folder):
    """Five global batches of 24: more than three epochs of one rank in its own process."""
    return take(shard_folder, 5, batch_size=24)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_and_workers_change_nothing(world_size, workers, shard_folder, whole):
    share = {"batch_size": 24 // world_size, "world_size": world_size, "workers": workers}
    parts = [take(shard_folder, 5, rank=r, **share) for r in range(world_size)]
    for number, batch in enumerate(whole):
        for field in ("images", "sample_ids", "epochs", "labels"):
            assert torch.equal(getattr(batch, field), torch.cat([getattr(p[number], field) for p in parts]))


@pytest.mark.parametrize("done", range(1, 9))
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_start_at_any_batch_continues_the_order_on_any_number_of_ranks(shard_folder, done, world_size):
    rest = take(shard_folder, 9)[done:]
    parts = [take(shard_folder, 9 - done, batch_size=6 // world_size, rank=r, world_size=world_size, start=6 * done)
             for r in range(world_size)]  # fmt: skip
    assert equal(rest, [joined_batch([p[number] for p in parts]) for number in range(9 - done)])


def test_an_uneven_split_of_shards_gives_every_rank_as_many_batches(image_folder, tmp_path):
    index, _ = write_shards(image_folder, tmp_path / "seven", Recode(resize=16), samples_per_shard=6)
    assert len(index.shards) == 7
    found = [take(tmp_path / "seven", 37, batch_size=1, rank=r, world_size=3) for r in range(3)]
    ids = torch.stack([joined(f, "sample_ids") for f in found], dim=1).flatten()
    assert all(sorted(ids[37 * e : 37 * (e + 1)].tolist()) == list(range(N)) for e in range(3))


def test_one_shard_keeps_eight_workers_busy(image_folder, tmp_path):
    write_shards(image_folder, tmp_path / "one", Recode(resize=16), samples_per_shard=100)
    assert equal(take(tmp_path / "one", 5, batch_size=37), take(tmp_path / "one", 5, batch_size=37, workers=8))


def test_seed_changes_order_and_crops(shard_folder):
    one, two = (take(shard_folder, 1, batch_size=N, seed=s)[0] for s in (0, 1))
    assert not torch.equal(one.sample_ids, two.sample_ids)
    assert not (one.images[one.sample_ids.argsort()] == two.images[two.sample_ids.argsort()]).flatten(1).all(1).any()


def test_labels_and_shapes_are_those_of_the_index(shard_folder):
    (batch,) = take(shard_folder, 1, image_size=(24, 40), channels=1)
    assert batch.images.shape == (6, 1, 24, 40) and batch.images.dtype == torch.uint8
    assert torch.equal(
        batch.labels, torch.from_numpy(Index.load(shard_folder).table["label"].astype(np.int64))[batch.sample_ids]
    )


def test_a_shuffle_window_keeps_exact_order_and_resume(shard_folder):
    whole = take(shard_folder, 9, shuffle_window=2)
    assert sorted(joined(whole, "sample_ids")[:N].tolist()) == list(range(N))
    assert equal(whole[4:], take(shard_folder, 5, shuffle_window=2, start=24, workers=2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"fingerprint": "0123"},
            r"other data than this run began with, fingerprint [0-9a-f]{16} here and 0123 in the checkpoint",
        ),
        ({"seed": 1}, "made with seed 1, not 0"),
        ({"views": 2}, "made with views 2, not 1"),
        ({"shuffle_window": 3}, "made with shuffle_window 3, not None"),
    ],
)
def test_a_place_in_another_order_is_refused(shard_folder, change, says):
    state = Loader(shard_folder, LoaderConfig(), batch_size=1).state(10)
    with pytest.raises(InputError, match=says):
        Loader(shard_folder, LoaderConfig(), batch_size=1, state={**state, **change})


def test_batches_do_not_lie_under_dev_shm(shard_folder):
    """Whose size containers limit: their memory is a file without a name."""
    source = iter(Loader(shard_folder, LoaderConfig(image_size=(16, 16), workers=2), batch_size=6))
    batch = next(source)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "fastmae-batches" in line]
    source.close()
    assert any(
        int(line.split("-")[0], 16) <= batch.images.data_ptr() < int(line.split("-")[1].split()[0], 16) for line in lines
    )
    assert all("/memfd:" in line for line in lines)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"views": 0}, "views and the shuffle window must be >= 1"),
        ({"crop": "gpu"}, "crop must be one of auto, cpu, device, got 'gpu'"),
        ({"sizes": ((5, (8, 8)), (5, (9, 9)))}, "first positions rise"),
        ({"workers": -1}, "workers must be >= 0"),
        ({"channels": 4}, "images from files have 1 or 3 channels"),
    ],
)
def test_settings_that_cannot_work_are_named(fields, says):
    with pytest.raises(InputError, match=says):
        LoaderConfig(**fields)


@pytest.mark.gpu
@pytest.mark.parametrize("crop", ["cpu", "device"])
def test_batches_on_a_gpu_are_those_on_the_cpu(shard_folder, crop):
    config = LoaderConfig(image_size=(32, 48), workers=2, crop=crop, prefetch=2)
    sources = [iter(Loader(shard_folder, config, batch_size=6, device=d)) for d in ("cpu", "cuda")]
    for _ in range(40):  # many more than there are buffers
        on_cpu, on_gpu = (next(source) for source in sources)
        assert on_gpu.images.is_cuda and all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu[1:4], on_gpu[1:4], strict=True))
        difference = (on_cpu.images.float() - on_gpu.images.cpu().float()).abs()
        assert difference.max() <= (0 if crop == "cpu" else 1)
    for source in sources:
        source.close()


@pytest.mark.gpu
@pytest.mark.worth(2)
@pytest.mark.parametrize("crop", ["cpu", "device"])
def test_workers_that_start_after_slots_are_page_locked_write_the_same_batches(shard_folder, crop):
    config = LoaderConfig(image_size=(32, 48), workers=2, crop=crop, prefetch=2)
    sources = [iter(Loader(shard_folder, config, batch_size=6, device=d)) for d in ("cpu", "cuda")]
    notes = []
    for step in range(30):
        on_cpu, on_gpu = (next(source) for source in sources)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu[1:4], on_gpu[1:4], strict=True))
        assert (on_cpu.images.float() - on_gpu.images.cpu().float()).abs().max() <= (0 if crop == "cpu" else 1)
        notes += on_gpu.notes
        if step in (8, 16):  # every buffer has been on the GPU
            os.kill(workers_of(sources[1])[0], signal.SIGKILL)
    for source in sources:
        source.close()
    assert len(notes) == 2 and all("killed by SIGKILL" in line for line in notes)
