"""Decoding on the device: the same crops from the same keys, what it cannot decode replaced, and a clear word without a GPU."""

import shutil

import pytest
import torch

from fastmae import InputError
from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from fastmae.errors import SampleError
from fastmae.images.decode import decode
from fastmae.images.nvjpeg import make_decoder
from tests.support.batches import equal, take
from tests.support.hostile import GOOD, REPLACED, dataset

pytestmark = pytest.mark.worth(3)


@pytest.fixture
def decoder(monkeypatch):
    """The CPU's decoder in place of the GPU's, so that everything around it runs here. Returns its calls' sizes."""
    asked = []

    def decode_all(jpegs):
        asked.append(len(jpegs))
        found = []
        for jpeg in jpegs:
            try:
                found.append(torch.from_numpy(decode(jpeg.numpy().tobytes())))
            except SampleError as error:
                found.append(str(error))
        return found

    for module in ("to_device", "loader"):
        monkeypatch.setattr(f"fastmae.data.{module}.make_decoder", lambda device: decode_all)
    return asked


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_are_those_of_cropping_on_the_device(shard_folder, decoder, workers):
    plain = take(shard_folder, 4, crop="device")
    found = take(shard_folder, 4, crop="device", decode="nvjpeg", workers=workers)
    assert equal(plain, found) and decoder == [6] * 4  # all of them were left to the decoder


def test_other_formats_are_decoded_by_workers_beside_it(tmp_path, decoder):
    folder = tmp_path / "mixed"
    folder.mkdir()
    dataset(folder, REPLACED["a JPEG cut in half"][0])
    shutil.copy(folder / "a.tar", tmp_path / "a.tar")
    (batch,) = take(folder, 1, batch_size=11, crop="device", decode="nvjpeg")
    (line,) = batch.replaced
    assert "odd.jpg: cannot be decoded" in line and 10 not in batch.sample_ids.tolist()
    assert equal([batch], take(folder, 1, batch_size=11, crop="device"))


def test_views_and_grey_images_work_too(decoder, shard_folder):
    for fields in ({"views": 2}, {"channels": 1}):
        assert equal(
            take(shard_folder, 3, crop="device", decode="nvjpeg", **fields), take(shard_folder, 3, crop="device", **fields)
        )


def test_what_it_needs_is_said(shard_folder):
    with pytest.raises(InputError, match="decode nvjpeg needs a CUDA device, and this run is on cpu"):
        Loader(shard_folder, LoaderConfig(decode="nvjpeg", crop="device"), batch_size=1)


@pytest.mark.gpu
def test_a_gpus_pixels_are_those_of_the_cpu_within_a_few_levels():
    pytest.importorskip("torchvision")
    (found,) = make_decoder(torch.device("cuda"))([torch.frombuffer(bytearray(GOOD), dtype=torch.uint8)])
    expected = torch.from_numpy(decode(GOOD))
    assert found.shape == expected.shape and (found.cpu().float() - expected.float()).abs().mean() < 2


@pytest.mark.gpu
def test_a_gpu_leaves_what_it_cannot_decode_to_be_replaced(tmp_path):
    pytest.importorskip("torchvision")
    folder = dataset(tmp_path, REPLACED["a JPEG cut in half"][0])
    source = iter(Loader(folder, LoaderConfig(image_size=(16, 16), decode="nvjpeg", workers=1), batch_size=11, device="cuda"))
    batch = next(source)
    source.close()
    assert len(batch.replaced) == 1 and batch.images.is_cuda
