"""Any number of processes, sharing the model in any way, takes the same steps: same samples, same masks, same loss."""

import functools
import json
import shutil

import pytest
import xxhash

from fastmae.train.step import loss_module
from fastmae.train.step.step import Step
from tests.support.crew import Crew, run
from tests.support.runs import assert_same_bits, losses

pytestmark = pytest.mark.cluster
STEPS = 10
FLAGS = ("--steps", STEPS, "--blr", "0.05", "--save-every", "4", "--keep", "9")


def note_samples(folder, rank):
    """Write down, for each micro-batch of each step, every sample's id and epoch and a digest of the patches it keeps."""
    masking, warm_up, is_warm = loss_module.random_masking, Step.warm_up, []

    def noted(*arguments, sample_ids, epoch, **options):
        masks = masking(*arguments, sample_ids=sample_ids, epoch=epoch, **options)
        kept = [xxhash.xxh3_64_hexdigest(ids.contiguous().numpy().tobytes()) for ids in masks.ids_keep]
        with (folder / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([bool(is_warm), *zip(sample_ids.tolist(), epoch.tolist(), kept, strict=True)]) + "\n")
        return masks

    def warmed_up(self, batch):
        is_warm.append(1)
        warm_up(self, batch)
        is_warm.clear()

    loss_module.random_masking, Step.warm_up = noted, warmed_up


def samples(folder, accumulate=1):
    """[{(sample, epoch, kept patches)}] of each step that ``note_samples`` has seen, over all ranks."""
    ranks = [[json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("rank-*.jsonl")]
    batches = [[line[1:] for line in lines if not line[0]] for lines in ranks]
    steps = [[rank[i : i + accumulate] for rank in batches] for i in range(0, len(batches[0]), accumulate)]
    return [{tuple(sample) for rank in each for batch in rank for sample in batch} for each in steps]


def train(size, shards, out, *flags, **options):
    """Run to the end, noting samples in ``out``; returns the newest checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    run(size, shards, out, *FLAGS, *flags, fault=functools.partial(note_samples, out), **options)
    return out / f"step-{STEPS:07d}"


@pytest.fixture(scope="module")
def two(shard_folder, tmp_path_factory):
    """The folder of an undisturbed run of two processes under DDP."""
    out = tmp_path_factory.mktemp("two")
    train(2, shard_folder, out)
    return out


@pytest.fixture(scope="module")
def sharded(shard_folder, tmp_path_factory):
    """The same under FSDP2."""
    out = tmp_path_factory.mktemp("sharded")
    train(2, shard_folder, out, "--parallel", "fsdp")
    return out


@pytest.fixture(scope="module")
def one(shard_folder, tmp_path_factory):
    """The same of one process."""
    out = tmp_path_factory.mktemp("one")
    train(1, shard_folder, out)
    return out


def begun(source, out, number=4):
    """A run that has ended after step ``number`` of the one in ``source``."""
    shutil.copytree(source / f"step-{number:07d}", out / f"step-{number:07d}")
    return out


def assert_continues(out, whole, number=4):
    """The steps after ``number`` had the samples, masks and losses of the run ``whole``."""
    found = losses(out)
    assert sorted(found) == list(range(number + 1, STEPS + 1))
    assert found == pytest.approx({k: v for k, v in losses(whole).items() if k > number}, rel=1e-5)
    assert samples(out) == samples(whole)[number:]


def test_two_processes_take_the_steps_of_one(one, two):
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    assert samples(two) == samples(one)
    assert [len(seen) for seen in samples(one)] == [12] * STEPS
    assert len(set(map(frozenset, samples(one)))) == STEPS  # or the equality above would say little
    found = losses(one)
    assert found[STEPS] < 0.97 * found[1]


def test_accumulated_steps_are_those_of_full_batches(one, two, shard_folder, tmp_path):
    train(1, shard_folder, tmp_path / "one", "--batch-size", 3)
    assert losses(tmp_path / "one") == pytest.approx(losses(one), rel=1e-6)
    assert samples(tmp_path / "one", accumulate=4) == samples(one)
    train(2, shard_folder, tmp_path / "two", "--batch-size", 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(two), rel=1e-6)
    assert samples(tmp_path / "two", accumulate=3) == samples(two)


@pytest.mark.parametrize(
    ("size", "how", "local"), [(1, "ddp", 1), (3, "ddp", 3), (4, "ddp", 4), (2, "fsdp", 2), (3, "fsdp", 3), (4, "hsdp", 2)]
)
def test_a_run_of_two_goes_on_in_any_number_and_shared_in_any_way(size, how, local, two, shard_folder, tmp_path):
    train(size, shard_folder, begun(two, tmp_path), "--parallel", how, local=local)
    assert_continues(tmp_path, two)
    if how == "hsdp":  # and back
        train(2, shard_folder, begun(tmp_path, tmp_path / "back", 8))
        assert_continues(tmp_path / "back", two, 8)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sharded_run_resumes_unsharded(size, sharded, two, shard_folder, tmp_path):
    train(size, shard_folder, begun(sharded, tmp_path))
    assert_continues(tmp_path, two)


def test_a_sharded_run_has_the_loss_of_an_unsharded_one_and_resumes_with_its_own_bits(sharded, two, shard_folder, tmp_path):
    assert losses(sharded) == pytest.approx(losses(two), rel=1e-6)
    assert samples(sharded) == samples(two)
    assert_same_bits(train(2, shard_folder, begun(sharded, tmp_path), "--parallel", "fsdp"), sharded / f"step-{STEPS:07d}")


def test_a_run_of_two_goes_on_with_its_own_bits(two, shard_folder, tmp_path):
    assert_same_bits(train(2, shard_folder, begun(two, tmp_path)), two / f"step-{STEPS:07d}")


def without_warm_up(rank):
    Step.warm_up = lambda self, batch: None


def test_a_run_of_three_goes_on_with_its_own_bits(shard_folder, tmp_path):
    """Of three gradients the order of the sum counts, so the buckets in which they travel must be those of before."""
    whole = train(3, shard_folder, tmp_path / "whole")
    assert_same_bits(train(3, shard_folder, begun(tmp_path / "whole", tmp_path / "parts")), whole)
    run(3, shard_folder, begun(tmp_path / "whole", tmp_path / "cold"), *FLAGS, fault=without_warm_up)
    with pytest.raises(AssertionError):
        assert_same_bits(tmp_path / "cold" / whole.name, whole)


def test_gradients_that_travel_in_bf16_keep_the_loss(two, shard_folder, tmp_path):
    """A gradient is rounded by at most 2^-9 of it three times, on both sides and in the sum; so is what its step wins."""
    train(2, shard_folder, tmp_path, "--reduce", "bf16")
    exact, rounded = losses(two), losses(tmp_path)
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=3 * 2**-9 * (max(exact.values()) - min(exact.values())))


@pytest.mark.parametrize("how", ["blocks", pytest.param("model", marks=pytest.mark.all)])
def test_a_compiled_run_of_two_keeps_the_loss(how, two, shard_folder, tmp_path):
    with Crew(2, shard_folder, tmp_path / how, *FLAGS, "--compile", how) as crew:
        assert crew.end(400) == [0, 0], crew.text()
    assert losses(tmp_path / how) == pytest.approx(losses(two), rel=1e-5)
