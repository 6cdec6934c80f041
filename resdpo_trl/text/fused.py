"""Layers of Llama-type models with fewer passes over memory, for mixed precision on the CPU.

Under autocast the residual stream is float32. transformers' RMSNorm runs six kernels and returns float32. Each linear
layer after it then casts and stores its own copy. The MLP stores silu(gate) and its product with up. The modules here
write bfloat16 once, and store only the tensors that the backward pass can't cheaply recompute.

`use_fused_layers` changes only the class of a module. Parameters keep their names, a linear layer with an adapter is
called unchanged, and a saved folder has transformers' format. docs/speed.md lists the speedups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import SiLUActivation


class RMSNorm(torch.nn.Module):
    """y = w ∘ x·r, r = 1/√(mean(x²) + ε)        (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467, Eq. 4)

    The input is (…, D). The layer computes in float32 (in float64 for float64) and rounds once. Under autocast, the
    result has autocast's data type, because linear layers follow. Otherwise, it has the data type of x·w.
    """

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        kind = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        if torch.is_autocast_enabled(hidden_states.device.type):
            kind = torch.get_autocast_dtype(hidden_states.device.type)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, kind)


class _RMSNorm(torch.autograd.Function):
    """(…, D) values, (D,) weight, ε and the data type of the result -> (…, D).

    With x̂ = x·r and the result's gradient g:
        ∂w = Σ g∘x̂ over all rows,        ∂x = r·(g∘w − x̂·mean(g∘w∘x̂)).
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, epsilon: float, kind: torch.dtype) -> Tensor:
        exact = in_float32(values)
        mean_square = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(exact.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_()
        normed = exact * scale
        ctx.save_for_backward(normed.to(kind, copy=True), weight, scale)  # the values would take twice the bytes
        ctx.kind = values.dtype
        return normed.mul_(weight).to(kind)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        normed, weight, scale = ctx.saved_tensors
        normed, exact = normed.to(scale.dtype), gradient.to(scale.dtype)
        product = exact * normed
        of_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None, None
        mean = product.mul_(weight).mean(-1, keepdim=True)
        of_values = torch.mul(exact, weight, out=product).addcmul_(normed, mean, value=-1).mul_(scale)
        return of_values.to(ctx.kind), of_weight, None, None


class SwiGLU(torch.nn.Module):
    """W_down·(silu(W_gate·x) ∘ W_up·x)        (Shazeer 2020, https://arxiv.org/abs/2002.05202, Eq. 6)"""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        if type(down) is not torch.nn.Linear:  # with an adapter
            return down(F.silu(gate) * up)
        operands: list[Tensor | None] = [gate, up, down.weight, down.bias]
        device = x.device.type
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
            operands = [each if each is None else each.to(kind) for each in operands]
        return _DownProjection.apply(*operands)


class _DownProjection(torch.autograd.Function):
    """(…, I) gate and up, (D, I) weight, (D,) bias or None -> (…, D): W·(silu(gate) ∘ up) + b, silu(z) = z·σ(z).

    The backward pass recomputes the product. With the result's gradient g and p = Wᵀ·g:
        ∂up = p∘silu(gate),   ∂gate = p∘up∘silu'(gate) with silu'(z) = σ(z)·(1 + z·(1 − σ(z))),
        ∂W = Σ g·(silu(gate)∘up)ᵀ,   ∂b = Σ g.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        of_weight = of_bias = None
        if ctx.needs_input_grad[2]:
            of_weight = gradient.flatten(0, -2).T @ (activated * up).flatten(0, -2)
        if ctx.needs_input_grad[3]:
            of_bias = gradient.flatten(0, -2).sum(0)
        of_product = gradient @ weight
        of_gate = torch.ops.aten.silu_backward(of_product * up, gate)
        return of_gate, activated.mul_(of_product), of_weight, of_bias


@torch.no_grad()
def use_fused_layers(model: torch.nn.Module) -> None:
    """Replace RMSNorms and SwiGLU MLPs of Llama's form by the classes above, in Llama, Qwen 2 and 3, Mistral, SmolLM
    and others.

    A module has this form if it has the same members and returns the same values. Gemma's norm scales by 1 + w and does
    not have it. A quantized MLP is not replaced.
    """
    fused: Any
    weight: Any
    for module in model.modules():
        children = dict(module.named_children())
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and not children:
            fused, weight = RMSNorm, module.weight
        elif (
            set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
            and isinstance(children["act_fn"], torch.nn.SiLU | SiLUActivation)
            and type(children["gate_proj"]) is torch.nn.Linear
        ):
            fused, weight = SwiGLU, children["gate_proj"].weight
        else:
            continue
        values = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight)
        tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
        if torch.allclose(fused.forward(module, values), module(values), rtol=tolerance, atol=tolerance):
            module.__class__ = fused


def in_float32(values: Tensor) -> Tensor:
    """Convert values to float32. float64 values are unchanged."""
    return values if values.dtype == torch.float64 else values.float()
