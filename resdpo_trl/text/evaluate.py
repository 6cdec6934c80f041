"""Evaluation of a policy on held-out pairs (rewards, accuracies, baselines) and of its own answers (lengths, KL)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from resdpo_trl.errors import UserError
from resdpo_trl.losses import LogProbs, PreferenceLoss
from resdpo_trl.metrics import (
    FIGURES,
    figure_rows,
    number,
    paired_difference,
    preference_metrics,
    rank_correlation,
    raw_accuracy,
    shown,
    table,
    with_intervals,
)
from resdpo_trl.run.folder import use_the_cores, write_figures
from resdpo_trl.run.provenance import as_trained, describe_settings, loss_of, read_facts, unseen
from resdpo_trl.scorer import score_rows
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.text.data import TextDataConfig, load_preferences
from resdpo_trl.text.generate import answer, answerable, stop_tokens
from resdpo_trl.text.model import base_model, check_fits, check_same_tokenizer, load_model, load_tokenizer, local_model
from resdpo_trl.text.reward import RewardModel, reward_figures
from resdpo_trl.text.scoring import add_response_head, check_adapters, pair_logps
from resdpo_trl.text.tokens import PairCollator, longest_sequence, tokenize
from resdpo_trl.training.arguments import option


@dataclass
class EvaluateConfig:
    """Options of an evaluation."""

    _argument_group_name = "evaluation"

    model: str | None = option(None, "Folder or Hub id of the policy.")
    reference: str | None = option(None, "Folder or Hub id of the policy's reference.")
    other_model: str | None = option(
        None, "A second policy of the same reference. Adds paired tests of the difference."
    )
    reward_model: str | None = option(
        None,
        "Folder or Hub id of a reward model (reward_hh.py trains one). Adds its accuracy on the same "
        "pairs, the rank correlation of both rewards, and its reward of the sampled answers.",
    )
    split: Literal["train", "validation", "test"] = option("test", "Split to evaluate on.")
    beta: float | None = option(None, "β of the rewards, above 0. The default is that of the training, or 0.1.")
    loss_type: list[str] | None = option(None, "The loss. The default is that of the training, or sigmoid.")
    max_length: int | None = option(None, "Maximum tokens of a row. The default is that of the training, or 256.")
    batch_size: int = option(32, "Pairs per batch, and prompts per batch of answers.")
    prefix_sharing: bool = option(True, "Run a pair's prompt once for both responses.")
    bf16: bool | None = option(
        None, "Score in bfloat16. The default is as in the training, or true if the hardware supports it."
    )
    num_samples: int = option(64, "Number of prompts to answer; 0 disables this.")
    max_new_tokens: int = option(64, "Maximum number of tokens per answer.")
    seed: int = option(42, "Seed of the sampled answers.")
    trust_remote_code: bool = option(False, "Run code from a model's repository.")
    output: str | None = option(None, "Also write the figures to this .json file.")

    def __post_init__(self) -> None:
        for name in ("model", "reference"):
            if getattr(self, name) is None:
                raise UserError(f"--{name}: pass a folder or Hub id")
        if self.batch_size < 1 or self.max_new_tokens < 1 or self.num_samples < 0:
            raise UserError("--batch_size and --max_new_tokens must be at least 1, --num_samples at least 0")


def evaluate(config: EvaluateConfig, data: TextDataConfig, model: TextModelConfig) -> dict[str, Any]:
    """Evaluate `config.model` on one split. Return the figures, and write them to `config.output` if set.

    Settings without a flag are those of the model's training. Test pairs that training has seen are skipped.
    """
    use_the_cores()
    named = {f"--{name}": getattr(config, name) for name in ("model", "reference", "other_model", "reward_model")}
    names: dict[str, str] = {flag: name for flag, name in named.items() if name is not None}
    known = {flag: read_facts(local_model(name, flag), model.model_revision, flag) for flag, name in names.items()}
    names.pop("--reward_model", None)
    asked = {
        "beta": config.beta,
        "loss_type": config.loss_type,
        "max_length": config.max_length,
        "max_response_length": data.max_response_length,
        "precision": None if config.bf16 is None else "bfloat16" if config.bf16 else "float32",
    }
    settings = as_trained(known["--model"], asked, {"max_length": 256, "max_response_length": None})
    used: dict[str, Any] = {name: value for name, (value, _) in settings.items()}
    config = dataclasses.replace(config, bf16=used["precision"] == "bfloat16")
    loss = loss_of(settings)
    tokenizers = {flag: load_tokenizer(name, model, config.trust_remote_code, flag) for flag, name in names.items()}
    tokenizer = tokenizers["--model"]
    for flag, found in tokenizers.items():
        check_same_tokenizer(tokenizer, "--model", found, flag)
    held_out = config.split == "test"
    texts = load_preferences(data, tokenizer, held_out)
    rows = texts[config.split]
    kept, left_out = unseen(rows["pair"][:], known.values() if held_out else (), f"--dataset_name {data.dataset_name}")
    cap = (used["max_length"], used["max_response_length"])
    pairs = tokenize(rows.select(kept), tokenizer, *cap, texts.ends_turns)
    reward = None
    if config.reward_model is not None:  # fails early if it is not a reward model
        reward = RewardModel(config.reward_model, model, config.trust_remote_code, bool(config.bf16))
        its_texts = load_preferences(data, reward.tokenizer, held_out)
        texts.check_same_pairs(its_texts, config.split, reward.name)
    logps: dict[str, LogProbs] = {}
    answers: list[list[int]] = []
    for flag, name in names.items():  # one model in memory at a time
        loaded = load_model(name, model, config.trust_remote_code, flag)
        check_fits(loaded, tokenizer, used["max_length"], config.max_new_tokens if config.num_samples else 0)
        if not getattr(loaded, "is_quantized", False):
            loaded.to(PartialState().device)
        how = (config.batch_size, f"Scoring, {flag.lstrip('-')}", config.prefix_sharing, config.bf16)
        logps[flag] = score_pairs(loaded, pairs, tokenizer, *how)
        if flag == "--model" and config.num_samples:
            prompts = answerable(loaded, pairs["prompt_ids"][: config.num_samples], config.max_new_tokens)
            answers = answer(
                loaded, tokenizer, prompts, config.max_new_tokens, sampled=True, seed=config.seed,
                batch_size=config.batch_size,
            )  # fmt: skip
            policy_logps = answer_logps(loaded, prompts, answers, tokenizer, config)
        elif flag == "--reference" and config.num_samples:
            log_ratios = policy_logps - answer_logps(loaded, prompts, answers, tokenizer, config)
        del loaded
    for each in logps.values():
        each.ref_chosen, each.ref_rejected = logps["--reference"].chosen, logps["--reference"].rejected
    scores = logps["--model"]
    per_pair = pair_figures(scores, loss)
    figures: dict[str, Any] = {
        "model": config.model,
        "reference": config.reference,
        "data": texts.counts,
        "split": config.split,
        "left_out": left_out,
        "settings": {name: {"value": value, "from": origin} for name, (value, origin) in settings.items()},
        "dialogue_format": texts.counts["dialogue_format"],
        "pairs": with_intervals(per_pair),
        "length_controlled_accuracy": length_controlled(per_pair["rewards/accuracies"], scores),
    }
    if config.num_samples:
        figures["answers"] = answer_figures(answers, log_ratios, tokenizer)
    if config.other_model is not None:
        other = pair_figures(logps["--other_model"], loss)
        figures["other_model"] = {"model": config.other_model, "pairs": with_intervals(other)}
        compared = ("loss", "rewards/accuracies", "rewards/margins")
        figures["difference"] = {name: paired_difference(per_pair[name], other[name]) for name in compared}
    if reward is not None:
        its_rows, limits = its_texts[config.split].select(kept), (*cap, its_texts.ends_turns, config.batch_size)
        figures["reward_model"] = explicit_rewards(reward, its_rows, per_pair, *texts_of(answers, tokenizer), limits)
    if config.output:
        write_figures(config.output, figures)
    return figures


def explicit_rewards(
    reward: RewardModel,
    rows: Dataset,
    implicit: dict[str, np.ndarray],
    answers: list[str],
    ended: list[bool],
    how: tuple[int, int | None, bool, int],
) -> dict[str, Any]:
    """Figures of a trained reward model on the same pairs, and its agreement with the implicit reward.

    The implicit reward β(log π − log π_ref) equals the explicit one up to β log Z(x) of the prompt (Eq. 5 of DPO). This
    term cancels in a margin, but not between prompts. The correlation of margins therefore compares the two models,
    while that of all rewards also depends on the prompts.

    Args:
        reward: the reward model.
        rows: the pairs, rendered with the reward model's tokenizer.
        implicit: the policy's figures of these pairs.
        answers, ended: the policy's answers to the first prompts, and whether the model ended each of them.
        how: the arguments max_length, max_response_length, ends_turns and batch_size of `pair_rewards`.
    """
    explicit = reward_figures(*reward.pair_rewards(rows, *how))
    right, implicitly_right = explicit["rewards/accuracies"], implicit["rewards/accuracies"]
    of_all, implicit_of_all = (
        np.stack([found["rewards/chosen"], found["rewards/rejected"]], axis=1) for found in (explicit, implicit)
    )
    figures: dict[str, Any] = {
        "model": reward.name,
        "pairs": with_intervals({**explicit, "agreement": (right == implicitly_right).astype(float)}),
        "accuracy_minus_implicit": paired_difference(right, implicitly_right),
        "rank_correlation": {
            "margins": rank_correlation(explicit["rewards/margins"], implicit["rewards/margins"]),
            "rewards": rank_correlation(of_all, implicit_of_all),
        },
    }
    if answers:
        given = reward.answer_rewards(rows.select(range(len(answers))), answers, ended, *how).double().numpy()
        better = given > explicit["rewards/chosen"][: len(answers)]
        figures["answers"] = with_intervals({"reward": given, "beats_chosen": better.astype(float)})
    return figures


def texts_of(answers: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[bool]]:
    """Decode sampled answers. Return their texts, and whether the model ended each of them."""
    stops = stop_tokens(tokenizer)
    ended = [bool(row) and row[-1] in stops for row in answers]
    return tokenizer.batch_decode([list(row) for row in answers], skip_special_tokens=True), ended


def score_pairs(
    model: Any,
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    description: str,
    prefix_sharing: bool = True,
    bf16: bool | None = False,
) -> LogProbs:
    """(N,) log-probabilities of both responses under `model`, in the order of the pairs."""
    check_adapters(model, None, prefix_sharing)
    longest = max(pairs["length"][:]) if prefix_sharing else None
    add_response_head(base_model(model), longest, longest_sequence(pairs))

    def logps(batch: dict[str, Tensor]) -> list[Tensor]:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(bf16)):
            return [*pair_logps(model, batch), batch["chosen_tokens"], batch["rejected_tokens"]]

    collate = PairCollator(int(tokenizer.pad_token_id), prefix_sharing)
    chosen, rejected, *tokens = score_rows(
        logps, pairs, collate, batch_size, [model], description, lengths=pairs["length"][:]
    )
    return LogProbs(chosen, rejected, chosen, rejected, *tokens)


def pair_figures(scores: LogProbs, loss: PreferenceLoss) -> dict[str, np.ndarray]:
    """Per-pair figures, each (N,): rewards, accuracies, and the accuracies of baselines that rank by length.

    A baseline scores 0.5 for responses of equal length.
    """
    longer = np.sign(np.asarray(scores.chosen_tokens, dtype=float) - np.asarray(scores.rejected_tokens, dtype=float))
    return (
        preference_metrics(scores, loss)
        | raw_accuracy(scores)
        | {"baselines/longer_wins": (1 + longer) / 2, "baselines/shorter_wins": (1 - longer) / 2}
    )


def length_controlled(accuracies: np.ndarray, scores: LogProbs) -> dict[str, Any]:
    """The mean of two accuracies: on pairs whose chosen response is longer, and on pairs whose chosen response is
    shorter. Ranking by length alone scores 0.5.
    """
    longer = np.asarray(scores.chosen_tokens) - np.asarray(scores.rejected_tokens)
    strata = {"chosen_longer": accuracies[longer > 0], "chosen_shorter": accuracies[longer < 0]}
    found = {name: with_intervals({"accuracy": values}) if len(values) else None for name, values in strata.items()}
    if None in found.values():
        return {"accuracy": None, **found}
    generator = np.random.default_rng(0)
    means = [
        np.mean([values[generator.integers(0, len(values), len(values))].mean() for values in strata.values()])
        for _ in range(2000)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    accuracy = float(np.mean([values.mean() for values in strata.values()]))
    return {"accuracy": accuracy, "interval_95": [float(low), float(high)], **found}


def answer_figures(
    answers: Sequence[Sequence[int]], log_ratios: Tensor, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Figures of sampled answers.

    Args:
        answers: token ids of each answer.
        log_ratios: (N,) log π(y|x) − log π_ref(y|x) of each answer. Their mean over the policy's own answers is an
            unbiased estimate of KL(π‖π_ref) per answer, in nats, with the allowed number of tokens.
        tokenizer: one of its `stop_tokens` ends an answer that is not truncated.
    """
    tokens, stops = [list(row) for row in answers], stop_tokens(tokenizer)
    figures = {
        "length_tokens": np.array([len(row) for row in tokens], dtype=float),
        "kl": log_ratios.double().numpy(),
        "cut": np.array([row[-1] not in stops for row in tokens], dtype=float),
    }
    distinct = {f"distinct_{n}": distinct_ngrams(tokens, n) for n in (1, 2, 3)}
    return {**with_intervals(figures), **distinct}


