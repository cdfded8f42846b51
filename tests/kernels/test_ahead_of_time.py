"""Every kernel compiles for A100, H100 and B200 as it is launched, within its limits, as the committed table states."""

import importlib
import json
import pkgutil

import pytest
import torch
import triton

from fastmae import kernels
from fastmae.benchmarks.kernels.launches import launches
from fastmae.benchmarks.kernels.resources import TABLE, TARGETS, exceeded, measure
from fastmae.benchmarks.kernels.uses import cases

EVERYTHING = [pytest.param((target, True), marks=pytest.mark.all, id=f"sm_{target}") for target in TARGETS]


@pytest.fixture(scope="module", params=[pytest.param((90, False), id="sm_90 of usual steps"), *EVERYTHING])
def found(request):
    target, rare = request.param
    return measure((target,), rare)


def test_no_kernel_spills_or_needs_too_much(found):
    assert exceeded(found) == []


def test_every_kernel_is_in_the_table(found):
    modules = [importlib.import_module(f"fastmae.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    names = {n for m in modules for n, v in vars(m).items() if isinstance(v, triton.JITFunction) and n.endswith("_kernel")}
    assert {f"_{row.split()[0]}_kernel" for row in found["kernels"]} == names


def test_the_committed_table_is_what_the_compiler_says(found):
    committed = json.loads(TABLE.read_text())
    names = {f"{launch.name} {case}" for case, call in cases() for launch in launches(call, 90)}
    assert {name.removesuffix(" in the gradient") for name in committed["kernels"]} == names
    asked = next(iter(found["kernels"].values())).keys()
    committed["kernels"] = {name: {t: committed["kernels"][name][t] for t in asked} for name in found["kernels"]}
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the table is of triton {committed['triton']}; this is {triton.__version__}, which counts otherwise")
    assert committed == found, "rewrite it: python -m fastmae.benchmarks kernels --resources --save"


def test_each_limit_is_checked():
    good = {"registers": 128, "stack": 0, "shared": 48 * 1024}
    for change in ({"registers": 129}, {"stack": 8}, {"shared": 48 * 1024 + 1}):
        assert len(exceeded({"kernels": {"k": {"sm_90": {**good, **change}, "sm_80": good}}})) == 1
    for change, count in (({"registers": 255}, 0), ({"shared": 49 * 1024}, 1), ({"stack": 8}, 1)):
        assert len(exceeded({"kernels": {"short_attention_bwd k": {"sm_90": {**good, **change}}}})) == count


@pytest.mark.parametrize(("side", "layout", "start"), [(224, "NCHW", 0), (98, "NCHW", 0), (224, "NHWC", 0), (224, "NCHW", 1)])
def test_a_launch_is_recorded_with_what_triton_makes_of_its_arguments(side, layout, start):
    statistics = torch.zeros(3), torch.ones(3)
    pixels = torch.zeros(start + 2 * 3 * side * side, dtype=torch.uint8)[start:]
    images = pixels.view(2, 3, side, side) if layout == "NCHW" else pixels.view(2, side, side, 3).permute(0, 3, 1, 2)
    ids = torch.zeros(2, 5, dtype=torch.int32)
    (launch,) = launches(lambda: kernels.gather_patches(images, ids, 14, *statistics, torch.bfloat16), 90)

    position = launch.kernel.arg_names.index
    divisible = {name for name in launch.signature if launch.attributes.get((position(name),))}
    ones = {name for name in launch.signature if name.startswith("stride") and launch.constants.get((position(name),)) == 1}
    strides = {f"stride_{axis}": stride for axis, stride in zip("bcyx", images.stride(), strict=True)}
    assert ones == {name for name, stride in strides.items() if stride == 1}
    assert divisible & strides.keys() == {name for name, stride in strides.items() if stride % 16 == 0}
    assert ("images_ptr" in divisible) == (images.data_ptr() % 16 == 0) == (start == 0)
    assert launch.signature["out_ptr"] == "*bf16" and launch.signature["images_ptr"] == "*u8"


def test_a_launch_is_recorded_with_the_warps_that_it_asks_for():
    ids = torch.zeros(1, dtype=torch.int64)
    found = {patches: launches(lambda n=patches: kernels.random_masking(0, ids, ids, n, 1, 1), 80)[0] for patches in (64, 2048)}
    assert found[64].options["num_warps"] < found[2048].options["num_warps"]
    assert {launch.target for launch in found.values()} == {80} and found[64].key != found[2048].key


def test_recording_a_launch_leaves_ops_as_they_were():
    ids = torch.arange(3)
    before = kernels.random_masking(0, ids, ids, 16, 4, 12)
    launches(lambda: kernels.random_masking(0, ids, ids, 16, 4, 12), 90)
    after = kernels.random_masking(0, ids, ids, 16, 4, 12)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
