"""Read and write weights, in our format and the reference's, without ever running code from a file.

Ours is a safetensors file whose metadata holds the model's config; the reference's ``.pth`` holds ``{'model': state dict}``, of
the full autoencoder or its encoder alone, with the same parameter names, so converting renames nothing.
"""

import argparse
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmae.errors import DataError, InputError
from fastmae.files import write_atomically
from fastmae.model.config import ModelConfig
from fastmae.model.mae import MAE

_CONFIG = "fastmae.model"  # key of the safetensors metadata
_NAMESPACE_FIELD = "fastmae_model"  # the same in the namespace of a .pth
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # encoder width to heads; the widths of fastmae's presets


@dataclass(frozen=True)
class Weights:
    """The contents of a file."""

    path: Path
    tensors: dict[str, Tensor]
    config: ModelConfig | None
    """None if the file does not state it and it does not follow from the shapes."""
    knows_target: bool
    """Whether the file states if the target was normalised pixels."""
    knows_config: bool = False
    """Whether the file states the full config, rather than the shapes."""
    norm_pix_loss: bool = False
    """Whether the target was normalised pixels, if the file states it."""

    @property
    def is_encoder_only(self) -> bool:
        """No decoder: it gives features, but no reconstructions."""
        return "mask_token" not in self.tensors

    def encoder(self) -> "Weights":
        """The encoder's weights alone: a ViT with timm's names."""
        kept = {n: t for n, t in self.tensors.items() if not n.startswith("decoder_") and n != "mask_token"}
        return replace(self, tensors=kept)


def read_weights(path: str | Path) -> Weights:
    """Read a ``.safetensors`` file of ours or a ``.pth`` of the reference. Raises DataError that names the file."""
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a .safetensors or .pth file, such as a checkpoint's model.safetensors")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_pth(path)


def save_model(model: MAE, path: str | Path) -> None:
    """Write the model's weights and config as safetensors, atomically."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_tensors(state, path, {_CONFIG: model.config.to_json()})


def save_weights(weights: Weights, path: str | Path) -> None:
    """Write ``weights``: ``.pth`` in the reference's format, ``.safetensors`` with the config if it is known.

    Raises InputError on another suffix.
    """
    suffix = Path(path).suffix
    if suffix == ".pth":
        save_pth(weights, path)
    elif suffix == ".safetensors":
        config = weights.config if weights.knows_target else None
        save_tensors(weights.tensors, path, {_CONFIG: config.to_json()} if config else None)
    else:
        raise InputError(f"{path}: must end in .safetensors or .pth")


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as safetensors, atomically."""
    with write_atomically(Path(path)) as file:
        try:
            save_file(tensors, file.name, metadata)  # unlike ``save``, it releases the GIL
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def save_pth(weights: Weights, path: str | Path) -> None:
    """Write the reference's format: ``{'model': state dict, 'args': ...}``, which its own scripts load.

    ``args`` also holds the config as JSON, for ``read_weights``.
    """
    config = weights.config if weights.knows_target else None
    known = {"norm_pix_loss": config.norm_pix_loss, _NAMESPACE_FIELD: config.to_json()} if config else {}
    arguments = argparse.Namespace(**known)
    with write_atomically(Path(path)) as file:
        try:
            torch.save({"model": weights.tensors, "args": arguments}, file)
        except RuntimeError as error:  # torch's, which hides the OSError
            if not isinstance(hidden := error.__context__, OSError):
                raise
            raise OSError(hidden.errno, hidden.strerror, str(path)) from error


def load_model(path: str | Path, heads: int | None = None, decoder_heads: int | None = None,
               norm_pix_loss: bool | None = None) -> MAE:  # fmt: skip
    """The autoencoder in ``path``, a ``.safetensors`` or ``.pth`` file, on the CPU.

    ``heads``, ``decoder_heads`` and ``norm_pix_loss`` are for files without a config, because shapes do not show them:
    attention heads of the encoder's and the decoder's blocks, and whether the target was normalised pixels. Raises InputError
    on an encoder-only file, an unknown architecture, heads that do not divide the width or contradict the file, or a target
    that neither file nor caller states.
    """
    weights = read_weights(path)
    if weights.is_encoder_only:
        raise InputError(
            f"{weights.path}: holds an encoder only, and pixels need the decoder too; use a full pretraining checkpoint "
            "(the reference publishes them as mae_visualize_*.pth)"
        )
    config = _with_heads(weights, heads, decoder_heads)
    if config is None:
        raise InputError(
            f"{weights.path}: unknown architecture, its config does not follow from its shapes; pass heads, decoder_heads to "
            "fastmae.load_model, or build the model by its ModelConfig and save it with fastmae.model.weights.save_model"
        )
    if norm_pix_loss is None and not weights.knows_target:
        raise InputError(
            f"{weights.path}: does not state its norm_pix_loss; add --norm-pix-loss True or False (norm_pix_loss=)"
        )
    target = config.norm_pix_loss if norm_pix_loss is None else norm_pix_loss
    # Not attention, residual and checkpointing, which belong to the training run.
    model = MAE(ModelConfig(**{**config.architecture, "norm_pix_loss": target}))
    load_strictly(model, weights)
    return model


