"""What goes wrong without ending a run is logged, and what ends it is written first."""

import json

import pytest
import torch

from fastmae import DivergedError
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.events import Events
from fastmae.train.pretrain.log import RunLog
from fastmae.train.step.loss_module import MicroBatch
from fastmae.train.step.step import StepResult
from tests.support.runs import records, run_of


@pytest.fixture
def make(tmp_path):
    """Makes the events of a run in ``tmp_path``."""
    logs = []

    def made(precision="bf16", **options):
        logs.append(RunLog(tmp_path, is_main=True, first_step=0, total_steps=100))
        run = run_of("none", tmp_path, **{"max_skips": 3, **options})
        return Events(logs[-1], run, World(0, 1, torch.device("cpu")), precision)

    yield made
    for log in logs:
        log.close()


def result(loss=1.0, skipped=0, spike=0.0):
    return StepResult(*map(torch.tensor, (loss, 1.0, skipped, spike)))


def micro_batch(*ids):
    return MicroBatch(torch.zeros(len(ids), 3, 8, 8), torch.tensor(ids), torch.zeros(len(ids), dtype=torch.int64))


def logged(out, name):
    return [{k: v for k, v in r.items() if k not in ("time", "event")} for r in records(out) if r.get("event") == name]


def test_skipped_updates_are_counted(make, tmp_path, capsys):
    make().log_steps(12, [result(), result(skipped=1), result(), result(skipped=1), result(skipped=2)])
    assert logged(tmp_path, "skipped") == [{"step": 12, "updates": 3}]
    assert "step 12: 3 updates skipped, gradients were not finite" in capsys.readouterr().out


def test_too_many_consecutive_ones_diverge_with_the_samples_of_the_last_steps(make, tmp_path):
    events = make()
    for step in range(1, 6):
        events.remember(step, [micro_batch(10 * step, 10 * step + 1), micro_batch(10 * step + 2)])
    events.log_steps(4, [result(), result(skipped=1), result(skipped=2)])
    path = tmp_path / "diverged-step-0000005-rank-0.json"
    with pytest.raises(
        DivergedError, match=r"^3 consecutive updates were skipped up to step 5: .* samples of these steps are in .*rank-0"
    ):
        events.log_steps(5, [result(skipped=3)])
    steps = [{"step": s, "sample_ids": [10 * s, 10 * s + 1, 10 * s + 2]} for s in (3, 4, 5)]
    assert json.loads(path.read_text()) == {"rank": 0, "steps": steps}
    assert logged(tmp_path, "diverged") == [{"step": 5, "reason": "3 consecutive updates were skipped"}]


@pytest.mark.parametrize(
    ("options", "results", "says"),
    [
        ({"precision": "fp32"}, [result(skipped=3)], "gradients were not finite; try a lower --blr; the samples"),
        ({}, [result(skipped=3)], "gradients were not finite; try a lower --blr or --precision fp32; the samples"),
        ({"skip_spikes": True}, [result(9.0, skipped=n, spike=30.0) for n in (1, 2, 3)],
         "losses spiked; try a lower --blr or a --spike-z above 8 or --no-skip-spikes; the samples"),
        ({"skip_spikes": True, "precision": "fp16"}, [result(9.0, skipped=2, spike=30.0), result(skipped=3)],
         "gradients were not finite or losses spiked; try a lower --blr or --precision fp32 or a --spike-z above 8 or "),
    ],
)  # fmt: skip
def test_what_may_help_is_not_what_the_run_does_already(options, results, says, make):
    with pytest.raises(DivergedError) as raised:
        make(**options).log_steps(9, results)
    assert f"3 consecutive updates were skipped up to step 9: {says}" in str(raised.value)


def test_a_sample_file_that_cannot_be_written_does_not_hide_the_divergence(make, tmp_path):
    events = make(max_skips=1)
    (tmp_path / ".diverged-step-0000001-rank-0.json.partial").mkdir()
    with pytest.raises(DivergedError, match=r"the samples of these steps are in no file, .* cannot be written"):
        events.log_steps(1, [result(skipped=1)])


def test_a_spike_is_logged_and_its_update_applied_unless_spikes_are_skipped(make, tmp_path, capsys):
    make().log_steps(40, [*(result() for _ in range(39)), result(2.0, spike=30.0)])
    (spike,) = logged(tmp_path, "spike")
    assert spike == {"step": 40, "loss": 2.0, "z": 30.0, "skipped": False}
    text = capsys.readouterr().out
    assert "step 40: loss spike, 2.0000 is" in text and "skipped" not in text


def test_a_spike_that_the_step_has_skipped_is_logged_once_and_as_no_bad_gradient(make, tmp_path, capsys):
    make(skip_spikes=True).log_steps(2, [result(), result(5.0, skipped=1, spike=30.0)])
    assert logged(tmp_path, "spike") == [{"step": 2, "loss": 5.0, "z": 30.0, "skipped": True}]
    assert logged(tmp_path, "skipped") == []
    assert "30.0 robust deviations above the recent losses, its update was skipped" in capsys.readouterr().out
