"""Figures of preference pairs: means over pairs, each with its count and a bootstrap interval."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from resdpo_trl.losses import LogProbs, PreferenceLoss


def preference_metrics(pairs: LogProbs, loss: PreferenceLoss) -> dict[str, np.ndarray]:
    """Per-pair figures under TRL's metric names, each (N,) float64.

    `rewards/accuracies` is 1 where the chosen reward is the larger. `loss` is over all N pairs at once.
    """
    values: dict[str, Any] = {name: _float64(value) for name, value in vars(pairs).items()}
    pairs = LogProbs(**values)
    chosen, rejected = loss.rewards(pairs)
    figures = {
        "loss": loss(pairs),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).double(),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    return {name: value.detach().cpu().numpy() for name, value in figures.items()}


def raw_accuracy(pairs: LogProbs) -> dict[str, np.ndarray]:
    """(N,) 1 where a model's own log-likelihood, with no reference, is larger for the chosen response."""
    return {
        "logps/accuracies": (pairs.chosen > pairs.rejected).double().cpu().numpy(),
        "logps/ref_accuracies": (pairs.ref_chosen > pairs.ref_rejected).double().cpu().numpy(),
    }


def with_intervals(figures: dict[str, np.ndarray], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Means over pairs, with `n` and `interval_95`: the percentile bootstrap over pairs (Efron 1979).

    Args:
        figures: name -> (N,) per-pair values, all of the same pairs.
        resamples: bootstrap resamples; all figures share each resample's pairs.

    Returns:
        {name: mean, …, "n": N, "interval_95": {name: [low, high], …}}
    """
    names = list(figures)
    values = np.stack([figures[name] for name in names])  # (M, N)
    n = values.shape[1]
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, len(names)))
    for index in range(resamples):
        means[index] = values[:, generator.integers(0, n, n)].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return {
        **{name: float(value) for name, value in zip(names, values.mean(axis=1), strict=True)},
        "n": n,
        "interval_95": {name: [float(low[i]), float(high[i])] for i, name in enumerate(names)},
    }


def concatenate(parts: list[LogProbs]) -> LogProbs:
    """One `LogProbs` of all the batches' pairs, in order, on the CPU."""
    fields = {name: torch.cat([getattr(part, name).detach().cpu() for part in parts]) for name in vars(parts[0])}
    return replace(parts[0], **fields)


def _float64(value: torch.Tensor | int) -> torch.Tensor | int:
    return value.detach().double() if isinstance(value, torch.Tensor) else value
