"""Speed that does not hang on the machine: far above the bounds here, so that only a real fault falls below them."""

import time

import numpy as np
import pytest
from PIL import Image

from fastmae.data.batch import LoaderConfig
from fastmae.data.indexed_batches import IndexedBatches
from fastmae.images.recode import Recode
from fastmae.shards.build import write_shards
from fastmae.shards.index import Index
from fastmae.shards.read import ShardReader

pytestmark = pytest.mark.timing


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """1024 images of 256 x 340, some 30 kB each, as shards for training are; 64 differ, which is enough for speed."""
    source, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("shards")
    noise = np.random.default_rng(0)
    for i in range(64):
        coarse = Image.fromarray(noise.integers(0, 256, (40, 53, 3), dtype=np.uint8)).resize(
            (340, 256), Image.Resampling.BICUBIC
        )
        coarse.save(source / f"{i}.jpg", quality=90)
        for copy in range(1, 16):
            (source / f"{i}-{copy}.jpg").hardlink_to(source / f"{i}.jpg")
    write_shards(source, out, Recode(resize=256), samples_per_shard=256)
    return out


def test_indexed_reads_exceed_30000_records_a_second(shards):
    index = Index.load(shards)
    assert 20_000 < index.table["size"].mean() < 40_000
    reader, order = ShardReader(index), np.random.default_rng(0).integers(0, len(index), 3000).tolist()
    speeds = []
    for _ in range(5):
        began = time.perf_counter()
        for sample in order:
            reader.read(sample)
        speeds.append(len(order) / (time.perf_counter() - began))
    assert max(speeds) > 30_000


@pytest.mark.parametrize("on_device", [False, True])
def test_the_training_process_spends_at_most_3_ms_on_256_images(shards, on_device):
    source = IndexedBatches(Index.load(shards), LoaderConfig(workers=2), batch_size=256, rank=0, world_size=1, start=0,
                            on_device=on_device)  # fmt: skip
    seconds = []
    for _ in range(6):
        began = time.thread_time()
        source.buffers.give(next(source).buffer)
        seconds.append(time.thread_time() - began)
    source.close()
    assert min(seconds[1:]) < 0.003
