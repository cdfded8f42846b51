"""Linear layers that keep little for the backward pass and, on CPUs, run in oneDNN.

    linear(x) = x W^T + b;      norm_linear(x) = layer_norm(x) W^T + b;      gelu_linear(x) = gelu(x) W^T + b

On a CPU in float32, outside autocast and compiled graphs, products of W run in oneDNN, which adds the bias as it writes
(torch's own code fills the result with the bias first), and neither the normalised nor the activated x is kept: the backward
pass recomputes them from x, which costs a few thousandths of a step. Elsewhere all three are torch's own layers; torch.compile
decides what to keep.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """``torch.nn.Linear``, computed by ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x`` (..., I) by ``weight`` (O, I) plus ``bias`` (O,): (..., O)."""
    return _Linear.apply(x, weight, bias) if _by_onednn(x) else F.linear(x, weight, bias)


def norm_linear(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor:
    """``layer(norm(x))``: (..., I) -> (..., O)."""
    # Modules with a hook, a parametrisation or another class are called.
    if not (_by_onednn(x) and is_plain(norm, nn.LayerNorm) and is_plain(layer, Linear)):
        return layer(norm(x))
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, layer.weight, layer.bias)[0]


def gelu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(gelu(x))`` with the exact GELU: (..., I) -> (..., O)."""
    if not (_by_onednn(x) and is_plain(layer, Linear)):
        return layer(F.gelu(x))
    return _GeluLinear.apply(x, layer.weight, layer.bias)


def compute_dtype(x: Tensor, norms: bool = False) -> torch.dtype:
    """The dtype of products of ``x``, autocast's if it is on; with ``norms`` that of LayerNorms, float32 under autocast but for
    CPUs, where it is that of ``x``."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or (norms and device == "cpu"):
        return x.dtype
    return torch.float32 if norms else torch.get_autocast_dtype(device)


def residual_dtype(x: Tensor, residual: str) -> torch.dtype:
    """The dtype of the residual stream of ``x``: its own, or autocast's if ``residual`` is bf16."""
    return compute_dtype(x) if residual == "bf16" else x.dtype


def _by_onednn(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether ``module`` is of this very class, has no hook, and no ``forward`` of its own: whether its call may be replaced by
    what it computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks) and "forward" not in module.__dict__


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad`` (N, O) and ``x`` (N, I): (O, I). By oneDNN where O < I, by torch elsewhere, as each is faster."""
    return _product(grad.t(), x.t(), None) if grad.shape[1] < x.shape[1] else grad.t() @ x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        grad = _flat(grad)
        return grad_x, _weight_gradient(grad, _flat(x)), grad.sum(0)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, scale, shift, eps, weight, bias):
        normal, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], scale, shift, eps)
        return _product(normal, weight, bias), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, shift, ctx.eps, weight, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, scale, shift, weight, mean, rstd)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        x, scale, shift, weight, mean, rstd = ctx.saved_tensors
        grad_normal = _product(grad, weight.t(), None)
        grad = _flat(grad)
        normal = torch.native_layer_norm(x, x.shape[-1:], scale, shift, ctx.eps)[0]
        grad_weight = _weight_gradient(grad, _flat(normal))
        del normal
        grads = torch.ops.aten.native_layer_norm_backward(
            grad_normal, x, x.shape[-1:], mean, rstd, scale, shift, [True, True, True]
        )
        return *grads, None, grad_weight, grad.sum(0)


class _GeluLinear(_Linear):  # saves the same tensors
    @staticmethod
    def forward(x, weight, bias):
        return _product(F.gelu(x), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.t(), None)
        grad = _flat(grad)
        grad_weight = _weight_gradient(grad, _flat(F.gelu(x)))
        # In place, because page faults of new memory cost more than the arithmetic.
        torch.ops.aten.gelu_backward.grad_input(grad_x, x, grad_input=grad_x)
        return grad_x, grad_weight, grad.sum(0)
