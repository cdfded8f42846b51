"""The random_masking op: the ids that an argsort of the keys gives, whoever computes them."""

import pytest
import torch

from fastmae.kernels import random_masking, random_masking_ref
from fastmae.kernels.philox import MASKS, random_words
from tests.support.twins import twin

pytestmark = pytest.mark.worth(1)

SHAPES = [(1, 2, 1, 1), twin(3, 16, 4, 12), (2, 49, 12, 20), twin(5, 196, 49, 147)]  # B, L, K, Q


def counters(B, device):
    generator = torch.Generator().manual_seed(B)
    samples = torch.randint(0, 2**60, (B,), generator=generator)
    return torch.randint(0, 2**31, (B,), generator=generator).to(device), samples.to(device)


@pytest.mark.parametrize("seed", [0, 1, 12345678901, -1, 2**64 - 1])
@pytest.mark.parametrize(("B", "L", "K", "Q"), SHAPES)
def test_ids_are_the_argsort_of_the_keys(B, L, K, Q, seed, device):
    epochs, samples = counters(B, device)
    ids_keep, ids_predict, ids_restore = random_masking(seed, epochs, samples, L, K, Q)
    words = random_words(seed, MASKS, epochs.cpu(), samples.cpu(), L)
    for b in range(B):
        ids_shuffle = sorted(range(L), key=lambda i: (int(words[b, i]), i))
        assert ids_keep[b].tolist() == ids_shuffle[:K]
        assert ids_predict[b].tolist() == ids_shuffle[K : K + Q]
        assert [ids_shuffle[i] for i in ids_restore[b].tolist()] == list(range(L))


def test_kernel_and_twin_are_bitwise_identical(device):
    epochs, samples = counters(2, device)
    for L in (1024, 4097):  # the second is past what the kernel sorts
        found = random_masking(7, epochs, samples, L, L // 4, L // 2)
        expected = random_masking_ref(7, epochs.cpu(), samples.cpu(), L, L // 4, L // 2)
        assert all(torch.equal(f.cpu(), e) and f.dtype == torch.int32 for f, e in zip(found, expected, strict=True))


def test_an_empty_batch_gives_empty_ids(device):
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    assert [tuple(ids.shape) for ids in random_masking(0, empty, empty, 8, 2, 3)] == [(0, 2), (0, 3), (0, 8)]


@pytest.mark.twin
def test_op_passes_opcheck(device):
    epochs, samples = counters(2, device)
    torch.library.opcheck(torch.ops.fastmae.random_masking.default, (3, epochs, samples, 9, 2, 5))


@pytest.mark.gpu
def test_a_cuda_graph_draws_new_masks_at_each_replay():
    epochs, samples = counters(3, "cuda")
    random_masking(5, epochs, samples, 196, 49, 147)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = random_masking(5, epochs, samples, 196, 49, 147)
    for epoch in (0, 1):
        epochs.fill_(epoch)
        graph.replay()
        expected = random_masking_ref(5, epochs.cpu(), samples.cpu(), 196, 49, 147)
        assert all(torch.equal(f.cpu(), e) for f, e in zip(ids, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": torch.zeros(2)}, r"must be int64 \(B,\), got torch.float32 \(2,\)"),
        ({"sample_ids": torch.zeros(3, dtype=torch.int64)}, r"must be int64 \(B,\)"),
        ({"kept": 0}, "at least 1 and together at most patches"),
        ({"predicted": 14}, r"got 4, 14 and 16"),
        ({"patches": 2**24}, "below 2[*][*]24"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    zeros = torch.zeros(2, dtype=torch.int64)
    good = {"seed": 0, "epochs": zeros, "sample_ids": zeros, "patches": 16, "kept": 4, "predicted": 12}
    with pytest.raises(ValueError, match=message):
        random_masking(**{**good, **change})
