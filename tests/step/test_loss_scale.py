"""The loss scale of fp16: its schedule, and whole fp16 runs."""

import math

import torch

from fastmae.train.pretrain.pretrain import pretrain
from fastmae.train.step.loss_scale import LossScale
from tests.support.runs import RECIPE, assert_same_bits, losses, run_of, signal_after, tensors_of
from tests.support.steps import batch, make_step, weights

GOOD, BAD = torch.tensor(False), torch.tensor(True)


def test_it_halves_after_each_bad_gradient_and_doubles_after_2000_good_ones_on_end():
    scale = LossScale(torch.device("cpu"))
    values = [scale.value.item()]
    for is_bad in (BAD, BAD, *([GOOD] * 1999), BAD, *([GOOD] * 2000), *([GOOD] * 2000)):
        scale.update(is_bad)
        values.append(scale.value.item())
    assert values[:3] == [65536.0, 32768.0, 16384.0]
    assert values[2001:2003] == [16384.0, 8192.0]  # the 2000th was bad: the count began anew
    assert values[4001:4003] == [8192.0, 16384.0]
    assert values[6001:6003] == [16384.0, 32768.0]
    assert scale.good == 0


def test_a_scale_costs_no_bit():
    results = []
    for scale in (None, LossScale(torch.device("cpu"))):
        model, step = make_step(scale=scale)
        found = [step([batch()], 1e-3) for _ in range(3)]
        results.append(([(r.loss.item(), r.grad_norm.item()) for r in found], weights(model)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(w, results[1][1][name]) for name, w in results[0][1].items())


def test_gradients_that_overflow_halve_it_and_change_nothing_else():
    scale = LossScale(torch.device("cpu"))
    scale.value.fill_(2.0**127)
    model, step = make_step(scale=scale, autocast=torch.float16)
    before = weights(model)
    results = [step([batch()], 1e-3) for _ in range(2)]
    assert [r.skipped.item() for r in results] == [1, 2] and math.log2(scale.value.item()) == 125
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())


def test_an_fp16_run_has_about_the_loss_of_fp32_and_resumes_bit_for_bit(shard_folder, tmp_path, monkeypatch):
    pretrain(RECIPE, run_of(shard_folder, tmp_path / "fp32"))
    whole = pretrain(RECIPE, run_of(shard_folder, tmp_path / "whole", precision="fp16"))
    exact, found = losses(tmp_path / "fp32"), losses(tmp_path / "whole")
    # Activations are rounded to 11 bits, some 20 times one after the other.
    assert all(abs(found[step] - loss) < 20 * 2**-11 * loss for step, loss in exact.items()) and found != exact
    tensors = tensors_of(whole)
    assert tensors["loss_scale/value"] == 65536 and tensors["loss_scale/good"] == 6
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        pretrain(RECIPE, run_of(shard_folder, tmp_path / "halves", precision="fp16"))
    assert_same_bits(pretrain(RECIPE, run_of(shard_folder, tmp_path / "halves", precision="fp16")), whole)
