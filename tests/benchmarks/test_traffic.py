"""Traffic on paper: counts that are known by hand, gradients without the engine, costs and their limits, the committed page."""

import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from fastmae.benchmarks.arguments import DESCRIBED, TRAFFIC_CONTENDERS
from fastmae.benchmarks.cli import PREDICTIONS, TRAFFIC
from fastmae.benchmarks.traffic import page
from fastmae.benchmarks.traffic.contenders import CONTENDERS
from fastmae.benchmarks.traffic.cost import Rates, attention_seconds, flash_padded, product_seconds, seconds
from fastmae.benchmarks.traffic.described import gradients
from fastmae.benchmarks.traffic.gpus import GPUS
from fastmae.benchmarks.traffic.kernel import Attention, Kernel, Product
from fastmae.benchmarks.traffic.predict import CHECK, COUNTED_APART, lowered, row
from fastmae.errors import InputError
from fastmae.kernels.add_norm import _bwd_launch as add_norm_launch
from fastmae.model.attention.dot_product import attention_shapes
from fastmae.model.config import kept_patches, preset
from fastmae.model.flops import training_flops
from tests.benchmarks.traffic_cases import DIM, HEAD_DIM, HEADS, HIDDEN, IMAGES, ROWS, TOKENS, lower_both

H100 = GPUS["H100"]
FREE = Rates(product_share=1.0, memory_share=1.0, launch=1e-30)
COMMITTED = json.loads(PREDICTIONS.read_text())


@pytest.fixture(scope="module")
def both() -> tuple[dict[str, list[Kernel]], list[Kernel]]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(lower_both).result()


@pytest.fixture(scope="module")
def mlp(both) -> dict[str, dict[str, tuple[int, int]]]:
    """Launches and bytes of the MLP's groups."""
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for name, kernels in both[0].items():
        for k in kernels:
            launches, size = groups.setdefault(name, {}).get(k.group, (0, 0))
            groups[name][k.group] = (launches + k.launches, size + k.bytes)
    return groups


def test_a_compiled_mlp_moves_what_it_must(mlp):
    found, weight = mlp["compiled"], DIM * HIDDEN
    hidden = 2 * ROWS * HIDDEN  # bytes of the hidden activations in bf16
    assert found["GELU, forward"] == (1, 2 * hidden)
    assert found["GELU, backward"] == (1, 3 * hidden)  # reads the gradient and the activations, writes a gradient
    assert found["products"][0] == 2 + 3  # the first layer's input needs no gradient
    # Both weights become bf16, both biases too, and each weight's gradient float32 again.
    assert found["casts, weights"] == (6, 6 * (4 * weight + HIDDEN + DIM))
    launches, size = found["bias gradients"]  # each reads its tensor once more, in two stages
    assert launches == 4 and 0 <= size - hidden - 2 * ROWS * DIM < 0.05 * hidden


def test_an_eager_mlp_launches_each_of_its_operators(mlp):
    found, weight = mlp["eager"], DIM * HIDDEN
    hidden, out = ROWS * HIDDEN, ROWS * DIM
    assert found["GELU, forward"] == (1, 4 * hidden) and found["GELU, backward"] == (1, 6 * hidden)
    assert found["casts, weights"] == (8, 6 * (4 * weight + 2 * HIDDEN + 2 * DIM))  # biases' gradients too
    assert found["casts, activations"] == (3, 3 * 6 * out)  # the loss is in float32
    assert found["bias gradients"] == (2, 2 * (hidden + out) + 2 * (HIDDEN + DIM))
    assert found["products"][0] == 5
    assert found["other"][0] == 3  # the loss, its gradient, and the one that this starts from


def test_our_operators_count_each_input_and_output_once(both):
    D, rows, found = HEADS * HEAD_DIM, IMAGES * TOKENS, {k.does[0]: k for k in both[1]}
    out, lse, row = 2 * rows * D, 4 * IMAGES * HEADS * TOKENS, 4 * rows  # bytes
    assert found["fastmae::short_attention"].bytes == 3 * out + 4 * 3 * D + out + lse
    sums = 4 * IMAGES * 2 * D
    assert found["fastmae::short_attention_bwd"].bytes == out + 3 * out + out + lse + 3 * out + sums
    assert found["fastmae::add_norm"].bytes == 2 * out + out + 2 * 4 * D + 2 * out + out + 2 * row  # x and its sum are float32
    partial = 4 * add_norm_launch(torch.empty(rows, D, device="meta"))[0] * 3 * D
    assert found["fastmae::add_norm_bwd"].bytes == out + 2 * out + 4 * D + 2 * row + 2 * out + out + partial
    cast = found["fastmae::cast_all"]
    assert cast.bytes == 6 * (D + 1) * HIDDEN and cast.blocks == 2 and cast.names == ("aten::_foreach_copy_",)
    assert all(k.launches == 1 for name, k in found.items() if name.startswith("fastmae::"))


