"""An optional package that is missing costs its feature only, and is named once."""

import subprocess
import sys

import pytest

WITHOUT = """import sys
sys.modules["tensorboard"] = None
from fastmae.train.cli.main import main
sys.exit(main(sys.argv[1:]))"""


def test_the_demo_runs_without_tensorboard(tmp_path):
    pytest.importorskip("skimage")
    command = [sys.executable, "-c", WITHOUT, "demo", "--out", str(tmp_path), "--steps", "2", "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "needs tensorboard" in line]
    assert line.endswith(": pip install tensorboard; training continues, with metrics.jsonl")
    for name in ("metrics.jsonl", "reconstruction.png", "loss.png", "report.html", "step-0000002/model.safetensors"):
        assert (tmp_path / name).is_file()
    assert not (tmp_path / "tensorboard").exists()
    assert f"look at {tmp_path}/reconstruction.png" in done.stderr
