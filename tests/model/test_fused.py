"""A model of fused blocks computes what the plain one does: loss, gradients and features, however it is run."""

import itertools
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastmae.benchmarks.training.gradients import errors, wrong_parameters
from fastmae.model.block import block as block_file
from fastmae.model.config import FUSED
from fastmae.model.masking import random_masking
from fastmae.train.distributed.world import World
from fastmae.train.step.loss_module import LossModule
from fastmae.train.step.parallelize import full, parallelize
from tests.support.forked import run_together
from tests.support.fused import ALL, OURS, PLAIN, model_of, pass_
from tests.support.runs import free_port

pytestmark = pytest.mark.worth(2)

SETS = [",".join(names) or "off" for n in range(4) for names in itertools.combinations(FUSED, n)]


def far(found, exact, most=1e-12):
    """Names of what is further from ``exact`` than ``most`` of its norm."""
    return [name for name, error in errors(found, exact).items() if not error <= most]


@pytest.mark.parametrize("names", SETS)
@pytest.mark.parametrize("fields", [{}, {"decoder_depth": 1, "size": (24, 40)}, {"checkpointing": True}], ids=str)
def test_loss_and_gradients_are_the_plain_blocks_in_float64(names, fields):
    exact = pass_(model_of(**fields, **PLAIN))
    for attention in ("math", "short"):
        assert far(pass_(model_of(**fields, fused=names, attention=attention)), exact) == []


@pytest.mark.parametrize("residual", ["fp32", "bf16"])
@pytest.mark.parametrize("fused", ["linear", ALL])
def test_under_autocast_gradients_are_as_exact_as_the_plain_blocks(fused, residual, device):
    exact = pass_(model_of(**PLAIN))

    def found(**fields):
        return errors(pass_(model_of(**fields, residual=residual).float().to(device), low=torch.bfloat16), on(device, exact))

    ours = found(fused=fused, attention="short" if fused == ALL else "math")
    assert wrong_parameters(ours, found(**PLAIN)) == [] and max(ours.values()) > 1e-4  # it does round


def on(device, tensors):
    return {name: t.to(device) for name, t in tensors.items()}


def compiled(model, how):
    """``model.training_loss``, traced as full graphs: of the model, or of each block."""
    compile = partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=False)
    if how == "model":
        return compile(model.training_loss)
    for block in (*model.blocks, *model.decoder_blocks):
        block.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    return None


COMPILED = [("model", torch.bfloat16, False), *(pytest.param(*case, marks=pytest.mark.all) for case in (
    ("model", None, True), ("blocks", torch.bfloat16, True), ("blocks", None, False)))]  # fmt: skip


@pytest.mark.parametrize(("how", "low", "checkpointing"), COMPILED)
def test_compiled_as_full_graphs_it_computes_the_same(how, low, checkpointing):
    shallow = {"depth": 1, "decoder_depth": 1}
    exact = pass_(model_of(**PLAIN, **shallow))
    ours, plain = model_of(**OURS, **shallow, checkpointing=checkpointing), model_of(**PLAIN, **shallow)
    torch.compiler.reset()  # few variants of a function are kept
    if low is None:
        assert far(pass_(ours, compiled(ours, how)), exact) == []
    else:
        ours, plain = ours.float(), plain.float()
        found = pass_(ours, compiled(ours, how), low)
        assert wrong_parameters(errors(found, exact), errors(pass_(plain, low=low), exact)) == []


@pytest.mark.all
def test_inductor_compiles_it():
    exact, plain = pass_(model_of(**PLAIN)), pass_(model_of(**PLAIN).float(), low=torch.bfloat16)
    model = model_of(**OURS).float()
    found = pass_(model, torch.compile(model.training_loss, fullgraph=True, dynamic=False), torch.bfloat16)
    assert wrong_parameters(errors(found, exact), errors(plain, exact)) == []


