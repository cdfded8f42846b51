"""The model against an independent oracle, and the fast path against the reference call, in float64."""

import pytest
import torch

import fastmae
from fastmae import random_masking
from fastmae.kernels.dispatch import mode
from tests.support.models import make
from tests.support.oracle import oracle

pytestmark = pytest.mark.worth(1)

CASES = [  # channels, (H, W), patch, mask ratio
    (1, (32, 32), 8, 0.75),
    (3, (32, 48), 8, 0.25),
    (3, (14, 28), 2, 0.95),
    (3, (28, 42), 14, 0.5),
    (4, (16, 16), 4, 0.9),
    (4, (32, 64), 16, 0.6),
    (13, (8, 24), 4, 0.75),
    (13, (64, 64), 16, 0.9),
]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def gradients(model, loss):
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return dict(zip(names, torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names]), strict=True))


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize(("C", "size", "patch", "ratio"), CASES)
def test_call_and_fast_path_equal_the_oracle(C, size, patch, ratio, norm_pix):
    model = make(C, size, patch, norm_pix)
    images, noise = torch.randn(3, C, *size, dtype=torch.float64), torch.rand(3, model.config.patches)
    state = dict(model.named_parameters())
    expected, expected_pred, is_removed = oracle(
        state, images, noise, ratio, patch=patch, heads=3, decoder_heads=4, norm_pix=norm_pix
    )
    expected_gradients = gradients(model, expected)

    loss, pred, mask = model(images, ratio, noise)
    assert abs(loss - expected) / expected < 1e-12
    assert relative(pred, expected_pred) < 1e-10
    assert torch.equal(mask, is_removed.double())
    fast = model.training_loss(images, random_masking(3, model.config.patches, ratio, noise=noise))
    assert abs(fast - expected) / expected < 1e-12
    for found in (gradients(model, loss), gradients(model, fast)):
        assert max(relative(found[n], g) for n, g in expected_gradients.items()) < 1e-10


@pytest.mark.parametrize("decoder_depth", [1, 3])
def test_any_decoder_depth_keeps_the_shortcuts_exact(decoder_depth):
    model = make(3, 32, 8, decoder_depth=decoder_depth)
    images, noise = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.rand(2, 16)
    fast = model.training_loss(images, random_masking(2, 16, 0.75, noise=noise))
    assert abs(fast - model(images, 0.75, noise)[0]) / fast < 1e-12


