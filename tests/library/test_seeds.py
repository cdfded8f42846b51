"""Seeds of 64 bits: each its own numbers, and no other is taken."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import fastmae
from fastmae.data.batch import LoaderConfig
from fastmae.seeds import LARGEST, check_seed
from fastmae.train.pretrain.pretrain import pretrain
from tests.support.runs import RECIPE, run_of


@pytest.mark.parametrize("seed", [-1, LARGEST + 1, 10**30, 1.0, "1", None])
def test_an_invalid_seed_is_refused_wherever_it_is_given(seed):
    text = f"seed must be an integer from 0 to 18446744073709551615 \\(64 bits\\), got {seed!r}"
    for use in (check_seed, lambda s: replace(RECIPE, seed=s), lambda s: LoaderConfig(seed=s)):
        with pytest.raises(fastmae.InputError, match=text):
            use(seed)
    if seed is not None:  # without one the call draws from torch's generator
        with pytest.raises(ValueError, match=text):
            fastmae.random_masking(2, 16, 0.75, seed=seed)


def test_the_largest_seeds_have_different_masks():
    seeds = [0, 2**31, 2**32, 2**63 - 1, 2**63, LARGEST - 1, LARGEST, np.int64(7)]
    masks = [tuple(fastmae.random_masking(1, 196, 0.75, seed=seed).ids_keep[0].tolist()) for seed in seeds]
    assert len(set(masks)) == len(seeds)


def test_a_run_takes_the_largest_seed_and_resumes_with_it(shard_folder, tmp_path):
    recipe = replace(RECIPE, seed=LARGEST)
    pretrain(replace(recipe, steps=1, warmup_epochs=0), run_of(shard_folder, tmp_path))
    assert torch.initial_seed() == LARGEST
    assert pretrain(replace(recipe, steps=2), run_of(shard_folder, tmp_path)).name == "step-0000002"
