"""TRL's SFT and DPO trainers with this project's losses, scoring and exact evaluation."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from accelerate.utils.other import is_repeated_blocks
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import DPOTrainer, SFTTrainer
from trl.trainer.utils import use_adapter

from resdpo_trl.errors import UserError
from resdpo_trl.losses import LogProbs
from resdpo_trl.metrics import preference_metrics, training_figures
from resdpo_trl.scorer import score_rows
from resdpo_trl.text.attention import FLEX
from resdpo_trl.text.config import TextDPOConfig, TextModelConfig, TextSFTConfig
from resdpo_trl.text.data import tokenized_pairs
from resdpo_trl.text.model import base_model, check_positions, load_model, load_tokenizer
from resdpo_trl.text.reference_cache import (
    cache_folder,
    forward_config,
    read_reference,
    reference_key,
    weights_digest,
    write_reference,
)
from resdpo_trl.text.scoring import add_response_head, check_adapters, pair_logps, predicted_logps
from resdpo_trl.text.tokens import LabelCollator, PairCollator, longest_sequence
from resdpo_trl.training.arguments import preference_loss
from resdpo_trl.training.callbacks import TIMINGS
from resdpo_trl.training.processes import is_sharded, mean_over_processes, own_rows
from resdpo_trl.training.trainer import RunTrainer


class LengthSampler(Sampler[int]):
    """Sample batches of rows of similar length in random order. The seed and the epoch determine them on all processes.

    Each group of 50 random batches is sorted by length. transformers' own grouping uses fewer batches for small data,
    and then pads three times as much. The batches are then shuffled, so that an epoch does not go from long to short.
    The longest row stays first, so that a batch that does not fit in memory fails immediately.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        self.batch_size, self.lengths, self.seed, self.epoch = batch_size, lengths, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        grouped = get_length_grouped_indices(self.lengths, self.batch_size, mega_batch_mult=50, generator=generator)
        batches = [grouped[at : at + self.batch_size] for at in range(0, len(grouped), self.batch_size)]
        short = batches.pop() if len(grouped) % self.batch_size else []  # only the last batch may be short
        first, middle = batches[:1], batches[1:]
        shuffled = [middle[at] for at in torch.randperm(len(middle), generator=generator).tolist()]
        return iter([row for batch in [*first, *shuffled, short] for row in batch])


@torch.no_grad()
def check_updates(model: torch.nn.Module, args: TrainingArguments) -> None:
    """Raise a UserError if trainable weights have 16 bits, and these are too coarse for the learning rate.

    An AdamW step changes a weight by about the learning rate (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, §2.1).
    Full fine-tuning raises if this change rounds to zero for more than half of the weights. Loss scaling does not
    support 16-bit gradients. With --fp16, full fine-tuning therefore raises, and adapters, which TRL casts to bfloat16
    for quantized models, are converted to float32.
    """
    coarse = [each for each in model.parameters() if each.requires_grad and each.dtype in (torch.bfloat16, torch.half)]
    if not coarse:
        return
    if hasattr(model, "peft_config"):
        for each in coarse if args.fp16 else ():
            each.data = each.data.float()
        return
    kind = str(coarse[0].dtype).removeprefix("torch.")
    fix = "remove --dtype (training also multiplies in 16 bits without it), or train an adapter (--use_peft)"
    if args.fp16:
        raise UserError(f"the model's weights are {kind}, but --fp16 supports only float32 weights: {fix}")
    kept = sum(int((each + args.learning_rate == each).sum()) for each in coarse)
    share = kept / max(sum(each.numel() for each in coarse), 1)  # a shard may be empty
    if share > 0.5:
        raise UserError(
            f"the model's weights are {kind}, and at learning rate {args.learning_rate:g} a step rounds to no "
            f"change for {share:.0%} of them: {fix}"
        )


