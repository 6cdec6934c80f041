"""A reference that follows the policy: by Polyak averaging after every step, or as a copy between epochs.

    polyak   reference ← (1 − τ)·reference + τ·policy   after each optimizer step (TR-DPO's soft update with τ for its
             α, https://arxiv.org/abs/2404.09656)
    copy     reference ← policy                          when an epoch has ended and the next begins (its hard update)

`resdpo_trl.training.trainer` decides when it moves. An epoch's evaluation comes before the copy, so it still sees the
reference that the epoch was trained against. Several processes move one copy each, all alike.
"""

from __future__ import annotations

import torch

from resdpo_trl.training.processes import share_buffers

REFERENCE_FILE = "reference.safetensors"  # of a checkpoint


@torch.no_grad()
def move_reference(reference: torch.nn.Module, policy: torch.nn.Module, tau: float) -> None:
    """reference ← (1 − τ)·reference + τ·policy, in place, for every parameter and buffer of two equal modules.

    The running statistics of batch norms move too; buffers that count are copied.
    """
    share_buffers(policy)
    theirs = dict(policy.named_parameters()) | dict(policy.named_buffers())
    for name, own in [*reference.named_parameters(), *reference.named_buffers()]:
        other = theirs[name].detach().to(own.dtype)
        if tau == 1 or not own.is_floating_point():
            own.copy_(other)
        else:
            own.lerp_(other, tau)
