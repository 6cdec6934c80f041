"""Figures (metrics) of preference pairs: their names, their values per pair, and their means with intervals.

To add a figure, add a row to `FIGURES` and return its values from `pair_figures`, `classifier_metrics` or
`cross_entropy_metrics`. metrics.jsonl, terminal tables, curves, the report, the model card and table.csv then show it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from resdpo_trl.losses import LogProbs, PreferenceLoss, classifier_pairs, wrong_classes

SHARES = ("accuracy", "accuracies", "agreement", "beats_chosen", "cut", "wins")  # suffixes of the names of proportions
REPEATS = 3  # occurrences of the same text from which an answer counts as repetitive
READ = 3000  # characters of an answer that are searched for repetition


@dataclass(frozen=True)
class Figure:
    """The display of a figure."""

    name: str  # in metrics.jsonl and summary.json
    words: str  # in tables, on axes and in the model card
    digits: int = 4  # decimals in the terminal, and in the report if there is no interval
    better: Literal["higher", "lower"] | None = None
    column: str = ""  # in a sweep's table.csv; empty: not in the table

    @property
    def label(self) -> str:
        """`words` and an arrow that points in the better direction."""
        return self.words + {"higher": " ↑", "lower": " ↓", None: ""}[self.better]


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("loss", "loss", 4, "lower", "loss"),
        Figure("accuracy", "accuracy", 4, "higher"),
        Figure("rewards/accuracies", "pairs ranked right", 4, "higher", "accuracy"),
        Figure("logps/accuracies", "pairs ranked right by the policy's log-likelihood", 4, "higher"),
        Figure("logps/ref_accuracies", "pairs ranked right by the reference's log-likelihood"),
        Figure("baselines/shorter_wins", "pairs whose shorter response is the chosen one"),
        Figure("baselines/longer_wins", "pairs whose longer response is the chosen one"),
        Figure("rewards/margins", "margin of rewards", 3, "higher", "margin"),
        Figure("rewards/chosen", "reward, chosen", 3, None, "reward_chosen"),
        Figure("rewards/rejected", "reward, rejected", 3, None, "reward_rejected"),
        Figure("kl", "KL(policy‖reference), nats", 3),
    )
}


def pair_figures(pairs: LogProbs, loss: PreferenceLoss) -> dict[str, torch.Tensor]:
    """Figures of each pair under TRL's names, detached, each with the shape of the pairs.

    `rewards/accuracies` is 1 if the chosen response has the larger reward.
    """
    chosen, rejected = loss.rewards(pairs)
    figures = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    return {name: value.detach() for name, value in figures.items()}


PAIR_FIGURES = ("loss", *pair_figures(LogProbs(*torch.zeros(4, 1)), PreferenceLoss()))  # in an evaluation


def training_figures(pairs: LogProbs, loss: PreferenceLoss) -> dict[str, torch.Tensor]:
    """`pair_figures` of a training step, and the gradient weight of each response."""
    chosen, rejected = loss.gradient_weights(pairs)
    return {**pair_figures(pairs, loss), "gradient_weights/chosen": chosen, "gradient_weights/rejected": rejected}


def preference_metrics(pairs: LogProbs, loss: PreferenceLoss) -> dict[str, np.ndarray]:
    """`pair_figures` and the loss of N evaluated pairs, each (N,) float64. The loss sees all pairs in one batch."""
    values: dict[str, Any] = {
        name: value.detach().double() if isinstance(value, torch.Tensor) else value
        for name, value in vars(pairs).items()
    }
    pairs = LogProbs(**values)
    figures = {"loss": loss(pairs), **pair_figures(pairs, loss)}
    return {name: value.cpu().numpy() for name, value in figures.items()}


def raw_accuracy(pairs: LogProbs) -> dict[str, np.ndarray]:
    """(N,) 1 where the log-likelihood of the policy, or of the reference, is larger for the chosen response, else 0."""
    return {
        "logps/accuracies": (pairs.chosen > pairs.rejected).double().cpu().numpy(),
        "logps/ref_accuracies": (pairs.ref_chosen > pairs.ref_rejected).double().cpu().numpy(),
    }


def classifier_metrics(
    logps: torch.Tensor, ref_logps: torch.Tensor, labels: torch.Tensor, loss: PreferenceLoss
) -> dict[str, np.ndarray]:
    """Per-image figures, each (N,) float64: means over the K−1 wrong classes, `accuracy` and the exact `kl`.

    The KL divergence of an image is KL(π‖π_ref) = Σ_k π(k) (log π(k) − log π_ref(k)), in nats.
    """
    logps, ref_logps = logps.double(), ref_logps.double()
    wrong = wrong_classes(labels, logps.shape[1])
    figures = preference_metrics(classifier_pairs(logps, ref_logps, labels, wrong), loss)
    return {name: values.mean(1) for name, values in figures.items()} | {
        "accuracy": (logps.argmax(1) == labels).double().numpy(),
        "kl": (logps.exp() * (logps - ref_logps)).sum(1).numpy(),
    }


def cross_entropy_metrics(logps: torch.Tensor, labels: torch.Tensor) -> dict[str, np.ndarray]:
    """Per-image loss and accuracy, each (N,), from (N, K) log-probabilities and (N,) labels."""
    logps = logps.double()
    return {
        "loss": -logps.gather(1, labels[:, None])[:, 0].numpy(),
        "accuracy": (logps.argmax(1) == labels).double().numpy(),
    }


def with_intervals(figures: dict[str, np.ndarray], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Means over pairs with 95% intervals. A proportion gets Wilson's interval (`wilson_interval`), and any other mean
    gets the percentile bootstrap interval over pairs (Efron 1979).

    Args:
        figures: name -> (N,) values of the same N pairs. A figure is a proportion if its name ends with one of `SHARES`
            and all values are 0 or 1.
        resamples: number of bootstrap resamples. All figures use the same pairs in a resample.

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
    bounds = np.percentile(means, [2.5, 97.5], axis=0).T.tolist()  # (M, 2)
    for index, name in enumerate(names):
        if name.endswith(SHARES) and np.isin(values[index], (0, 1)).all():
            bounds[index] = list(wilson_interval(float(values[index].mean()), n))
    return {
        **{name: float(value) for name, value in zip(names, values.mean(axis=1), strict=True)},
        "n": n,
        "interval_95": dict(zip(names, bounds, strict=True)),
    }


def wilson_interval(share: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927, "Probable inference, the law of succession, and statistical
    inference", https://doi.org/10.1080/01621459.1927.10502953):

        (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)

    Unlike a bootstrap interval, it does not shrink to a point at 0 or 1: for 30 of 30 it is 0.89 to 1. It is too wide
    if ties count as half a win.
    """
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (centre - half) / scale, (centre + half) / scale
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding must not exclude the share


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` decimals, or None as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(share: float, n: int) -> str:
    """Format a proportion of n as a percentage, with one decimal if n is at least 1000."""
    return f"{100 * share:.{1 if n >= 1000 else 0}f}%"


def digits_of(low: float | None, high: float | None, default: int = 3) -> int:
    """The number of decimals to show for a figure with this 95% interval, or `default` if there is no interval.

    Half the interval keeps one significant digit, or two if its mantissa is below 3.55. This simplifies the rule of the
    Particle Data Group (https://pdg.lbl.gov/2020/reviews/rpp2020-rev-rpp-intro.pdf, section 5.3).
    """
    if low is None or high is None or high <= low:
        return default
    half = (high - low) / 2
    exponent = math.floor(math.log10(half))
    return min(6, max(0, -exponent + (half / 10**exponent < 3.55)))


def shown(figures: dict[str, Any], name: str, digits: int | None = None) -> list[str]:
    """Format a mean and its 95% interval.

    Args:
        figures: the means that `with_intervals` returns, or one mean whose `interval_95` is a list.
        name: the figure to format.
        digits: number of decimals. The default is `digits_of` the interval.
    """
    intervals = figures.get("interval_95") or {}
    low, high = (intervals.get(name) if isinstance(intervals, dict) else intervals) or (None, None)
    if digits is None:
        digits = digits_of(low, high, FIGURES[name].digits if name in FIGURES else 3)
    interval = "" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"
    return [number(figures.get(name), digits), interval]


def figure_rows(figures: dict[str, Any], names: Iterable[str] = FIGURES) -> list[list[str]]:
    """Rows (words, mean, 95% interval) of a terminal table. A figure that is missing is skipped."""
    return [[FIGURES[name].words, *shown(figures, name, FIGURES[name].digits)] for name in names if name in figures]


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Format rows as aligned columns. With a head, all columns except the first are right-aligned, as for numbers."""
    lines = [[str(cell) for cell in row] for row in (*([head] if head else []), *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        cells = [cell.rjust(width) if head else cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        texts.append("  ".join(["", line[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(texts)


def flaw(text: str) -> str | None:
    """Return `ends at once` for an empty answer, `repeats itself` for a repetitive one, and None otherwise.

    An answer is repetitive if a sequence of words occurs `REPEATS` times in a row, with at least six words in all, or
    if a sentence of at least two words occurs `REPEATS` times.
    """
    words = text[:READ].split()
    if not words:
        return "ends at once"
    for length in range(1, len(words) // REPEATS + 1):
        run = 0
        for at in range(length, len(words)):
            run = run + 1 if words[at] == words[at - length] else 0
            if run >= max((REPEATS - 1) * length, 6 - length):
                return "repeats itself"
    sentences = Counter(part.strip() for part in re.split(r"[.!?\n]", text[:READ]) if len(part.split()) > 1)
    return "repeats itself" if max(sentences.values(), default=0) >= REPEATS else None


def extremes(margins: np.ndarray, count: int = 8) -> list[int]:
    """Sorted unique indices of the `count` smallest and the `count` largest of (N,) margins."""
    order = np.argsort(margins, kind="stable")
    return sorted({int(place) for place in (*order[:count], *order[-count:])})


def paired_difference(first: np.ndarray, second: np.ndarray, resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Compare two models on the same pairs: the mean difference, its interval and a test.

    Args:
        first: (N,) values of a figure under the first model.
        second: (N,) values under the second model.
        resamples: number of bootstrap resamples for the 95% interval, and of random sign flips for the test.

    Returns:
        {"difference", "interval_95", "p_value", "n"}. The two-sided p-value is of the paired randomization test (Fisher
        1935): it flips the signs of the differences at random and counts the observed signs as one of the flips.
    """
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    observed, n = differences.mean(), len(differences)
    generator = np.random.default_rng(seed)
    means, extreme = np.empty(resamples), 0
    for index in range(resamples):
        means[index] = differences[generator.integers(0, n, n)].mean()
        flipped = (differences * generator.choice((-1.0, 1.0), n)).mean()
        extreme += abs(flipped) >= abs(observed) - 1e-12
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "difference": float(observed),
        "interval_95": [float(low), float(high)],
        "p_value": (extreme + 1) / (resamples + 1),
        "n": n,
    }


def rank_correlation(first: np.ndarray, second: np.ndarray, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Spearman's rank correlation of two figures of the same rows, with its percentile bootstrap interval.

    ρ is Pearson's correlation of the ranks; tied values get their mean rank (Spearman 1904).

    Args:
        first, second: (N,) or (N, M) values. All N·M values are ranked together. The bootstrap draws whole rows, so
            that the M responses to a prompt stay together.

    Returns:
        {"spearman", "interval_95", "n"}. n counts values. The others are None if all values are equal.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    generator = np.random.default_rng(seed)
    rows = len(first)
    drawn = (generator.integers(0, rows, rows) for _ in range(resamples))
    found = [_spearman(first[at].ravel(), second[at].ravel()) for at in drawn]
    low, high = np.nanpercentile(found, [2.5, 97.5]) if not np.isnan(found).all() else (np.nan, np.nan)
    observed = _spearman(first.ravel(), second.ravel())
    defined = not np.isnan(observed)
    return {
        "spearman": float(observed) if defined else None,
        "interval_95": [float(low), float(high)] if defined else None,
        "n": first.size,
    }


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    ranks = [_ranks(values) for values in (first, second)]
    centred = [values - values.mean() for values in ranks]
    scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float((centred[0] * centred[1]).sum() / scale) if scale > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """(N,) ranks from 0. Tied values get their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


class RunningMeans:
    """Means over the rows of several steps. Sums stay on the device until `take`, so that no step waits for them."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []  # each (M + 1,): the metrics' sums and the number of rows
        self._names: list[str] = []

    def add(self, figures: dict[str, torch.Tensor]) -> None:
        """Add the figures of one step: name -> (B,) values. Every call must have the same names."""
        self._names = list(figures)
        sums = torch.stack([values.sum(dtype=torch.float32) for values in figures.values()])
        count = len(next(iter(figures.values())))
        self._sums.append(torch.cat([sums, sums.new_full((1,), count)]))

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the means since the last call. `reduce` sums a tensor over the processes."""
        if not self._sums:
            return {}
        sums = torch.stack(self._sums)
        if sums.device.type == "mps":  # MPS has no float64, and runs one process: nothing to reduce
            sums = sums.cpu()
        total = reduce(sums.double().sum(0)).tolist()
        self._sums.clear()
        return {name: value / total[-1] for name, value in zip(self._names, total, strict=False)}

    def state(self) -> dict[str, Any]:
        """The sums since the last `take`, as JSON."""
        return {"names": self._names, "sums": [row.tolist() for row in self._sums]}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        self._names = state["names"]
        self._sums = [torch.tensor(row, dtype=torch.float32, device=device) for row in state["sums"]]
