"""An independent masked autoencoder in plain PyTorch, the tests' oracle: boolean masks, explicit softmax, no fastmae code.

Written from the paper (arXiv 2111.06377) and the facts of its reference, as one function of a state dict.
"""

import math

import torch


def oracle(state, images, noise, mask_ratio, *, patch, heads, decoder_heads, norm_pix):
    """Loss, pred (B, L, P) and is_removed (B, L) for weights ``state``, normalised ``images`` and ``noise`` (B, L)."""
    B, _, H, W = images.shape
    patches = [
        images[:, :, y : y + patch, x : x + patch] for y in range(0, H, patch) for x in range(0, W, patch)
    ]  # L times (B, C, p, p)
    L = len(patches)
    kept = int(L * (1 - mask_ratio))
    rank = (noise[:, :, None] > noise[:, None, :]).sum(-1)  # how many are smaller
    is_removed = rank >= kept

    weight = state["patch_embed.proj.weight"]
    tokens = torch.stack([torch.einsum("bcuv,dcuv->bd", p, weight) for p in patches], 1) + state["patch_embed.proj.bias"]
    tokens = tokens + state["pos_embed"][:, 1:]
    cls = (state["cls_token"] + state["pos_embed"][:, :1]).expand(B, -1, -1)
    visible = tokens[~is_removed].reshape(B, kept, -1)  # spatial order: attention does not care
    x = torch.cat([cls, visible], 1)
    x = layer_norm(run_blocks(state, "blocks", x, heads), state, "norm")

    x = linear(x, state, "decoder_embed")
    full = state["mask_token"].expand(B, L, -1).clone()
    full[~is_removed] = x[:, 1:].reshape(B * kept, -1)
    x = torch.cat([x[:, :1], full], 1) + state["decoder_pos_embed"]
    x = layer_norm(run_blocks(state, "decoder_blocks", x, decoder_heads), state, "decoder_norm")
    pred = linear(x, state, "decoder_pred")[:, 1:]

    target = torch.stack([p.permute(0, 2, 3, 1).reshape(B, -1) for p in patches], 1)
    if norm_pix:
        centred = target - target.mean(-1, keepdim=True)
        target = centred / (centred.square().sum(-1, keepdim=True) / (target.shape[-1] - 1) + 1e-6).sqrt()
    error = (pred - target).square().mean(-1)
    return error[is_removed].mean(), pred, is_removed


def run_blocks(state, prefix, x, heads):
    depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith(f"{prefix}."))
    for i in range(depth):
        block = f"{prefix}.{i}"
        B, N, D = x.shape
        q, k, v = linear(layer_norm(x, state, f"{block}.norm1"), state, f"{block}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (t.reshape(B, N, heads, D // heads).transpose(1, 2) for t in (q, k, v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D // heads), dim=-1)
        x = x + linear((weights @ v).transpose(1, 2).reshape(B, N, D), state, f"{block}.attn.proj")
        hidden = linear(layer_norm(x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, state, f"{block}.mlp.fc2")
    return x


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(x, state, name):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]
