"""A user's own clone of facebookresearch/mae, importable beside today's packages, to compare with.

The reference was written for timm 0.3.2 and numpy < 1.20. Here its ``models_mae.py`` is imported as it stands, with the three
names it needs put back for as long as the import takes: ``np.float``, ``qk_scale`` of timm's block, and, next to a torch
without torchvision's operators, ``torchvision::nms``. Nothing of it is copied; its licence is CC BY-NC 4.0.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from fastmae.errors import InputError
from fastmae.model.config import ModelConfig

_REPOSITORY = "facebookresearch/mae"
CROSSMAE = ("models_cross.py", "TonyLianLong/CrossMAE")
"""The file of a clone that grew from the reference, and whose."""
_operators: list[torch.library.Library] = []  # torch forgets operators whose library object is gone


class Draw:
    """``torch.rand`` for a model that draws its noise itself: it draws, as it does, and then takes ``noise`` if that is set."""

    noise: Tensor | None = None
    """The size of the draw."""

    def __call__(self, *size: int, device: torch.device) -> Tensor:
        """Uniform over [0, 1), or ``noise``."""
        drawn = torch.rand(*size, device=device)
        return drawn if self.noise is None else 0 * drawn + self.noise  # so that a compiler does not drop the draw


def load_reference(clone: str | Path, draw: Draw | None = None) -> ModuleType:
    """The module ``models_mae`` of the clone, with ``draw`` for its ``torch.rand``.

    Raises InputError if it or timm is missing.
    """
    return load_clone(clone, "models_mae.py", _REPOSITORY, draw)


def load_clone(clone: str | Path, name: str, repository: str, draw: Draw | None = None) -> ModuleType:
    """``load_reference`` for the file ``name`` of a clone of ``repository``, which may be one that grew from the reference."""
    path = file_of_clone(clone, name, repository)
    with _todays_packages(repository), _on_path(Path(clone)):
        module = _module(path)
    if draw is not None:
        module.torch = ModuleType("torch")  # its own: other modules' draws do not change
        module.torch.__dict__.update(torch.__dict__, rand=draw)
    return module


def build_reference(module: ModuleType, config: ModelConfig, fused: bool) -> nn.Module:
    """The model of ``config`` by the clone's ``models_mae``, its attention step by step or ``fused`` by torch.

    Raises InputError on images that are not square or not RGB, which the reference does not take, and on an older timm.
    """
    height, width = config.img_size
    if height != width or config.in_chans != 3:
        raise InputError(f"the reference takes square RGB images, got {height} x {width} of {config.in_chans} channels")
    names = ("patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads",
             "mlp_ratio", "norm_pix_loss")  # fmt: skip
    sizes = {name: getattr(config, name) for name in names}
    model = module.MaskedAutoencoderViT(img_size=height, norm_layer=partial(nn.LayerNorm, eps=1e-6), **sizes)
    layers = [part for part in model.modules() if hasattr(part, "fused_attn")]  # timm's attention
    if not layers:
        raise InputError("this timm's attention has no fused_attn to switch; install timm 1.0 or newer")
    for layer in layers:
        layer.fused_attn = fused
    return model


def load_schedule(clone: str | Path) -> Callable[[torch.optim.Optimizer, float, object], float]:
    """``adjust_learning_rate(optimizer, epoch, args)`` of the clone's ``util/lr_sched.py``. Raises InputError if missing."""
    return _module(file_of_clone(clone, "util/lr_sched.py", _REPOSITORY)).adjust_learning_rate


def file_of_clone(clone: str | Path, name: str, repository: str) -> Path:
    """The path of ``name`` in a clone of ``repository``. Raises InputError if there is no such file."""
    path = Path(clone) / name
    if not path.is_file():
        raise InputError(f"{path}: not found; give a clone of github.com/{repository}")
    return path


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"clone_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _todays_packages(repository: str) -> Iterator[None]:
    declare_torchvision_operators()
    try:
        from timm.models import vision_transformer
    except ImportError as error:
        raise InputError(f"{repository} needs timm: pip install -c constraints.txt timm ({error})") from error
    block = vision_transformer.Block

    class Block(block):
        def __init__(self, *args, qk_scale=None, **kwargs):
            super().__init__(*args, **kwargs)

    vision_transformer.Block = Block
    # Stays: the reference asks for it when a model is made.
    if not hasattr(np, "float"):
        np.__dict__["float"] = float
    try:
        yield
    finally:
        vision_transformer.Block = block


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """``folder`` in front of the import path; its modules are forgotten afterwards, for they have names like ``util``."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            top = folder / name.partition(".")[0]
            if top.is_dir() or top.with_suffix(".py").is_file():
                del sys.modules[name]


def declare_torchvision_operators() -> None:
    """Make torchvision importable next to a torch without its operators, which asks for two of them by name."""
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.append(library)
