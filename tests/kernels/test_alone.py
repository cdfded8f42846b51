"""The kernels alone: their one folder beside torch and triton, and nothing else that is installed, nor the rest of fastmae."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

KERNELS = Path(__file__).parents[2] / "kernels"
USE = """
import torch
from fastmae import kernels
x = torch.randn(2, 5, 3, requires_grad=True)
ids = torch.stack([torch.randperm(5) for _ in range(2)]).int()
inverse = ids.argsort(1).int()
kernels.take_rows(x, ids[:, :2], inverse).sum().backward()
assert torch.equal(x.grad, (inverse < 2)[..., None].expand(-1, -1, 3).float())
pred = torch.zeros(2, 2, 4, requires_grad=True)
loss = kernels.masked_mse(pred, torch.ones(2, 1, 4, 4), ids[:, :2].clamp(max=3), 2, norm_pix=False)
loss.backward()
assert loss == 1 and torch.equal(pred.grad, torch.full_like(pred, -2 / 16))
print("done")
"""


def requirements(name: str, found: set[str]) -> set[str]:
    """``found`` with ``name`` and all that its installation brings."""
    if name not in found:
        found.add(name)
        for line in distribution(name).requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                requirements(wanted.name, found)
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with links to what ``pip install torch triton`` installs, and to the kernels."""
    folder = tmp_path_factory.mktemp("packages")
    try:
        names = requirements("triton", requirements("torch", set()))
    except PackageNotFoundError as error:
        pytest.skip(f"torch was installed without {error.name}, so what it needs cannot be listed")
    for files in (distribution(name).files for name in names):
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():  # several packages of NVIDIA's share a folder
                link.symlink_to(files[0].locate().parents[len(files[0].parts) - 1] / top)
    (folder / "fastmae").mkdir()
    (folder / "fastmae" / "kernels").symlink_to(KERNELS)
    return folder


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", "-P", "-W", "ignore", "-c", code]  # -S: no installed package but those of the folder
    return subprocess.run(command, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False)


def test_kernels_need_torch_and_triton_alone(packages):
    done = run(USE, packages)
    assert done.stdout == "done\n", done.stderr


def test_no_other_package_is_there(packages):
    tried = run("for name in ('numpy', 'safetensors', 'fastmae.model'):\n"
                "    try: __import__(name)\n    except ImportError as error: print(error)", packages)  # fmt: skip
    assert tried.stdout.splitlines() == [f"No module named {name!r}" for name in ("numpy", "safetensors", "fastmae.model")]
