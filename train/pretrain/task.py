"""What a run trains. ``Trainer`` takes any task: it knows steps, checkpoints and logs, and nothing of the model or its loss."""

from typing import Protocol

import torch
from torch import Tensor, nn

from fastmae.data.batch import Batch
from fastmae.model.flops import training_flops
from fastmae.model.mae import MAE
from fastmae.train.config.recipes import Recipe
from fastmae.train.step.loss_module import LossModule, MaskedLoss, MicroBatch
from fastmae.train.step.optimizer import parameter_groups


class Task(Protocol):
    """A model, its loss, and the batches that the loss takes."""

    flops: float
    """Of a training step, per image of the model's own size."""

    def make_model(self, device: torch.device) -> nn.Module:
        """The model on ``device``, initialised from torch's generator; a checkpoint holds its state dict."""

    def make_module(self, model: nn.Module) -> LossModule:
        """What is compiled and parallelized: a module around ``model`` whose call is its loss."""

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        """The optimizer's groups over the parameters of the parallelized ``model``."""

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """What the loss needs of the loader's ``batch``, on the device."""

    def loss(self, module: nn.Module, batch: MicroBatch) -> Tensor:
        """The mean loss of ``batch`` by the parallelized module, a float32 scalar."""


class Pretraining:
    """The masked autoencoder of ``recipe``."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.flops = training_flops(recipe.model, recipe.mask_ratio)
        self.loss = MaskedLoss(patch_size=recipe.model.patch_size, mask_ratio=recipe.mask_ratio, seed=recipe.seed)

    def make_model(self, device: torch.device) -> MAE:
        """With the positions of every image size of a progressive run."""
        model = MAE(self.recipe.model).to(device)
        for _, size in self.recipe.progressive:
            model.add_size(size)
        return model

    def make_module(self, model: MAE) -> LossModule:
        """``MAE.training_loss`` as a module."""
        return LossModule(model)

    def parameter_groups(self, model: MAE) -> list[dict]:
        """The reference's two: without and with weight decay."""
        return parameter_groups(model, self.recipe.weight_decay)

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """Images, and what their masks follow from."""
        return MicroBatch(batch.images, batch.sample_ids, batch.epochs)
