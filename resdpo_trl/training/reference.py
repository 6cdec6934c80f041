"""Updates of the reference from the policy, by Polyak averaging after every step or by a copy between epochs.

    polyak   reference ← (1 − τ)·reference + τ·policy   after each optimizer step: the soft update of TR-DPO
             (https://arxiv.org/abs/2404.09656), whose α is τ here
    copy     reference ← policy                          between two epochs: the hard update of TR-DPO

`resdpo_trl.training.trainer` decides when to update. The evaluation of an epoch runs before the copy, so it uses the
reference that the epoch was trained against. Each process updates its own copy, and the copies stay equal.
"""

from __future__ import annotations

import torch

from resdpo_trl.training.processes import share_buffers

REFERENCE_FILE = "reference.safetensors"  # in a checkpoint


@torch.no_grad()
def move_reference(reference: torch.nn.Module, policy: torch.nn.Module, tau: float) -> None:
    """Update in place reference ← (1 − τ)·reference + τ·policy, for every parameter and buffer of modules of one class.

    This includes the running statistics of batch norms. Buffers that are not floating-point are copied.
    """
    share_buffers(policy)
    theirs = dict(policy.named_parameters()) | dict(policy.named_buffers())
    for name, own in [*reference.named_parameters(), *reference.named_buffers()]:
        other = theirs[name].detach().to(own.dtype)
        if tau == 1 or not own.is_floating_point():
            own.copy_(other)
        else:
            own.lerp_(other, tau)
