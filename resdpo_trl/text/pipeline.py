"""The steps of a text run: pairs, reference, policy or reward model, answers, files. Recipes call them in order."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed
from trl import get_peft_config

from resdpo_trl.errors import UserError
from resdpo_trl.job import Job, describe_run, epochs, free, silent
from resdpo_trl.metrics import extremes, preference_metrics, raw_accuracy, with_intervals
from resdpo_trl.run.card import write_card
from resdpo_trl.run.files import ASIDE, replace_folder
from resdpo_trl.run.folder import RunFolder
from resdpo_trl.run.hub import check_public_base
from resdpo_trl.run.provenance import read_facts, write_facts
from resdpo_trl.sources import SMOLLM2, SMOLLM2_ID, SPLITS, describe_cuts, describe_left_out, first_line, source_name
from resdpo_trl.text.config import SamplesConfig, TextDPOConfig, TextModelConfig, TextRewardConfig, TextSFTConfig
from resdpo_trl.text.data import QUICKSTART, TextDataConfig, load_preferences, newest_turns
from resdpo_trl.text.generate import answer, answerable, stop_tokens
from resdpo_trl.text.model import (
    base_model,
    check_fits,
    check_same_tokenizer,
    full_model,
    is_quantized,
    load_model,
    load_tokenizer,
    local_model,
    merged_model,
)
from resdpo_trl.text.reward import TextRewardTrainer, reward_rows, save_reward_model, untrained_reward_model
from resdpo_trl.text.tokens import cap_counts, fingerprint, sft_rows, tokenize
from resdpo_trl.text.trainer import TextDPOTrainer, TextSFTTrainer
from resdpo_trl.training.arguments import RunConfig
from resdpo_trl.training.callbacks import use_run_callbacks
from resdpo_trl.training.processes import is_sharded

SHOWN_CHARACTERS = 600  # of each text of the first pair in the terminal


class TextRun(Job):
    """A run of SFT and DPO, of SFT and a reward model, or of SFT alone."""

    def __init__(
        self,
        data: TextDataConfig,
        model: TextModelConfig,
        samples: SamplesConfig,
        options: RunConfig,
        training: TextDPOConfig | TextRewardConfig | TextSFTConfig,
        sft: TextSFTConfig | None = None,
        preset: Path | None = None,
        given: Collection[str] | None = None,
    ):
        """`training` configures the last stage. `sft` configures the stage before DPO or a reward model. Without it the
        reference is the unchanged model."""
        self.data, self.model, self.samples = data, model, samples
        self.reference: str | None = None  # folder or Hub id of a trained reference
        if isinstance(training, TextSFTConfig):
            sft = training
            if training.is_skipped:
                raise UserError("--num_train_epochs 0: this trains nothing; pass a number above 0")
        else:
            self.reference = training.reference
        self.sft = None if sft is None or sft.is_skipped or self.reference else sft
        # the model that SFT starts from; unknown if only --reference is given
        self.base = model.model_name_or_path or (None if self.reference else SMOLLM2)
        self.training: Any = training
        self._check_model_flags(given or ())
        if model.dtype is None and model.use_peft and training.bf16 and not isinstance(training, TextRewardConfig):
            model.dtype = "bfloat16"  # autocast would convert frozen float32 weights in every step
        before = {"sft": self.sft} if self.sft is not None and self.sft is not training else {}
        super().__init__(training, options, {"data": data, "model": model, "samples": samples}, before, preset, given)

    def _check_model_flags(self, given: Collection[str]) -> None:
        model, training, reward = self.model, self.training, isinstance(self.training, TextRewardConfig)
        if model.load_in_4bit or model.load_in_8bit:
            refused = {
                "freeze the model's weights: add --use_peft to train adapters": not model.use_peft,
                "are not supported with FSDP or DeepSpeed: remove them, or use accelerate_configs/multi_gpu.yaml": (
                    is_sharded()
                ),
                "are not supported for a reward model: remove them": reward,
            }
            for why in (why for why, found in refused.items() if found):
                raise UserError(f"--load_in_4bit and --load_in_8bit {why}")
        figure = training.metric_for_best_model
        if figure is not None and figure.removeprefix("eval_") not in training.figures:
            raise UserError(f"--metric_for_best_model {figure}: must be among {', '.join(training.figures)}")
        if getattr(training, "reference_update", "frozen") != "frozen" and model.use_peft:
            raise UserError(
                "--reference_update needs a full reference model, and --use_peft keeps none: pass --use_peft false, or "
                "omit --reference_update"
            )
        if reward and "merge_adapter" in given:
            raise UserError("--merge_adapter: a reward model's adapter is always merged: remove the flag")
        if training.merge_adapter and not self._trains_adapter and "merge_adapter" in given:
            raise UserError("--merge_adapter: no adapter is trained: add --use_peft, or remove the flag")
        if training.push_to_hub and self._trains_adapter and not training.merge_adapter and not reward:
            check_public_base(full_model(*self._sources()[0]))  # a reward model's adapter is always merged

    @property
    def _trains_adapter(self) -> bool:
        return self.model.use_peft or (Path(self._sources()[0][0]) / "adapter_config.json").is_file()

    def _check_weights(self, name: str, flag: str) -> None:
        """Raise a UserError for a checkpoint with quantized weights, if the weights would be trained."""
        reward = isinstance(self.training, TextRewardConfig)
        if self._trains_adapter and not reward:
            return
        if is_quantized(name, self.model, self.training.trust_remote_code, flag):
            fix = "pass a checkpoint that is not quantized" if reward else "add --use_peft to train adapters"
            raise UserError(f"{flag} {name}: its weights are quantized, which freezes them: {fix}")

    def say_what_runs(self) -> None:
        """Print the stages, the model, the data and the hardware."""
        model = self.base or f"the reference {self.reference}"
        if model == SMOLLM2:
            model = SMOLLM2_ID.partition("/")[2]
        source = source_name(self.data.dataset_name) + (
            f", {self.data.dataset_data_dir}" if self.data.dataset_data_dir else ""
        )
        if source == QUICKSTART:
            source = "human chit-chat (no network needed)"
        last = {TextDPOConfig: "DPO", TextRewardConfig: "a reward model", TextSFTConfig: "SFT"}[type(self.training)]
        self.say(
            f"{'SFT and ' if self.before else ''}{last} of {model} on {source}; for GPT-2 on Anthropic HH: "
            "--config hh/gpt2.yaml\n" + self.hardware_line()
        )
        if self.model.use_peft:
            sft = "".join(f", SFT {args.learning_rate:g}" for args in self.before.values())
            self.say(f"LoRA of rank {self.model.lora_r}: learning rate {self.training.learning_rate:g}{sft}")

    # --- pairs ---------------------------------------------------------------------------------------------------

    def prepare_pairs(self) -> dict[str, Dataset]:
        """Return the tokenized and truncated pairs of each split."""
        flags = self._sources()
        found = [load_tokenizer(name, self.model, self.training.trust_remote_code, flag) for name, flag in flags]
        for tokenizer, (_, flag) in zip(found[1:], flags[1:], strict=True):
            check_same_tokenizer(found[0], flags[0][1], tokenizer, flag)
        self._check_weights(*flags[0])
        self.tokenizer = found[0]
        with PartialState().main_process_first():
            started = time.perf_counter()
            texts = self.texts = load_preferences(self.data, self.tokenizer)
            pairs = {
                split: tokenize(
                    texts[split],
                    self.tokenizer,
                    self.training.max_length or 0,
                    self.data.max_response_length,
                    texts.ends_turns,
                    f"Tokenizing {split}",
                )
                for split in SPLITS
            }
        counts = texts.counts | {"cap": {split: cap_counts(rows) for split, rows in pairs.items()}}
        counts["max_length"] = self.training.max_length
        counts["adapted"] = self.adapt(counts["train"])
        self.begin({split: fingerprint(rows) for split, rows in pairs.items()}, counts)
        self.preparation_seconds = time.perf_counter() - started
        self.say(describe_data(counts) + describe_cuts(counts, self.data))
        self.say(describe_format(counts["dialogue_format"], self.tokenizer, pairs["train"][0]))
        return pairs

    def _facts(self, args: Any) -> dict[str, Any]:
        rows = (self.texts[split]["pair"][:] for split in ("train", "validation"))
        return self.facts(args, *rows, max_length=args.max_length, max_response_length=self.data.max_response_length)

    def _sources(self) -> list[tuple[str, str]]:
        """(name, flag) of each source of a tokenizer. The first one is used."""
        found = []
        if self.reference:  # its tokenizer has the format that it was trained with
            found.append((self.reference, "--reference"))
        if self.base:
            found.append((self.base, "--model_name_or_path"))
        return found

    def _shown(self, split: str, index: int, row: dict[str, Any]) -> str:
        """A prompt for display, as a dialogue. A truncated prompt has only the turns that the model sees."""
        texts = self.texts[split][index]
        if not row["prompt_tokens_dropped"]:
            return str(texts["shown"])
        seen = str(self.tokenizer.decode(row["prompt_ids"], skip_special_tokens=True))
        if not self.texts.ends_turns:  # no chat template: the text is a dialogue
            return seen
        return newest_turns(texts["shown"], len(texts["turn_starts"]) + 1 - row["turns_dropped"], seen)

    # --- the reference -------------------------------------------------------------------------------------------

    def make_reference(self, pairs: dict[str, Dataset]) -> None:
        """Save the reference in reference/: train it with SFT, or copy the given model."""
        set_seed((self.sft or self.training).seed)
        if self.past("sft", self.run.reference, self.run.summary.get("sft")):
            return
        if self.sft is None:
            name, flag = self._sources()[0]
            model = self._load(name, flag)
            self._prepare(model)
            save = model.save_pretrained if self.run.main_process else silent
            facts = read_facts(local_model(name, flag), None, flag)
            if not hasattr(model, "peft_config"):
                facts |= {"copy_of": full_model(name, flag)}
            self.publish(self.run.reference, save, self.tokenizer, facts)
            self.run.summarize(sft={"skipped": name})
            return
        model = self._load(str(self.base), "--model_name_or_path")
        self._prepare(model)
        checkpoint = self.checkpoint("sft")
        # not `evaluate` before training: accelerate would treat the model as prepared and never average gradients
        args = dataclasses.replace(self.arguments("sft", self.sft), eval_on_start=checkpoint is None)
        as_rows = partial(sft_rows, completion_only_loss=args.completion_only_loss is not False)
        held_out = as_rows(pairs["validation"])
        with adapter_refusals():
            trainer = TextSFTTrainer(
                model=model,
                args=args,
                train_dataset=as_rows(pairs["train"]),
                eval_dataset=held_out,
                processing_class=self.tokenizer,
                peft_config=None if hasattr(model, "peft_config") else self._new_adapter(),
            )
        del model  # so that `free` can free it
        use_run_callbacks(trainer, self.run, "sft", "SFT")
        if isinstance(self.training, TextSFTConfig) and not self.training.merge_adapter:
            self.push_saves(trainer)
        seconds, _ = self.train(trainer, "sft")
        before = self.run.logged("sft", "validation", 0)
        evaluated = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
        kept = epochs(trainer)["kept_step"]
        after = evaluated[kept] if kept in evaluated else trainer.evaluate()["eval_loss"]
        self.publish(self.run.reference, trainer.save_model, self.tokenizer, self._facts(args))
        self.run.summarize(
            sft={
                "train": {"loss": trainer.mean_training_loss},
                "validation": {"loss_before": before and before["loss"], "loss_after": after, "n": len(held_out)},
                "steps": trainer.state.global_step,
                "seconds": seconds,
            }
        )
        free(trainer)

    def publish(self, folder: Path, save: Callable[[str], Any], processor: Any, facts: dict[str, Any]) -> None:
        """`Job.publish`. An adapter's folder also gets a generation_config.json: its base's may lack a stop token."""

        def save_with_ends(path: str) -> None:
            save(path)
            if self.run.main_process and (Path(path) / "adapter_config.json").is_file():
                ids = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
                GenerationConfig(eos_token_id=stop_tokens(self.tokenizer), **ids).save_pretrained(path)

        super().publish(folder, save_with_ends, processor, facts)

    def _prepare(self, model: Any) -> None:
        """Raise a UserError if the model is too small for the run, and set the stop tokens that are saved with it."""
        new_tokens = self.samples.max_new_tokens if self.samples.num_samples else 0
        check_fits(model, self.tokenizer, self.training.max_length, new_tokens)
        end_answers(model, self.tokenizer)

    def _load(self, name: str | Path, flag: str) -> Any:
        return load_model(str(name), self.model, self.training.trust_remote_code, flag)

    # --- the policy ----------------------------------------------------------------------------------------------

    def cache_reference(self, pairs: dict[str, Dataset]) -> None:
        """Cache the reference's log-probabilities for later runs, unless the cache is disabled."""
        if not self.training.precompute_ref_log_probs or self.training.reference_cache_dir == "none":
            return
        trainer = self._dpo_trainer(pairs)  # computes those of training and validation
        trainer.add_reference(pairs["test"])
        throughput = {"preparation_seconds": self.preparation_seconds, "reference_seconds": trainer.reference_seconds}
        self.run.summarize(throughput=throughput)
        free(trainer)

    def _dpo_trainer(self, pairs: dict[str, Dataset]) -> TextDPOTrainer:
        reference = self.run.reference
        model = self._load(reference, "reference")
        adapter_on_full = self.model.use_peft and not (reference / "adapter_config.json").is_file()
        args = self.arguments("dpo", self.training)
        sharded = is_sharded()
        if sharded and self.model.use_peft:
            args.precompute_ref_log_probs = False  # the policy can't run without its adapter before it is sharded
        ref_model = None
        if (sharded or not args.precompute_ref_log_probs) and not self.model.use_peft:
            ref_model = self._load(reference, "reference")
        with adapter_refusals():
            return TextDPOTrainer(
                model=model,
                ref_model=ref_model,
                args=args,
                train_dataset=pairs["train"],
                eval_dataset=pairs["validation"],
                processing_class=self.tokenizer,
                peft_config=self._new_adapter() if adapter_on_full else None,
            )

    def _new_adapter(self) -> Any:
        """The configuration of a new adapter, or None. It has the base's revision, so that PEFT loads the same base."""
        config = get_peft_config(self.model)
        if config is not None and not Path(full_model(*self._sources()[0])).is_dir():
            config.revision = self.model.model_revision
        return config

    def merge_adapter(self) -> None:
        """With --merge_adapter, replace the trained adapter by the full model."""
        folder = self.run.policy if isinstance(self.training, TextDPOConfig) else self.run.reference
        if self.training.merge_adapter and (folder / "adapter_config.json").is_file():
            save = partial(save_merged, folder, self.model, self.training.trust_remote_code, self.tokenizer)
            self.publish(folder, save if self.run.main_process else silent, self.tokenizer, self._facts(self.training))

    def make_policy(self, pairs: dict[str, Dataset]) -> None:
        """Train the policy from the reference with DPO, save it in policy/, and evaluate it on the test once."""
        if self.past("dpo", self.run.policy, self.run.summary.get("dpo")):
            return
        set_seed(self.training.seed)  # an adapter is initialized before the trainer sets the seed
        trainer = self._dpo_trainer(pairs)
        args = trainer.args
        use_run_callbacks(trainer, self.run, "dpo", "DPO")
        if not self.training.merge_adapter:  # a checkpoint contains only the adapter
            self.push_saves(trainer)
        test = pairs["test"]
        if args.precompute_ref_log_probs:
            test = trainer.add_reference(test)
            trainer.ref_model = None  # its log-probabilities of all pairs are computed
        timed = self.train(trainer, "dpo")
        loss = trainer.preference_loss
        self.publish(self.run.policy, trainer.save_model, self.tokenizer, self._facts(args))
        if trainer.moves_reference:  # figures compare with the saved reference, not with the updated one
            first = self._load(self.run.reference, "reference")
            trainer.accelerator.unwrap_model(trainer.ref_model).load_state_dict(first.state_dict())
        per_pair = {
            split: preference_metrics(found, loss) | raw_accuracy(found)
            for split, found in (
                ("validation", trainer.validation_scores(epochs(trainer)["kept_step"])),
                ("test", trainer.score(test, "Test")),
            )
        }
        self._summarize(
            "dpo", trainer, pairs["test"], per_pair, timed, {"beta": loss.beta, "loss_type": list(loss.loss_types)},
            reference_seconds=trainer.reference_seconds,
            reference_pairs_read_from_cache=trainer.reference_pairs_read,
        )  # fmt: skip

    def _summarize(
        self,
        stage: str,
        trainer: Any,
        pairs: Dataset,
        per_pair: dict[str, Any],
        timed: tuple[float, int],
        settings: dict[str, Any],
        **throughput: Any,
    ) -> None:
        """Write the figures of the last stage to the run's files, and free the trainer."""
        state = trainer.state
        figures = {split: with_intervals(found) for split, found in per_pair.items()}
        seconds, first = timed
        rows_trained = (state.global_step - first) / state.global_step * state.epoch * len(trainer.train_dataset)
        self.run.log(stage, "test", state.global_step, state.epoch, figures["test"])
        self.run.write_rows("scores.jsonl", self._scored(pairs, per_pair["test"]))
        of_stage = {"train": trainer.last_train_metrics(), **figures, "steps": state.global_step, **epochs(trainer)}
        throughput |= {
            "preparation_seconds": self.preparation_seconds,
            f"{stage}_seconds": seconds,
            f"{stage}_pairs_per_second": rows_trained / seconds,
        }
        self.run.summarize(**{stage: of_stage | settings}, throughput=throughput)
        free(trainer)

    # --- the reward model ----------------------------------------------------------------------------------------

    def make_reward_model(self, pairs: dict[str, Dataset]) -> None:
        """Train a Bradley–Terry model from the reference, save it in reward_model/, and test it once."""
        if self.past("reward", self.run.reward_model, self.run.summary.get("reward")):
            return
        args = self.arguments("reward", self.training)
        peft_config = get_peft_config(self.model)
        if peft_config is not None:
            peft_config.task_type = "SEQ_CLS"  # PEFT then trains the whole new head
        rows = {split: reward_rows(pairs[split]) for split in SPLITS}
        untrained = partial(
            untrained_reward_model, str(self.run.reference), self.model, args.trust_remote_code, "reference", args.seed
        )
        with adapter_refusals():
            trainer = TextRewardTrainer(
                model=untrained(),
                args=args,
                train_dataset=rows["train"],
                eval_dataset=rows["validation"],
                processing_class=self.tokenizer,
                peft_config=peft_config,
            )
        use_run_callbacks(trainer, self.run, "reward", "Reward model")
        if not args.merge_adapter:
            self.push_saves(trainer)
        timed = self.train(trainer, "reward")
        save = partial(save_reward_model, trainer, untrained)
        self.publish(self.run.reward_model, save, self.tokenizer, self._facts(args))
        per_pair = {split: trainer.pair_figures(rows[split], split) for split in ("validation", "test")}
        settings = {"center_rewards_coefficient": args.center_rewards_coefficient}
        self._summarize("reward", trainer, pairs["test"], per_pair, timed, settings)

    def _scored(self, pairs: Dataset, figures: dict[str, Any]) -> list[dict[str, Any]]:
        """The rewards of every test pair. The pairs with the smallest and largest margins also have their texts."""
        chosen, rejected = figures["rewards/chosen"], figures["rewards/rejected"]
        rows: list[dict[str, Any]] = [
            {
                "pair": at,
                "chosen_reward": chosen[at],
                "rejected_reward": rejected[at],
                "margin": chosen[at] - rejected[at],
            }
            for at in range(len(pairs))
        ]
        for at in extremes(figures["rewards/margins"]):
            texts = pairs[int(at)]
            rows[at]["prompt"] = self._shown("test", int(at), texts)
            for name in ("chosen", "rejected"):
                rows[at][name] = self.tokenizer.decode(texts[f"{name}_ids"], skip_special_tokens=True)
        return rows

    # --- answers and files ---------------------------------------------------------------------------------------

    def write_samples(self, pairs: dict[str, Dataset]) -> None:
        """Write samples.jsonl: the first test pairs, and the answers of base, reference and policy to their prompts."""
        count = min(self.samples.num_samples, len(pairs["test"]))
        if count == 0 or not self.run.main_process:
            return
        shown = pairs["test"].select(range(count))
        models: dict[str, Callable[[], Any]] = {}
        if self.base and self.run.summary["sft"].get("skipped") != self.base:  # else the reference is the base
            models["base"] = partial(self._load, str(self.base), "--model_name_or_path")
        for name, folder in (("reference", self.run.reference), ("policy", self.run.policy)):
            if folder.is_dir():
                models[name] = partial(self._load, folder, name)
        answers = {name: self._answers(name, load(), shown["prompt_ids"][:]) for name, load in models.items()}
        rows = []
        for index, pair in enumerate(shown):
            texts = {"prompt": self._shown("test", index, pair)} | {
                name: self.tokenizer.decode(pair[f"{name}_ids"], skip_special_tokens=True)
                for name in ("chosen", "rejected")
            }
            given = {name: {"greedy": texts[index]} for name, texts in answers.items()}
            rows.append({**texts, "answers": given})
        self.run.write_rows("samples.jsonl", rows)

    def _answers(self, name: str, model: Any, prompts: list[list[int]]) -> list[str]:
        if not getattr(model, "is_quantized", False):
            # autocast would convert float32 weights for every token
            model.to(self.training.device, torch.bfloat16 if self.training.bf16 else None)
        prompts = answerable(model, prompts, self.samples.max_new_tokens)
        answers = answer(model, self.tokenizer, prompts, self.samples.max_new_tokens, description=f"{name} answers")
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)

    def finish(self) -> None:
        """Finish the run and write the model card."""
        base = str(self.base or self.reference)
        folder, ends = self.run.trained, stop_tokens(self.tokenizer)
        if len(ends) > 1 and (folder / "adapter_config.json").is_file():
            end = self.tokenizer.convert_ids_to_tokens(ends[-1])
            self.say(
                f"{folder} is an adapter: transformers' pipeline uses the stop tokens of its base, which may not "
                f"include {end}; pass generation_config=GenerationConfig.from_pretrained('{folder}') with each call, "
                "or train with --merge_adapter"
            )
        self.end(describe_results, partial(write_card, self.run, self.run.trained, base))


