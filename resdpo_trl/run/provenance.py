"""The facts of a model's training in resdpo_trl.json, so that an evaluation uses the settings of the training.

The file has the loss with its β, the maximum length, the precision, and digests of the training and validation rows.
If the folder is a copy of the base model, the file names the base.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from resdpo_trl.errors import UserError
from resdpo_trl.losses import PreferenceLoss
from resdpo_trl.run.folder import read_object, to_json
from resdpo_trl.training.arguments import has_bfloat16, preference_loss

FILE = "resdpo_trl.json"
LOSS = {
    "beta": 0.1,
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
}


def training_facts(args: Any, trained: Iterable[str], validated: Iterable[str], **more: Any) -> dict[str, Any]:
    """The facts of a training that are saved with the model.

    Args:
        args: its configuration, with or without the fields of a preference loss.
        trained: digests of its training rows.
        validated: digests of its validation rows, which may have been used to choose an epoch or a setting.
        more: further facts, such as the maximum length.
    """
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    loss = {name: getattr(args, name) for name in LOSS} if hasattr(args, "beta") else {}
    rows = {"trained_on": " ".join(sorted(trained)), "validated_on": " ".join(sorted(validated))}
    return {**loss, **more, "precision": precision, **rows}


def write_facts(folder: str | Path, facts: dict[str, Any]) -> None:
    if facts:
        (Path(folder) / FILE).write_text(to_json(facts, indent=2) + "\n", encoding="utf-8")


def read_facts(name: str, revision: str | None, flag: str) -> dict[str, Any]:
    """The facts of a folder or Hub id; {} if it has no such file."""
    from transformers.utils import cached_file

    try:
        path = cached_file(name, FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:  # the model does not exist; loading it reports that
        path = None
    try:
        return {} if path is None else read_object(Path(path))
    except ValueError as error:
        raise UserError(f"{flag} {name}: its {FILE} can't be read ({error}); delete it to use the defaults") from None


def as_trained(facts: dict[str, Any], asked: dict[str, Any], defaults: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """The settings of an evaluation, each with its origin: a flag, the model's folder, or a default.

    Args:
        facts: the result of `read_facts`.
        asked: name -> the flag's value, or None if it is not given. If it gives another loss type than the trained one,
            all other settings of the trained loss except β are ignored.
        defaults: further defaults, in addition to those of the loss and the precision.
    """
    defaults = {**LOSS, "precision": "bfloat16" if has_bfloat16() else "float32", **defaults}
    if asked.get("loss_type") not in (None, facts.get("loss_type")):
        facts = {name: value for name, value in facts.items() if name == "beta" or name not in LOSS}
    settings = {name: (default, "default") for name, default in defaults.items()}
    settings |= {name: (facts[name], "model") for name in defaults if name in facts}
    return settings | {name: (asked[name], "flag") for name in defaults if asked.get(name) is not None}


def loss_of(settings: dict[str, tuple[Any, str]]) -> PreferenceLoss:
    """The loss of `as_trained`'s settings."""
    return preference_loss(SimpleNamespace(**{name: settings[name][0] for name in LOSS}))


def seen_by(*facts: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Digests of the training rows of these models, and of their validation rows."""
    trained, validated = (
        {digest for each in facts for digest in each.get(name, "").split()} for name in ("trained_on", "validated_on")
    )
    return trained, validated


def unseen(digests: list[str], facts: Iterable[dict[str, Any]], flag: str) -> tuple[np.ndarray, dict[str, int]]:
    """The indices of the rows that no training in `facts` has used, and the numbers of the rows that one trained on or
    only validated on.

    Raises:
        UserError: all rows were used.
    """
    trained, validated = seen_by(*facts)
    seen = trained | validated
    kept = np.flatnonzero([digest not in seen for digest in digests])
    if len(digests) and not len(kept):
        raise UserError(
            f"{flag}: the models' training has used all {len(digests)} rows: name other data, or pass --split train"
        )
    trained_on = sum(digest in trained for digest in digests)
    return kept, {"trained_on": trained_on, "validated_on": len(digests) - len(kept) - trained_on}


def describe_settings(settings: dict[str, tuple[Any, str]], left_out: dict[str, int]) -> list[str]:
    """Lines with the settings of an evaluation and the number of rows that it skipped."""
    texts = {"beta": "β {:g}", "loss_type": "loss {}", "max_length": "cap {}"}
    texts |= {"max_response_length": "responses {}", "precision": "{}"}
    origins = {"model": "as trained", "flag": "by flag", "default": "by default (the model's folder does not say)"}
    lines = []
    for origin, words in origins.items():
        said = [
            text.format(" + ".join(value) if isinstance(value, list) else value)
            for name, text in texts.items()
            if name in settings and settings[name][1] == origin and (value := settings[name][0]) is not None
        ]
        lines += [f"  {words}: {', '.join(said)}"] if said else []
    if any(left_out.values()):
        trained_on, validated_on = left_out["trained_on"], left_out["validated_on"]
        lines.append(
            f"  left out: {trained_on} rows that these models were trained on, {validated_on} of their validation sets"
        )
    return lines
