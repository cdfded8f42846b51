"""The layers of the code: imports only point down, and nothing heavy is imported before it is needed."""

import ast
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"kernels": "fastmae.kernels", "fastmae": "fastmae", "train": "fastmae.train", "benchmarks": "fastmae.benchmarks"}
ALLOWED = {  # a layer may import itself and these
    "fastmae.kernels": set(),
    "fastmae": {"fastmae.kernels"},
    "fastmae.train": {"fastmae", "fastmae.kernels"},
    "fastmae.benchmarks": {"fastmae", "fastmae.kernels", "fastmae.train"},
}


def layer_of(module: str) -> str:
    return next(
        (m for m in ("fastmae.kernels", "fastmae.train", "fastmae.benchmarks") if f"{module}.".startswith(f"{m}.")), "fastmae"
    )


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= modules().keys() else {node.module, *names}
    return found


@pytest.mark.parametrize(("module", "path"), sorted(modules().items()))
def test_imports_point_down(module, path):
    layer = layer_of(module)
    for target in imports(path):
        if target.partition(".")[0] == "fastmae":
            assert layer_of(target) in {layer, *ALLOWED[layer]}, f"{module} imports {target}"
        assert target.partition(".")[0] != "tests", f"{module} imports {target}"


@pytest.mark.parametrize("module", sorted(m for m in modules() if not m.rpartition(".")[2].startswith(("__main__", "test_"))))
def test_everything_can_be_imported(module):
    importlib.import_module(module)


ROOMS = [  # of each layer, from below: a room imports its own and those before it; a file in no room, none
    ("fastmae.model", "fastmae.images", "fastmae.shards", "fastmae.data"),
    ("fastmae.train.config", "fastmae.train.distributed", "fastmae.train.checkpoint", "fastmae.train.step",
     "fastmae.train.pretrain", "fastmae.train.report", "fastmae.train.doctor", "fastmae.train.cli", "fastmae.train.launch",
     "fastmae.train.api"),
]  # fmt: skip


@pytest.mark.parametrize("rooms", ROOMS, ids=["fastmae", "train"])
def test_a_room_imports_only_rooms_below_it(rooms):
    def room_of(module: str) -> int:
        return next((i for i, room in enumerate(rooms) if f"{module}.".startswith(f"{room}.")), -1)

    wrong = [
        f"{module} imports {target}"
        for module, path in modules().items()
        for target in imports(path)
        if layer_of(module) == layer_of(target) and room_of(module) < room_of(target) and path.name[:2] != "__"
    ]
    assert not wrong


@pytest.mark.parametrize("folder", sorted({path.parent for path in modules().values()}), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_folder_holds_more_than_fifteen_modules(folder):
    found = [path.name for path in folder.glob("*.py") if not path.name.startswith("__")]
    assert len(found) <= 15, found


def test_kernels_import_torch_and_triton_only():
    for module, path in modules().items():
        if layer_of(module) == "fastmae.kernels":
            outside = {t.partition(".")[0] for t in imports(path)} - {"fastmae"} - sys.stdlib_module_names
            assert outside <= {"torch", "triton"}, f"{module} imports {outside}"


def test_imports_have_no_circles():
    known = modules()
    edges = {m: {t for t in imports(p) if t in known and t != m} for m, p in known.items()}
    # A package's __init__ gathers its modules; they do not import it back.
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for target in edges[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in known:
        visit(module, ())


def test_using_every_name_of_fastmae_imports_nothing_heavy_or_optional():
    heavy = (
        "torch._dynamo",
        "xformers",
        "webdataset",
        "simplejpeg",
        "tensorboard",
        "matplotlib",
        "tyro",
        "torchvision",
        "timm",
        "fastmae.train",
    )
    code = (
        f"import sys, fastmae; [getattr(fastmae, n) for n in fastmae.__all__]; print([m for m in {heavy} if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
