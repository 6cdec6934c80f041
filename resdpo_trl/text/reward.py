"""Reward models: training on pairs with TRL, and scoring of a prompt with a response by one number.

In the model of Bradley and Terry (1952), a pair's loss is −log σ(r_w − r_l) (Eq. 2 of DPO,
https://arxiv.org/abs/2305.18290). This is DPO's sigmoid loss with β = 1 and r instead of the log-ratios. The figures of
a reward model and of a policy therefore have the same names.

As in transformers' sequence classifiers, the reward is read at the last token that is not padding. If a tokenizer pads
with its end of text, as GPT-2's does here, this is the token before the end of text.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from trl import RewardTrainer

from resdpo_trl.errors import UserError
from resdpo_trl.losses import LogProbs, PreferenceLoss
from resdpo_trl.metrics import preference_metrics
from resdpo_trl.scorer import score_rows
from resdpo_trl.sources import check_model_folder
from resdpo_trl.text.config import TextModelConfig, TextRewardConfig
from resdpo_trl.text.data import end_of_turn
from resdpo_trl.text.model import (
    check_fits,
    load_model,
    load_tokenizer,
    loading_options,
    not_a_model,
    with_faster_parts,
)
from resdpo_trl.text.tokens import IDS, cached_map, tokenize
from resdpo_trl.text.trainer import TextTrainer, check_arguments
from resdpo_trl.training.processes import mean_over_processes, own_rows


def bradley_terry(chosen: Tensor, rejected: Tensor) -> LogProbs:
    """Convert (B,) rewards of both responses to pairs whose sigmoid loss with β = 1 is −log σ(r_w − r_l)."""
    zero, one = torch.zeros_like(chosen), torch.ones_like(chosen)
    return LogProbs(chosen, rejected, zero, zero, one, one)


def reward_figures(chosen: Tensor, rejected: Tensor) -> dict[str, np.ndarray]:
    """Per-pair figures of (N,) rewards with the names of a policy: loss, rewards, margins and accuracies, each (N,)."""
    figures = preference_metrics(bradley_terry(chosen, rejected), PreferenceLoss(beta=1.0))
    return {name: values for name, values in figures.items() if not name.startswith("logps/")}


def reward_rows(tokenized: Dataset) -> Dataset:
    """Convert tokenized pairs to rows of TRL's `RewardTrainer`, which join the prompt and the response."""
    columns = {"chosen_ids": "ids", "rejected_ids": "ids", "length": "int"}
    return cached_map(_reward_batch, tokenized.select_columns(list(IDS)), columns, "Rows for the reward model")


def _reward_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    chosen, rejected = (
        [prompt + response for prompt, response in zip(batch["prompt_ids"], batch[side], strict=True)]
        for side in ("chosen_ids", "rejected_ids")
    )
    lengths = [max(len(first), len(second)) for first, second in zip(chosen, rejected, strict=True)]
    return {"chosen_ids": chosen, "rejected_ids": rejected, "length": lengths}


def untrained_reward_model(
    name: str, model: TextModelConfig, trust_remote_code: bool, flag: str, seed: int
) -> PreTrainedModel:
    """Add a new head with one output, initialized with `seed`, to a language model. An adapter is merged first."""
    language: Any = load_model(name, model, trust_remote_code, flag)
    if hasattr(language, "peft_config"):
        language = language.merge_and_unload()
    config = copy.deepcopy(language.config)
    config.num_labels = 1
    torch.manual_seed(seed)
    try:
        made = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:  # transformers has no sequence classifier for this architecture
        raise not_a_model(name, flag, error) from None
    made.base_model.load_state_dict(language.base_model.state_dict())
    return with_faster_parts(made.to(language.dtype), model.attn_implementation)