def test_bytes_give_the_loss_of_normalised_floats():
    model = make(3, 32, 8).float()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    masking = random_masking(2, 16, 0.75, seed=0)
    floats = (images / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(model.training_loss(images, masking), model.training_loss(floats, masking), rtol=1e-6, atol=0)
    noise = torch.rand(2, 16)
    torch.testing.assert_close(model(images, 0.75, noise)[0], model(floats, 0.75, noise)[0], rtol=1e-6, atol=0)


def test_predicting_all_masked_patches_partially_equals_full_prediction():
    model = make(3, 32, 8)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    full, all_twelve = (random_masking(2, 16, 0.75, seed=0, num_predict=q) for q in (None, 12))
    assert model.training_loss(images, full) == model.training_loss(images, all_twelve)
    few = model.training_loss(images, random_masking(2, 16, 0.75, seed=0, num_predict=3))
    assert few.isfinite() and few != model.training_loss(images, full)


def test_masked_patches_do_not_reach_the_encoder():
    model = make(3, 32, 8)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    masking = random_masking(1, 16, 0.75, seed=0)
    changed = images.clone()
    y, x = divmod(int(masking.ids_predict[0, 0]), 4)
    changed[:, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = float("nan")
    assert torch.equal(model.encode_visible(images, masking.ids_keep), model.encode_visible(changed, masking.ids_keep))


def test_every_masked_patch_gets_a_prediction_of_its_own():
    """Frozen zero decoder positions, a known mistake, would predict the same for all of them."""
    model = make(3, 32, 8).float()
    pred = model(torch.randn(1, 3, 32, 32), 0.75)[1]
    assert torch.pdist(pred[0]).min() > 1e-3


def test_encode_gives_the_features_of_keeping_every_patch_in_order():
    model = make(3, (32, 48), 8)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    everything = torch.arange(24, dtype=torch.int32).expand(2, 24)
    torch.testing.assert_close(model.encode(images), model.encode_visible(images, everything), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("C", [1, 3, 13])
def test_patchify_is_channel_fastest_and_unpatchify_its_inverse(C):
    model = make(C, (8, 12), 4)
    images = torch.arange(2 * C * 96, dtype=torch.float64).reshape(2, C, 8, 12)
    patches = model.patchify(images)
    for y, x, u, v, c in ((0, 0, 0, 0, 0), (1, 2, 3, 1, C - 1), (0, 1, 2, 3, 0)):
        assert patches[1, y * 3 + x, (u * 4 + v) * C + c] == images[1, c, y * 4 + u, x * 4 + v]
    assert torch.equal(model.unpatchify(patches), images)


@pytest.mark.parametrize(
    ("build", "trained", "entries"),
    [
        (fastmae.mae_vit_base_patch16, 111_655_680, 254),
        (fastmae.mae_vit_large_patch16, 329_239_296, 398),
        (fastmae.mae_vit_huge_patch14, 656_613_964, 494),
        (fastmae.mae_vit_tiny_patch16, 8_893_184, 206),
        (fastmae.mae_vit_small_patch16, 25_045_760, 206),
    ],
)
def test_presets_have_the_published_sizes(build, trained, entries):
    with torch.device("meta"):
        model = build(norm_pix_loss=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert len(model.state_dict()) == entries


def test_state_dict_names_and_order_are_the_references():
    model = make(3, 32, 8, depth=1, decoder_depth=1)
    block = [f"{layer}.{kind}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")]  # fmt: skip
    expected = ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    expected += [f"blocks.0.{n}" for n in block] + ["norm.weight", "norm.bias", "decoder_embed.weight", "decoder_embed.bias"]
    expected += [f"decoder_blocks.0.{n}" for n in block]
    expected += ["decoder_norm.weight", "decoder_norm.bias", "decoder_pred.weight", "decoder_pred.bias"]
    assert list(model.state_dict()) == expected


def test_initial_weights_follow_the_reference():
    model = fastmae.mae_vit_small_patch16()

    def xavier(p):
        return (6 / (p.shape[0] + p[0].numel())) ** 0.5

    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            assert (p == 1).all()
        elif name == "patch_embed.proj.bias":
            assert 0.5 < p.abs().max() * 768**0.5 <= 1  # the convolution's own, uniform within 1/sqrt(fan in)
        elif name.endswith("bias"):
            assert (p == 0).all()
        elif "token" in name:
            assert 0.015 < p.std() < 0.025
        elif p.requires_grad:
            assert 0.99 < p.abs().max() / xavier(p) <= 1
            assert abs(p.std() / (xavier(p) / 3**0.5) - 1) < 0.02


def test_residual_stream_is_float32_under_autocast(device):
    model = make(3, 32, 8).float().to(device)
    seen = []
    for block in (*model.blocks, *model.decoder_blocks):
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    masking = random_masking(2, 16, 0.75, seed=0, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = model.training_loss(torch.randn(2, 3, 32, 32, device=device), masking)
        model(torch.randn(2, 3, 32, 32, device=device))
    assert seen == [torch.float32] * 8
    assert loss.dtype == torch.float32


def test_a_bf16_residual_stream_is_bf16_under_autocast_only(device):
    model = make(3, 32, 8, residual="bf16").float().to(device)
    seen = []
    for block in (*model.blocks, *model.decoder_blocks):
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    images, masking = torch.randn(2, 3, 32, 32, device=device), random_masking(2, 16, 0.75, seed=0, device=device)
    exact = model.training_loss(images, masking)
    with torch.autocast(device, dtype=torch.bfloat16):
        losses = model.training_loss(images, masking), model(images)[0]
    assert seen == [torch.float32] * 4 + [torch.bfloat16] * 8
    assert losses[0].dtype == torch.float32 and 0 < abs(losses[0] - exact) / exact < 2e-2


def test_checkpointing_keeps_the_gradients_and_less_memory():
    found = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make(3, 32, 8, checkpointing=checkpointing).float()
        images, masking = torch.randn(2, 3, 32, 32), random_masking(2, 16, 0.75, seed=0)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = model.training_loss(images, masking)
        found[checkpointing] = (sum(kept), gradients(model, loss))
    assert found[True][0] < 0.5 * found[False][0]
    assert all(torch.equal(found[True][1][n], g) for n, g in found[False][1].items())


def test_training_loss_compiles_into_one_graph_with_equal_gradients(device):
    model = make(3, 32, 8).float().to(device)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device=device)
    masking = random_masking(4, 16, 0.75, seed=0, device=device)
    expected = gradients(model, model.training_loss(images, masking))
    compiled = torch.compile(model.training_loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    found = gradients(model, compiled(images, masking))
    assert max(relative(found[n], g) for n, g in expected.items()) < 1e-4


def test_training_loss_compiles_through_inductor_at_two_batch_sizes():
    model = make(1, 16, 8, depth=1, decoder_depth=1).float()
    compiled = torch.compile(torch.no_grad()(model.training_loss), fullgraph=True, dynamic=True)
    for B in (3, 5):
        images = torch.randint(0, 256, (B, 1, 16, 16), dtype=torch.uint8)
        masking = random_masking(B, 4, 0.5, seed=0)
        expected = model.training_loss(images, masking).detach()
        torch.testing.assert_close(compiled(images, masking), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_kernels_and_twins_train_alike_on_a_gpu(monkeypatch):
    model = fastmae.mae_vit_tiny_patch16(norm_pix_loss=True).cuda()
    images = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8, device="cuda")
    masking = random_masking(8, 196, 0.75, seed=0, device="cuda")
    assert mode() == "auto"
    found = gradients(model, loss := model.training_loss(images, masking))
    monkeypatch.setenv("FASTMAE_KERNELS", "torch")
    expected = gradients(model, twin := model.training_loss(images, masking))
    assert abs(loss - twin) / twin < 1e-6
    assert max(relative(found[n], g) for n, g in expected.items()) < 1e-4


def test_images_of_another_shape_are_refused():
    model = make(3, 32, 8).float()
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 32, 32\), got \(1, 3, 32, 40\)"):
        model(torch.zeros(1, 3, 32, 40))  # the reference's call
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 32, 32\), got \(1, 3, 16, 64\)"):
        model.forward_encoder(torch.zeros(1, 3, 16, 64), 0.75)  # as many patches, at other positions
    for call in (model.encode, lambda images: model.training_loss(images, random_masking(1, 16, 0.75, seed=0))):
        with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(1, 1, 32, 32\)"):
            call(torch.zeros(1, 1, 32, 32))
        with pytest.raises(ValueError, match=r"multiples of the patch size 8 high and wide, got \(32, 36\)"):
            call(torch.zeros(1, 3, 32, 36))


@pytest.mark.parametrize("masks", [(1, 16), (2, 20), (3, 16)])
def test_a_masking_of_another_grid_than_the_images_is_refused(masks):
    model = make(3, 32, 8).float()
    masking = random_masking(*masks, 0.75, seed=0)
    with pytest.raises(ValueError, match=rf"2 images of 4 x 4 = 16 patches .* got {masks[0]} images of {masks[1]}"):
        model.training_loss(torch.zeros(2, 3, 32, 32), masking)
