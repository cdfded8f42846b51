"""Scaling on paper: shares add up, costs follow their formulas, limits are what they must be, the page is what is computed."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastmae.benchmarks.cli import RESULTS, SCALING, main
from fastmae.benchmarks.scaling import model as scaling
from fastmae.benchmarks.scaling import page as scaling_page
from fastmae.benchmarks.scaling.cluster import Cluster, explained
from fastmae.benchmarks.scaling.collectives import Layout, step_collectives, trained_elements, units
from fastmae.benchmarks.scaling.peers import PEERS
from fastmae.benchmarks.scaling.timeline import Batch, held_bytes, step_time, unit_shares
from fastmae.errors import InputError
from fastmae.model.config import preset
from fastmae.model.flops import training_flops
from fastmae.model.mae import MAE
from fastmae.model.masking import random_masking

FREE = Cluster(link_bytes=1e30, network_bytes=1e30, memory_bytes=1e30, link_hop=1e-30, network_hop=1e-30, collective=1e-30,
               message=1e-30, launch=1e-30)  # fmt: skip
BASE = preset("base")


@pytest.fixture(scope="module")
def section():
    return scaling.predict_scaling(scaling.MODELS, scaling.GPUS, Cluster(), RESULTS)


@pytest.mark.parametrize("name", ["tiny", "base", "large", "huge"])
def test_shares_of_units_are_those_of_the_models_flops(name):
    config = preset(name)
    shares, L, K = unit_shares(config, 0.75), config.patches, config.patches // 4
    assert len(shares) == len(units(config)) and sum(shares) == pytest.approx(1, abs=1e-12)
    head = 6 * (1 + L) * config.decoder_embed_dim * config.patch_values
    assert shares[-1] * training_flops(config, 0.75) == pytest.approx(head, rel=1e-9)
    block = 6 * (1 + K) * (12 * config.embed_dim**2 + 2 * (1 + K) * config.embed_dim)
    assert shares[1] * training_flops(config, 0.75) == pytest.approx(block, rel=1e-9)


@pytest.mark.parametrize(("how", "reduce"), [*itertools.product(("ddp", "fsdp", "hsdp"), ("fp32", "bf16"))])
def test_where_nothing_else_costs_a_step_is_its_work(how, reduce):
    time = step_time(BASE, Batch(images=96, micro_batch=32), Layout(how=how, machines=8, reduce=reduce), FREE)
    assert time.total == pytest.approx(96 * training_flops(BASE, 0.75) / FREE.flops, rel=1e-9)
    assert time.efficiency == pytest.approx(1) and time.exposed == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("how", ["ddp", "hsdp"])
def test_a_slow_network_is_all_that_counts(how):
    """Between the last collective's bytes alone and no overlap at all."""
    slow = replace(Cluster(), network_bytes=1e6)
    layout, batch = Layout(how=how, machines=4), Batch(images=8, micro_batch=8)
    sent = [c for c in step_collectives(BASE, layout) if layout.span(c.group)[0] > 1 and c.phase == "backward"]
    alone = sum(slow.collective_seconds(c.kind, c.bytes, *layout.span(c.group)) for c in sent)
    time = step_time(BASE, batch, layout, slow)
    assert alone < time.gpu < alone + 0.5 and time.exposed > 0.99 * alone


def test_a_step_is_never_shorter_than_each_of_its_parts(section):
    for r in section["strong"] + section["weak"]:
        parts = ("work", "launches", "vote", "update", "copies")
        assert all(r["milliseconds"] >= r[f"{part}_milliseconds"] for part in parts)
        assert 0 < r["efficiency"] <= r["efficiency_without_vote"] <= 1 and r["exposed_milliseconds"] > 0


def test_a_step_grows_with_every_cost():
    layout, batch = Layout(how="hsdp", machines=8), Batch(images=64, micro_batch=32)
    time = step_time(BASE, batch, layout, Cluster()).gpu
    for name, factor in {"utilisation": 0.5, "memory_bytes": 0.5, "link_bytes": 0.1, "network_bytes": 0.1, "link_hop": 10,
                         "network_hop": 10, "collective": 10, "launch": 10}.items():  # fmt: skip
        worse = replace(Cluster(), **{name: getattr(Cluster(), name) * factor})
        assert step_time(BASE, batch, layout, worse).gpu > time, name


def test_collectives_cost_what_the_formulas_say():
    c = Cluster(link_bytes=100.0, network_bytes=10.0, link_share=1.0, link_hop=1.0, network_hop=5.0, collective=0.5)
    assert c.collective_seconds("all_gather", 800, 1, 8) == pytest.approx(0.5 + 7 / 8 * 800 / 100 + 7)
    assert c.collective_seconds("reduce_scatter", 800, 4, 1) == pytest.approx(0.5 + 3 / 4 * 800 / 10 + 3 * 5)
    assert c.collective_seconds("all_reduce", 800, 1, 2) == pytest.approx(0.5 + 2 * (800 / 2 / 100 + 1))  # a ring
    # Eight cards of a machine together are slower than its links here; a tree over four machines has the fewer hops.
    assert c.collective_seconds("all_reduce", 800, 4, 8) == pytest.approx(0.5 + 2 * 800 / 80 + 2 * (2 * 5 + 7))
    assert c.collective_seconds("all_reduce", 800, 1, 1) == 0
    slow = replace(c, message=2.0)
    assert (slow.vote_seconds(1, 5), slow.vote_seconds(5, 1), slow.vote_seconds(4, 8)) == (16, 16, 2.0 * (14 + 6 + 3))