class TextRewardTrainer(TextTrainer, RewardTrainer):
    """`trl.RewardTrainer` for the rows of `reward_rows`.

    The loss and the training figures are TRL's. Rows of a batch have similar lengths. With several processes, an
    epoch's last batch counts each row once. Evaluation is the mean over all pairs, and its figures have the names of
    the other stages (`rewards/accuracies` instead of TRL's `accuracy`).
    """

    columns = ("chosen_ids", "rejected_ids", "length")

    def __init__(self, model: str | PreTrainedModel, args: TextRewardConfig, peft_config: Any = None, **options: Any):
        """`options` are TRL's keyword arguments.

        Raises:
            UserError: an argument is not supported, the rows lack columns, or the PEFT method uses virtual tokens.
        """
        names = ("compute_metrics", "preprocess_logits_for_metrics", "quantization_config")
        check_arguments(self, args, TextRewardConfig, **{name: options.get(name) for name in names})
        if peft_config is not None and peft_config.is_prompt_learning:
            raise UserError(
                f"the PEFT method {peft_config.peft_type.value} puts virtual tokens before a row, so transformers does "
                "not find the row's last token, where the reward is read: use LoRA (--use_peft)"
            )
        super().__init__(model=model, args=args, peft_config=peft_config, **options)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        rows = super()._prepare_dataset(dataset, *args, **kwargs)
        if "margin" in rows.column_names:
            raise UserError("the column margin is not supported: remove it, or train with trl.RewardTrainer")
        return rows

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The mean of −log σ(r_w − r_l) + c·(r_w + r_l)² over the process's pairs; c is the centering coefficient."""
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        rewards = model(**read, use_cache=False).logits.squeeze(-1)
        chosen, rejected = (own_rows(inputs, side) for side in rewards.chunk(2))  # the collator puts all chosen first
        loss = mean_over_processes(inputs, -torch.nn.functional.logsigmoid(chosen - rejected))
        if self.args.center_rewards_coefficient is not None:
            squares = mean_over_processes(inputs, (chosen + rejected) ** 2)
            loss = loss + self.args.center_rewards_coefficient * squares
        with torch.no_grad():  # (B, 4): rewards of both sides, tokens, and 1 if the row counts
            tokens = inputs["attention_mask"].sum(1).view(2, -1).sum(0)
            counts = torch.arange(len(tokens), device=tokens.device) < inputs.get("own_rows", len(tokens))
            self.noted["rewards"].append(torch.stack([*rewards.float().chunk(2), tokens, counts], 1))
        return loss

    def step_figures(self) -> dict[str, float]:
        """Compute each figure over a step's pairs of all processes, and average over the steps since the last log."""
        steps = []
        for step in self.noted.pop("rewards", []):
            every = self.accelerator.gather(step).double().cpu()
            chosen, rejected, tokens, _ = every[every[:, 3] == 1].unbind(1)
            self._total_train_tokens += int(tokens.sum())
            found = {
                "min_reward": torch.minimum(chosen, rejected).min(),
                "mean_reward": (chosen + rejected).mean() / 2,
                "max_reward": torch.maximum(chosen, rejected).max(),
                "rewards/accuracies": (chosen > rejected).double().mean(),
                "rewards/margins": (chosen - rejected).mean(),
            }
            steps.append({name: value.item() for name, value in found.items()})
        if not steps:
            return {}
        figures = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        return figures | {"num_tokens": self._total_train_tokens}

    def pair_figures(self, dataset: Dataset, description: str = "Scoring") -> dict[str, np.ndarray]:
        chosen, rejected = self._over_rows(dataset, self._batch_rewards, description)
        figures = reward_figures(chosen, rejected)
        if self.args.center_rewards_coefficient is not None:  # the training loss, as in TRL's evaluation
            squares = (chosen.double() + rejected.double()).numpy() ** 2
            figures["loss"] = figures["loss"] + self.args.center_rewards_coefficient * squares
        return figures

    def _batch_rewards(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with self.accelerator.autocast():
            logits = model(**inputs, use_cache=False).logits
        return logits.float().squeeze(-1).chunk(2)  # the collator puts all chosen rows first


def save_reward_model(trainer: TextRewardTrainer, untrained: Callable[[], PreTrainedModel], folder: str) -> None:
    """Save a model for `AutoModelForSequenceClassification`, with adapters merged.

    `untrained` returns the base model of an adapter, because the trainer's own model may be sharded.
    """
    trainer.save_model(folder)
    if trainer.is_world_process_zero() and (Path(folder) / "adapter_config.json").is_file():
        merged = PeftModel.from_pretrained(untrained(), folder).merge_and_unload()
        shutil.rmtree(folder)
        merged.save_pretrained(folder)


def check_reward_model(name: str, trust_remote_code: bool, flag: str = "--reward_model") -> None:
    """Raise a UserError unless `name` is a sequence classifier with one label."""
    check_model_folder(name, flag)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise not_a_model(name, flag, error) from None
    kind = (config.architectures or ["a model of no named architecture"])[0]
    if not kind.endswith("ForSequenceClassification"):
        raise UserError(f"{flag} {name}: not a reward model ({kind}); resdpo-trl reward trains one")
    if config.num_labels != 1:
        raise UserError(f"{flag} {name}: it has {config.num_labels} labels, but a reward model has one")


class RewardModel:
    """A trained reward model that scores texts with its own tokenizer."""

    def __init__(
        self,
        name: str,
        model: TextModelConfig,
        trust_remote_code: bool = False,
        bf16: bool = False,
        flag: str = "--reward_model",
    ):
        """Load the model onto the process's device. `bf16` uses bfloat16 autocast for scoring.

        Raises:
            UserError: as in `check_reward_model`, or the weights can't be read.
        """
        check_reward_model(name, trust_remote_code, flag)
        self.name, self.bf16 = name, bf16
        model = dataclasses.replace(model, model_revision="main")  # the flag's revision is the policy's
        self.tokenizer = load_tokenizer(name, model, trust_remote_code, flag)
        options = loading_options(model, trust_remote_code)
        try:
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(name, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
            raise not_a_model(name, flag, error) from None
        self.model: Any = with_faster_parts(loaded, model.attn_implementation)
        # the model reads the reward at the last token that is not this one
        text_config = self.model.config.get_text_config()
        if text_config.pad_token_id not in range(text_config.vocab_size):
            text_config.pad_token_id = self.tokenizer.pad_token_id
        self._padding: int = text_config.pad_token_id
        self.model.to(PartialState().device).eval()

    def pair_rewards(
        self, texts: Dataset, max_length: int, max_response_length: int | None, ends_turns: bool, batch_size: int = 32
    ) -> tuple[Tensor, Tensor]:
        """(N,) rewards of the chosen and the rejected responses of pairs of texts, truncated as in training."""
        check_fits(self.model, self.tokenizer, max_length)
        rows = reward_rows(tokenize(texts, self.tokenizer, max_length, max_response_length, ends_turns))
        both = self.score([*rows["chosen_ids"], *rows["rejected_ids"]], batch_size)
        return both[: len(rows)], both[len(rows) :]

    def answer_rewards(
        self,
        prompts: Dataset,
        answers: Sequence[str],
        ended: Sequence[bool],
        max_length: int,
        max_response_length: int | None = None,
        ends_turns: bool = False,
        batch_size: int = 32,
    ) -> Tensor:
        """(N,) rewards of one answer per prompt.

        Args:
            prompts: columns prompt, turn_starts and header_end, as returned by `load_preferences`.
            answers: a text per prompt, without special tokens.
            ended: whether the model ended each answer. A truncated answer gets no end of turn or text.
            max_length, max_response_length, ends_turns: as in `resdpo_trl.text.tokens.tokenize`.
        """
        check_fits(self.model, self.tokenizer, max_length)
        ending = end_of_turn(self.tokenizer) if ends_turns else ""  # as a template writes an answer
        texts = [
            (text.strip() if ends_turns else text) + ending * whole for text, whole in zip(answers, ended, strict=True)
        ]
        rows = prompts.select_columns(["prompt", "turn_starts", "header_end"])
        rows = rows.add_column("chosen", texts).add_column("rejected", texts)
        rows = reward_rows(tokenize(rows, self.tokenizer, max_length, max_response_length, ends_turns))
        sequences = rows["chosen_ids"][:]
        for ids, whole in zip(sequences, ended, strict=True):
            if not whole and not ends_turns and ids[-1] == self.tokenizer.eos_token_id:
                ids.pop()
        return self.score(sequences, batch_size)

    def score(self, sequences: Sequence[Sequence[int]], batch_size: int = 32) -> Tensor:
        """(N,) float32 rewards of N sequences of token ids, on the CPU."""
        lengths = [len(ids) for ids in sequences]
        return score_rows(self._rewards, sequences, self._padded, batch_size, [self.model], "Rewards", lengths)[0]

    def _padded(self, rows: list[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(B, T) token ids, padded on the right, and a (B, T) mask that is 1 for tokens and 0 for padding."""
        ids = pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=self._padding)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()

    def _rewards(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        ids, mask = (each.to(self.model.device) for each in batch)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return [logits.float().squeeze(-1)]
