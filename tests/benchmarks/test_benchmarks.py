"""The benchmarks: equal work is shown before time is taken, turns are fair, and results are what was measured."""

import json
import subprocess
import sys
import time
from functools import partial
from typing import ClassVar

import pytest
import torch

from fastmae.benchmarks.cli import main
from fastmae.benchmarks.kernels import attention
from fastmae.benchmarks.timing import LossesDiffer, Times, check_losses, interleave
from fastmae.benchmarks.training import contenders, waterfall
from fastmae.benchmarks.training.contenders import NAMES, Workload, make
from fastmae.benchmarks.training.reference import Draw
from fastmae.benchmarks.training.step import measure_steps
from fastmae.benchmarks.training.step import profiles as profiles_of
from fastmae.benchmarks.training.worker import OutOfMemory
from fastmae.model.block import linear
from fastmae.model.block.measured import Found
from fastmae.model.block.trial import Variant
from fastmae.model.config import preset

CPU = torch.device("cpu")
ON_CPU = "; ".join(s.name for s in waterfall.SWITCHES if "cpu" in s.devices)


def workload(**more):
    config = preset("tiny", norm_pix_loss=True, img_size=32, depth=2, decoder_depth=2)
    return Workload(name="tiny", config=config, batch=2, device=CPU, **more)


def test_all_contenders_train_on_the_same_loss():
    losses = {}
    for name in NAMES:
        contender = make(name, workload())
        losses[name] = contender.loss(contender.images, 7).item(), contender.timed_loss().item()
        contender.step()
        assert contender.loss(contender.images, 7).item() != losses[name][0]  # the same weights train
        assert contender.timed_loss().item() != losses[name][1]
    check_losses(losses, CPU)


def test_all_contenders_train_under_the_same_masks(monkeypatch):
    found = {name: make(name, workload()).timed_loss().item() for name in NAMES}
    assert found["reference"] == pytest.approx(found["fastmae"], rel=1e-6)
    assert found["rival"] == pytest.approx(found["fastmae"], rel=1e-6)
    monkeypatch.setattr(Workload, "noise", lambda self: torch.rand(2, self.config.patches))
    others = [make(name, workload()).timed_loss().item() for name in ("reference", "rival")]
    assert all(abs(loss - found["fastmae"]) > 1e-3 for loss in others)  # other masks give another loss


def test_a_draw_of_noise_is_made_and_then_replaced(compiler):
    draw = Draw()
    torch.manual_seed(3)
    drawn, then = draw(2, 5, device=CPU), torch.rand(1)
    draw.noise = noise = torch.arange(10.0).reshape(2, 5)
    torch.manual_seed(3)
    assert torch.equal(draw(2, 5, device=CPU), noise) and torch.equal(torch.rand(1), then)
    assert torch.equal(torch.compile(draw, fullgraph=True)(2, 5, device=CPU), noise)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2, 5))


@pytest.mark.parametrize("losses", [{"a": (1.0, 2.0), "b": (1.0001, 2.0)}, {"a": (1.0, 2.0), "b": (1.0, 2.0001)},
                                    {"a": (1.0, 2.0), "b": (float("nan"), 2.0)}])  # fmt: skip
def test_another_loss_ends_the_benchmark(losses):
    with pytest.raises(LossesDiffer, match=r"b (computes|trains on) another loss"):
        check_losses(losses, CPU)
    check_losses({"a": (1.0, 2.0), "b": (1.000001, 2.01)}, torch.device("cuda"))


