"""The batch that fits: searched for by trying, or estimated from what a step keeps."""

import re
from dataclasses import replace

import pytest
import torch
import tyro

from fastmae.host_memory import available_memory
from fastmae.model.config import preset
from fastmae.model.mae import MAE
from fastmae.model.masking import random_masking
from fastmae.train.config.settings import DoctorSettings
from fastmae.train.distributed.world import World
from fastmae.train.doctor.findings import Report
from fastmae.train.doctor.fit import Estimate, check_fit, estimate_step
from fastmae.train.doctor.largest_batch import MOST, Found, largest_batch, try_batches
from fastmae.train.pretrain.out_of_memory import is_out_of_memory
from tests.support.runs import MODEL, RECIPE, run_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("asked", [1, 3, 64, 256, 5000, 100_000])
@pytest.mark.parametrize("limit", [0, 1, 2, 7, 63, 64, 65, 300, 4097, MOST - 1, MOST, MOST + 1])
def test_the_search_ends_at_most_a_sixteenth_below_the_limit(asked, limit):
    tried = []
    found = largest_batch(lambda batch: tried.append(batch) or batch <= limit, asked)
    limit = min(limit, MOST)
    assert limit - max(1, limit // 16) < found <= limit or found == limit
    assert len(set(tried)) == len(tried) <= 22 and max(tried) <= MOST and min(tried) >= 1


def step_that_fits(limit):
    """The memory of a device that takes ``limit`` images, in the place of a step's backward pass."""

    def run(self, batches):
        if len(batches[0].images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return run


@pytest.fixture
def kept(monkeypatch):
    """Memory is not given back: what Python's collector looks at is all of the tests' process."""
    monkeypatch.setattr("fastmae.train.doctor.largest_batch._give_back", lambda: None)


def test_what_the_device_refuses_is_caught_and_the_largest_batch_found(monkeypatch, kept):
    monkeypatch.setattr("fastmae.train.step.step.Step.run", step_that_fits(21))
    monkeypatch.setattr("fastmae.train.step.step.Step.__call__", lambda self, batches, lr: self.run(batches))
    assert try_batches(MODEL, 0.75, None, CPU, 64).largest in (20, 21)
    monkeypatch.setattr("fastmae.train.step.step.Step.run", step_that_fits(0))
    assert try_batches(MODEL, 0.75, None, CPU, 64) == Found(largest=0, peak=0)


def test_libraries_that_lack_memory_count_as_well_and_other_faults_do_not(monkeypatch, kept):
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    text = "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"

    def fail(self, batches, lr):
        raise RuntimeError(text)

    monkeypatch.setattr("fastmae.train.step.step.Step.__call__", fail)
    assert try_batches(MODEL, 0.75, None, CPU, 4).largest == 0
    text = "device-side assert triggered"
    with pytest.raises(RuntimeError, match=text):
        try_batches(MODEL, 0.75, None, CPU, 4)


def test_a_real_step_goes_through_the_trial():
    assert largest_batch(lambda batch: batch <= 2, 2, most=2) == 2
    from fastmae.train.doctor.largest_batch import _Trial

    trial = _Trial(MODEL, 0.75, torch.bfloat16, CPU)
    weights = [p.clone() for p in trial.step.parameters]
    assert trial.fits(3) and trial.fits(1) and trial.step.parameters[0].grad is None
    assert all(torch.equal(a, b) for a, b in zip(weights, trial.step.parameters, strict=True))  # lr 0: nothing is trained


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_a_step_really_keeps(autocast, checkpointing):
    config, B = replace(MODEL, checkpointing=checkpointing, attention="sdpa"), 6
    model = MAE(config)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    masking = random_masking(B, config.patches, 0.75, seed=0, sample_ids=torch.arange(B))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", autocast, enabled=autocast is not None),
    ):
        model.training_loss(torch.zeros(B, 3, 32, 32, dtype=torch.uint8), masking)
    sizes = [storage.nbytes() for storage in kept.values()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    estimate = estimate_step(config, 0.75, autocast)
    assert estimate.parameters == trained
    assert estimate.needed(B) == pytest.approx(16 * trained + sum(sizes) + 2 * max(sizes), rel=0.01)


def test_checkpointing_takes_less_and_larger_models_more():
    small, large = (preset(name, img_size=64) for name in ("tiny", "small"))
    full = estimate_step(small, 0.75, None)
    assert estimate_step(replace(small, checkpointing=True), 0.75, None).per_image < full.per_image / 2
    assert estimate_step(large, 0.75, None).per_image > full.per_image


def test_the_largest_batch_of_an_estimate_just_fits():
    estimate = Estimate(fixed=1000, per_image=30, parameters=0)
    for available in (999, 1000, 1029, 1030, 10_000):
        largest = estimate.largest(available)
        assert largest == 0 or estimate.needed(largest) <= available < estimate.needed(largest + 1)


class Lines(Report):
    """The lines of a report."""

    def __init__(self):
        super().__init__(World(0, 1, CPU))
        self.lines = []

    def line(self, text):
        self.lines.append(text)


def test_a_batch_that_does_not_fit_is_an_error_with_one_that_does_and_makes_up_the_effective_batch(monkeypatch):
    estimate = estimate_step(RECIPE.model, 0.75, None)
    monkeypatch.setattr("fastmae.train.doctor.fit.available_memory", lambda: estimate.needed(7))
    report = Lines()
    check_fit(report, report.world, run_of("x", "y"), RECIPE, CPU)  # batch 8 of 8
    (line,) = report.lines
    start = r"error: batch 8 per process in fp32: does not fit; the largest that does is 7 \(an estimate: "
    middle = r"0\.\d\d GB of the 0\.\d\d GB that are available to a process\); give --batch-size 4 --effective-batch "
    end = r"8 or --checkpointing \(the largest is \d+ with it\)"
    assert re.fullmatch(start + middle + end, line), line


def test_the_advice_can_be_given_as_it_stands(monkeypatch):
    monkeypatch.setattr("fastmae.train.doctor.fit.available_memory", lambda: estimate_step(RECIPE.model, 0.75, None).needed(7))
    report = Lines()
    check_fit(report, report.world, run_of("x", "y"), RECIPE, CPU)
    for flags in re.findall(r"(--\S+ (?:\d+|True)(?: --\S+ \d+)?)", report.lines[0]):
        tyro.cli(tyro.conf.OmitArgPrefixes[DoctorSettings], args=["tiny", *flags.split()])


def test_a_sharded_run_is_not_refused_for_what_an_unsharded_one_lacks(monkeypatch):
    monkeypatch.setattr("fastmae.train.doctor.fit.try_batches", lambda *_: Found(largest=0, peak=0))
    monkeypatch.setattr(World, "gather", lambda self, found: found)
    report = Lines()
    world = World(0, 2, CPU)
    recipe = replace(RECIPE, effective_batch=16)
    check_fit(report, world, run_of("x", "y", parallel="fsdp"), recipe, torch.device("cuda", 0))
    assert (report.errors, report.warnings) == (0, 1) and "--parallel fsdp" not in report.lines[0], report.lines


def test_on_a_gpu_the_process_with_the_least_memory_decides(monkeypatch):
    monkeypatch.setattr("fastmae.train.doctor.fit.try_batches", lambda *_: Found(largest=100, peak=70 << 30))
    monkeypatch.setattr(World, "gather", lambda self, found: [*found, (6, 3, 30 << 30)])
    report = Lines()
    check_fit(report, report.world, run_of("x", "y"), RECIPE, torch.device("cuda", 0))
    (line,) = report.lines
    assert (
        "error: batch 8 per process in bf16: does not fit; the largest that does is 6 (tried uncompiled, 30.0 GiB on rank 3;"
        in line
    )


# Memory of the machine and its containers.


def files_in(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal:  2000 kB\nMemAvailable:  1000 kB\n"}
IN_V2 = {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/step/memory.max": "max\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 1_024_000),
        ({**MEMINFO, **IN_V2}, 1_024_000),
        ({**MEMINFO, **IN_V2, "sys/fs/cgroup/job/memory.max": "9000\n", "sys/fs/cgroup/job/memory.current": "8000\n",
          "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 500\n"}, 1500),
        ({**MEMINFO, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "5\n",
          "sys/fs/cgroup/memory.current": "9\n"}, 0),
        ({**MEMINFO, "proc/self/cgroup": "7:cpu:/x\n9:memory:/docker/abc\n",
          "sys/fs/cgroup/memory/memory.limit_in_bytes": "900\n",
          "sys/fs/cgroup/memory/memory.usage_in_bytes": "300\n"}, 600),
    ],
    ids=["nothing known", "machine", "no limit", "limit of a cgroup above", "above its limit", "v1, the host's path"],
)  # fmt: skip
def test_the_least_of_machine_and_cgroups_counts(files, expected, tmp_path):
    files_in(tmp_path, files)
    assert available_memory(tmp_path) == expected


def test_this_machine_has_memory():
    assert 0 < available_memory() < 1 << 50


@pytest.mark.gpu
@pytest.mark.worth(3)
def test_a_gpu_s_largest_batch_is_found_and_its_memory_given_back():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    limit = 4 << 30
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total, device)  # so that the search takes seconds on any GPU
    try:
        config = preset("small")
        found = try_batches(config, 0.75, torch.bfloat16, device, 4096)
        assert 1 <= found.largest < 4096 and limit / 2 < found.peak <= limit
        less = try_batches(replace(config, checkpointing=True), 0.75, torch.bfloat16, device, found.largest)
        assert less.largest > found.largest
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert torch.cuda.memory_allocated(device) <= before + (64 << 20)