def load_strictly(model: MAE, weights: Weights) -> None:
    """Load all of ``weights`` into ``model``. Raises DataError naming the first difference of names or shapes."""
    own = model.state_dict()
    for name in sorted(set(own) ^ set(weights.tensors)):
        where = "not in the file" if name in own else "not in the model"
        raise DataError(f"{weights.path}: another architecture, {name} is {where}; use the preset it was trained with")
    for name, tensor in weights.tensors.items():
        if tensor.shape != own[name].shape:
            raise DataError(
                f"{weights.path}: another architecture, {name} is {tuple(tensor.shape)} in the file and "
                f"{tuple(own[name].shape)} in the model; use the preset and image size it was trained with"
            )
    model.load_state_dict(weights.tensors)


def infer_config(tensors: dict[str, Tensor], norm_pix_loss: bool = False, heads: int | None = None,
                 decoder_heads: int | None = None) -> ModelConfig | None:  # fmt: skip
    """The config of a full state dict from its shapes, for square images; None if they fit no known width.

    Shapes do not show the heads: by default the encoder's follow from its width, and the decoder's have 32 channels each.
    Raises InputError on heads that do not divide the width.
    """
    if tensors["patch_embed.proj.weight"].ndim != 4 or tensors["pos_embed"].ndim != 3:
        return None
    dim, in_chans, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    heads = _HEADS.get(dim) if heads is None else heads
    if heads is None or side**2 != tensors["pos_embed"].shape[1] - 1:
        return None
    decoder = {}
    if "mask_token" in tensors:
        decoder_dim = tensors["mask_token"].shape[-1]
        if decoder_heads is None and decoder_dim % 32:
            return None
        decoder_heads = decoder_dim // 32 if decoder_heads is None else decoder_heads
        decoder = {"decoder_embed_dim": decoder_dim, "decoder_num_heads": decoder_heads,
                   "decoder_depth": _count(tensors, "decoder_blocks")}  # fmt: skip
    return ModelConfig(
        img_size=side * patch_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=dim,
        depth=_count(tensors, "blocks"),
        num_heads=heads,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        norm_pix_loss=norm_pix_loss,
        **decoder,
    )


def _with_heads(weights: Weights, heads: int | None, decoder_heads: int | None) -> ModelConfig | None:
    """The config of ``weights`` with the given heads. Raises InputError if they contradict the file or do not fit."""
    given = {n: h for n, h in (("num_heads", heads), ("decoder_num_heads", decoder_heads)) if h is not None}
    if weights.knows_config:
        for name, number in given.items():
            if number != (own := getattr(weights.config, name)):
                raise InputError(f"{weights.path}: states {name} {own}, got {number}; do not give it")
    elif given:
        try:
            return infer_config(weights.tensors, weights.norm_pix_loss, heads, decoder_heads)
        except InputError as error:
            raise InputError(f"{weights.path}: {error}") from error
    return weights.config


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{prefix}.")})


def _read_safetensors(path: Path) -> Weights:
    try:
        with path.open("rb") as opened, safe_open(_in_utf8(path, opened.fileno()), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged, or not a safetensors file, {error}") from error
    if _CONFIG in metadata:
        return Weights(path, tensors, ModelConfig.from_json(metadata[_CONFIG]), knows_target=True, knows_config=True)
    return _without_config(path, tensors, None)


def _in_utf8(path: Path, handle: int) -> str:
    """``path``, or the name of its open file in /proc if ``path`` is not UTF-8, which safetensors requires."""
    name = os.fspath(path)
    return f"/proc/self/fd/{handle}" if re.search("[\udc80-\udcff]", name) else name


def _read_pth(path: Path) -> Weights:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise anything
        text = re.sub(r"(?s)^Weights only load failed.*?(WeightsUnpickler error: |(?=Trying to load))", "", str(error))
        reason = text.strip().partition("\n")[0].partition(". ")[0]  # without torch's advice to run the file
        reason = reason or type(error).__name__
        raise DataError(f"{path}: damaged, or holds more than tensors; nothing in it was run ({reason})") from error
    tensors = document.get("model", document) if isinstance(document, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise DataError(f"{path}: holds no state dict; expected {{'model': {{name: tensor}}}}")
    arguments = document.get("args") if tensors is not document else None
    if isinstance(text := getattr(arguments, _NAMESPACE_FIELD, None), str):
        return Weights(path, tensors, ModelConfig.from_json(text), knows_target=True, knows_config=True)
    norm_pix_loss = getattr(arguments, "norm_pix_loss", None)
    return _without_config(path, tensors, norm_pix_loss)


def _without_config(path: Path, tensors: dict[str, Tensor], norm_pix_loss: bool | None) -> Weights:
    missing = [n for n in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight") if n not in tensors]
    if missing:
        raise DataError(f"{path}: not a masked autoencoder, {missing[0]} is missing")
    config = infer_config(tensors, bool(norm_pix_loss))
    return Weights(path, tensors, config, knows_target=norm_pix_loss is not None, norm_pix_loss=bool(norm_pix_loss))
