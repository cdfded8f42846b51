"""The modes that a run can be given by name. Free of torch and of packages that only the command line needs, so that
benchmarks, which need torch, triton and numpy alone, can read them."""

from typing import Literal, get_args

from fastmae.errors import InputError

Compile = Literal["auto", "off", "blocks", "model"]
Parallel = Literal["ddp", "fsdp", "hsdp"]
Reduce = Literal["fp32", "bf16"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
COMPILE, PARALLEL, REDUCE, PRECISION = map(get_args, (Compile, Parallel, Reduce, Precision))


def check_kernels() -> None:
    """Raise InputError on a wrong ``FASTMAE_KERNELS`` before any work is done."""
    from fastmae.kernels import dispatch  # and torch, without which this file can be read

    try:
        dispatch.mode()
    except ValueError as error:
        raise InputError(str(error)) from error
