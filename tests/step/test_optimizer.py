"""The optimizer's groups and the schedule, as the reference has them."""

import math

import pytest

from fastmae import MAE, ModelConfig
from fastmae.train.step.optimizer import learning_rate, make_optimizer, parameter_groups

SMALL = ModelConfig(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1,
                    decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=1)  # fmt: skip


def test_biases_and_norms_are_not_decayed_and_tokens_are():
    model = MAE(SMALL)
    plain, decayed = make_optimizer(parameter_groups(model, 0.05), (0.9, 0.95)).param_groups
    name_of = {id(p): n for n, p in model.named_parameters()}
    plain_names, decayed_names = ([name_of[id(p)] for p in g["params"]] for g in (plain, decayed))
    assert all(n.endswith("bias") or "norm" in n for n in plain_names)
    assert {"cls_token", "mask_token", "patch_embed.proj.weight", "decoder_pred.weight"} <= set(decayed_names)
    assert not {"pos_embed", "decoder_pos_embed"} & {*plain_names, *decayed_names}
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert (plain["betas"], plain["eps"]) == ((0.9, 0.95), 1e-8)
    assert len(plain_names) + len(decayed_names) == sum(p.requires_grad for p in model.parameters())


def test_schedule_warms_up_from_zero_and_ends_at_the_minimum():
    def lr(step):
        return learning_rate(step, 100, 10, 2.0, 0.5)

    assert [lr(0), lr(5), lr(10)] == [0.0, 1.0, 2.0]
    assert lr(55) == pytest.approx(1.25)
    assert lr(99) == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * 89 / 90)))
    assert all(lr(t) > lr(t + 1) for t in range(10, 99))


def test_a_fractional_warm_up_and_none_at_all_work():
    assert learning_rate(2, 10, 2.5, 1.0, 0.0) == pytest.approx(0.8)
    assert learning_rate(0, 10, 0, 1.0, 0.0) == 1.0