def test_too_few_blocks_do_not_reach_the_memorys_rate():
    kernel, rates = Kernel(("aten::_foreach_copy_",), 10**9), Rates(launch=1e-30)
    time = seconds(kernel, H100, rates)
    assert seconds(kernel._replace(blocks=33), H100, rates) == pytest.approx(4 * time)
    assert seconds(kernel._replace(blocks=500), H100, rates) == time


def test_nothing_of_it_is_left_in_this_process(mlp):
    assert mlp and not torch.cuda.is_available() and torch.autograd.grad is not gradients


@pytest.mark.all
def test_the_committed_counts_of_a_small_model_are_those_of_this_code():
    if not torch.__version__.startswith(COMMITTED["torch"]):
        pytest.skip(f"counted with torch {COMMITTED['torch']}")
    assert json.loads(json.dumps(row(CHECK, *lowered([CHECK])))) == COMMITTED["check"]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_gradients_equal_those_of_autograds_engine():
    torch.manual_seed(0)
    weight, bias, unused = (torch.randn(shape, requires_grad=True) for shape in ((5, 3), (5,), (2,)))
    x = torch.randn(7, 3, requires_grad=True)

    def outputs():
        y = F.linear(Doubled.apply(x), weight, bias)
        y = (y.relu() + y).double().float()
        return [(y * y.mean(0, keepdim=True)).sum(), y.split(2, dim=1)[1].square()]

    leaves = [weight, x, bias, unused]
    given = [torch.tensor(0.5), torch.randn(7, 2)]
    expected = torch.autograd.grad(outputs(), leaves, given, allow_unused=True)
    found = gradients(outputs(), leaves, given)
    assert expected[3] is None and found[3] is None
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))
    hidden = x * 3
    assert torch.equal(*gradients(hidden.square().sum(), hidden), 2 * hidden)  # of what is no leaf


def test_a_large_product_reaches_the_rate_and_none_exceeds_it():
    for rows, columns, inner in itertools.product((1, 100, 12800, 66000), (96, 512, 4096), (64, 512, 16384)):
        product = Product(1, rows, columns, inner)
        time = product_seconds(product, H100, FREE)
        assert time >= product.flops / H100.flops
        assert time <= product_seconds(product._replace(inner=2 * inner), H100, FREE)
        assert time <= product_seconds(product._replace(rows=2 * rows), H100, FREE)
    large = Product(1, 132 * 512, 4096, 65536)
    assert large.flops / H100.flops == pytest.approx(product_seconds(large, H100, FREE), rel=0.02)


def test_attention_pays_for_whole_tiles():
    whole = Attention(images=256, heads=12, queries=50, keys=50, head_dim=64, is_backward=False, is_whole=False)
    tile = whole._replace(queries=128, keys=128)
    rates = Rates()
    assert attention_seconds(whole, 0.0, H100, rates) == attention_seconds(tile, 0.0, H100, rates)
    assert attention_seconds(tile, 0.0, H100, rates) == pytest.approx(
        4 * 256 * 12 * 128 * 128 * 64 / (H100.flops * rates.flash_forward)
    )
    short = whole._replace(is_whole=True)
    assert attention_seconds(short, 0.0, H100, rates) < 0.5 * attention_seconds(whole, 0.0, H100, rates)
    assert attention_seconds(short, 1.0, H100, rates) == 1.0  # never faster than its bytes


@pytest.mark.parametrize("is_backward", [False, True])
def test_attention_of_80_channels_pays_for_the_padding_of_each_kernel(is_backward):
    work = Attention(images=1, heads=16, queries=65, keys=65, head_dim=80, is_backward=is_backward, is_whole=True)
    rates, products = Rates(), 7 if is_backward else 2  # 65 tokens are more than one tile
    rows, columns = (80, 80) if is_backward else (80, 96)  # blocks of 32 or 64 rows and a tail, by tiles of 16 or 32 columns
    share = rates.short_backward if is_backward else rates.short_forward
    expected = 16 * 2 * products * rows * columns * 128 / (H100.flops * share)
    assert attention_seconds(work, 0.0, H100, rates) == pytest.approx(expected)
    assert flash_padded(work._replace(is_whole=False, keys=129)) == ((128, 256, 96) if is_backward else (128, 192, 96))


def test_the_summary_also_compares_with_a_rival_whose_attention_takes_as_long():
    rows = [{"model": "base", "gpu": "G", "contender": name, "residual": "fp32", "predicted_milliseconds": time,
             "predicted_images_per_second": 1e3 / time, "predicted_mfu": 0.5, "forward_backward": {"launches": 1, "bytes": 1},
             "groups": {"attention": {"milliseconds": attention}}}
            for name, time, attention in (("fastmae", 10.0, 1.0), ("rival", 15.0, 4.0))]  # fmt: skip
    assert [line[-2:] for line in page.summary(rows)[1:]] == [["1.50", "1.20"], ["1.00", "1.00"]]


