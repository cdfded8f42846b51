"""xformers with a torch for another CUDA: its runtime is found in its package, or the package is named."""

import json
import shutil
import subprocess
import sys

import pytest

from fastmae.model.attention.cuda_runtime import PACKAGE

NAME = "libcudart-of-a-test.so.12"  # a process that had loaded another libcudart.so.12 would take that one

CODE = f"""import ctypes, sys
from fastmae.model.attention import cuda_runtime
cuda_runtime.LIBRARY = {NAME!r}
print(cuda_runtime.load_runtime(sys.argv[1] or None))
print(hasattr(ctypes.CDLL(None), "runtime_of_a_test"), "torch" in sys.modules, "xformers" in sys.modules)
"""


def install(folder, name, version, files):
    """A package as pip leaves it behind."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in [*files, f"{info.name}/METADATA"]))


def load(folder, cuda):
    done = subprocess.run([sys.executable, "-c", CODE, cuda], env={"PYTHONPATH": str(folder)}, capture_output=True, text=True,
                          check=True)  # fmt: skip
    return done.stdout.splitlines()


@pytest.fixture
def site(tmp_path):
    """A folder of packages in which xformers 0.0.35 is installed, as far as its wheel states its CUDA."""
    built = {"version": {"cuda": 1208, "hip": None, "torch": "2.10.0+cu128"}}
    install(tmp_path, "xformers", "0.0.35", {"xformers/cpp_lib.json": json.dumps(built).encode()})
    return tmp_path


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A shared library with one function."""
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("no C compiler to make a library with")
    folder = tmp_path_factory.mktemp("library")
    (folder / "a.c").write_text("int runtime_of_a_test(void) { return 12; }")
    subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{NAME}", "-o", folder / "a.so", folder / "a.c"], check=True)
    return (folder / "a.so").read_bytes()


def test_the_library_of_an_installed_package_is_loaded_globally(site, library):
    install(site, PACKAGE, "12.8.90", {f"nvidia/cuda_runtime/lib/{NAME}": library, "nvidia/cuda_runtime/include/a.h": b""})
    assert load(site, "13.0") == ["None", "True False False"]
    assert load(site, "12.6") == ["None", "False False False"]  # torch includes it
    assert load(site, "") == ["None", "False False False"]  # no CUDA


@pytest.mark.parametrize("damage", ["missing", "not listed", "no library"])
def test_without_it_the_package_and_the_torch_that_fits_are_named(damage, site, library):
    if damage == "not listed":
        install(site, PACKAGE, "12.8.90", {"nvidia/cuda_runtime/include/a.h": b""})
    elif damage == "no library":
        install(site, PACKAGE, "12.8.90", {f"nvidia/cuda_runtime/lib/{NAME}": b"\x7fELF"})
    reason, loaded = load(site, "13.0")
    assert reason == (
        f"xformers 0.0.35 needs {NAME}, which a torch for CUDA 13.0 does not include: pip install nvidia-cuda-runtime-cu12, or "
        "use a torch for CUDA 12.8, for which it is built"
    )
    assert loaded == "False False False"


@pytest.mark.parametrize("stated", [{"version": {"cuda": 1300}}, {"version": {"cuda": None}}, {}, None])
def test_an_xformers_that_is_not_built_for_cuda_12_needs_nothing(stated, tmp_path):
    install(tmp_path, "xformers", "0.0.99", {} if stated is None else {"xformers/cpp_lib.json": json.dumps(stated).encode()})
    assert load(tmp_path, "13.0")[0] == "None"