class TextTrainer(RunTrainer):
    """Base class of the text trainers: batches of similar length, counts of tokens, and scoring of all rows.

    `columns` are the required columns of rows. The class must precede TRL's trainers in a class's bases.
    """

    model: Any
    _total_train_tokens: int  # TRL's
    columns: tuple[str, ...]

    def __init__(self, *args: Any, **kwargs: Any):
        held_out, config = kwargs.get("eval_dataset"), kwargs["args"]
        figures: list[str] = list(config.figures)
        if isinstance(held_out, dict):
            figures = [f"{name}_{figure}" for name in held_out for figure in figures]
            if not config.load_best_model_at_end:
                config.metric_for_best_model = None
        best = config.metric_for_best_model
        if best is not None and best.removeprefix("eval_") not in figures:
            raise UserError(f"metric_for_best_model {best}: must be among {', '.join(figures)}; or pass select='last'")
        super().__init__(*args, **kwargs)
        held_out = self.eval_dataset
        for rows in (self.train_dataset, *(held_out.values() if isinstance(held_out, dict) else [held_out])):
            if rows is not None:
                check_positions(base_model(self.model), self.longest_sequence(rows))
        check_updates(self.model, self.args)

    def create_accelerator_and_postprocess(self) -> None:
        """With --torch_compile, compile the model's repeated blocks with dynamic batch sizes and widths.

        accelerate would compile the whole model, including the response head, once per shape, until torch reaches its
        recompilation limit and runs it uncompiled. The blocks share two graphs, one with gradients and one without.
        """
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.dynamo_plugin
        if plugin.backend == DynamoBackend.NO:
            return
        options = plugin.to_kwargs() | {"dynamic": True}
        plugin.backend = DynamoBackend.NO
        for blocks in filter(is_repeated_blocks, base_model(self.model).modules()):
            for block in blocks:
                block.compile(**options)

    def longest_sequence(self, rows: Dataset) -> int:
        """Tokens of the longest sequence of positions."""
        return max(rows["length"][:])

    def _note_tokens(self, real: Tensor) -> None:
        """Count the (R, T) tokens of a step. `real` is False for padding."""
        count = real.sum()
        self.noted["tokens"].append(torch.stack([count, real.numel() - count]))

    def step_figures(self) -> dict[str, float]:
        found = super().step_figures()
        if tokens := self.noted.pop("tokens", []):
            real, padding = self.accelerator.reduce(torch.stack(tokens).sum(0)).tolist()
            self._total_train_tokens += real
            found |= {"num_tokens": self._total_train_tokens, "padding": padding / (real + padding)}
        return found

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # for --include_num_input_tokens_seen: with prefix sharing the mask has an element per query and key
        real = inputs["copies"] > 0 if "copies" in inputs else inputs["attention_mask"]
        super()._track_num_input_tokens({**inputs, "attention_mask": real})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # a checkpoint stores a tied weight once, and transformers would warn that it is missing
        tied = getattr(base_model(self.model), "all_tied_weights_keys", {})
        if load_result.unexpected_keys or not set(load_result.missing_keys) <= set(tied):
            super()._issue_warnings_after_load(load_result)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthSampler(batch, dataset["length"][:], self._data_seed)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        _check_rows(dataset, self.columns)
        return dataset  # already tokenized and truncated

    def pair_figures(self, dataset: Dataset, description: str = "Scoring") -> dict[str, np.ndarray]:
        """Figures of every pair under TRL's names, each (N,), in the order of the data set."""
        raise NotImplementedError

    def figures(self, rows: Dataset, description: str) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.pair_figures(rows, description).items()}

    def last_train_metrics(self) -> dict[str, float]:
        """The last logged training figures of pairs."""
        # skips the line at the end of training, which has the mean loss of the whole training
        logs = (entry for entry in reversed(self.state.log_history) if {"loss", "rewards/margins"} <= entry.keys())
        left_out = ("step", "epoch", *TIMINGS)
        return {name: value for name, value in next(logs, {}).items() if not name.endswith(left_out)}

    def _over_rows(
        self,
        dataset: Dataset,
        function: Any,
        description: str,
        batch_size: int | None = None,
    ) -> list[Tensor]:
        """Apply `function(model, batch)` to all rows. Return its outputs on the CPU in the data set's order.

        `batch_size` is the number of rows per device. The default is --per_device_eval_batch_size. The rows of a batch
        have similar lengths. See `score_rows`.
        """
        _check_rows(dataset, self.columns)
        model = self.model_wrapped

        def of_batch(batch: dict[str, Any]) -> Sequence[Tensor]:
            return function(model, self._prepare_inputs(batch))

        return score_rows(
            of_batch,
            dataset,
            self.data_collator,
            batch_size or self.args.per_device_eval_batch_size,
            [model],
            description,
            dataset["length"][:],
            workers=self.args.dataloader_num_workers,
            delay=0,  # a batch may take seconds
            quiet=self.args.disable_tqdm,
        )


