"""Plain sentences on what a run, a sweep or a comparison shows, and on what to try next.

Each rule is a function of the figures that returns a list of sentences, which may be empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from resdpo_trl.metrics import percent
from resdpo_trl.sources import FEW_TO_TEST

STAGES = ("dpo", "reward", "cross_entropy")  # stages with test figures; the first one that a run has is its main stage
BARELY_MOVED = 0.05  # this margin moves σ(margin) from 0.5 to 0.512
DIVERGED = 3.0  # times the loss before training
TURNED = 0.02  # relative change of a loss between epochs; a smaller one is noise
FEW_TO_CHOOSE_BY = 30  # validation rows


def verdict(summary: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> list[str]:
    """The sentences of a run.

    Args:
        summary: summary.json.
        metrics: the rows of metrics.jsonl.
    """
    stage, test = stage_of(summary), test_of(summary)
    if stage is None:
        return of_sft(summary.get("sft", {}))
    found = summary[stage]
    rows = found.get("validation", {}).get("n")
    losses = [
        (row["epoch"], row["loss"])
        for row in metrics
        if (row["stage"], row["split"]) == (stage, "validation") and row["epoch"] and row.get("loss") is not None
    ]
    diverged = of_divergence(test.get("loss"), _loss_before(stage, summary, metrics))
    return [
        *of_the_test(summary),
        *diverged,
        *([] if diverged or stage != "dpo" else of_the_margin(test)),
        *of_epochs(losses, found.get("kept_epoch"), stage == "dpo", rows),
        *of_held_out(rows, len(losses), test.get("n")),
    ]


def stage_of(summary: dict[str, Any]) -> str | None:
    """The main stage of a run; None for SFT alone."""
    return next((stage for stage in STAGES if stage in summary), None)


def test_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The test figures of a run; empty before it has any."""
    return dict(summary.get(stage_of(summary) or "", {}).get("test", {}))


def before_and_after(summary: dict[str, Any]) -> list[tuple[str, float, list[float], int]]:
    """(name, share, its 95% interval, n) of the reference and of the trained model."""
    test = test_of(summary)
    if "accuracy" in test:
        before = summary.get("reference", {}).get("test", {})
        sides = [("reference", before, "accuracy"), ("policy", test, "accuracy")]
    elif "reward" in summary:
        sides = [("reward model", test, "rewards/accuracies")]
    else:
        sides = [("reference", test, "logps/ref_accuracies"), ("policy", test, "rewards/accuracies")]
    return [
        (name, figures[metric], figures["interval_95"][metric], figures["n"])
        for name, figures, metric in sides
        if metric in figures.get("interval_95", {})
    ]


def of_sft(sft: dict[str, Any]) -> list[str]:
    losses = sft.get("validation", {})
    before, after = losses.get("loss_before"), losses.get("loss_after")
    if before is None or after is None:
        return []
    change = f"the validation loss from {before:.3f} to {after:.3f} on {losses['n']} rows"
    if after < before:
        return [f"SFT lowered {change}."]
    return [f"SFT did not help: it changed {change}. Try a lower learning rate."]


def of_the_test(summary: dict[str, Any]) -> list[str]:
    """The accuracy on held-out rows before and after training, and whether the interval excludes no change.

    The first sentence is the lead of the page and of the model card.
    """
    sides = before_and_after(summary)
    if not sides:
        return []
    name, share, (low, high), n = sides[-1]
    before = sides[0][1] if len(sides) > 1 else None
    said = f"{percent(share, n)} of {n} unseen {{}} right (95% interval {percent(low, n)} to {percent(high, n)})"
    if "accuracy" in test_of(summary):
        said = f"The {name} classifies {said.format('images')}"
        if before is None:
            return [f"{said}."]
        if low <= before <= high:
            return [f"{said}; the reference's {percent(before, n)} is in this interval: no difference is shown."]
        return [f"{said}, {'more' if before < low else 'fewer'} than the reference ({percent(before, n)})."]
    who = "The policy's implicit reward" if name == "policy" else f"The {name}"
    said = f"{who} ranks {said.format('pairs')}"
    known = "" if before is None else f"; the reference's log-likelihood {percent(before, n)}"
    if low > 0.5:
        return [f"{said}, better than chance{known}."]
    if high < 0.5:
        advice = "Look at a few pairs: chosen and rejected may be swapped (--prefer)."
        return [f"{said}, worse than chance{known}.", advice]
    return [f"{said}, which is not distinguishable from chance{known}.", "Use more test pairs, or train on more pairs."]


def of_divergence(loss: float | None, start: float | None) -> list[str]:
    """A loss that is not finite, or far above that of the untrained model."""
    if loss is None:  # values that are not finite are null in the files
        return ["The test loss is not finite: training diverged. Lower --learning_rate."]
    if start is not None and loss > DIVERGED * start:
        return [
            f"The test loss is {loss:.3g}, and {start:.3g} before training: training diverged. Lower --learning_rate."
        ]
    return []


def of_the_margin(test: dict[str, Any]) -> list[str]:
    """A policy that is almost its reference, or rewards that both fall."""
    margin, chosen, rejected = (test.get(f"rewards/{name}") for name in ("margins", "chosen", "rejected"))
    if margin is None or chosen is None or rejected is None:
        return []
    if abs(margin) < BARELY_MOVED:
        return [
            f"The policy barely moved (margin {margin:.3f}): raise --learning_rate or train longer "
            "(--num_train_epochs)."
        ]
    if chosen < 0 and rejected < 0 and margin > 0:
        return ["Both rewards fell: that is normal while the margin grows."]
    return []


