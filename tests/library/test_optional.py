"""Packages that are not there cost their feature, are named once, and nothing else."""

import subprocess
import sys

import pytest

WITHOUT = """import sys
sys.modules.update(tensorboard=None, matplotlib=None)
from fastmae.train.cli.main import main
sys.exit(main(sys.argv[1:]))"""


def test_the_demo_runs_without_tensorboard_and_matplotlib(tmp_path):
    pytest.importorskip("skimage")
    command = [sys.executable, "-c", WITHOUT, "demo", "--out", str(tmp_path), "--steps", "2", "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for package, follows in (("tensorboard", "training continues, with metrics.jsonl"),
                             ("matplotlib", "the demo continues without loss.png and report.html")):  # fmt: skip
        (line,) = [line for line in done.stderr.splitlines() if f"needs {package}" in line]
        assert line.endswith(f": pip install {package}; {follows}")
    for name in ("metrics.jsonl", "reconstruction.png", "step-0000002/model.safetensors"):
        assert (tmp_path / name).is_file()
    for name in ("tensorboard", "loss.png", "report.html"):
        assert not (tmp_path / name).exists()
    assert f"look at {tmp_path}/reconstruction.png" in done.stderr
