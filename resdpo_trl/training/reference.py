"""A reference that follows the policy: by Polyak averaging after every step, or as a copy between epochs.

    polyak   reference ← (1 − τ)·reference + τ·policy   after each optimizer step (TR-DPO's soft update with τ for its
             α, https://arxiv.org/abs/2404.09656)
    copy     reference ← policy                          when an epoch has ended and the next begins (its hard update)

Both move the parameters and the buffers (a batch norm's running statistics); buffers that count are copied. An epoch's
evaluation comes before the copy, so it still sees the reference that the epoch was trained against. Several processes
move one copy each, all alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from resdpo_trl.training.processes import share_buffers
from resdpo_trl.training.resume import Resumable

REFERENCE_FILE = "reference.safetensors"


@torch.no_grad()
def move_reference(reference: torch.nn.Module, policy: torch.nn.Module, tau: float) -> None:
    """reference ← (1 − τ)·reference + τ·policy, in place, for every parameter and buffer of two equal modules."""
    theirs = dict(policy.named_parameters()) | dict(policy.named_buffers())
    for name, own in [*reference.named_parameters(), *reference.named_buffers()]:
        other = theirs[name].detach().to(own.dtype)
        if tau == 1 or not own.is_floating_point():
            own.copy_(other)
        else:
            own.lerp_(other, tau)


class MovingReference(Resumable):
    """A Trainer with a `ref_model` that moves as `args.reference_update` says and travels with the checkpoints."""

    ref_model: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.moves_reference:
            assert self.ref_model is not None
            self.add_callback(_MoveReference(self))

    @property
    def moves_reference(self) -> bool:
        return self.args.reference_update != "frozen"

    def reference_tau(self, at: Literal["step", "epoch"]) -> float:
        """How far the reference moves towards the policy after a step, or between two epochs: τ in [0, 1].

        A new update overrides this (docs/extending.md). A text run that is not `frozen` keeps its reference in memory.
        """
        if self.args.reference_update == "polyak":
            return self.args.polyak_tau if at == "step" else 0.0
        return 1.0 if self.args.reference_update == "copy" and at == "epoch" else 0.0

    def save_more(self, checkpoint: Path) -> None:
        super().save_more(checkpoint)
        if self.moves_reference and self.args.should_save:
            state = self.accelerator.unwrap_model(self.ref_model).state_dict()
            save_file(_untied(state), checkpoint / REFERENCE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.moves_reference:
            state = load_file(Path(resume_from_checkpoint) / REFERENCE_FILE)
            reference = self.accelerator.unwrap_model(self.ref_model)
            tied = set(reference.state_dict()) - set(_untied(reference.state_dict()))
            missing, unexpected = reference.load_state_dict(state, strict=False)
            if unexpected or set(missing) - tied:
                raise RuntimeError(f"{resume_from_checkpoint}/{REFERENCE_FILE} is of another model")


class _MoveReference(TrainerCallback):
    def __init__(self, trainer: MovingReference):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._move(self.trainer.reference_tau("step"))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # a run resumed within an epoch begins at a fraction: its reference was copied before
        epoch = state.epoch or 0.0
        if epoch > 0.5 and abs(epoch - round(epoch)) < 1e-6:
            self._move(self.trainer.reference_tau("epoch"))

    def _move(self, tau: float) -> None:
        if tau == 0:
            return
        unwrap = self.trainer.accelerator.unwrap_model
        policy = unwrap(self.trainer.model)
        share_buffers(policy)
        move_reference(unwrap(self.trainer.ref_model), policy, tau)


def _untied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One name for each storage, contiguous: safetensors writes no tensor twice."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            kept[name] = tensor.detach().contiguous()
    return kept