@pytest.mark.parametrize("name", DESCRIBED)
def test_bytes_take_their_time_on_every_gpu(name):
    kernel, gpu, rates = Kernel(("triton_poi_fused_gelu_0",), 10**9), GPUS[name], Rates()
    time = seconds(kernel, gpu, rates)
    assert time == pytest.approx(1e9 / (gpu.memory_bytes * rates.memory_share) + rates.launch)
    assert seconds(kernel._replace(names=kernel.names * 3), gpu, rates) == pytest.approx(time + 2 * rates.launch)
    assert gpu.shared_memory_per_block < gpu.shared_memory and gpu.processors > 100


def test_a_share_of_more_than_all_is_refused():
    with pytest.raises(InputError, match=r"memory_share must lie in \(0, 1\], got 1.5"):
        Rates(memory_share=1.5)


def test_groups_tell_what_names_do_not():
    norm = Kernel(("triton_per_fused_native_layer_norm_3",), 8)
    assert norm.group == "norms, forward" and norm._replace(is_backward=True).group == "norms, backward"
    cast = Kernel(("triton_poi_fused__to_copy_1",), 8, is_small=True)
    assert cast.group == "casts, weights" and cast._replace(is_small=False).group == "casts, activations"
    flash = Kernel(("aten::_scaled_dot_product_flash_attention_backward",), 8, work=Attention(1, 1, 2, 2, 8, True, False))
    assert flash.group == "attention" and flash.launches == 3
    assert norm.without_number == Kernel(("triton_per_fused_native_layer_norm_4",), 8).without_number


def test_arguments_name_what_there_is():
    assert tuple(GPUS) == DESCRIBED and TRAFFIC_CONTENDERS == CONTENDERS


def test_the_page_shows_the_committed_predictions():
    assert page.with_tables(TRAFFIC.read_text(), COMMITTED) == TRAFFIC.read_text()


def test_every_committed_row_adds_up():
    for r in COMMITTED["rows"]:
        config, groups = preset(r["model"], norm_pix_loss=True), r["groups"]
        assert set(groups) <= set(page.GROUPS)
        assert r["forward_backward"]["launches"] == sum(g["launches"] for n, g in groups.items() if n != "optimizer")
        assert r["forward_backward"]["bytes"] == sum(g["bytes"] for n, g in groups.items() if n not in COUNTED_APART)
        assert r["predicted_milliseconds"] == pytest.approx(sum(g["milliseconds"] for g in groups.values()))
        rate = 1e3 * r["batch"] / r["predicted_milliseconds"]
        gpu = next(gpu for gpu in GPUS.values() if gpu.name == r["gpu"])
        assert r["predicted_mfu"] == pytest.approx(rate * training_flops(config, 0.75) / gpu.flops)
        # fastmae leaves out work that makes no difference; the others do all of it.
        done = r["product_flops"] / (r["batch"] * training_flops(config, 0.75))
        assert 0.85 < done < 1.05 and (r["contender"] != "reference" or done > 0.99)


def test_committed_attention_is_that_of_the_models_shapes():
    rows = [r for r in COMMITTED["rows"] if r["attention"] == "short"]
    assert {r["model"] for r in rows} == {"base", "large", "huge"}
    for r in rows:
        config, B, gpu = preset(r["model"]), r["batch"], next(gpu for gpu in GPUS.values() if gpu.name == r["gpu"])
        kept = kept_patches(config.patches, 0.75)
        shapes = attention_shapes(config, kept, config.patches - kept)
        size = time = 0
        for (N, M, H, d), times in zip(shapes, (config.depth, config.decoder_depth - 1, 1), strict=True):
            q, kv, lse = 2 * B * N * H * d, 4 * B * M * H * d, 4 * B * H * N  # bytes
            for is_backward, moved in enumerate((2 * q + kv + lse + 12 * H * d, 4 * q + 2 * kv + lse + 8 * B * H * d)):
                work = Attention(B, H, N, M, d, bool(is_backward), True)
                size += times * moved
                time += times * seconds(Kernel(("_short_attention",), moved, work=work), gpu, Rates())
        found = r["groups"]["attention"]
        assert found["bytes"] == size and found["milliseconds"] == pytest.approx(1e3 * time)


def test_fused_kernels_move_less_than_torchs_own():
    rows = {(r["model"], r["residual"], r["contender"]): r["forward_backward"] for r in COMMITTED["rows"] if "H100" in r["gpu"]}
    for residual, before, after in (("fp32", 46e9, 34e9), ("bf16", 34e9, 26e9)):
        assert rows["base", residual, "standard"]["bytes"] > before
        assert rows["base", residual, "fastmae"]["bytes"] <= after
        assert rows["base", residual, "fastmae"]["launches"] <= 700 < rows["base", residual, "standard"]["launches"]