def of_epochs(
    losses: Sequence[tuple[float, float]], kept: float | None, dpo: bool = True, rows: int | None = None
) -> list[str]:
    """A validation loss that has risen again, or that still falls.

    Args:
        losses: (epoch, validation loss) of each evaluation.
        kept: the epoch whose weights were kept.
        dpo: whether the stage has a β to raise.
        rows: number of validation rows. The standard deviation of a row's loss is about its mean, so that the mean
            over n rows has a relative error of about 1/√n. A smaller change is noise.
    """
    if len(losses) < 2:
        return []
    noise = max(TURNED, 1 / math.sqrt(rows) if rows else 0.0)
    (last, final), (best, least) = losses[-1], min(losses, key=lambda row: row[1])
    if final > least * (1 + noise):
        keeps = "" if kept is None or kept != best else "; that epoch is kept"
        return [
            f"The validation loss has risen since epoch {best:g} ({least:.3f} to {final:.3f}{keeps}): train fewer "
            f"epochs{', or with a larger --beta' if dpo else ''}."
        ]
    if best == last and losses[-2][1] > final * (1 + noise):
        return [f"The validation loss still fell in the last epoch ({losses[-2][1]:.3f} to {final:.3f}): train longer."]
    return []


def of_held_out(validation: int | None, evaluations: int, test: int | None) -> list[str]:
    """Numbers of held-out rows that are too small for their use."""
    said = []
    if validation is not None and validation < FEW_TO_CHOOSE_BY and evaluations > 1:
        said.append(
            f"{validation} validation rows are too few to choose an epoch: use more (--validation_fraction), or pass "
            "--select last."
        )
    if test is not None and test < FEW_TO_TEST:
        said.append(
            f"{test} test rows give a share to ±{98 / math.sqrt(test):.0f} percentage points: repeat the run with "
            "other test rows (cross-validation) before you trust a difference."
        )
    return said


def of_sweep(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The sentences of a sweep, from the rows of its table.csv."""
    done = [row for row in rows if row["status"] == "done"]
    best = next((row for row in done if row["best"]), None)
    if best is None:
        return []
    if all(row["accuracy_low"] <= 0.5 for row in done):
        return ["No point beats the reference: no interval of the accuracy is above 50%."]
    share, low, high = (percent(best[name], best["n"]) for name in ("accuracy", "accuracy_low", "accuracy_high"))
    said = [
        f"{best['point']} is the best on the validation pairs; it ranks {share} of {best['n']:g} test pairs right "
        f"(95% interval {low} to {high})."
    ]
    others = [row for row in done if row is not best and row["accuracy_high"] >= best["accuracy_low"]]
    others = [row for row in others if row["accuracy_low"] <= best["accuracy_high"]]
    if others:
        said.append(
            f"The intervals of {len(others)} of {len(done) - 1} other points overlap its own: no difference is shown."
        )
    for name, flag in (("beta", "--betas"), ("learning_rate", "--learning_rates")):
        tried = sorted({row[name] for row in done})
        if len(tried) > 1 and best[name] in (tried[0], tried[-1]):
            end, word = ("smallest", "smaller") if best[name] == tried[0] else ("largest", "larger")
            said.append(f"Its {name} {best[name]:g} is the {end} that was tried: also try {word} ones ({flag}).")
    return said


def of_comparison(summary: dict[str, Any]) -> list[str]:
    """The sentences of a comparison, from its summary.json."""
    rates = summary.get("win_rates") or []
    if not rates:
        answers = summary["comparison"]["answers"]
        ended = [f"{name} {percent(1 - found['cut'], found['n'])}" for name, found in answers.items()]
        return [
            f"Of {next(iter(answers.values()))['n']} answers per model, these end on their own: {', '.join(ended)}.",
            "No judge compared the answers: pass --reward_model or --judge_url for win rates.",
        ]
    said = []
    for row in rates:
        model, against, n = row["model"], row["against"], row["n"]
        if not n:
            said.append(f"{row['judge']} gave no verdict on {model} against {against}.")
            continue
        shares = (row["win_rate"], *row["interval_95"])
        if row["win_rate"] < 0.5:
            model, against, shares = against, model, (1 - shares[0], 1 - shares[2], 1 - shares[1])
        rate, low, high = (percent(share, n) for share in shares)
        won = f"{model} wins {rate} of {n} prompts against {against}, judged by {row['judge']}"
        shown = "" if shares[1] > 0.5 else ": no difference is shown; use more prompts"
        said.append(f"{won} (95% interval {low} to {high}){shown}.")
    return said


def _loss_before(stage: str, summary: dict[str, Any], metrics: Iterable[dict[str, Any]]) -> float | None:
    """The loss before training: by its formula, or the first logged value."""
    if stage == "reward" or summary[stage].get("loss_type") == ["sigmoid"]:
        return math.log(2)
    if stage == "cross_entropy":
        return math.log(summary["data"]["classes"])
    logged = (row.get("loss") for row in metrics if (row["stage"], row["split"]) == (stage, "train"))
    return next((loss for loss in logged if loss is not None), None)