class ForgedWorker:
    """Says of the second contender that it computes another loss, and takes note of what is asked."""

    asked: ClassVar[list[str]] = []

    def __init__(self, build, device):
        self.name = build.args[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def ask_losses(self, seed):
        pass

    def losses(self, seed):
        return (1.0, 1.0) if self.name == "reference" else (1.1, 1.1)

    def seconds(self, calls):
        self.asked.append("seconds")
        return 1.0


def test_nothing_is_timed_when_losses_differ(monkeypatch, capsys):
    monkeypatch.setattr("fastmae.benchmarks.training.step.Worker", ForgedWorker)
    monkeypatch.setattr("fastmae.benchmarks.training.step.matmul_flops", lambda device: 1e12)
    assert main(["step", "--models", "tiny"]) == 1
    assert "do not do the same work: rival computes another loss, 1.1, not 1.0" in capsys.readouterr().err
    assert ForgedWorker.asked == []


def test_a_contender_that_does_not_fit_costs_its_own_row_alone(monkeypatch):
    class Small(ForgedWorker):
        losses = lambda self, seed: (1.0, 1.0)  # noqa: E731
        peak_memory = lambda self: 2**30  # noqa: E731
        description = lambda self: self.name  # noqa: E731

        def seconds(self, calls):
            if self.name == "reference":
                raise OutOfMemory("out of memory")
            return 0.5

    monkeypatch.setattr("fastmae.benchmarks.training.step.Worker", Small)
    found = measure_steps(["tiny"], [2, 4], CPU, rounds=1, image_size=32)
    assert [(r["contender"], r["batch"]) for r in found["rows"]] == [(n, b) for b in (2, 4) for n in NAMES[1:]]
    assert any("one after the other" in n for n in found["notes"])
    assert "reference, tiny at batch 2: out of memory" in found["notes"]


def test_a_step_is_measured_for_everyone_in_turns():
    found = measure_steps(["tiny"], [2], CPU, rounds=2, image_size=32, profile=True)
    profiles = profiles_of(found)["rows"]
    assert [r["contender"] for r in found["rows"]] == [r["contender"] for r in profiles] == list(NAMES)
    assert all(r["kinds"]["products"]["launches"] > 10 and r["kinds"]["norms"]["share"] > 0 for r in profiles)
    for row in found["rows"]:
        assert len(row["rounds"]) == 2 and row["peak_memory"] > 2**27
        assert row["images_per_second"] == pytest.approx(2e3 / row["milliseconds"])
        assert row["loss_fp32"] == pytest.approx(found["rows"][0]["loss_fp32"], rel=1e-5)
    ours, reference = found["rows"][2], found["rows"][0]
    ratios = sorted(b / a for a, b in zip(ours["rounds"], reference["rounds"], strict=True))
    assert ours["speed_over_reference"] == pytest.approx(sum(ratios) / 2)
    assert ours["memory_over_reference"] == ours["peak_memory"] / reference["peak_memory"]
    json.dumps(found)


def test_turns_alternate_and_ratios_are_taken_within_a_round():
    order = []

    def run(name, calls):
        order.append(f"{name}{calls}")
        return 2.0 if name == "a" else float(len(order))

    times = interleave({"a": partial(run, "a"), "b": partial(run, "b")}, rounds=3, calls=5, warm_up=1)
    assert order == ["a1", "b1", "a5", "b5", "b5", "a5", "a5", "b5"]
    assert times["b"].seconds == (4.0, 5.0, 8.0)
    assert times["a"].over(times["b"]) == 2.5
    assert Times((1.0, 2.0, 4.0)).spread == 1.5


def test_a_limit_of_time_ends_the_turns_after_a_complete_round(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run(calls):
        clock[0] += calls
        return 1.0

    runs = {"a": run, "b": run}  # 2 seconds of warm-up, and 20 a round
    for rounds, seconds, expected in ((None, 62, 3), (None, 61.9, 2), (None, 1, 1), (2, 1000, 2), (5, 62, 3)):
        clock[0] = 0.0
        times = interleave(runs, rounds=rounds, calls=10, warm_up=1, seconds=seconds)
        assert [len(t.seconds) for t in times.values()] == [expected] * 2


def test_the_waterfall_measures_each_switch_against_the_whole(monkeypatch):
    monkeypatch.setattr(waterfall, "SWITCHES", [s for s in waterfall.SWITCHES if s.name.startswith("no exact")])
    found = waterfall.measure_waterfall("tiny", 2, CPU, rounds=2, image_size=32)
    assert [r["switch"] for r in found["rows"]] == ["fastmae", "no exact skipping"]
    assert all(r["images_per_second"] > 0 and r["memory"] > 0 for r in found["rows"])


@pytest.mark.parametrize("switch", [s for s in waterfall.SWITCHES if "cpu" in s.devices], ids=lambda s: s.name)
def test_every_switch_keeps_the_loss(switch, compiler, monkeypatch):
    monkeypatch.setattr("fastmae.benchmarks.training.contenders.keep_freed_memory", lambda: None)
    monkeypatch.setattr(linear, "_by_onednn", linear._by_onednn)  # undone at the end
    expected, found = make("fastmae", workload()), switch.build(workload())
    for _ in range(2):  # before and after an update
        torch.testing.assert_close(found.timed_loss(), expected.timed_loss(), rtol=2e-5, atol=0)
        expected.step()
        found.step()


def test_fastmae_is_timed_as_a_run_would_choose_and_without_what_a_switch_takes_away(monkeypatch):
    tasks, adopted, best = [], [], Variant("short", ("linear", "gelu"))
    monkeypatch.setattr(contenders, "MEASURED", ("cpu",))
    monkeypatch.setattr(contenders, "choose_block", lambda task: tasks.append(task) or Found(best, {}, {}))
    monkeypatch.setattr(contenders, "adopt_block", lambda task, variant: adopted.append(variant))
    monkeypatch.setattr(contenders, "fastest_alone", lambda *_: "flash")
    config = preset("base", residual="bf16")
    assert contenders.choose(config, CPU) == "attention short + linear + gelu"
    assert [task.shape.tokens for task in tasks] == [50, 197, 197] and {task.is_compiled for task in tasks} == {True}
    assert {(task.dtype, task.residual) for task in tasks} == {(torch.bfloat16, torch.bfloat16)}
    assert contenders.choose(config, CPU, "off", ("short", "gelu")) == "attention flash + linear" and not tasks[-1].is_compiled
    assert adopted == 3 * [best] + 3 * [Variant("flash", ("linear",))]
    assert contenders.choose(preset("base", fused="off"), CPU) == "attention auto, fused off" and len(tasks) == 6


def test_the_last_line_is_one_json_document(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "_CPU_TOKENS", 400)
    assert main(["attention", "--models", "tiny", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])["attention"]
    assert document["environment"]["torch"] == torch.__version__ and document["rows"]
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text())["attention"]["rows"] == document["rows"]
    assert "tmp" not in kept.read_text() and "/" not in document["environment"]["command"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--models", "giant"], "model must be one of tiny, small, base, large, huge, got 'giant'"),
        (["step", "--models", "tiny", "--reference", "/nowhere"], "model must be one of base, large, huge, got 'tiny'"),
        (["waterfall", "--model", "giant"], "model must be one of tiny, small, base, large, huge, got 'giant'"),
        (
            ["waterfall", "--device", "cpu", "--only", "float images", "a b"],
            f"only must be a part of a switch's name on cpu ({ON_CPU}), got 'a b'",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"fastmae bench: {message}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [["step"], ["step", "--profile"], ["gradients"], ["kernels"], ["attention"], ["waterfall"],
                                     ["loader", "--gpu", "--data", "x"], ["fed-step", "--data", "x"], ["all"]],
                         ids=" ".join)  # fmt: skip
def test_a_gpu_that_is_not_there_is_said_in_one_line(command, capsys):
    assert main([*command, "--device", "cuda"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "no CUDA device" in error


def test_the_command_line_hands_over(tmp_path):
    program = [sys.executable, "-m", "fastmae.train", "bench"]
    wrong = subprocess.run([*program, "attention", "--models", "giant"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("fastmae bench: model must be one of")
    help = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in help for name in ("step", "kernels", "attention", "waterfall", "all")) and "readme" not in help


@pytest.mark.gpu
def test_a_step_is_measured_on_a_gpu():
    began = time.monotonic()
    found = measure_steps(["tiny"], [8], torch.device("cuda"), rounds=2, image_size=64)
    assert [r["contender"] for r in found["rows"]] == list(NAMES) and not found["notes"]
    assert time.monotonic() - began < 600
