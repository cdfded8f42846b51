"""Real processes of real runs, killed for real: the same bits afterwards, and the same loss for any number of them."""

import re
import shutil
import signal
import time

import pytest

from tests.runs import FLAGS, TORCHRUN, assert_same_bits, finish, losses, start, wait_for
from tests.test_indexed import damage_samples

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference_run(shard_folder, tmp_path_factory):
    """An uninterrupted run of eight steps, its flags, and its last checkpoint."""
    out = tmp_path_factory.mktemp("uninterrupted")
    flags = ["--data", shard_folder, *FLAGS, "--steps", "8", "--batch-size", "8", "--save-every", "1", "--keep", "2"]
    code, text = finish(start([*flags, "--out", out]))
    assert code == 0, text
    return flags, out, text


def test_a_killed_run_continues_with_the_same_bits(reference_run, tmp_path):
    flags, whole, _ = reference_run
    for number in (2, 5):  # killed twice, at moments that nothing waits for
        process = start([*flags, "--out", tmp_path])
        wait_for(tmp_path / f"step-000000[{number}-9]", process)
        process.send_signal(signal.SIGKILL)
        finish(process)
    code, text = finish(start([*flags, "--out", tmp_path]))
    assert code == 0 and "resumed from" in text, text
    assert_same_bits(whole / "step-0000008", tmp_path / "step-0000008")
    assert losses(tmp_path) == losses(whole)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]


def test_a_terminated_run_saves_ends_well_and_continues_with_the_same_bits(reference_run, tmp_path):
    flags, whole, _ = reference_run
    process = start([*flags, "--save-every", "1000", "--out", tmp_path])
    wait_for(tmp_path / "metrics.jsonl", process)
    while '"loss"' not in (tmp_path / "metrics.jsonl").read_text() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == 0 and "stopped by SIGTERM after step" in text, text
    code, text = finish(start([*flags, "--out", tmp_path]))
    assert code == 0, text
    assert_same_bits(whole / "step-0000008", tmp_path / "step-0000008")


def test_two_processes_have_the_loss_of_one(reference_run, tmp_path):
    flags, whole, text_of_one = reference_run
    code, text = finish(start([*flags, "--batch-size", "4", "--out", tmp_path], (*TORCHRUN, "2")))
    assert code == 0, text
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-6)
    assert "effective batch = 4 per process x 2 processes x 1 accumulated = 8" in text
    assert "effective batch = 8 per process x 1 processes x 1 accumulated = 8" in text_of_one


def test_a_bad_sample_of_any_process_is_named(shard_folder, reference_run, tmp_path):
    shutil.copytree(shard_folder, tmp_path / "copy")
    damage_samples(tmp_path / "copy", 6)
    flags = ["--data", tmp_path / "copy", *FLAGS, "--steps", "5", "--batch-size", "4", "--out", tmp_path / "run"]
    code, text = finish(start(flags, (*TORCHRUN, "2")))
    assert code == 0, text
    named = set(re.findall(r"replaced a sample that cannot be used: (\S+ \S+)", text))
    assert len(named) == 6, text


def test_a_run_of_two_processes_continues_in_one(reference_run, tmp_path):
    flags, whole, _ = reference_run
    process = start([*flags, "--batch-size", "2", "--out", tmp_path], (*TORCHRUN, "2"))
    wait_for(tmp_path / "step-000000[3-7]", process)
    process.send_signal(signal.SIGTERM)
    finish(process)
    code, text = finish(start([*flags, "--out", tmp_path]))
    assert code == 0 and "resumed from" in text, text
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


def test_bad_data_of_one_process_ends_all_of_them_with_its_reason(shard_folder, tmp_path):
    """No process is left in a collective: the one without fault says that another has failed."""
    folder = tmp_path / "copy"
    shutil.copytree(shard_folder, folder)
    damage_samples(folder, 30)
    code, text = finish(
        start(["--data", folder, *FLAGS, "--steps", "200", "--batch-size", "4", "--out", tmp_path / "run"], (*TORCHRUN, "2"))
    )
    assert code != 0 and re.search(r"fastmae: 17 of 37 samples cannot be used, more than the budget of 0\.10%", text), text
    assert "Connection closed by peer" not in text and "backward" not in text
    assert "fastmae: another process of this run could not read its data" in text or text.count("fastmae: 17 of 37") == 2
    assert len(set(re.findall(r"tar: (\w+)\.jpg: its \d+ bytes", text))) >= 17  # every sample that broke the budget is named