class TextSFTTrainer(TextTrainer, SFTTrainer):
    """`trl.SFTTrainer` for the rows of `resdpo_trl.text.tokens.sft_rows`.

    The plain training loss and the evaluation use the response head, and omit the vocabulary-wide metrics (token
    accuracy, entropy). benchmarks/LOG.md lists the savings. Evaluation is the mean over all tokens with a label instead
    of over batches, and omits the router loss of a mixture of experts.
    """

    columns = ("input_ids", "labels", "length")

    def __init__(self, model: str | PreTrainedModel, args: TextSFTConfig, **options: Any):
        """`options` are TRL's keyword arguments. `model` may be a folder, a Hub id or `smollm2`.

        Raises:
            UserError: an argument is not supported, or the rows lack columns.
        """
        names = (
            "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "quantization_config",
            "formatting_func",
        )  # fmt: skip
        check_arguments(self, args, TextSFTConfig, **{name: options.get(name) for name in names})
        if isinstance(model, str):
            model = load_model(model, TextModelConfig(), args.trust_remote_code, "model")
        # TRL computes other losses
        self._plain = args.loss_type == "nll" and not args.label_smoothing_factor and not args.use_liger_kernel
        add_response_head(base_model(model))
        check_adapters(model, options.get("peft_config"), prefix_sharing=False)
        _check_router(base_model(model), args.router_aux_loss_coef)
        super().__init__(model=model, args=args, **options)
        self.data_collator = LabelCollator(self.data_collator)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The negative log-likelihood of the tokens with a label, divided by their number on all processes."""
        if not self._plain:
            rest = {name: value for name, value in inputs.items() if name not in ("predicted_at", "predicted")}
            return super().compute_loss(model, rest, return_outputs, num_items_in_batch)
        weights = inputs["attention_mask"] if self.aux_loss_enabled else None
        logps, *router_loss = predicted_logps(model, inputs, weights)
        self._note_tokens(inputs["attention_mask"])
        if num_items_in_batch is None:
            loss, steps = -logps.sum() / max(len(logps), 1), 1
        else:
            # DDP averages gradients over processes, but `num_items_in_batch` counts the tokens of all processes
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = -logps.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1) * processes
            steps = self.current_gradient_accumulation_steps
        for each in router_loss:  # of a mixture of experts, averaged over accumulation steps
            loss = loss + self.router_aux_loss_coef * each / steps
            self.means.add({"aux_loss": each.detach()[None]})
        return loss

    def figures(self, rows: Dataset, description: str) -> dict[str, float]:
        """The mean loss over all tokens with a label."""
        self.model.eval()  # TRL's `log` uses the mode to detect evaluation
        losses, tokens = self._over_rows(rows, self._row_losses, description)
        return {"loss": float(losses.double().numpy().sum() / tokens.numpy().sum())}

    def _row_losses(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B,) sums of the negative log-likelihood over each row's tokens with a label, and (B,) numbers of these."""
        with self.accelerator.autocast():
            (logps,) = predicted_logps(model, inputs)
        labels = inputs["labels"]
        sums = logps.new_zeros(len(labels)).index_add(0, inputs["predicted_at"][0], -logps)
        return sums, (labels[:, 1:] != -100).sum(1)

    def keep_rows(self, batch: dict[str, Any], own: int, everywhere: int) -> dict[str, Any]:
        # the loss is over the tokens with a label on all processes, so a row without labels does not change it
        kept = batch["predicted_at"][0] < own
        at = {"predicted_at": batch["predicted_at"][:, kept], "predicted": batch["predicted"][kept]}
        batch = {name: value[: max(own, 1)] for name, value in batch.items()} | at
        if own == 0:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch


