"""Masked autoencoders of other libraries, where they are installed or cloned: what their users run, beside the contenders.

hf          ``ViTMAEForPreTraining`` of Hugging Face transformers
lightly     lightly's ``MaskedVisionTransformerTIMM`` and its decoder, joined as its documentation joins them
crossmae    ``models_cross`` of a user's clone of TonyLianLong/CrossMAE (CC BY-NC 4.0: run here, nothing of it copied)

Each gets the weights, images and masks of all others. The first two compute the reference's loss, which is compared before
anything is timed. CrossMAE has another decoder and so another loss: compared is the loss of the reference's decoder on the
output of its encoder. What else differs, a contender's description states, which the benchmark prints among its notes.
"""

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastmae.errors import InputError

if TYPE_CHECKING:
    from fastmae.benchmarks.training.contenders import Contender, Workload

NAMES = ("hf", "lightly", "crossmae")
OTHER_LOSS = ("crossmae",)
"""Those whose timed loss is not the reference's."""
PACKAGES = {"hf": '"transformers>=5"', "lightly": '"lightly[timm]>=1.6"'}
"""What each needs, as pip takes it."""
_IMPORTED = {"hf": ("transformers",), "lightly": ("lightly", "timm"), "crossmae": ("timm",)}


def check_peers(contenders: Collection[str], crossmae: Path | None) -> None:
    """Raise InputError if one of ``contenders`` lacks its package or its clone: before minutes are spent on the others."""
    if "crossmae" in contenders and crossmae is None:
        raise InputError("contender crossmae needs --crossmae CLONE, a clone of github.com/TonyLianLong/CrossMAE")
    if "crossmae" in contenders:
        from fastmae.benchmarks.training.reference import CROSSMAE, file_of_clone  # with it comes torch

        file_of_clone(crossmae, *CROSSMAE)
    for name in NAMES:
        for package in _IMPORTED[name] if name in contenders else ():
            if find_spec(package) is None:
                command = f"pip install -c constraints.txt {PACKAGES.get(name, package)}"
                raise InputError(f"contender {name} needs {package}, which is not installed: {command}")


def make_peer(name: str, workload: "Workload") -> "Contender":
    """The contender of that name, one of ``NAMES``. Raises InputError if its package or clone is missing or unknown."""
    from fastmae.benchmarks.peers.cross_mae import cross_mae
    from fastmae.benchmarks.peers.hugging_face import hugging_face
    from fastmae.benchmarks.peers.lightly_mae import lightly_mae

    size = workload.config.img_size
    if size[0] != size[1]:
        raise InputError(f"contender {name} takes square images, got {size}")
    return {"hf": hugging_face, "lightly": lightly_mae, "crossmae": cross_mae}[name](workload)
