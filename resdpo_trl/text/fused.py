"""Layers of Llama-type models with fewer passes over memory, for mixed precision on the CPU.

A Llama layer keeps its residual stream in float32 under autocast. transformers' RMSNorm then takes six kernels and
leaves a float32 result, which each linear layer after it casts to bfloat16 and keeps for itself; the MLP keeps both
silu(gate) and its product with up. The modules here write bfloat16 once, and keep only what the backward pass cannot
compute again in one kernel.

`use_fused_layers` changes the class of a module and nothing else: parameters keep their names, linear layers are called
as modules (so that LoRA's are), and a saved folder is transformers' own. docs/speed.md says what each gives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import SiLUActivation


class RMSNorm(torch.nn.Module):
    """y = w ∘ x·r, r = 1/√(mean(x²) + ε)        (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467, Eq. 4)

    Takes (…, D). Computes in float32 (float64 for float64), and rounds once: to autocast's type under autocast, for
    linear layers follow; to the type of x·w otherwise.
    """

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        kind = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        if torch.is_autocast_enabled(hidden_states.device.type):
            kind = torch.get_autocast_dtype(hidden_states.device.type)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, kind)


class _RMSNorm(torch.autograd.Function):
    """(…, D) values, (D,) weight, ε and the result's type -> (…, D).

    With x̂ = x·r and the result's gradient g:
        ∂w = Σ g∘x̂ over all rows,        ∂x = r·(g∘w − x̂·mean(g∘w∘x̂)).
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, epsilon: float, kind: torch.dtype) -> Tensor:
        exact = _exact(values)
        mean_square = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(exact.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(values, weight, scale)
        return (exact * scale).mul_(weight).to(kind)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values, weight, scale = ctx.saved_tensors
        normed = _exact(values) * scale
        exact = gradient.to(normed.dtype)
        product = exact * normed
        of_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None, None
        mean = product.mul_(weight).mean(-1, keepdim=True)
        of_values = torch.mul(exact, weight, out=product).sub_(normed.mul_(mean)).mul_(scale)
        return of_values.to(values.dtype), of_weight, None, None


class SwiGLU(torch.nn.Module):
    """W_down·(silu(W_gate·x) ∘ W_up·x)        (Shazeer 2020, https://arxiv.org/abs/2002.05202, Eq. 6)"""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_SiLUProduct.apply(self.gate_proj(x), self.up_proj(x)))


class _SiLUProduct(torch.autograd.Function):
    """silu(gate) ∘ up, with silu(z) = z·σ(z). silu(gate) is computed again in the backward pass.

    With the result's gradient g: ∂up = g∘silu(gate), ∂gate = g∘up∘silu'(gate), silu'(z) = σ(z)·(1 + z·(1 − σ(z))).
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def use_fused_layers(model: torch.nn.Module) -> None:
    """Turn the RMSNorms and SwiGLU MLPs of Llama's form into those above: Llama, Qwen 2 and 3, Mistral, SmolLM and
    others.

    A module has the form where it has the members and gives the same numbers; Gemma's norm, which scales by 1 + w, does
    not. A quantized MLP is left alone.
    """
    same: dict[type, bool] = {}
    for module in list(model.modules()):
        fused = _fused_class(module)
        if fused is None:
            continue
        own = type(module)
        if own not in same:
            same[own] = _gives_the_same(module, fused)
        if same[own]:
            module.__class__ = fused


def _fused_class(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    children = dict(module.named_children())
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and not children:
        return RMSNorm
    if (
        set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and isinstance(children["act_fn"], torch.nn.SiLU | SiLUActivation)
        and type(children["gate_proj"]) is torch.nn.Linear
    ):
        return SwiGLU
    return None


@torch.no_grad()
def _gives_the_same(module: torch.nn.Module, fused: type[torch.nn.Module]) -> bool:
    weight: Any = module.weight if fused is RMSNorm else module.gate_proj.weight  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, weight.shape[-1], generator=generator).to(weight)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-4}.get(weight.dtype, 2e-2)
    return torch.allclose(fused.forward(module, values), module(values), rtol=tolerance, atol=tolerance)


def _exact(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
