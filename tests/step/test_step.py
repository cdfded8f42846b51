"""The training step: accumulation, updates that are skipped, and masks that follow the samples."""

import pytest
import torch

from fastmae.train.step.cuda_graph import GraphedStep
from fastmae.train.step.loss_scale import LossScale
from fastmae.train.step.step import MicroBatch, Step
from tests.support.steps import batch, make_step, weights

pytestmark = pytest.mark.worth(2)


def test_training_lowers_the_loss(device):
    _, step = make_step(device)
    losses = [step([batch(device=device)], 3e-3).loss.item() for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_four_micro_batches_make_the_step_of_one():
    whole = batch()
    parts = [MicroBatch(*(t[i : i + 2] for t in whole)) for i in range(0, 8, 2)]
    results = []
    for batches in ([whole], parts):
        model, step = make_step()
        results.append(([step(batches, 1e-3).loss.item() for _ in range(3)], weights(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, w in results[0][1].items():
        # Adam divides by the gradient's size, so a gradient near zero may go either way by one step of 1e-3 each.
        assert (w - results[1][1][name]).abs().mean() < 1e-5


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(device):
    model, step = make_step(device)
    step([batch(device=device)], 1e-3)
    before, moments = weights(model), {k: {n: t.clone() for n, t in s.items()} for k, s in step.optimizer.state.items()}
    spoiled = torch.nn.Parameter(model.decoder_pred.bias.detach().clone())
    spoiled.data[0] = float("inf")
    original, model.decoder_pred.bias = model.decoder_pred.bias, spoiled  # makes every gradient of this step NaN
    assert step([batch(device=device)], 1e-3).skipped == 1
    assert step([batch(device=device)], 1e-3).skipped == 2
    model.decoder_pred.bias = original
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())
    assert all(torch.equal(t, moments[k][n]) for k, s in step.optimizer.state.items() for n, t in s.items())
    assert step([batch(device=device)], 1e-3).skipped == 0
    assert not torch.equal(weights(model)["norm.weight"], before["norm.weight"])


def test_masks_follow_seed_epoch_and_sample_not_the_call():
    def first_loss(seed=0, epoch=0):
        return make_step(seed=seed)[1]([batch(epoch=epoch)], 0.0).loss.item()

    assert first_loss() == first_loss()
    assert len({first_loss(), first_loss(seed=1), first_loss(epoch=1)}) == 3
    _, step = make_step()
    assert step([batch()], 0.0).loss == step([batch()], 0.0).loss


def test_autocast_keeps_weights_and_loss_in_float32(device):
    model, step = make_step(device, autocast=torch.bfloat16)
    result = step([batch(device=device)], 1e-3)
    assert result.loss.dtype == torch.float32 and result.skipped == 0
    assert all(p.dtype == torch.float32 for p in model.parameters())
    exact = make_step(device)[1]([batch(device=device)], 1e-3).loss
    assert result.loss != exact and abs(result.loss - exact) / exact < 1e-2


def test_two_steps_of_one_seed_have_the_same_bits(device):
    runs = []
    for _ in range(2):
        _, step = make_step(device)
        runs.append([step([batch(device=device)], 1e-3).loss.item() for _ in range(5)])
    assert runs[0] == runs[1]


def test_the_learning_rate_may_change_at_every_step():
    model, step = make_step()
    step([batch()], 1e-3)
    before = weights(model)
    step([batch()], 0.0)
    assert all(torch.equal(w, before[n]) for n, w in weights(model).items())
    step([batch()], 1e-3)
    assert not torch.equal(weights(model)["norm.weight"], before["norm.weight"])


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "blocks", "model"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_graph_of_the_step_has_the_bits_of_the_step(accumulate, compile):
    losses, results = {}, {}
    for kind in (Step, GraphedStep):
        torch._dynamo.reset()
        model, step = make_step("cuda", kind=kind, compile=compile, autocast=torch.bfloat16)
        losses[kind] = []
        for number in range(8):
            batches = [batch(device="cuda", epoch=number + 100 * part) for part in range(accumulate)]
            losses[kind].append(step(batches, 1e-3 * (number % 3)).loss)
        results[kind] = weights(model)
    assert torch.equal(torch.stack(losses[Step]), torch.stack(losses[GraphedStep]))
    assert all(torch.equal(w, results[GraphedStep][n]) for n, w in results[Step].items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_never_waits_for_the_device(dtype):
    place = torch.device("cuda")
    scale = LossScale(place) if dtype == torch.float16 else None
    _, step = make_step("cuda", autocast=dtype, scale=scale, skip_spikes=True)
    micro = batch(device="cuda")
    for _ in range(3):
        step([micro], 1e-3)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step([micro, micro], 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