def process_of_two(rank, size, port, folder, compiles):
    """Loss and gradients by each way to train together."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    torch.compile = partial(torch.compile, backend="aot_eager")
    world, found = World(rank, size, torch.device("cpu")), {}
    for how, compile in itertools.product(("ddp", "fsdp"), compiles):
        module = parallelize(LossModule(model_of(**OURS)), world, how=how, compile=compile)
        loss = module(*inputs(rank))
        loss.backward()
        found[how, compile] = {"loss": loss.detach()} | {
            name.rpartition("model.")[2]: full(p.grad) for name, p in module.named_parameters() if p.requires_grad
        }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def inputs(rank):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return images, *random_masking(3, 16, 0.75, seed=rank)


@pytest.mark.cluster
@pytest.mark.parametrize("compile", ["off", pytest.param("blocks", marks=pytest.mark.all)])
def test_ranks_train_it_together_replicated_and_sharded(compile, tmp_path):
    port = free_port()
    run_together(process_of_two, [(rank, 2, port, tmp_path, [compile]) for rank in range(2)])
    module = LossModule(model_of(**PLAIN))
    losses = [module(*inputs(rank)) for rank in range(2)]
    (sum(losses) / 2).backward()
    exact = {name: p.grad for name, p in module.model.named_parameters() if p.requires_grad}
    for rank in range(2):
        for (how, _), found in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(found.pop("loss"), losses[rank].detach(), rtol=1e-12, atol=0)
            # FSDP reduces in float32.
            assert far(found, exact, 1e-12 if how == "ddp" else 1e-6) == [], how


class Adapted(nn.Linear):
    """As an adapter of low rank: a layer of another class in place of ours."""

    def forward(self, x):
        return super().forward(x) + x @ torch.ones_like(self.weight).t() * 0.01


def with_hook(block):
    block.mlp.fc1.register_forward_hook(lambda layer, inputs, output: output * 1.1)


def with_gradient_hook(block):
    block.norm2.register_full_backward_hook(lambda norm, inputs, outputs: (inputs[0] * 1.1,))


def with_parametrisation(block):
    nn.utils.parametrizations.weight_norm(block.attn.proj)
    with torch.no_grad():
        block.attn.proj.parametrizations.weight.original0 *= 1.1


def with_adapter(block):
    layer = Adapted(24, 72, dtype=torch.float64)
    layer.load_state_dict(block.attn.qkv.state_dict())
    block.attn.qkv = layer


def with_own_forward(block):
    forward = block.mlp.fc2.forward
    block.mlp.fc2.forward = lambda x: 1.1 * forward(x)


@pytest.mark.parametrize("change", [with_own_forward, with_hook, with_gradient_hook, with_parametrisation, with_adapter])
def test_a_block_of_changed_modules_calls_them(change):
    found = []
    for fields in (PLAIN, OURS):
        model = model_of(**fields)
        change(model.blocks[1])
        found.append(pass_(model))
    assert far(found[1], found[0]) == []
    untouched = pass_(model_of(**PLAIN))
    assert found[0].keys() != untouched.keys() or far(found[0], untouched)  # the change matters


def test_a_changed_final_norm_is_called():
    model = model_of(**OURS)
    model.norm.register_forward_hook(lambda norm, inputs, output: output * 2)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model.encode(images), 2 * model_of(**PLAIN).encode(images))


@pytest.mark.parametrize("residual", ["fp32", "bf16"])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_features_and_predictions_have_the_plain_models_dtype_and_values(low, residual):
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    found = []
    for fields in (PLAIN, OURS):
        model = model_of(**fields, residual=residual).float()
        with torch.no_grad(), torch.autocast("cpu", dtype=low, enabled=low is not None):
            found.append([model.encode(images), model.encode(images[..., :16]), *model(images, 0.75, noise=noise)])
    for one, two in zip(*found, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(
            two.float(), one.float(), rtol=0, atol=(1e-5 if low is None else 0.05) * one.abs().max().item()
        )


def test_its_weights_are_the_plain_models():
    plain, ours = model_of(**PLAIN), model_of(**OURS)
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), ours.state_dict().values(), strict=True))
    ours.load_state_dict(plain.state_dict(), strict=True)


def test_without_a_measurement_the_plain_block_runs(monkeypatch):
    monkeypatch.setattr(block_file, "fused_block", lambda *_: pytest.fail("fused"))
    pass_(model_of(fused="auto"))
    with pytest.raises(BaseException, match="fused"):
        pass_(model_of(fused="gelu"))
