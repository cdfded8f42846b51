"""Masks: the reference's counts and order, and the same ids whoever asks."""

import pytest
import torch

from fastmae import InputError, random_masking
from fastmae.model.config import kept_patches


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(196, 0.75, 49), (256, 0.75, 64), (196, 0.9, 19), (100, 0.9, 9), (400, 0.9, 39)]
)
def test_kept_patches_are_counted_as_the_reference_does(patches, ratio, kept):
    assert kept_patches(patches, ratio) == kept


def test_smallest_noise_is_kept_in_noise_order():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    masking = random_masking(1, 4, 0.5, noise=noise)
    assert masking.ids_keep.tolist() == [[1, 3]]
    assert masking.ids_predict.tolist() == [[2, 0]]
    assert masking.ids_restore.tolist() == [[3, 0, 2, 1]]
    assert all(ids.dtype == torch.int32 for ids in masking)


@pytest.mark.parametrize("epoch", [0, torch.tensor([0, 0, 4])])
def test_every_patch_is_kept_or_predicted_once(epoch):
    masking = random_masking(3, 100, 0.9, seed=1, epoch=epoch)
    both = torch.cat([masking.ids_keep, masking.ids_predict], 1)
    assert torch.equal(both.sort(1).values, torch.arange(100, dtype=torch.int32).expand(3, 100))
    assert torch.equal(both.gather(1, masking.ids_restore.long()), torch.arange(100, dtype=torch.int32).expand(3, 100))


def test_a_samples_mask_does_not_depend_on_its_batch(device):
    ids = torch.tensor([4, 17, 2**50])
    together = random_masking(3, 49, 0.75, seed=5, sample_ids=ids.to(device), epoch=torch.tensor([2, 0, 9]))
    for row, (sample, epoch) in enumerate(zip(ids, (2, 0, 9), strict=True)):
        alone = random_masking(1, 49, 0.75, seed=5, sample_ids=sample[None], epoch=epoch)
        assert all(torch.equal(t[row : row + 1].cpu(), a) for t, a in zip(together, alone, strict=True))


def test_seed_epoch_and_sample_each_change_the_mask():
    ids = [random_masking(1, 196, 0.75, seed=s, epoch=e, sample_ids=torch.tensor([i])).ids_keep.tolist()
           for s, e, i in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]  # fmt: skip
    assert len({str(i) for i in ids}) == 4


def test_every_patch_is_kept_equally_often():
    masking = random_masking(4000, 16, 0.75, seed=0)
    counts = torch.bincount(masking.ids_keep.flatten(), minlength=16)
    assert ((counts - 1000.0) ** 2 / 750).sum() < 40  # about chi-squared of 15 degrees of freedom, p = 0.0005


def test_partial_prediction_takes_the_first_masked_patches():
    full, part = (random_masking(2, 16, 0.75, seed=0, num_predict=q) for q in (None, 4))
    assert torch.equal(part.ids_predict, full.ids_predict[:, :4])
    assert torch.equal(part.ids_keep, full.ids_keep)


def test_without_a_seed_every_call_draws_again():
    assert not torch.equal(random_masking(1, 196, 0.75).ids_keep, random_masking(1, 196, 0.75).ids_keep)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 0}, "between 0 and 1, got 0"),
        ({"mask_ratio": 1}, "between 0 and 1, got 1"),
        ({"mask_ratio": 0.99}, "keeps 0 of 16 patches"),
        ({"mask_ratio": 0.75, "num_predict": 13}, r"num_predict must lie in 1\.\.12"),
        ({"mask_ratio": 0.75, "noise": torch.zeros(2, 15)}, r"noise must be \(2, 16\)"),
        (
            {"mask_ratio": 0.75, "seed": 0, "sample_ids": torch.arange(3)},
            r"sample_ids must be \(2,\), .* got \(3,\)",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        random_masking(2, 16, **arguments)