def test_memory_held_is_sixteen_bytes_a_parameter_less_what_is_cut():
    trained = trained_elements(BASE)
    assert held_bytes(BASE, Layout(machines=64)) == 16 * trained
    gathered = [c.bytes for c in step_collectives(BASE, Layout(how="hsdp")) if c.kind == "all_gather"]
    expected = 2 * trained + gathered[0] + 2 * max(gathered)
    assert held_bytes(BASE, Layout(how="hsdp", machines=64)) == expected
    assert held_bytes(BASE, Layout(how="hsdp", machines=64), accumulate=2) == expected + 4 * trained


class _Operators(TorchDispatchMode):
    """Counts operators that compute: views, empty tensors and what autograd keeps are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        name = op._schema.name.partition("::")[2]
        self.count += not (is_view or name in ("empty", "empty_like", "detach", "_unsafe_view"))
        return op(*args, **(kwargs or {}))


def operators(depth):
    config = preset("tiny", img_size=32, patch_size=8, depth=depth)
    masking = random_masking(2, 16, 0.75, seed=0, sample_ids=torch.arange(2))
    model = MAE(config)
    with _Operators() as seen:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.training_loss(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), masking)
        loss.backward()
    return seen.count


def test_launches_are_the_operators_of_a_step():
    some, more = operators(3), operators(4)
    per_block, besides = more - some, some - (3 + 4) * (more - some)  # three and four blocks
    assert per_block == pytest.approx(Cluster().launches_per_block, abs=3)  # releases of torch differ by a cast
    assert besides == pytest.approx(Cluster().launches_besides, abs=20)


def test_every_parameter_says_its_unit_and_origin():
    origins = explained(Cluster)
    assert list(origins) == list(Cluster.__dataclass_fields__)
    assert all(len(text) > 20 and text.endswith(".") for text in origins.values())


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: f"{p.who} {p.model}")
def test_what_others_report_is_possible_and_less_than_is_assumed_here(peer):
    """The model's arithmetic holds for others' machines: none went beyond its data sheet, or below a twentieth of it."""
    assert 0.05 < peer.share < Cluster().flops / Cluster().sheet_flops
    cluster = replace(FREE, matmul_flops=peer.sheet_flops, utilisation=peer.share)
    batch = Batch(images=4096 // peer.devices, micro_batch=4096 // peer.devices)
    time = step_time(preset(peer.model), batch, Layout(local=peer.devices), cluster)
    assert time.total * math.ceil(peer.epochs * 1_281_167 / 4096) / 3600 == pytest.approx(peer.hours, rel=0.005)


def test_the_loaders_speed_is_the_committed_one(section):
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    measured = [d["loader"]["rows"] for d in documents if "loader" in d][-1]
    speed = next(r["images_per_second_per_core"] for r in measured if r["pipeline"] == "fastmae, crop on the device")
    for row in section["loader"]:
        assert row["cores"] == row["images_per_second"] / speed
        rates = [r["images_per_second"] / r["gpus"] for r in section["weak"] if r["model"] == row["model"]]
        assert row["images_per_second"] == 8 * max(rates)


def test_without_a_result_of_the_loader_that_is_said(tmp_path):
    found = scaling.predict_scaling(["tiny"], [8], Cluster(), tmp_path)
    assert found["loader"] == [] and any("has no loader result" in note for note in found["notes"])


def test_the_committed_page_and_chart_are_what_the_command_writes(section, tmp_path):
    text = SCALING.read_text()
    assert text.split(scaling_page.BEGIN)[1].split(scaling_page.END)[0].strip() == scaling_page.body(section)
    assert scaling_page.digest(section).encode() in SCALING.with_suffix(".png").read_bytes()
    page = tmp_path / "page.md"
    page.write_text(f"before {scaling_page.BEGIN} old {scaling_page.END} after")
    scaling_page.write_page(page, section)
    assert page.read_text() == f"before {scaling_page.BEGIN}\n{scaling_page.body(section)}\n{scaling_page.END} after"
    page.write_text("no marks")
    with pytest.raises(InputError, match="marks"):
        scaling_page.write_page(page, section)


def test_the_chart_is_drawn_and_carries_its_digest(section, tmp_path):
    scaling_page.draw(section, tmp_path / "chart.png")
    picture = (tmp_path / "chart.png").read_bytes()
    assert len(picture) > 20_000 and scaling_page.digest(section).encode() in picture
    other = scaling.predict_scaling(["base"], [8, 16], Cluster(utilisation=0.4), Path(RESULTS))
    assert scaling_page.digest(other) != scaling_page.digest(section)


def test_the_last_line_is_one_json_document(capsys):
    assert main(["scaling", "--models", "base", "--gpus", "4", "64", "--network-bytes", "25e9"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])["scaling"]
    assert document["cluster"]["network_bytes"] == 25e9
    assert [r["gpus"] for r in document["strong"]] == [4] * 4 + [64] * 4
    hours = document["strong"][0]["hours_of_800_epochs"]
    assert hours == pytest.approx(math.ceil(800 * 1_281_167 / 4096) * document["strong"][0]["milliseconds"] / 3.6e6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "24"], "effective batch 4096 must be a multiple of the number of GPUs, got 24"),
        (["--gpus", "12", "--effective-batch", "96"], "the number of GPUs must be a multiple of gpus_per_machine (8), got 12"),
        (["--utilisation", "2"], "utilisation is a share and must be at most 1, got 2.0"),
        (["--launch", "nan"], "launch must be positive, got nan"),
        (["--models", "giant"], "model must be one of tiny, small, base, large, huge, got 'giant'"),
        (["--micro-batch", "100"], "a GPU's images must be a multiple of its micro-batch, got 512 and 100"),
    ],
)
def test_wrong_numbers_are_one_line(arguments, message, capsys):
    assert main(["scaling", *arguments]) == 2
    assert capsys.readouterr().err == f"fastmae bench: {message}\n"
