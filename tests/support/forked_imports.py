"""What forked processes need, imported once by the one that they are forked from."""

import torch._dynamo  # which torch.optim imports when an optimizer is made
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.tensorboard  # noqa: F401

import fastmae.train.cli.main
import fastmae.train.pretrain.pretrain  # noqa: F401
import tests.support.crew
import tests.support.killed_saves  # noqa: F401
