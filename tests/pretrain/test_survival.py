"""Processes that fail or spoil a step, for real: each is named, the others do as it does, and nothing good is lost."""

import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from fastmae.train.checkpoint.format import open_checkpoint
from fastmae.train.distributed import shared_folder
from tests.support import faults
from tests.support.crew import Crew, run
from tests.support.runs import FLAGS as TINY
from tests.support.runs import TORCHRUN, assert_same_bits, finish, losses, records, start, wait_for

pytestmark = pytest.mark.cluster
STEPS = 30
FLAGS = ("--steps", STEPS, "--blr", "0.05", "--save-every", "5", "--keep", "9")
LAST = f"step-{STEPS:07d}"


@pytest.fixture(scope="module")
def undisturbed(shard_folder, tmp_path_factory):
    """The folder of a run of two processes to which nothing happened."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(2, shard_folder, out, *FLAGS)
    return out


def test_a_process_that_fails_tells_the_others_why(shard_folder, tmp_path):
    with Crew(2, shard_folder, tmp_path / "run", *FLAGS, fault=partial(faults.raise_at, 3, 1)) as crew:
        assert crew.end(60) == [4, 1], crew.text()
        assert "TypeError: a fault of ours" in crew.text(1)
        assert "fastmae: rank 1 has failed, TypeError: a fault of ours, after step 2" in crew.text(0)


def ranks_of(launcher):
    """Process ids of the ranks that torchrun has started, in their order."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if rank := re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes()):
            found[int(rank[1])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def test_torchrun_starts_a_killed_run_again_and_it_ends_well(undisturbed, shard_folder, tmp_path):
    flags = [*FLAGS, "--effective-batch", 12, "--batch-size", 6, "--data", shard_folder, "--out", tmp_path]
    launcher = (*TORCHRUN, "2", "--max-restarts", "1")
    process = start([*TINY, *flags, "--no-async-save"], launcher, program=("-m", "tests.support.crew"))
    wait_for(tmp_path / "step-0000005", process)
    began = time.monotonic()
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    code, text = finish(process)
    print(f"{time.monotonic() - began:.1f} s from SIGKILL to the end of the run that torchrun has started again")
    assert code == 0, text
    assert "resumed from" in text
    assert_same_bits(tmp_path / LAST, undisturbed / LAST)
    assert losses(tmp_path) == losses(undisturbed)


@pytest.mark.parametrize(("change", "how"), [(faults.to_nan, "ddp"), (faults.with_nan_gradient, "ddp"),
                                             (faults.to_nan, "fsdp"), (faults.with_nan_gradient, "fsdp")])  # fmt: skip
def test_a_bad_step_of_one_process_is_skipped_by_all(change, how, shard_folder, tmp_path):
    """Weights and moments after that step are those before it, and the run continues."""
    flags = ("--steps", 8, "--blr", "0.05", "--save-every", 1, "--keep", 9, "--parallel", how, "--check-replicas", "1")
    with Crew(2, shard_folder, tmp_path / "run", *flags, fault=partial(faults.change_loss, change, 5, 5, 1)) as crew:
        assert crew.end() == [0, 0], crew.text()
        assert "step 5: 1 update skipped, gradients were not finite" in crew.text()
    assert [r["step"] for r in records(tmp_path / "run") if r.get("event") == "skipped"] == [5]
    assert len(losses(tmp_path / "run")) == 8
    assert _changed(tmp_path / "run", 4, 5) == {"step/skipped", "spikes"}
    assert "model" in _changed(tmp_path / "run", 5, 6)


def _changed(out, before, after):
    """The kinds of tensors that differ between two checkpoints of a run."""
    import torch

    from tests.support.runs import tensors_of

    a, b = (tensors_of(out / f"step-{number:07d}") for number in (before, after))
    names = {name for name in a if not torch.equal(a[name], b[name])}
    return {name if name.startswith("step/") else name.partition("/")[0] for name in names}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_run_that_stays_bad_ends_with_its_samples_written_down(how, shard_folder, tmp_path):
    out = tmp_path / "run"
    fault = partial(faults.change_loss, faults.to_nan, 7, 99, 1)
    with Crew(2, shard_folder, out, *FLAGS, "--max-skips", "3", "--parallel", how, fault=fault) as crew:
        assert crew.end() == [3, 3], crew.text()
        assert (
            "3 consecutive updates were skipped up to step 9: gradients were not finite; try a lower --blr; the samples"
            in crew.text(0)
        )
    written = [json.loads((out / f"diverged-step-0000009-rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [[len(s["sample_ids"]) for s in rank["steps"]] for rank in written] == [[6, 6, 6]] * 2
    assert [[s["step"] for s in rank["steps"]] for rank in written] == [[7, 8, 9]] * 2
    assert not set(written[0]["steps"][1]["sample_ids"]) & set(written[1]["steps"][1]["sample_ids"])
    assert sorted(p.name for p in out.glob("step-*")) == ["step-0000005"]
    open_checkpoint(out / "step-0000005")


def test_a_loss_spike_of_one_process_is_skipped_by_all(shard_folder, tmp_path):
    flags = ("--steps", 36, "--save-every", 1, "--keep", 9, "--skip-spikes", "--check-replicas", "1")
    with Crew(2, shard_folder, tmp_path / "run", *flags, fault=partial(faults.change_loss, faults.huge, 34, 34, 1)) as crew:
        assert crew.end() == [0, 0], crew.text()
        assert re.search(
            r"step 34: loss spike, .* robust deviations above the recent losses, its update was skipped", crew.text()
        )
    assert "gradients were not finite" not in crew.text()
    assert _changed(tmp_path / "run", 33, 34) == {"step/skipped", "spikes"}
    assert "model" in _changed(tmp_path / "run", 34, 35)


def test_wrong_input_ends_with_two_on_every_process(shard_folder, tmp_path):
    with Crew(2, tmp_path / "nowhere", tmp_path / "run", *FLAGS) as crew:
        assert crew.end() == [2, 2], crew.text()
        assert crew.text(1).count("fastmae: ") == 1 and "Traceback" not in crew.text()


def work_apart(folder, rank):
    os.chdir(folder / str(rank))
    shared_folder._APPEARS = 3


def test_a_folder_that_machines_do_not_share_is_refused_by_all(shard_folder, tmp_path):
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    flags, fault = (*FLAGS, "--out", "run"), partial(work_apart, tmp_path)
    with Crew(2, shard_folder, tmp_path / "run", *flags, local=1, fault=fault) as crew:
        assert crew.end() == [2, 2], crew.text()
        assert all("fastmae: run: is not the same folder on " in crew.text(rank) for rank in (0, 1)), crew.text()
    assert not list(tmp_path.rglob(".shared-*"))
