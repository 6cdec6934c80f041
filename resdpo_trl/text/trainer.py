"""TRL's DPO trainer with this project's loss, scoring and exact evaluation."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from accelerate.utils.other import is_repeated_blocks
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from trl import DPOTrainer, SFTTrainer
from trl.trainer.utils import use_adapter

from resdpo_trl.errors import UserError
from resdpo_trl.losses import LogProbs
from resdpo_trl.metrics import RunningMeans, preference_metrics, training_figures
from resdpo_trl.scorer import score_rows
from resdpo_trl.text.attention import FLEX
from resdpo_trl.text.config import TextDPOConfig, TextModelConfig, TextSFTConfig
from resdpo_trl.text.data import tokenized_pairs
from resdpo_trl.text.model import base_model, load_model, load_tokenizer
from resdpo_trl.text.reference_cache import (
    cache_folder,
    forward_config,
    read_reference,
    reference_key,
    weights_digest,
    write_reference,
)
from resdpo_trl.text.scoring import (
    add_response_head,
    check_adapters,
    check_float32,
    check_router_loss,
    pair_logps,
    pair_logps_and_router_loss,
)
from resdpo_trl.text.tokens import LabelCollator, PairCollator
from resdpo_trl.training.arguments import preference_loss
from resdpo_trl.training.callbacks import TIMINGS
from resdpo_trl.training.processes import EveryRowOnce, is_sharded, mean_over_processes, own_rows
from resdpo_trl.training.reference import MovingReference
from resdpo_trl.training.resume import Resumable


class LengthSampler(LengthGroupedSampler):
    """Batches of like length in random order, drawn anew each epoch from seed and epoch: the same on every process.

    Each run of 50 random batches is sorted by length (transformers' own grouping takes fewer where the data are small,
    and pads three times as much there); then the batches are shuffled, for an epoch should not go from long to short.
    The longest row stays first, so that too large a batch fails at once.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

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
    """Raise a UserError where the weights in training are 16-bit numbers too coarse for the learning rate.

    An AdamW step moves a weight by about the learning rate (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, §2.1).
    Full fine-tuning is refused where adding that to a weight rounds back to the weight itself for more than half of
    them. Loss scaling takes no 16-bit gradients: adapters, which TRL casts to bfloat16 for quantized models, become
    float32, and full fine-tuning is refused.
    """
    adapter = hasattr(model, "peft_config")
    coarse = [
        each for each in model.parameters() if each.requires_grad and each.dtype in (torch.bfloat16, torch.float16)
    ]
    if not coarse:
        return
    kind = str(coarse[0].dtype).removeprefix("torch.")
    fix = "drop --dtype (training multiplies in 16 bits without it too), or train an adapter (--use_peft)"
    if args.fp16 and adapter:
        for each in coarse:
            each.data = each.data.float()
    elif args.fp16:
        raise UserError(f"the model's weights are {kind}, and --fp16 scales the loss for float32 weights alone: {fix}")
    elif not adapter:
        kept = sum(int((each + args.learning_rate == each).sum()) for each in coarse)
        share = kept / max(sum(each.numel() for each in coarse), 1)  # a shard may be empty
        if share > 0.5:
            raise UserError(
                f"the model's weights are {kind}, and at learning rate {args.learning_rate:g} a step rounds to no "
                f"change for {share:.0%} of them: {fix}"
            )


