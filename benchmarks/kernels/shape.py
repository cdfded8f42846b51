"""The sizes of every op's inputs, as ``kernels --check --shape`` takes them."""

from dataclasses import dataclass, fields, replace

from fastmae.benchmarks.kernels.cases import Sizes
from fastmae.errors import InputError
from fastmae.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of every op's inputs, by the letters of ``--shape``."""

    B: int = 2
    """Images."""
    C: int = 3
    """Channels of an image."""
    H: int = 64
    """Height of an image, pixels."""
    W: int = 48
    """Width of an image, pixels."""
    p: int = 8
    """Side of a patch, pixels; three quarters of the patches are masked."""
    D: int = 96
    """Width of a token."""
    N: int = 0
    """Tokens; by default all patches and the class token."""
    heads: int = 0
    """Attention heads; by default as many as make them 64, 80 or 32 wide, else one."""

    def __post_init__(self):
        if not self.N:
            object.__setattr__(self, "N", 1 + self.H // self.p * (self.W // self.p))
        if not self.heads:
            object.__setattr__(self, "heads", next((self.D // d for d in (64, 80, 32) if self.D % d == 0), 1))
        if self.D % self.heads:
            raise InputError(f"shape must have a width D that its heads divide, got D={self.D} and heads={self.heads}")
        self.sizes()  # whether patches fit

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read ``B=2,C=13``: sizes that are not named keep their defaults. Raises InputError on anything else."""
        names = [field.name for field in fields(cls)]
        pairs = [part.partition("=") for part in text.split(",")]
        if not all(name in names and value.isdecimal() and int(value) > 0 for name, _, value in pairs):
            raise InputError(f"shape must be NAME=SIZE,..., names of {', '.join(names)}, sizes above 0, got {text!r}")
        return cls(**{name: int(value) for name, _, value in pairs})

    def sizes(self) -> Sizes:
        """The letters of the ops. Raises InputError if patches do not fit, or all or none of them would be visible."""
        config = ModelConfig(img_size=(self.H, self.W), patch_size=self.p, in_chans=self.C)
        return replace(Sizes.of(config, self.B), D=self.D, E=self.D)

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