def distinct_ngrams(answers: Sequence[Sequence[int]], n: int) -> float | None:
    """The fraction of distinct n-grams in the answers (Li et al. 2016, https://arxiv.org/abs/1510.03055)."""
    found = [tuple(row[at : at + n]) for row in answers for at in range(len(row) - n + 1)]
    return len(set(found)) / len(found) if found else None


def answer_logps(
    model: Any,
    prompts: list[list[int]],
    answers: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
) -> Tensor:
    """(N,) log-probabilities of the answers in the precision of sampling, each scored as a pair's chosen response."""
    rows = [
        {"prompt_ids": prompt, "chosen_ids": text, "rejected_ids": text[:1], "length": len(prompt) + len(text) + 1}
        for prompt, text in zip(prompts, answers, strict=True)
    ]
    how = (config.batch_size, "Scoring answers", config.prefix_sharing)
    return score_pairs(model, Dataset.from_list(rows), tokenizer, *how).chosen


def describe(figures: dict[str, Any]) -> str:
    """Format the figures as tables for the terminal."""
    pairs, controlled, explicit = figures["pairs"], figures["length_controlled_accuracy"], figures.get("reward_model")
    rows = figure_rows(pairs)
    if controlled["accuracy"] is not None:
        rows.append(["pairs ranked right, length-controlled", *shown(controlled, "accuracy", 4)])
    if explicit:
        rows.append(["pairs ranked right by the reward model", *shown(explicit["pairs"], "rewards/accuracies", 4)])
        rows.append(["pairs on which both models agree", *shown(explicit["pairs"], "agreement", 4)])
        for name, found in explicit["rank_correlation"].items():
            rows.append([f"rank correlation of {name}", *shown(found, "spearman", 4)])
    if answers := figures.get("answers"):
        rows.append(["tokens of an answer", *shown(answers, "length_tokens", 1)])
        rows.append(["KL(policy‖reference) of an answer, nats", *shown(answers, "kl", 3)])
        if explicit:
            rows.append(["reward of an answer", *shown(explicit["answers"], "reward", 3)])
        rows += [[f"distinct {n}-grams of the answers", number(answers[f"distinct_{n}"]), ""] for n in (1, 2, 3)]
    settings = {name: (each["value"], each["from"]) for name, each in figures["settings"].items()}
    lines = ["", f"  {figures['model']}", *describe_settings(settings, figures["left_out"]), ""]
    lines.append(table(rows, (f"on {pairs['n']} {figures['split']} pairs", "mean", "95% interval")))
    if "difference" in figures:
        rows = [
            [FIGURES[name].words, *shown(found, "difference", 4), f"{found['p_value']:.4f}"]
            for name, found in figures["difference"].items()
        ]
        lines += ["", table(rows, (f"minus {figures['other_model']['model']}", "difference", "95% interval", "p"))]
    return "\n".join([*lines, ""])