@contextmanager
def adapter_refusals() -> Iterator[None]:
    """Convert PEFT's errors about an adapter's target layers to UserErrors."""
    try:
        yield
    except ValueError as error:
        if not re.search("target.(modules|parameters)", str(error), re.IGNORECASE):
            raise
        raise UserError(
            f"--use_peft: {first_line(error)}; pass layers of the model with --lora_target_modules (all-linear selects "
            "every linear layer)"
        ) from None


def end_answers(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the model's stop tokens to `stop_tokens`, so that they are saved with it."""
    stops = stop_tokens(tokenizer)
    base_model(model).generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]


def save_merged(
    adapter: Path, model: TextModelConfig, trust_remote_code: bool, tokenizer: PreTrainedTokenizerBase, folder: str
) -> None:
    """Merge the adapter in the folder `adapter`, and save the full model in `folder`."""
    merged = merged_model(str(adapter), model, trust_remote_code)
    end_answers(merged, tokenizer)
    merged.save_pretrained(folder)


def merge_run(path: Path) -> None:
    """Merge the adapter of a finished run into a full model, and update its card. A full model is not changed."""
    run = RunFolder(path)
    run.open(resume=True)
    folder, config = run.trained, run.config
    if not (folder / "adapter_config.json").is_file():
        return
    model, reference = TextModelConfig(**config["model"]), config["training"].get("reference")
    trust_remote_code = config["training"]["trust_remote_code"]
    tokenizer = load_tokenizer(str(folder), model, trust_remote_code, str(folder))
    aside = folder.with_name(folder.name + ASIDE)
    save_merged(folder, model, trust_remote_code, tokenizer, str(aside))
    tokenizer.save_pretrained(str(aside))
    write_facts(aside, read_facts(str(folder), None, str(folder)))
    replace_folder(aside, folder)
    write_card(run, folder, model.model_name_or_path or reference or SMOLLM2)


