"""From slots to the device: what is small is copied before what is large, and nothing but a batch's own images is."""

import pytest
import torch

from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from fastmae.data.to_device import Stage
from fastmae.images.decode import decode
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


@pytest.mark.parametrize("fields", [{"crop": "cpu"}, {"crop": "device"}, {"crop": "device", "decode": "nvjpeg"}],
                         ids=["resized by workers", "cropped on the device", "some decoded there"])  # fmt: skip
def test_ids_epochs_and_labels_are_copied_before_the_images(shard_folder, copies, fields, monkeypatch):
    answers = iter(["odd"])  # the first JPEG is taken for a bad one: ids change until the pixels are there
    for module in ("to_device", "loader"):
        monkeypatch.setattr(f"fastmae.data.{module}.make_decoder", lambda device: lambda jpegs: [
            next(answers, None) or torch.from_numpy(decode(jpeg.numpy().tobytes())) for jpeg in jpegs])  # fmt: skip
    config = LoaderConfig(image_size=(16, 16), workers=0, **fields)
    loader = Loader(shard_folder, config, batch_size=BATCH)
    source = iter(loader)
    batch = next(source)
    source.close()
    assert len(batch.replaced) == (config.decode == "nvjpeg")
    assert torch.equal(batch.labels, torch.from_numpy(loader.index.table["label"][batch.sample_ids.numpy()].astype("int64")))
    assert copies[:3] == [8 * BATCH] * 3
    if config.decode == "nvjpeg":  # all pixels are on the device already
        assert copies[3:] == [4 * BATCH, 16 * BATCH, BATCH, 8 * BATCH]
    else:
        *small, large = copies[3:]
        assert large > sum(copies[:3]) + sum(small) and small == ([4 * BATCH, 16 * BATCH, BATCH, 8 * BATCH] if small else [])


def test_only_the_pixels_of_a_batch_are_copied(shard_folder, copies):
    take(shard_folder, 1, sizes=((0, (8, 8)), (100, (16, 16))))
    assert copies[-1] == BATCH * 8 * 8 * 3
