"""The known faults of backends."""

import pytest
import torch

from fastmae.model.attention import backends
from fastmae.model.attention.backends import Shape, cudnn_version, refusal

SHAPE = Shape(197, 197, 16, 32)


@pytest.mark.parametrize(
    ("number", "version"),
    [(None, None), (7605, (7, 6, 5)), (8902, (8, 9, 2)), (90000, (9, 0, 0)), (90100, (9, 1, 0)), (91002, (9, 10, 2)),
     (91500, (9, 15, 0)), (91501, (9, 15, 1)), (100203, (10, 2, 3))],
)  # fmt: skip
def test_the_number_that_torch_gives_is_a_version(number, version, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert cudnn_version() == version


@pytest.mark.parametrize("number", [8902, 90100, 91002, 91500])
@pytest.mark.parametrize(("queries", "keys", "is_refused"), [(50, 50, True), (128, 197, True), (147, 256, True),
                                                             (128, 256, False), (1024, 1024, False)])  # fmt: skip
def test_an_old_cudnn_is_refused_for_lengths_that_128_does_not_divide(number, queries, keys, is_refused, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    reason = refusal("cudnn", "cuda", Shape(queries, keys, 16, 32))
    assert (reason is not None) == is_refused
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    assert refusal("cudnn", "cuda", Shape(queries, keys, 16, 32)) is None


def test_a_cudnn_that_is_missing_or_refused_by_torch_is_refused(monkeypatch):
    def refuse():
        raise RuntimeError("cuDNN version incompatibility: PyTorch was compiled against\n (9, 15, 1)")

    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert refusal("cudnn", "cuda", SHAPE) == "this torch has no cuDNN"
    monkeypatch.setattr(torch.backends.cudnn, "version", refuse)
    assert refusal("cudnn", "cuda", SHAPE) == (
        "cuDNN cannot be used, cuDNN version incompatibility: PyTorch was compiled against (9, 15, 1)"
    )


def test_other_backends_and_devices_have_no_known_fault(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    monkeypatch.setattr(backends, "load_runtime", lambda cuda: f"no runtime for {cuda}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert [refusal(b, "cuda", SHAPE) for b in ("sdpa", "flash", "efficient", "math")] == [None] * 4
    assert refusal("cudnn", "cpu", SHAPE) is refusal("xformers", "cpu", SHAPE) is None
    assert refusal("xformers", "cuda", SHAPE) == "no runtime for 13.0"
