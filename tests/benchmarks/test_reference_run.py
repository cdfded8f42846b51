"""A run of fastmae has the reference's losses, and a difference anywhere in the step is found."""

import dataclasses
import json
import os

import pytest
import torch

from fastmae.benchmarks.cli import REFERENCE, REFERENCE_RUN, main
from fastmae.benchmarks.training import reference_page, reference_run
from fastmae.benchmarks.training.reference_run import LIMIT, Plan, deviations
from fastmae.model.config import ModelConfig
from fastmae.train.step.optimizer import learning_rate

CLONE = os.environ.get("FASTMAE_REFERENCE")
SMALL = ModelConfig(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=2,
                    decoder_num_heads=2, norm_pix_loss=True)  # fmt: skip
FEW = Plan(config=SMALL, steps=7, batch=4, epoch_steps=3, warmup=0.3)  # two epochs and a part of a third
EXACT = 1e-13  # what these few updates keep; ``LIMIT`` is for whole runs


def exact_deviation(plan, clone=None):
    """The largest relative deviation in float64."""
    images = torch.randint(0, 256, (plan.images, 3, *plan.config.img_size), dtype=torch.uint8)
    ours = reference_run.our_losses(plan, images, "float64")
    theirs = reference_run.reference_losses(plan, images, "float64", clone)
    assert len(set(ours)) == len(ours) == plan.steps  # it trains
    return max(deviations(ours, theirs))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_losses_are_the_twins_in_float64(accumulate, norm_pix):
    plan = dataclasses.replace(FEW, accumulate=accumulate, config=dataclasses.replace(SMALL, norm_pix_loss=norm_pix))
    assert exact_deviation(plan) < EXACT


@pytest.mark.skipif(CLONE is None, reason="FASTMAE_REFERENCE names no clone of facebookresearch/mae")
@pytest.mark.filterwarnings("ignore")  # the clone's and timm's, not ours
@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_are_the_references_in_float64(accumulate):
    assert exact_deviation(dataclasses.replace(FEW, accumulate=accumulate), CLONE) < EXACT


def _tokens_without_decay(patch):
    groups = reference_run.parameter_groups

    def wrong(model, decay):
        plain, decayed = groups(model, decay)
        tokens = [p for p in decayed["params"] if p.ndim == 3]
        rest = [p for p in decayed["params"] if p.ndim != 3]
        return [{**plain, "params": plain["params"] + tokens}, {**decayed, "params": rest}]

    patch.setattr(reference_run, "parameter_groups", wrong)


def _rate_of_the_next_update(patch):
    patch.setattr(reference_run, "learning_rate", lambda step, *more: learning_rate(step + 1, *more))


def _rate_in_float32(patch):
    float64 = reference_run.Step.__call__
    patch.setattr(reference_run.Step, "__call__", lambda self, batches, lr: float64(self, batches, torch.tensor(lr).item()))


def _other_momentum(patch):
    make = reference_run.make_optimizer
    patch.setattr(reference_run, "make_optimizer", lambda groups, betas: make(groups, (0.9, 0.9501)))


def _same_masks_in_every_epoch(patch):
    masked = reference_run.MaskedLoss.__call__
    patch.setattr(reference_run.MaskedLoss, "__call__", lambda self, module, batch: masked(
        self, module, batch._replace(epochs=torch.zeros_like(batch.epochs))))  # fmt: skip


MISTAKES = [_tokens_without_decay, _rate_of_the_next_update, _rate_in_float32, _other_momentum, _same_masks_in_every_epoch]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__.strip("_"))
def test_a_mistake_in_the_step_is_found(mistake, monkeypatch):
    mistake(monkeypatch)
    assert exact_deviation(FEW) > 10 * EXACT


@pytest.fixture
def quick(monkeypatch):
    """The command's run, as short as those above."""
    monkeypatch.setattr(reference_run, "Plan", lambda **more: dataclasses.replace(FEW, **more))


def test_the_command_states_what_it_compared_and_ends_with_its_exit_code(quick, monkeypatch, tmp_path, capsys):
    command = ["reference-run", "--device", "cpu", "--steps", "4", "--out", str(tmp_path)]
    assert main(command) == 0
    out, error = capsys.readouterr()
    (section,) = json.loads(out.splitlines()[-1]).values()
    assert "against the plain twin of the reference" in out and "--reference CLONE compares" in out and error == ""
    exact, single = section["rows"]
    assert exact["largest"] < EXACT < single["largest"] < 1e-5 and len(single["losses"]["fastmae"]) == 4
    assert "## reference run" in next(tmp_path.glob("*.md")).read_text()

    _rate_of_the_next_update(monkeypatch)
    assert main(command) == 1
    assert capsys.readouterr().err.startswith("fastmae bench: float64: the loss deviates by")


def test_a_loss_that_is_not_a_number_deviates(quick):
    assert deviations([1.0, 2.0], [1.0, 2.5]) == [0.0, 0.2]
    assert deviations([float("nan"), 1.0], [1.0, float("nan")]) == [float("inf")] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--docs"], "--docs needs --reference CLONE"), (["--reference", "nowhere"], "nowhere/models_mae.py: not found")],
)
def test_a_page_of_the_twin_and_a_clone_that_is_not_there_are_refused(flags, message, quick, capsys):
    assert main(["reference-run", "--device", "cpu", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def committed():
    return json.loads(REFERENCE_RUN.read_text())[reference_page.NAME]


def test_the_committed_run_is_of_the_reference_and_within_its_limit(committed):
    assert committed["against"] == "facebookresearch/mae" and committed["wrong"] == []
    rows = {row["precision"]: row for row in committed["rows"]}
    for row in rows.values():
        losses = row["losses"]
        found = deviations(losses["fastmae"], losses["reference"])
        assert len(found) == committed["steps"] == 300 and max(found) == row["largest"] == found[row["at"]]
        assert max(deviations(losses["fastmae"], rows["float64"]["losses"]["reference"])) == row["fastmae_error"]
        assert losses["fastmae"][-1] < 0.5 * losses["fastmae"][0]
    assert rows["float64"]["largest"] <= committed["limit"] == LIMIT


def test_the_page_and_its_picture_are_of_the_committed_run(committed, tmp_path):
    text = REFERENCE.read_text()
    assert text.split(reference_page.BEGIN)[1].split(reference_page.END)[0].strip() == reference_page.body(committed)
    picture = REFERENCE.with_suffix(".png").read_bytes()
    assert reference_page.digest(committed).encode() in picture and len(picture) < 60_000
    page, result = tmp_path / "page.md", tmp_path / "result.json"
    page.write_text(f"before\n{reference_page.BEGIN}\nold\n{reference_page.END}\nafter")
    reference_page.write_page(page, result, committed)
    assert page.read_text() == f"before\n{reference_page.BEGIN}\n{reference_page.body(committed)}\n{reference_page.END}\nafter"
    assert result.read_text() == REFERENCE_RUN.read_text() and page.with_suffix(".png").stat().st_size > 10_000