class _TextTrainer(EveryRowOnce, Resumable):
    """A Trainer whose `group_by_length` reads the data set's `length` column, that counts tokens without waiting for
    them at every step, and knows tied weights.
    """

    model: Any
    train_dataset: Any
    _total_train_tokens: int  # TRL's
    columns: tuple[str, ...]  # that rows must have

    def __init__(self, *args: Any, **kwargs: Any):
        self._tokens: list[Tensor] = []  # (real, padded) tokens of the steps since the last log
        held_out, config = kwargs.get("eval_dataset"), kwargs["args"]
        figures: list[str] = list(config.figures)
        if isinstance(held_out, dict):
            figures = [f"{name}_{figure}" for name in held_out for figure in figures]
            if not config.load_best_model_at_end:
                config.metric_for_best_model = None
        best = config.metric_for_best_model
        if best is not None and best.removeprefix("eval_") not in figures:
            raise UserError(f"metric_for_best_model {best}: no such figure; evaluation has {', '.join(figures)}")
        super().__init__(*args, **kwargs)
        check_updates(self.model, self.args)

    def create_accelerator_and_postprocess(self) -> None:
        """With --torch_compile, compile the model's repeated blocks, each for all batch sizes and widths.

        accelerate would compile the whole model, the response head included, once per shape until torch gives up and
        runs it uncompiled. The blocks share one graph: one with gradients and one without.
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

    def _note_tokens(self, real: Tensor) -> None:
        """Count a step's (R, T) tokens; `real` is True where one is not padding."""
        count = real.sum()
        self._tokens.append(torch.stack([count, real.numel() - count]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._tokens and not any(name.startswith("eval_") for name in logs):
            tokens = torch.stack(self._tokens).sum(0)
            real, padding = self.accelerator.reduce(tokens).tolist()
            self._total_train_tokens += real
            logs["num_tokens"] = self._total_train_tokens
            logs["padding"] = padding / (real + padding)
            self._tokens.clear()
        super().log(logs, start_time)

    def log_state(self) -> dict[str, Any]:
        return super().log_state() | {"step_tokens": [each.tolist() for each in self._tokens]}

    def load_log_state(self, state: dict[str, Any]) -> None:
        super().load_log_state(state)
        self._tokens = [torch.tensor(each, device=self.accelerator.device) for each in state["step_tokens"]]

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # --include_num_input_tokens_seen: with prefix sharing the mask has a cell for every query and key
        real = inputs["copies"] > 0 if "copies" in inputs else inputs["attention_mask"]
        super()._track_num_input_tokens({**inputs, "attention_mask": real})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # a checkpoint holds a tied weight once; transformers warns as if it had been lost
        tied = getattr(base_model(self.model), "all_tied_weights_keys", {})
        if load_result.unexpected_keys or not set(load_result.missing_keys) <= set(tied):
            super()._issue_warnings_after_load(load_result)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthSampler(batch, dataset["length"][:], seed)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        _check_rows(dataset, self.columns)
        return dataset  # tokenized and capped already


class TextSFTTrainer(_TextTrainer, SFTTrainer):
    """`trl.SFTTrainer` on the rows of `resdpo_trl.text.tokens.sft_rows`.

    What differs from TRL's: the plain loss and that of evaluation go through the response head, without the
    vocabulary-wide metrics (token accuracy, entropy; benchmarks/LOG.md has what that saves); evaluation is the mean
    over all tokens with a label, not over batches, without the router loss of a mixture of experts.
    """

    columns = ("input_ids", "labels", "length")

    def __init__(self, model: str | PreTrainedModel, args: TextSFTConfig, **options: Any):
        """As TRL's, with keywords. `model` may be a folder, a Hub id or `smollm2`.

        Raises:
            UserError: an argument that has no place here, or rows without their columns.
        """
        names = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "quantization_config")
        check_arguments(self, args, TextSFTConfig, options, (*names, "formatting_func"))
        if isinstance(model, str):
            model = load_model(model, TextModelConfig(), args.trust_remote_code, "model")
        # a loss of another kind is TRL's own
        self._plain = args.loss_type == "nll" and not args.label_smoothing_factor and not args.use_liger_kernel
        add_response_head(base_model(model))
        check_adapters(model, options.get("peft_config"), prefix_sharing=False)
        check_router_loss(base_model(model), args.router_aux_loss_coef)
        super().__init__(model=model, args=args, compute_metrics=_token_mean, **options)
        self.data_collator = LabelCollator(self.data_collator)
        self._router_losses = RunningMeans()  # of the steps since the last log

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        # transformers' leaves rows of evaluation out with --dataloader_drop_last, which is of training
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropped

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Negative log-likelihood of the tokens with a label, over their number on all processes."""
        if not self._plain:
            rest = {name: value for name, value in inputs.items() if name not in ("predicted_at", "predicted")}
            return super().compute_loss(model, rest, return_outputs, num_items_in_batch)
        logps, *router_loss = _label_logps(model, inputs, self.aux_loss_enabled)
        self._note_tokens(inputs["attention_mask"])
        if num_items_in_batch is None:
            loss, steps = -logps.sum() / max(len(logps), 1), 1
        else:
            # DDP averages the gradients over processes, and `num_items_in_batch` counts the tokens of all
            processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = -logps.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1) * processes
            steps = self.current_gradient_accumulation_steps
        for each in router_loss:  # of a mixture of experts: a mean of each step's
            loss = loss + self.router_aux_loss_coef * each / steps
            self._router_losses.add({"aux_loss": each.detach()[None]})
        return loss

    def log_state(self) -> dict[str, Any]:
        return super().log_state() | {"router_losses": self._router_losses.state()}

    def load_log_state(self, state: dict[str, Any]) -> None:
        super().load_log_state(state)
        self._router_losses.load_state(state["router_losses"], self.accelerator.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not any(name.startswith("eval_") for name in logs):
            logs.update(self._router_losses.take(self.accelerator.reduce))
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """(B,) negative log-likelihoods, each a sum over a row's tokens with a label, and (B,) numbers of them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            (logps,) = _label_logps(model, inputs)
        row, labels = inputs["predicted_at"][0], inputs["labels"]
        return None, logps.new_zeros(len(labels)).index_add(0, row, -logps), (labels[:, 1:] != -100).sum(1)

    def _keep(self, batch: dict[str, Any], own: int, everywhere: int) -> dict[str, Any]:
        # the loss is over the tokens with a label on all processes: a row without any changes nothing
        kept = batch["predicted_at"][0] < own
        at = {"predicted_at": batch["predicted_at"][:, kept], "predicted": batch["predicted"][kept]}
        batch = {name: value[: max(own, 1)] for name, value in batch.items()} | at
        if own == 0:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return batch


class PairTrainer(_TextTrainer, Trainer):
    """A Trainer of pairs whose evaluation is the mean over all pairs, not over batches."""

    control: Any
    evaluation_seconds = 0.0  # spent in `evaluate` while training

    def pair_figures(self, dataset: Dataset, description: str = "Scoring") -> dict[str, np.ndarray]:
        """Figures of every pair under TRL's names, each (N,), in the data set's order."""
        raise NotImplementedError

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """transformers' `evaluate`: of several data sets each under its name, `eval_NAME_loss` and so on."""
        started = time.perf_counter()
        own: Any = self.eval_dataset
        dataset: Any = (
            own if eval_dataset is None else own[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        )
        if isinstance(dataset, dict):
            every: dict[str, float] = {}
            for name, rows in dataset.items():
                every |= self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
            return every
        figures = self.pair_figures(dataset, "Evaluating")
        metrics = {f"{metric_key_prefix}_{name}": float(values.mean()) for name, values in figures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.evaluation_seconds += time.perf_counter() - started
        return metrics

    def last_train_metrics(self) -> dict[str, float]:
        """The newest training figures that were logged."""
        # not the line at the end of training, which has a mean loss over all of it
        logs = (entry for entry in reversed(self.state.log_history) if {"loss", "rewards/margins"} <= entry.keys())
        return {
            name: value
            for name, value in next(logs, {}).items()
            if name not in ("step", "epoch") and not name.endswith(TIMINGS)
        }

    def _over_pairs(self, dataset: Dataset, function: Any, description: str, batch_size: int | None = None) -> LogProbs:
        """`function(model, batch) -> LogProbs` of all pairs, in the data set's order.

        `batch_size` is the number of pairs per device; --per_device_eval_batch_size by default.
        """
        _check_rows(dataset, self.columns)
        self._set_signature_columns_if_needed()
        signature: list[str] = self._signature_columns or []
        columns = [name for name in signature if name in dataset.column_names]
        model = self.model_wrapped
        found = score_rows(
            lambda batch: [*vars(function(model, self._prepare_inputs(batch))).values()],
            dataset.select_columns(columns),
            self.data_collator,
            batch_size or self.args.per_device_eval_batch_size,
            [model],
            description,
            dataset["length"][:],
            workers=self.args.dataloader_num_workers,
            delay=0,  # a batch may take seconds
            quiet=self.args.disable_tqdm,
        )
        return LogProbs(*found)


class TextDPOTrainer(PairTrainer, MovingReference, DPOTrainer):
    """`trl.DPOTrainer`, with its arguments in its order, on raw pairs, which `resdpo_trl.text.data.tokenized_pairs`
    reads, or on pairs that `resdpo_trl.text.tokens.tokenize` made.

    What differs from TRL's: the loss is `resdpo_trl.losses`; the prompt of a pair runs once (`prefix_sharing`);
    evaluation is the mean over all pairs, not over batches, and has no router loss of a mixture of experts, which is
    one of batches; metrics are gathered when they are logged, not at every step; the vocabulary-wide metrics (entropy,
    mean logits, token accuracy) are left out, for they cost a pass over the logits each.
    """

    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "length")

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
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
        """As TRL's. `model` may be a folder, a Hub id or `smollm2`; the tokenizer is by default the model's.

        Raises:
            UserError: an argument that has no place here, or pairs that can't be used.
        """
        args = args or TextDPOConfig()
        refused = {
            "data_collator": data_collator, "compute_metrics": compute_metrics,
            "quantization_config": quantization_config,
        }  # fmt: skip
        check_arguments(self, args, TextDPOConfig, refused, tuple(refused))
        if train_dataset is None:
            raise UserError("train_dataset is required")
        if processing_class is None:
            name = model if isinstance(model, str) else base_model(model).config._name_or_path
            processing_class = load_tokenizer(name, TextModelConfig(), args.trust_remote_code, "model")
        if isinstance(model, str):
            model = load_model(model, TextModelConfig(), args.trust_remote_code, "model")
        train_dataset = _tokenized(train_dataset, processing_class, args)
        eval_dataset = (
            {name: _tokenized(rows, processing_class, args) for name, rows in eval_dataset.items()}
            if isinstance(eval_dataset, dict)
            else _tokenized(eval_dataset, processing_class, args)
        )
        self.preference_loss = preference_loss(args)
        adapter = peft_config is not None or hasattr(model, "peft_config")
        if ref_model is None and not adapter and not args.precompute_ref_log_probs:
            ref_model = copy.deepcopy(model)  # the policy as it starts
        held_out = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        splits = [rows for rows in (train_dataset, *held_out.values()) if rows is not None]
        self._longest_row = max(max(rows["length"][:]) for rows in splits)
        for each in (model, ref_model):
            if each is not None:
                longest = self._longest_row if args.prefix_sharing else None
                add_response_head(base_model(each), longest, args.max_length)
        check_adapters(model, peft_config, args.prefix_sharing)
        if ref_model is None:
            _check_base_stays(model, peft_config)
        check_router_loss(base_model(model), args.router_aux_loss_coef)
        self._means = RunningMeans()  # of the steps since the last log
        self._evaluated: tuple[int, LogProbs] | None = None  # the step of the last evaluation, and its scores
        self.reference_seconds = 0.0  # spent on the reference's log-probabilities before training
        self.reference_pairs_read = 0  # pairs whose log-probabilities an earlier run had left on disk
        self._cache = cache_folder(args.reference_cache_dir)
        self._weights: str | None = None  # the digest of the reference's, once it is needed
        if is_sharded() and self._cache is not None:
            self._weights = weights_digest(ref_model if ref_model is not None else model)  # while they are whole
        in_blocks = base_model(model).config._attn_implementation == FLEX
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=PairCollator(processing_class.pad_token_id, args.prefix_sharing, in_blocks),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )

    def score(self, dataset: Dataset, description: str = "Scoring") -> LogProbs:
        """Log-probabilities of every pair under policy and reference, in the data set's order, on the CPU.

        Batches are of like length. The reference's come from the columns that `add_reference` wrote, from the
        reference model otherwise.

        Raises:
            UserError: the rows have no such columns, and training has changed the only model there is.
        """
        dataset = _tokenized(dataset, self.processing_class, self.args)
        self._check_longest(dataset)
        if "ref_chosen_logps" not in dataset.column_names:
            self._check_reference_is_here()
        return self._over_pairs(dataset, self._batch_logps, description)

    def _check_longest(self, dataset: Dataset) -> None:
        """Check the model again where a data set has a longer row than those it was checked for, as a window may be
        between the two."""
        longest = max(dataset["length"][:])
        if self.args.prefix_sharing and longest > self._longest_row:
            add_response_head(base_model(self.accelerator.unwrap_model(self.model)), longest, self.args.max_length)
            self._longest_row = longest

    def pair_figures(self, dataset: Dataset, description: str = "Scoring") -> dict[str, np.ndarray]:
        scores = self.score(dataset, description)
        if dataset is self.eval_dataset:
            self._evaluated = self.state.global_step, scores
        return preference_metrics(scores, self.preference_loss)

    def validation_scores(self, step: int) -> LogProbs:
        """`score` of the validation pairs under the weights of `step`, which the model holds; not computed again where
        the last evaluation was of these weights."""
        if self._evaluated is not None and self._evaluated[0] == step and not self.moves_reference:
            return self._evaluated[1]
        return self.score(self.eval_dataset, "Validation")

    def add_reference(self, dataset: Dataset, description: str = "Reference log-probabilities") -> Dataset:
        """The data set with columns ref_chosen_logps and ref_rejected_logps; before training has begun."""
        dataset = _tokenized(dataset, self.processing_class, self.args)
        self._check_reference_is_here()
        self._check_longest(dataset)
        started = time.perf_counter()
        found = self._cached_reference(dataset)
        if found is None:
            pairs = self._over_pairs(dataset, self._reference_only, description, self.args.precompute_ref_batch_size)
            found = pairs.ref_chosen, pairs.ref_rejected
            if self._cache is not None and self.is_world_process_zero():
                write_reference(self._cache, self._reference_key(dataset), *found)
        else:
            self.reference_pairs_read += len(dataset)
        self.reference_seconds += time.perf_counter() - started
        return dataset.add_column("ref_chosen_logps", found[0].numpy()).add_column(
            "ref_rejected_logps", found[1].numpy()
        )

    def _check_reference_is_here(self) -> None:
        adapter = hasattr(self.accelerator.unwrap_model(self.model), "peft_config")
        if self.state.global_step > 0 and self.ref_model is None and not adapter:
            raise UserError(
                "the rows have no log-probabilities of the reference, and the model that was it has been trained: call "
                "add_reference before training, pass a ref_model, or set precompute_ref_log_probs=False"
            )

    def _cached_reference(self, dataset: Dataset) -> tuple[Tensor, Tensor] | None:
        """The log-probabilities as an earlier run left them; every process reads them, or none."""
        if self._cache is None:
            return None
        found = read_reference(self._cache, self._reference_key(dataset), len(dataset))
        everywhere = self.accelerator.reduce(torch.tensor(float(found is not None), device=self.accelerator.device))
        return found if everywhere.item() == self.accelerator.num_processes else None

    def _reference_key(self, dataset: Dataset) -> str:
        if self._weights is None:
            model = self.ref_model if self.ref_model is not None else self.accelerator.unwrap_model(self.model)
            # the adapter in training is no part of the reference: TRL keeps a copy of a continued one as "ref"
            self._weights = weights_digest(model, ".default." if hasattr(model, "peft_config") else None)
        precision = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"
        precision += f" tf32 {self.args.tf32} {self.accelerator.device.type}"
        if is_sharded():  # FSDP2 and DeepSpeed round in other places than autocast
            precision += f" {self.accelerator.distributed_type.value}"
        model = self.accelerator.unwrap_model(self.model)
        attention = base_model(model).config._attn_implementation
        forward = f"{precision} {attention} {'shared' if self.args.prefix_sharing else 'plain'} {forward_config(model)}"
        return reference_key(self._weights, dataset, forward, self.args.max_length)

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B,) chosen and rejected log-probabilities under the reference: its own model, or the policy's base."""
        with torch.no_grad(), self.accelerator.autocast():
            if self.ref_model is None and hasattr(unwrapped := self.accelerator.unwrap_model(model), "peft_config"):
                # a continued adapter was copied by TRL under the name "ref"; a new one is simply switched off
                with use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None):
                    return pair_logps(model, inputs)
            return pair_logps(model if self.ref_model is None else self.ref_model, inputs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return dataset if "ref_chosen_logps" in dataset.column_names else self.add_reference(dataset)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Tensor:
        router_loss = None
        if self.aux_loss_enabled:
            chosen, rejected, router_loss = pair_logps_and_router_loss(model, inputs)
        else:
            chosen, rejected = pair_logps(model, inputs)
        pairs = self._with_reference(model, inputs, chosen, rejected)
        pairs = LogProbs(*(own_rows(inputs, value) for value in vars(pairs).values()))
        losses = self.preference_loss(pairs)
        self._note(pairs, losses.detach(), inputs, router_loss)
        loss = mean_over_processes(inputs, losses)
        return loss if router_loss is None else loss + self.router_aux_loss_coef * router_loss

    def _batch_logps(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> LogProbs:
        with torch.no_grad(), self.accelerator.autocast():
            chosen, rejected = pair_logps(model, inputs)
        return self._with_reference(model, inputs, chosen, rejected)

    def _reference_only(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> LogProbs:
        chosen, rejected = self.compute_ref_log_probs(model, inputs)
        return LogProbs(chosen, rejected, chosen, rejected, inputs["chosen_tokens"], inputs["rejected_tokens"])

    def _with_reference(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], chosen: Tensor, rejected: Tensor
    ) -> LogProbs:
        if "ref_chosen_logps" in inputs:
            reference = inputs["ref_chosen_logps"].to(chosen.dtype), inputs["ref_rejected_logps"].to(chosen.dtype)
        else:
            reference = self.compute_ref_log_probs(model, inputs)
        return LogProbs(chosen, rejected, *reference, inputs["chosen_tokens"], inputs["rejected_tokens"])

    def _note(self, pairs: LogProbs, losses: Tensor, inputs: dict[str, Tensor], router_loss: Tensor | None) -> None:
        """Keep this step's figures for `log`."""
        figures = training_figures(pairs, self.preference_loss)
        if router_loss is not None:
            figures["aux_loss"] = router_loss.detach().expand(len(losses))
        self._means.add(figures)
        real = inputs["copies"] > 0
        self._note_tokens(real[: len(losses) * len(real) // len(inputs["chosen_tokens"])])  # a pair has one row, or two

    def log_state(self) -> dict[str, Any]:
        return super().log_state() | {"means": self._means.state()}

    def load_log_state(self, state: dict[str, Any]) -> None:
        super().load_log_state(state)
        self._means.load_state(state["means"], self.accelerator.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not any(name.startswith("eval_") for name in logs):
            logs.update(self._means.take(self.accelerator.reduce))
        super().log(logs, start_time)


def check_arguments(trainer: Any, args: Any, config: type, options: dict[str, Any], refused: tuple[str, ...]) -> None:
    """Raise a UserError for a configuration of another class, and for arguments that a trainer does not honor."""
    name = type(trainer).__name__
    if not isinstance(args, config):
        raise UserError(f"args is of class {type(args).__name__}: {name} takes {config.__name__}")
    for each in refused:
        if options.get(each) is not None:
            raise UserError(f"{each} is not supported by {name}: leave it out")


def _tokenized(rows: Any, tokenizer: Any, args: TextDPOConfig) -> Any:
    """Pairs as they are where they are tokenized, and tokenized where they are raw."""
    if isinstance(rows, Dataset) and "prompt_ids" not in rows.column_names:
        return tokenized_pairs(rows, tokenizer, args.max_length or 0)
    if rows is not None:
        _check_rows(rows, TextDPOTrainer.columns)
    return rows


def _check_base_stays(model: Any, new: Any) -> None:
    """Raise a UserError for an adapter whose initialization takes a part out of the base model's weights (PiSSA, OLoRA,
    CorDA, LoftQ, LoRA-GA): the base without the adapter is then not the reference.
    """
    for config in (new, *getattr(model, "peft_config", {}).values()):
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal", "mica"):
            raise UserError(
                f"init_lora_weights {start} changes the weights of the base model, which is the reference: leave it "
                "out, or pass a ref_model"
            )


def _check_rows(rows: Any, columns: tuple[str, ...]) -> None:
    if not isinstance(rows, Dataset):
        raise UserError(f"the rows are of class {type(rows).__name__}: pass a datasets.Dataset, which can be sorted")
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise UserError(
            f"the rows have no column {', '.join(missing)} (found: {', '.join(rows.column_names)}): make them with "
            "resdpo_trl.text.tokens.tokenize, and sft_rows or reward_rows after it"
        )


def _label_logps(model: torch.nn.Module, inputs: dict[str, Tensor], router_loss: bool = False) -> tuple[Tensor, ...]:
    """The (N,) log-probabilities of the tokens with a label of a `LabelCollator` batch; the router loss if asked."""
    names = ("input_ids", "attention_mask", "position_ids", "predicted_at", "predicted")
    found = model(
        **{name: inputs[name] for name in names if name in inputs},
        router_weights=inputs["attention_mask"] if router_loss else None,
        use_cache=False,
    )
    logps, *rest = found if router_loss else (found,)
    return check_float32(logps), *rest


def _token_mean(rows: EvalPrediction) -> dict[str, float]:
    """The mean over all tokens with a label, of the sums over each row's."""
    losses = np.asarray(rows.predictions, dtype=np.float64).sum()
    return {"loss": losses / np.asarray(rows.label_ids).sum()}
