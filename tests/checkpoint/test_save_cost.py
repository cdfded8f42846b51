"""What saving beside training costs the steps, if saves are ten of their own lengths apart.

    cost = (held + length (1 - 1 / slowdown)) / (10 length)

A save holds the step while its tensors are copied, and slows the steps beside it: they compete for Python's lock, which DCP
holds for most of a millisecond per tensor, however small. So the tensors are as large here as those of ViT-B.
"""

import statistics
import time
from dataclasses import replace

import pytest
import torch

from fastmae import ModelConfig
from fastmae.train.checkpoint.state import random_state, run_tensors
from tests.support.saves import WORLD, saver_of, state_at
from tests.support.steps import batch, make_step

ROUNDS = 7
# Two blocks of ViT-B's, 170 MB of weights and moments: a save takes as long as several steps.
BIG = ModelConfig(img_size=32, patch_size=8, embed_dim=768, depth=2, num_heads=12, norm_pix_loss=True,
                  decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2)  # fmt: skip


def clock(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@pytest.fixture
def one_thread():
    """A core is free for the save, as on machines that train."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measured(device, one_thread, tmp_path):
    """Medians over saves: seconds that the step was held, seconds of the save, and by what the steps beside it took longer."""
    model, train = make_step(device, config=BIG)
    world, data = replace(WORLD, device=torch.device(device, 0) if device == "cuda" else WORLD.device), batch(8, device)
    tensors, saver = run_tensors(model, train.optimizer), saver_of(tmp_path, world, asynchronous=True)

    def step():
        train([data], 1e-4)
        if device == "cuda":
            torch.cuda.synchronize()

    def measure(number):
        held = clock(lambda: saver.begin(number, tensors, random_state(world), state_at(number)))
        beside = []
        while not (ended := saver.ended()):
            beside.append(clock(step))
        saver.wait()
        assert ended[0].error is None
        return held, ended[0].seconds, sum(beside) / sum(clock(step) for _ in beside)

    for number in (1, 2):  # memory taken, kernels compiled
        step()
        measure(number)
    rounds = [measure(number) for number in range(3, 3 + ROUNDS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


@pytest.mark.timing
def test_saving_beside_training_costs_less_than_a_twentieth_of_the_steps_time(measured):
    held, length, slowdown = measured
    cost = (held + length * (1 - 1 / slowdown)) / (10 * length)
    print(f"held for {held:.3f} s of {length:.2f} s, steps beside it take {slowdown:.2f} x: {cost:.1%} of the time")
    assert cost < 0.05
