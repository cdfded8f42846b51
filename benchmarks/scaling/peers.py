"""What others report of MAE pretraining, as the share of their hardware's data-sheet rate that it amounts to.

    share = images/s of a device x FLOP of an image / FLOP/s in the data sheet

FLOPs are those of ``fastmae.model.flops`` in every row: what the model asks for, whatever was computed.
"""

from dataclasses import dataclass

from fastmae.model.config import preset
from fastmae.model.flops import training_flops

IMAGES = 1_281_167  # ImageNet-1k's training set


@dataclass(frozen=True)
class Peer:
    """A reported run."""

    who: str
    model: str
    """One of ``PRESETS``."""
    devices: int
    device: str
    sheet_flops: float
    """Dense FLOP/s of a device at 16 bits, from its maker."""
    epochs: float
    hours: float
    source: str

    @property
    def images_per_second(self) -> float:
        """Of a device."""
        return self.epochs * IMAGES / (3600 * self.hours * self.devices)

    @property
    def share(self) -> float:
        """Of the data sheet's rate."""
        return self.images_per_second * training_flops(preset(self.model), 0.75) / self.sheet_flops


PEERS = (
    Peer("reference", "large", 64, "V100", 125e12, 800, 42, "facebookresearch/mae PRETRAIN.md"),
    Peer("paper", "large", 128, "TPU-v3 core", 61.5e12, 800, 15.4, "arXiv 2111.06377, table 2"),
    Peer("paper", "huge", 128, "TPU-v3 core", 61.5e12, 800, 34.5, "arXiv 2111.06377, table 2"),
    Peer("DailyMAE", "base", 8, "A100", 312e12, 800, 18, "arXiv 2404.00509; smaller images at first: less work than counted"),
    Peer("CrossMAE's MAE", "base", 2, "A100", 312e12, 1, 9.35 / 60, "arXiv 2401.14391"),
)


def table() -> list[list[str]]:
    """A row for each."""
    rows = [["who", "model", "on", "epochs", "hours", "images/s per device", "share of data sheet", "source"]]
    for p in PEERS:
        rows.append([p.who, p.model, f"{p.devices} {p.device}", f"{p.epochs:g}", f"{p.hours:.3g}", f"{p.images_per_second:.0f}",
                     f"{p.share:.0%}", p.source])  # fmt: skip
    return rows
