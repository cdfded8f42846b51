"""The robust score of losses: against the formula in numpy, and what it calls a spike."""

import numpy as np
import pytest
import torch

from fastmae.train.step.spikes import SpikeDetector


def scores(detector, losses):
    return np.array([detector.score(torch.tensor(float(loss))).item() for loss in losses])


def formula(losses):
    """z of each loss against the finite ones of the 128 before it, once there are 32."""
    found, window = [], []
    for loss in np.float32(losses):
        z = 0.0
        if len(window) >= 32 and np.isfinite(loss):
            recent = np.array(window[-128:], dtype=np.float64)
            median = np.sort(recent)[(len(recent) - 1) // 2]  # the lower one of two
            deviations = np.sort(np.abs(recent - median))
            z = (loss - median) / (1.4826 * deviations[(len(recent) - 1) // 2] + 1e-6 * abs(median))
        found.append(z)
        if np.isfinite(loss):
            window.append(loss)
    return np.array(found)


def noise(count, seed=0):
    return 1.0 + 0.01 * np.random.default_rng(seed).standard_normal(count)


@pytest.mark.parametrize("count", [1, 32, 33, 128, 129, 300])
def test_scores_are_those_of_the_formula(count):
    losses = noise(count)
    # The difference to the median is exact to half an ulp of 1, 6e-8, and is divided by a deviation near 0.01.
    assert scores(SpikeDetector(8.0, torch.device("cpu")), losses) == pytest.approx(formula(losses), rel=1e-4, abs=6e-5)


def test_one_spike_stands_out_of_noise_and_nothing_else_does():
    losses = noise(400)
    losses[[200, 201]] = 1.3, 1.2
    losses[300] = 0.5  # a loss that falls is none
    z = scores(SpikeDetector(8.0, torch.device("cpu")), losses)
    assert np.flatnonzero(z > 8.0).tolist() == [200, 201]
    assert z[300] < -8.0


def test_a_run_that_has_just_begun_has_no_spikes():
    detector = SpikeDetector(8.0, torch.device("cpu"))
    assert scores(detector, [1.0] * 30 + [100.0]).tolist() == [0.0] * 31
    assert scores(detector, [1.0, 100.0]).tolist()[0] == 0.0


def test_losses_that_are_not_finite_score_nothing_and_are_forgotten():
    losses = np.insert(noise(200), [0, 50, 50, 150], [np.nan, np.inf, np.nan, -np.inf])
    z = scores(SpikeDetector(8.0, torch.device("cpu")), losses)
    assert (z[~np.isfinite(losses)] == 0).all()
    assert z == pytest.approx(formula(losses), rel=1e-4, abs=6e-5)


def test_a_loss_that_never_changes_does_not_divide_by_zero():
    detector = SpikeDetector(8.0, torch.device("cpu"))
    assert scores(detector, [0.5] * 40).tolist() == [0.0] * 40
    assert scores(detector, [0.5001]) == pytest.approx(0.0001 / (1e-6 * 0.5), rel=1e-2)


def test_a_new_level_stops_being_a_spike_once_it_is_half_of_what_is_known():
    z = scores(SpikeDetector(8.0, torch.device("cpu")), np.concatenate([noise(128), 2 * noise(128, seed=1)]))
    assert (z[128:190] > 8.0).all() and (z[200:] < 8.0).all()


def test_a_detector_filled_from_another_s_state_goes_on_with_its_bits():
    losses = noise(200)
    one, two = SpikeDetector(8.0, torch.device("cpu")), SpikeDetector(8.0, torch.device("cpu"))
    scores(one, losses[:77])
    for name, tensor in two.tensors().items():
        tensor.copy_(one.tensors()[name])
    assert (scores(one, losses[77:]) == scores(two, losses[77:])).all()
