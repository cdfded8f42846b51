"""The counter-based generator: known answers, ranges, and independence of how it is called."""

import pytest
import torch
import triton
import triton.language as tl

from fastmae.kernels.dispatch import INTERPRETED
from fastmae.kernels.philox import CROPS, MASKS, permutation, philox4x32, random_words, uniform

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # the known answers published with Random123
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL, FULL), (FULL, FULL, FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)  # fmt: skip
def test_words_equal_the_published_known_answers(key, counter, expected):
    words = philox4x32(key, tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == expected


def test_a_samples_numbers_do_not_depend_on_its_batch():
    ids = torch.tensor([5, 2**40 + 1, 0])
    together = uniform(7, CROPS, torch.tensor([0, 3, 1]), ids, 6)
    alone = torch.cat([uniform(7, CROPS, e, ids[i : i + 1], 6) for i, e in enumerate((0, 3, 1))])
    assert torch.equal(together, alone)
    assert torch.equal(together[:, :4], uniform(7, CROPS, torch.tensor([0, 3, 1]), ids, 4))


def test_seed_stream_epoch_and_sample_each_change_the_numbers():
    ids = torch.arange(4)
    rows = [random_words(s, stream, e, ids + shift, 8).flatten()
            for s, stream, e, shift in ((0, CROPS, 0, 0), (2**32, CROPS, 0, 0), (1, CROPS, 0, 0), (0, MASKS, 0, 0),
                                        (0, CROPS, 1, 0), (0, CROPS, 0, 2**32))]  # fmt: skip
    for i, row in enumerate(rows):
        assert all(not (row == other).any() for other in rows[i + 1 :])


def test_uniform_numbers_fill_the_unit_interval_evenly():
    numbers = uniform(0, CROPS, 0, torch.arange(1000), 100)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, 20, 0, 1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001


def test_permutation_holds_every_index_once():
    order = permutation(3, 1, 2, 1001)
    assert torch.equal(order.sort().values, torch.arange(1001))
    assert not torch.equal(order, permutation(3, 1, 3, 1001))


@triton.jit
def _philox_kernel(out_ptr, seed, c0, c1, c2, c3, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    words = tl.philox(
        seed, c0 + i, tl.full([BLOCK], c1, tl.int32), tl.full([BLOCK], c2, tl.int32), tl.full([BLOCK], c3, tl.int32)
    )
    tl.store(out_ptr + i, words[0].to(tl.int32, bitcast=True))


def test_triton_draws_the_same_bits(device):
    """So that a kernel can make the masks that the twin makes."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("needs CUDA or Triton's interpreter")
    out = torch.empty(16, dtype=torch.int32, device=device)
    seed = (7 << 32) + 12345
    _philox_kernel[(1,)](out, seed, 3, 4, 5, 6, BLOCK=16)
    expected = philox4x32((12345, 7), (torch.arange(3, 19), 4, 5, 6))[0]
    assert torch.equal(out.cpu().long() & FULL, expected)
