"""From buffers to the device: what is small is copied before what is large, and nothing but a batch's own images is."""

import pytest
import torch

from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from fastmae.data.to_device import Stage
from tests.support.batches import take

BATCH = 6


@pytest.fixture
def copies(monkeypatch):
    """Bytes of each copy to the device, in order."""
    found, send = [], Stage._to_device

    def record(self, x):
        found.append(x.nbytes)
        return send(self, x)

    monkeypatch.setattr(Stage, "_to_device", record)
    return found


@pytest.mark.parametrize("crop", ["cpu", "device"])
def test_ids_epochs_and_labels_are_copied_before_the_images(shard_folder, copies, crop):
    loader = Loader(shard_folder, LoaderConfig(image_size=(16, 16), workers=0, crop=crop), batch_size=BATCH)
    source = iter(loader)
    batch = next(source)
    source.close()
    labels = loader.source.index.table["label"][batch.sample_ids.numpy()]
    assert torch.equal(batch.labels, torch.from_numpy(labels.astype("int64")))
    *small, large = copies
    assert small == [8 * BATCH] * 3 + ([8 * BATCH, 4 * BATCH, 16 * BATCH, BATCH] if crop == "device" else [])
    assert large > sum(small)


def test_only_the_pixels_of_a_batch_are_copied(shard_folder, copies):
    take(shard_folder, 1, sizes=((0, (8, 8)), (100, (16, 16))))
    assert copies[-1] == BATCH * 8 * 8 * 3