class TextDPOTrainer(TextTrainer, DPOTrainer):
    """`trl.DPOTrainer` with the same arguments in the same order. Its data are raw pairs (see
    `resdpo_trl.text.data.tokenized_pairs`) or tokenized pairs (see `resdpo_trl.text.tokens.tokenize`).

    It differs from TRL's as follows. The losses are those of `resdpo_trl.losses`. A pair's prompt runs once
    (`prefix_sharing`). Evaluation is the mean over all pairs instead of over batches, and omits the router loss of a
    mixture of experts, which depends on batches. Metrics are gathered when they are logged instead of at every step.
    The vocabulary-wide metrics (entropy, mean logits, token accuracy) are omitted: each takes a pass over the logits.
    """

    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "length")

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: str | PreTrainedModel | None = None,
        args: TextDPOConfig | None = None,
        data_collator: None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: None = None,
        peft_config: Any = None,
    ):
        """The arguments are TRL's. `model` may also be `smollm2`. The default tokenizer is the model's.

        Raises:
            UserError: an argument is not supported, or the pairs can't be used.
        """
        args = args or TextDPOConfig()
        check_arguments(
            self, args, TextDPOConfig, data_collator=data_collator, compute_metrics=compute_metrics,
            quantization_config=quantization_config,
        )  # fmt: skip
        if train_dataset is None:
            raise UserError("train_dataset is required")
        if processing_class is None:
            name = model if isinstance(model, str) else base_model(model).config._name_or_path
            processing_class = load_tokenizer(name, TextModelConfig(), args.trust_remote_code, "model")
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        if isinstance(model, str):
            model = load_model(model, TextModelConfig(), args.trust_remote_code, "model")
        if isinstance(ref_model, str):
            ref_model = load_model(ref_model, TextModelConfig(), args.trust_remote_code, "ref_model")
        several = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        train_dataset = _tokenized(train_dataset, processing_class, args)
        held_out = {
            name: _tokenized(rows, processing_class, args) for name, rows in several.items() if rows is not None
        }
        self._longest_row = max(max(rows["length"][:]) for rows in (train_dataset, *held_out.values()))
        self.preference_loss = preference_loss(args)
        adapter = peft_config is not None or hasattr(model, "peft_config")
        if ref_model is None and not adapter and not args.precompute_ref_log_probs:
            ref_model = copy.deepcopy(model)  # the initial policy
        for each in (model, ref_model):
            if each is not None:
                longest = self._longest_row if args.prefix_sharing else None
                add_response_head(base_model(each), longest, args.max_length)
        check_adapters(model, peft_config, args.prefix_sharing)
        if ref_model is None:
            _check_base_stays(model, peft_config)
        _check_router(base_model(model), args.router_aux_loss_coef)
        self._evaluated: tuple[int, LogProbs] | None = None  # the step of the last evaluation, and its scores
        self.reference_seconds = 0.0  # spent on the reference's log-probabilities before training
        self.reference_pairs_read = 0  # pairs whose log-probabilities were read from the cache
        self._cache = cache_folder(args.reference_cache_dir)
        self._weights: str | None = None  # the digest of the reference's weights, computed on demand
        if is_sharded() and self._cache is not None:
            self._weights = weights_digest(ref_model if ref_model is not None else model)  # before they are sharded
        in_blocks = base_model(model).config._attn_implementation == FLEX
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=PairCollator(processing_class.pad_token_id, args.prefix_sharing, in_blocks),
            train_dataset=train_dataset,
            eval_dataset=held_out if isinstance(eval_dataset, dict) else held_out.get("eval"),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )

    # --- log-probabilities -------------------------------------------------------------------------------------------

    def longest_sequence(self, rows: Dataset) -> int:
        return longest_sequence(rows)  # the positions of both responses follow the prompt's

    def score(self, dataset: Dataset, description: str = "Scoring") -> LogProbs:
        """Log-probabilities of every pair under policy and reference, in the data set's order, on the CPU.

        Those of the reference come from the columns of `add_reference`, or from the reference model without them.

        Raises:
            UserError: the rows have no such columns, there is no reference model, and training has changed the model.
        """
        dataset = self._checked(dataset)
        if "ref_chosen_logps" not in dataset.column_names:
            self._check_reference_is_here()

        def of_batch(model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
            with self.accelerator.autocast():
                chosen, rejected = pair_logps(model, inputs)
            return [*vars(self._with_reference(model, inputs, chosen, rejected)).values()]

        return LogProbs(*self._over_rows(dataset, of_batch, description))

    def _checked(self, dataset: Dataset) -> Dataset:
        """Return the tokenized data set. If it has a longer row than before, check the model again, because the row may
        exceed the model's attention window."""
        dataset = _tokenized(dataset, self.processing_class, self.args)
        longest, model = max(dataset["length"][:]), base_model(self.accelerator.unwrap_model(self.model))
        check_positions(model, self.longest_sequence(dataset))
        if self.args.prefix_sharing and longest > self._longest_row:
            add_response_head(model, longest, self.args.max_length)
            self._longest_row = longest
        return dataset

    def pair_figures(self, dataset: Dataset, description: str = "Scoring") -> dict[str, np.ndarray]:
        scores = self.score(dataset, description)
        if dataset is self.eval_dataset:
            self._evaluated = self.state.global_step, scores
        return preference_metrics(scores, self.preference_loss)

    def validation_scores(self, step: int) -> LogProbs:
        """`score` of the validation pairs under the current weights, which are those of `step`. If the last evaluation
        used the same weights, its scores are returned."""
        if self._evaluated is not None and self._evaluated[0] == step and not self.moves_reference:
            return self._evaluated[1]
        return self.score(self.eval_dataset, "Validation")

    def _with_reference(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], chosen: Tensor, rejected: Tensor
    ) -> LogProbs:
        stored = [inputs[name] for name in ("ref_chosen_logps", "ref_rejected_logps") if name in inputs]
        first, second = (each.to(chosen.dtype) for each in stored or self.compute_ref_log_probs(model, inputs))
        return LogProbs(chosen, rejected, first, second, inputs["chosen_tokens"], inputs["rejected_tokens"])

    # --- the reference -----------------------------------------------------------------------------------------------

    def add_reference(self, dataset: Dataset, description: str = "Reference log-probabilities") -> Dataset:
        """Add the columns ref_chosen_logps and ref_rejected_logps to a data set. Call it before training."""
        dataset = self._checked(dataset)
        self._check_reference_is_here()
        started = time.perf_counter()
        key = self._reference_key(dataset) if self._cache else ""
        found: Any = read_reference(self._cache, key) if self._cache else None
        # either every process reads them, or none does
        everywhere = self.accelerator.reduce(torch.tensor(float(found is not None), device=self.accelerator.device))
        if found is None or everywhere.item() < self.accelerator.num_processes:
            batch_size = self.args.precompute_ref_batch_size
            found = self._over_rows(dataset, self.compute_ref_log_probs, description, batch_size)
            if self._cache and self.is_world_process_zero():
                write_reference(self._cache, key, *found)
        else:
            self.reference_pairs_read += len(dataset)
        self.reference_seconds += time.perf_counter() - started
        chosen, rejected = (each.numpy() for each in found)
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

    def _check_reference_is_here(self) -> None:
        adapter = hasattr(self.accelerator.unwrap_model(self.model), "peft_config")
        if self.state.global_step > 0 and self.ref_model is None and not adapter:
            raise UserError(
                "the rows have no log-probabilities of the reference, and training has changed the model: call "
                "add_reference before training, pass a ref_model, or set precompute_ref_log_probs=False"
            )

    def _reference_key(self, dataset: Dataset) -> str:
        args = self.args
        model = self.accelerator.unwrap_model(self.model if self.ref_model is None else self.ref_model)
        if self._weights is None:
            # the trained adapter is not part of the reference: TRL keeps a copy of a continued adapter as "ref"
            self._weights = weights_digest(model, ".default." if hasattr(model, "peft_config") else None)
        forward = {
            "precision": (args.bf16, args.fp16, args.tf32),
            "device": self.accelerator.device.type,
            # FSDP2 and DeepSpeed round differently than autocast
            "sharded": self.accelerator.distributed_type.value if is_sharded() else None,
            "attention": base_model(model).config._attn_implementation,
            "prefix_sharing": args.prefix_sharing,
            "max_length": args.max_length,
            "config": forward_config(model),
        }
        return reference_key(self._weights, dataset, forward)

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """(B,) chosen and rejected log-probabilities under the reference: `ref_model`, or the policy's base model."""
        with torch.no_grad(), self.accelerator.autocast():
            if self.ref_model is None and hasattr(unwrapped := self.accelerator.unwrap_model(model), "peft_config"):
                # TRL copies a continued adapter to "ref"; a new adapter is disabled
                with use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None):
                    return pair_logps(model, inputs)
            return pair_logps(model if self.ref_model is None else self.ref_model, inputs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset if "ref_chosen_logps" in dataset.column_names else self.add_reference(dataset)

    # --- a training step ---------------------------------------------------------------------------------------------

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Tensor:
        chosen, rejected, *router_loss = pair_logps(model, inputs, self.aux_loss_enabled)
        pairs = self._with_reference(model, inputs, chosen, rejected)
        pairs = LogProbs(*(own_rows(inputs, value) for value in vars(pairs).values()))
        losses = self.preference_loss(pairs)
        loss = mean_over_processes(inputs, losses)
        figures = training_figures(pairs, self.preference_loss)
        for each in router_loss:  # of a mixture of experts
            figures["aux_loss"] = each.detach().expand(len(losses))
            loss = loss + self.router_aux_loss_coef * each
        self.means.add(figures)
        real = inputs["copies"] > 0
        self._note_tokens(real[: len(losses) * len(real) // len(inputs["chosen_tokens"])])  # a pair has one row, or two
        return loss


def check_arguments(trainer: Any, args: Any, config: type, **refused: Any) -> None:
    """Raise a UserError for a configuration of another class, and for arguments that a trainer does not support."""
    name = type(trainer).__name__
    if not isinstance(args, config):
        raise UserError(f"args is of class {type(args).__name__}: {name} takes {config.__name__}")
    for each, value in refused.items():
        if value is not None:
            raise UserError(f"{each} is not supported by {name}: omit it")


def _tokenized(rows: Any, tokenizer: Any, args: TextDPOConfig) -> Any:
    """Tokenize pairs if they are raw. Return tokenized pairs unchanged."""
    if isinstance(rows, Dataset) and "prompt_ids" not in rows.column_names:
        return tokenized_pairs(rows, tokenizer, args.max_length or 0)
    if rows is not None:
        _check_rows(rows, TextDPOTrainer.columns)
    return rows


def _check_base_stays(model: Any, new: Any) -> None:
    """Raise a UserError for an adapter whose initialization changes the base model's weights (PiSSA, OLoRA, CorDA,
    LoftQ, LoRA-GA), because the base model without the adapter is then not the reference.
    """
    for config in (new, *getattr(model, "peft_config", {}).values()):
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal", "mica"):
            raise UserError(
                f"init_lora_weights {start} changes the weights of the base model, which is the reference: omit it, or "
                "pass a ref_model"
            )


def _check_router(model: PreTrainedModel, coefficient: float | None) -> None:
    if coefficient and not hasattr(model.config.get_text_config(), "output_router_logits"):
        name = type(model).__name__
        raise UserError(f"--router_aux_loss_coef {coefficient}: {name} has no router logits; remove the flag")


def _check_rows(rows: Any, columns: tuple[str, ...]) -> None:
    if not isinstance(rows, Dataset):
        raise UserError(f"the rows are of class {type(rows).__name__}: pass a datasets.Dataset, which can be sorted")
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise UserError(
            f"the rows have no column {', '.join(missing)} (found: {', '.join(rows.column_names)}): create them with "
            "resdpo_trl.text.tokens.tokenize, followed by sft_rows or reward_rows for SFT or reward models"
        )
