"""Muon for convolutions: it makes the update of a filter bank, as a matrix, orthogonal.

For a convolution's weight W of shape (out, in, h, w), taken as a matrix of out rows, with gradient G_t, momentum μ and
learning rate η (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; on filters as in airbench,
https://github.com/KellerJordan/cifar10-airbench):

    B_t = μ·B_{t−1} + G_t
    O_t = NS(G_t + μ·B_t)                     Newton–Schulz: nearly U·Vᵀ of the singular value decomposition U·S·Vᵀ
    W_t = √out · W_{t−1} / ‖W_{t−1}‖ − η·O_t  a batch norm follows, so that only the direction of W matters

`torch.optim.Muon` takes only matrices and lets weights grow. A test compares the two where they must agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.6
STEPS = 3  # of Newton–Schulz: the singular values end between 0.5 and 1.3, close enough to 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of its odd polynomial a·x + b·x³ + c·x⁵, steep at zero


@torch.no_grad()
def orthogonalize(matrix: Tensor, steps: int = STEPS) -> Tensor:
    """(M, N) -> nearly U·Vᵀ of its singular value decomposition, in bfloat16; zero stays zero.

    Each step applies a·x + b·x³ + c·x⁵ to the singular values of the matrix divided by its Frobenius norm.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = (found / found.norm().clamp(min=1e-7)).bfloat16()
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if tall else found


def with_muon(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of `base` that updates the 4-D weights of parameter groups with `muon: True` by Muon."""

    class WithMuon(base):  # type: ignore[misc, valid-type]
        param_groups: list[dict[str, Any]]

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            groups = self.param_groups
            self.param_groups = [group for group in groups if not group.get("muon")]
            try:
                loss = super().step(closure)
            finally:
                self.param_groups = groups
            for group in groups:
                if group.get("muon"):
                    for weight in group["params"]:
                        if weight.grad is not None:
                            _step(weight, weight.grad, self.state[weight], group["lr"])
            return loss

    WithMuon.__name__ = f"{base.__name__}WithMuon"
    return WithMuon


def _step(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], learning_rate: float) -> None:
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(weight)
    momentum = state["momentum_buffer"].mul_(MOMENTUM).add_(gradient)
    nesterov = gradient.add(momentum, alpha=MOMENTUM)
    # rows in channels-last memory order; the order within a row does not change the update
    rows = nesterov.permute(0, 2, 3, 1)
    update = orthogonalize(rows.reshape(len(rows), -1)).view(rows.shape).permute(0, 3, 1, 2)
    weight.mul_(len(weight) ** 0.5 / weight.norm()).add_(update, alpha=-learning_rate)
