"""Expected reward against KL from the reference, over the checkpoints of a sweep.

The DPO paper compares methods by this figure (Figure 2, left, https://arxiv.org/abs/2305.18290): a good policy has a
high reward at a low KL. Both coordinates come from the same sampled answers y ~ π(·|x) to
held-out prompts: the mean reward of a trained reward model, and the mean of log π(y|x) − log π_ref(y|x), an unbiased
estimate of KL(π‖π_ref) per answer, in nats. The KL of the reference is 0.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from resdpo_trl.errors import UserError
from resdpo_trl.metrics import with_intervals
from resdpo_trl.run.files import checkpoints_of, step_of
from resdpo_trl.run.folder import read_object
from resdpo_trl.study.sweep import AXES, FRONTIER_COLUMNS, Point, read_rows, write_rows
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.text.data import TextDataConfig, load_preferences
from resdpo_trl.text.evaluate import EvaluateConfig, answer_logps, texts_of
from resdpo_trl.text.generate import answer, answerable
from resdpo_trl.text.model import check_fits, load_model, load_tokenizer
from resdpo_trl.text.reference_cache import weights_digest
from resdpo_trl.text.reward import RewardModel
from resdpo_trl.text.tokens import tokenize


class Frontier:
    """Measures the points of a sweep and writes frontier.csv, with one row per checkpoint."""

    def __init__(self, config: EvaluateConfig, data: TextDataConfig, model: TextModelConfig):
        """`config` has the reward model, the maximum length and the sampling. Its policy and reference are not used."""
        assert config.reward_model is not None
        self.config, self.data, self.model = config, data, model
        self.max_length = config.max_length or 256  # the default of `evaluate`
        self.reward = RewardModel(config.reward_model, model, config.trust_remote_code, bool(config.bf16))
        self._reward_weights = weights_digest(self.reward.model)

    def measure(self, points: Sequence[Point], failures: dict[str, str], path: Path) -> list[dict[str, Any]]:
        """Measure all points, and write their rows to `path` after each. Rows that are still valid are reused.

        A point that failed, or a checkpoint that can't be read, has a row with the reason in `status`.
        """
        known = {row["key"]: row for row in read_rows(path, FRONTIER_COLUMNS) if row["status"] == "done"}
        checkpoints = {point: _checkpoints(point) for point in points}
        rows: list[dict[str, Any]] = []
        with tqdm(total=sum(map(len, checkpoints.values())), desc="Frontier") as bar:
            for reference, group in itertools.groupby(points, lambda point: point.reference):
                for place, point in enumerate(group):
                    if place == 0:
                        rows.append(self._open(reference, point, known))
                    start = _row(point.name, point)
                    why = failures.get(point.name) or "it has no checkpoint; keep them with --save_strategy"
                    if point.name in failures or not checkpoints[point]:
                        rows.append(start | {"status": f"failed: {why}"})
                        continue
                    for folder, step, epoch in checkpoints[point]:
                        at = start | {"step": step, "epoch": epoch}
                        try:
                            rows.append(at | self._figures(str(folder), known))
                        except UserError as error:
                            rows.append(at | {"status": f"failed: {error}"})
                        bar.update()
                    listed = {row["key"] for row in rows}
                    ahead = [row for key, row in known.items() if key not in listed]  # a kill loses none of them
                    write_rows(path, FRONTIER_COLUMNS, [*rows, *ahead])
        write_rows(path, FRONTIER_COLUMNS, rows)
        return rows

    def _open(self, reference: Path, point: Point, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Load a reference with its prompts, and return its row, at KL 0."""
        config, name = self.config, str(reference)
        self.tokenizer = load_tokenizer(name, self.model, config.trust_remote_code, "reference")
        texts = load_preferences(self.data, self.tokenizer)
        shown = texts["test"].select(range(min(config.num_samples, len(texts["test"]))))
        limits = (self.max_length, self.data.max_response_length, texts.ends_turns)
        prompts = tokenize(shown, self.tokenizer, *limits, "Prompts")["prompt_ids"][:]
        own = load_preferences(self.data, self.reward.tokenizer)
        texts.check_same_pairs(own, "test", self.reward.name)
        self.texts, self.ends_turns = own["test"].select(range(len(shown))), own.ends_turns
        ref_model = load_model(name, self.model, config.trust_remote_code, "reference")
        check_fits(ref_model, self.tokenizer, self.max_length, config.max_new_tokens)
        self.prompts = answerable(ref_model, prompts, config.max_new_tokens)
        self.ref_model = ref_model.to(self.reward.model.device)
        self._ref_weights = weights_digest(self.ref_model)
        row = _row("reference", point) | dict.fromkeys(("beta", "learning_rate", "seed"), "") | {"epoch": 0, "step": 0}
        return row | self._figures(None, known)

    def _figures(self, policy: str | None, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """KL and reward of a policy's answers, or of the reference's own answers if there is no policy."""
        config = self.config
        model = self.ref_model
        if policy is not None:
            loaded = load_model(policy, self.model, config.trust_remote_code, "checkpoint")
            model = loaded.to(self.reward.model.device)
        drawn = (config.max_new_tokens, self.max_length, config.seed, config.bf16)
        parts = (weights_digest(model), self._ref_weights, self._reward_weights, self.prompts, drawn)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        measured = FRONTIER_COLUMNS[FRONTIER_COLUMNS.index("kl") :]
        if key in known:
            return {name: known[key][name] for name in measured}
        answers = answer(
            model, self.tokenizer, self.prompts, config.max_new_tokens, sampled=True, seed=config.seed,
            batch_size=config.batch_size, description="Answering",
        )  # fmt: skip
        log_ratios = answer_logps(model, self.prompts, answers, self.tokenizer, config)
        log_ratios = log_ratios - answer_logps(self.ref_model, self.prompts, answers, self.tokenizer, config)
        rewards = self.reward.answer_rewards(
            self.texts, *texts_of(answers, self.tokenizer), self.max_length, self.data.max_response_length,
            self.ends_turns, config.batch_size,
        )  # fmt: skip
        found = with_intervals({"kl": log_ratios.double().numpy(), "reward": rewards.double().numpy()})
        values = [value for name in ("kl", "reward") for value in (found[name], *found["interval_95"][name])]
        return dict(zip(measured, [*values, found["n"], "done", key], strict=True))


def _row(name: str, point: Point) -> dict[str, Any]:
    return dict.fromkeys(FRONTIER_COLUMNS, "") | {axis: getattr(point, axis) for axis in AXES} | {"point": name}


def _checkpoints(point: Point) -> list[tuple[Path, int, float]]:
    """(folder, step, epoch) of every checkpoint of a point's DPO, oldest first."""
    found = []
    for folder in reversed(checkpoints_of(point.folder / "checkpoints" / "dpo")):
        with suppress(OSError, ValueError):  # damaged by a crash: a resumed run does not start from it either
            found.append((folder, step_of(folder), float(read_object(folder / "trainer_state.json")["epoch"])))
    return found