def describe_data(counts: dict[str, Any]) -> str:
    """Describe the data: layout, splits, dropped rows and truncation."""
    dropped = ", ".join(f"{number} {reason}" for reason, number in counts["dropped"].items() if number) or "none"
    left_out = f", {counts['left_out']} unused (their conversations are held out)" if counts["left_out"] else ""
    repaired = f"; roles repaired for the template: {counts['roles_repaired']}" if counts["roles_repaired"] else ""
    cap = {name: sum(split[name] for split in counts["cap"].values()) for name in counts["cap"]["train"]}
    ignored = f"; ignored columns: {', '.join(counts['ignored_columns'])}" if counts["ignored_columns"] else ""
    merged = (
        f"; in {cap['prompts_merged']} pairs a token spans the prompt and the response, and belongs to the response"
        if cap["prompts_merged"]
        else ""
    )
    layout = f"layout: {'; '.join(counts['layouts'])}\n" if counts["layouts"] else ""
    return layout + (
        f"pairs: {counts['train']} train, {counts['validation']} validation, {counts['test']} test{left_out}; "
        f"dropped: {dropped}{repaired}; max_length {counts['max_length']}: {cap['prompts_shortened']} prompts lost "
        f"{cap['turns_dropped']} turns, {cap['chosen_cut'] + cap['rejected_cut']} responses truncated, "
        f"{cap['pairs_lost'] or 'no'} pairs lost{merged}{ignored}{describe_left_out(counts)}"
    )


def describe_format(dialogue_format: str, tokenizer: PreTrainedTokenizerBase, pair: dict[str, Any]) -> str:
    """Describe the format of dialogues, and show a pair as the model sees it, with special tokens. Long texts are
    truncated on the left."""
    how = "the tokenizer's chat template" if dialogue_format == "chat" else "plain text (Human:, Assistant:)"
    lines = [f"dialogue format: {how}; the first training pair as the model sees it"]
    for name in ("prompt", "chosen", "rejected"):
        text = str(tokenizer.decode(pair[f"{name}_ids"])).replace("\n", "\\n")
        lines.append(f"  {name:<8}  {'…' if len(text) > SHOWN_CHARACTERS else ''}{text[-SHOWN_CHARACTERS:]}")
    return "\n".join(lines)


def describe_results(summary: dict[str, Any]) -> str:
    """Format the tables at the end of a run."""
    return describe_run(summary, "pairs") + "\n"
