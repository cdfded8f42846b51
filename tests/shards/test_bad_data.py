"""Data that cannot be used, on one of several processes: all hear of it, and none is left in a collective."""

import re
import shutil

import pytest

from tests.support.batches import damage_samples
from tests.support.crew import Crew, run

pytestmark = pytest.mark.cluster


def test_a_bad_sample_of_any_process_is_named(shard_folder, tmp_path):
    shutil.copytree(shard_folder, tmp_path / "copy")
    damage_samples(tmp_path / "copy", 6)
    text = run(2, tmp_path / "copy", tmp_path / "run", "--steps", "5")
    named = set(re.findall(r"replaced a sample that cannot be used: (\S+ \S+)", text))
    assert len(named) == 6, text


def test_bad_data_of_one_process_ends_all_of_them_with_its_reason(shard_folder, tmp_path):
    shutil.copytree(shard_folder, tmp_path / "copy")
    damage_samples(tmp_path / "copy", 30)
    with Crew(2, tmp_path / "copy", tmp_path / "run", "--steps", "200") as crew:
        assert crew.end() == [2, 2], crew.text()
        text = crew.text()
    assert re.search(r"fastmae: 17 of 37 samples cannot be used, more than the budget of 0\.10%", text), text
    assert "Connection closed by peer" not in text and "backward" not in text
    assert "fastmae: another rank could not read its data" in text or text.count("fastmae: 17 of 37") == 2
    assert len(set(re.findall(r"tar: (\w+)\.jpg: its \d+ bytes", text))) >= 17  # every sample that broke the budget is named
