"""The base Trainer of this project: it resumes exactly, uses each row once per epoch, and can update its reference.

transformers saves the weights, the optimizer, the schedule and the random states. `RunTrainer` adds the following:

- A checkpoint is written to a temporary folder and renamed when complete, so that no kill leaves a partial one.
- A checkpoint contains the loss and the figures since the last log line.
- A run that was killed between its last save and the end of the epoch repeats the end of the epoch.
- A run that is resumed at its last step does not train (transformers 5.23 trains one step too many).
- The best checkpoint is found in the run's current folder, even if the folder was moved.
- The main process decides which step is the best. In transformers each process compares its own figure and looks for
  the folder, so one process may load the best weights while another keeps the last.
- SIGTERM and Ctrl-C stop training after a step and its checkpoint. All processes stop after the same step.
- Training stops if the loss or the weights are not finite, before they are saved as a good checkpoint.
- accelerate pads an epoch's last batch with rows from the epoch's beginning. They do not count here.
- Under FSDP2 and DeepSpeed, gradients are summed and model outputs are returned in float32. By default gradients have
  the precision of the computation. accelerate's FSDP2 policy also casts outputs to it, and omits autocast in training.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from resdpo_trl.errors import UserError
from resdpo_trl.memory import trim_heap
from resdpo_trl.metrics import RunningMeans
from resdpo_trl.run.files import last_good, last_whole, read_manifest, replace_folder, write_manifest, writing
from resdpo_trl.training.processes import own_part
from resdpo_trl.training.reference import REFERENCE_FILE, move_reference
from resdpo_trl.training.signals import AfterTheStep, Interrupted

UNFINISHED = "unfinished"  # the temporary folder of the next checkpoint


class RunTrainer(Trainer):
    """A `transformers.Trainer` with the features above. It must precede TRL's trainers in a class's bases.

    A subclass implements `figures` for evaluation. In a training step it adds values to `means`, or to `noted` and
    overrides `step_figures` to read them. A checkpoint contains both.
    """

    args: Any
    control: Any
    train_dataset: Any
    ref_model: Any = None
    metrics_file: Path | None = None  # must be flushed to disk before a checkpoint is complete
    evaluation_seconds = 0.0  # spent in `evaluate` during training

    def __init__(self, *args: Any, **kwargs: Any):
        self.means = RunningMeans()  # of the steps since the last log
        self.noted: dict[str, list[Tensor]] = defaultdict(list)  # a tensor per step since the last log
        super().__init__(*args, **kwargs)
        self._signals = AfterTheStep()
        self._cpu_group: Any = None  # lets processes agree on a signal without waiting for their GPUs
        self._aside: str | None = None  # the folder while a checkpoint is written
        self._resumed_from: str | None = None
        self._ended_epoch_at = -1  # the last step whose epoch end was processed
        self._stopping = 0  # the signal that ends training once this step is saved
        self._due = True  # whether the checkpoint would have been saved without a signal
        self.add_callback(_Watch(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `train`.

        Raises:
            Interrupted: after SIGTERM or Ctrl-C.
            UserError: the loss or the weights are not finite, or a checkpoint can't be written.
        """
        if resume_from_checkpoint is True and (found := last_whole(Path(self.args.output_dir))):
            resume_from_checkpoint = str(found)
        if isinstance(resume_from_checkpoint, str):
            self._resumed_from = resume_from_checkpoint
        if self.args.world_size > 1 and self._cpu_group is None:
            self._cpu_group = torch.distributed.new_group(backend="gloo")
        with AfterTheStep() as self._signals:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        result = TrainOutput(result.global_step, self.mean_training_loss, result.metrics)
        if signum := self._signal():  # received after the last step
            raise Interrupted(signum)
        return result

    @property
    def mean_training_loss(self) -> float:
        """The mean loss over all steps, including those before a resumption."""
        return self._total_loss_scalar / max(self.state.global_step, 1)

    # --- figures -----------------------------------------------------------------------------------------------------

    def figures(self, rows: Any, description: str) -> dict[str, float]:
        """Evaluate the current model on held-out rows."""
        raise NotImplementedError

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """transformers' `evaluate`, but over all rows instead of means over batches. With several data sets, the
        figures contain their names, such as `eval_NAME_loss`."""
        started = time.perf_counter()
        own: Any = self.eval_dataset
        rows = own if eval_dataset is None else own[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        if isinstance(rows, dict):
            every: dict[str, float] = {}
            for name, part in rows.items():
                every |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return every
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.figures(rows, "Evaluating").items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.evaluation_seconds += time.perf_counter() - started
        return metrics

    def step_figures(self) -> dict[str, float]:
        """The training figures since the last log line, averaged over all processes."""
        return self.means.take(self.accelerator.reduce)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not any(name.startswith("eval_") for name in logs):
            logs.update(self.step_figures())
        if "train_loss" in logs:  # transformers divides by the steps since a resumption, and `load_log_state` has all
            logs["train_loss"] = self.mean_training_loss
        super().log(logs, start_time)

    # --- batches, precision, whole models ----------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """transformers' batches of one optimizer step on this process. `keep_rows` marks a last batch with padding."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        processes, rows = self.args.world_size, self.args.train_batch_size
        last = len(self.train_dataset) % (rows * processes)  # rows of the last global batch, if it is smaller
        filled = processes > 1 and last and not self.args.dataloader_drop_last
        if filled and batches and self.accelerator.gradient_state.end_of_dataloader:
            # each process takes the next `rows` rows, and the padding is at the end
            own = min(max(last - rows * self.args.process_index, 0), rows)
            batches[-1] = self.keep_rows(batches[-1], own, last)
            items = self._get_num_items_in_batch(batches, device)
        return batches, items

    def keep_rows(self, batch: dict[str, Any], own: int, everywhere: int) -> dict[str, Any]:
        """The batch with row counts for `mean_over_processes`: `own` rows count here, and `everywhere` in total."""
        return {**batch, "own_rows": own, "all_rows": everywhere}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        unset_hf_deepspeed_config()  # an accelerator sets it again, and transformers would then load models sharded
        state = self.accelerator.state
        if self.is_fsdp_enabled and state.mixed_precision != "no":  # must precede wrapping the reference
            computed = {"bf16": torch.bfloat16, "fp16": torch.float16}[state.mixed_precision]
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(computed, torch.float32, torch.float32)
        if self.is_deepspeed_enabled and state.mixed_precision == "bf16":
            config = state.deepspeed_plugin.deepspeed_config
            config["communication_data_type"] = "fp32"
            config["data_types"] = {"grad_accum_dtype": "fp32"}

    def _prepare_input(self, data: Any) -> Any:
        # transformers would cast floats, including the reference's log-probabilities, to DeepSpeed's precision
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        """Autocast around a training step's loss under FSDP2, as around evaluation and the reference. For other models
        accelerate wraps the forward pass in autocast."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a whole model. Under FSDP, training checkpoints may be sharded, but a published model is not."""
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)

    # --- the reference -----------------------------------------------------------------------------------------------

    @property
    def moves_reference(self) -> bool:
        return getattr(self.args, "reference_update", "frozen") != "frozen"

    def reference_tau(self, at: Literal["step", "epoch"]) -> float:
        """τ in [0, 1] of the reference update after a step, or between two epochs.

        A new update overrides this (docs/extending.md). A text run that is not `frozen` keeps its reference in memory.
        """
        if self.args.reference_update == "polyak":
            return self.args.polyak_tau if at == "step" else 0.0
        return 1.0 if self.args.reference_update == "copy" and at == "epoch" else 0.0

    def _move_reference(self, at: Literal["step", "epoch"]) -> None:
        if self.moves_reference and (tau := self.reference_tau(at)):
            unwrap = self.accelerator.unwrap_model
            move_reference(unwrap(self.ref_model), unwrap(self.model), tau)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.moves_reference:
            load_model(self.accelerator.unwrap_model(self.ref_model), Path(resume_from_checkpoint) / REFERENCE_FILE)

    # --- what a checkpoint holds -------------------------------------------------------------------------------------

    def log_state(self) -> dict[str, Any]:
        """The loss and figures of this process since the last log line, in JSON types."""
        state: dict[str, Any] = {
            "loss": self._tr_loss.item(),
            "total": self._total_loss_scalar,
            "step": self._globalstep_last_logged,
            "means": self.means.state(),
            "noted": {name: [each.tolist() for each in found] for name, found in self.noted.items()},
        }
        trl: Any = self
        if hasattr(self, "_total_train_tokens"):  # TRL's trainers
            state |= {"tokens": trl._total_train_tokens, "figures": trl._metrics["train"]}
        return state

    def load_log_state(self, state: dict[str, Any]) -> None:
        device = self.accelerator.device
        self._tr_loss.fill_(state["loss"])
        self._total_loss_scalar, self._globalstep_last_logged = state["total"], state["step"]
        self.means.load_state(state["means"], device)
        for name, found in state["noted"].items():
            self.noted[name] = [torch.tensor(each, device=device) for each in found]
        trl: Any = self
        if "tokens" in state:
            trl._total_train_tokens = state["tokens"]
            trl._metrics["train"].update(state["figures"])

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._check_weights()
        folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        target, aside = folder / f"checkpoint-{step}", folder / UNFINISHED
        best = self.state.best_model_checkpoint
        trim_heap()  # saving needs memory that the activations of the last step have freed
        with writing(target, [folder], aside):
            if self.args.should_save and aside.exists():
                shutil.rmtree(aside)
            self.accelerator.wait_for_everyone()
            self._aside = str(aside)
            try:
                # not TRL's method, which also creates a model card: the run writes its own
                Trainer._save_checkpoint(self, model, trial)
            finally:
                self._aside = None
            unfinished = aside / target.name
            unfinished.mkdir(parents=True, exist_ok=True)  # a process other than the main one may be first
            if self.moves_reference and self.args.should_save:
                save_model(self.accelerator.unwrap_model(self.ref_model), str(unfinished / REFERENCE_FILE))
            (unfinished / f"log_state_{self.args.process_index}.json").write_text(json.dumps(self.log_state()))
            # a checkpoint that was saved only because of a signal is not the best
            is_best = self.state.best_global_step == step and self._due
            self.state.best_model_checkpoint = str(target) if is_best else best
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / "trainer_state.json"))
                write_manifest(unfinished, epoch_ends=self._epoch_ends())
                if self.metrics_file is not None and self.metrics_file.exists():
                    with open(self.metrics_file, "rb") as file:
                        os.fsync(file.fileno())
                replace_folder(unfinished, target)
                aside.rmdir()
                rotate_checkpoints(
                    output_dir=str(folder),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                )
        self.accelerator.wait_for_everyone()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        state = self.state
        decided = [super()._determine_best_metric(metrics, trial), state.best_metric, state.best_global_step]
        is_new, state.best_metric, state.best_global_step = self._of_the_main_process(decided)
        return bool(is_new)

    def _of_the_main_process(self, values: list[Any]) -> list[Any]:
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(values, 0, group=self._cpu_group)
        return values

    # --- resuming ----------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Finish resuming. It runs after the checkpoint is loaded and before the first step."""
        if self._resumed_from is None:
            return
        self.args.eval_on_start = False  # it ran when the stage started
        checkpoint = Path(self._resumed_from)
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if state["best_model_checkpoint"]:
            best = Path(self.args.output_dir) / Path(state["best_model_checkpoint"]).name
            (self.state.best_model_checkpoint,) = self._of_the_main_process([str(best) if best.is_dir() else None])
        log_state = checkpoint / f"log_state_{self.args.process_index}.json"
        if log_state.is_file():  # missing if another tool, or fewer processes, wrote the checkpoint
            self.load_log_state(json.loads(log_state.read_text(encoding="utf-8")))
        if read_manifest(checkpoint).get("epoch_ends"):
            self._load_rng_state(self._resumed_from)
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._save_anyway()  # replaces the checkpoint from before the epoch's end
            epoch = float(self.state.epoch or 0)
            self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, epoch, None, 0.0)
            self._due = True

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at the last step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # --- stopping ----------------------------------------------------------------------------------------------------

    def _epoch_ends(self) -> bool:
        """Whether this step is the last one of an epoch, and the end of the epoch has not been processed yet."""
        last = self.state.global_step >= self.state.max_steps or float(self.state.epoch or 0).is_integer()
        return last and self._ended_epoch_at != self.state.global_step

    def _save_anyway(self) -> None:
        self._due, self.control.should_save = self.control.should_save, True

    def _signal(self) -> int:
        """The signal that any process has received, or 0. Every process must call it at the same step."""
        if self.args.world_size == 1:
            return self._signals.received
        received = torch.tensor(self._signals.received)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._cpu_group)
        return int(received)

    def _stop(self, signum: int) -> None:
        saved = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        raise Interrupted(
            signum,
            f"stopped after step {self.state.global_step} of {self.state.max_steps}; {saved} is complete: to continue "
            "from it, add --resume_from_checkpoint to the same command",
        )

    def _check_weights(self) -> None:
        """Raise a UserError if the loss since the last log, or a trained weight, is not finite."""
        model: Any = self.model
        weights = [own_part(parameter).detach() for parameter in model.parameters() if parameter.requires_grad]
        finite = [each.isfinite().all() for each in [self._tr_loss, *weights] if each.numel()]
        wrong = torch.stack([each.to(self._tr_loss.device) for each in finite]).logical_not().any().float()
        if self.accelerator.reduce(wrong).item():
            self._not_finite("the loss" if not math.isfinite(self._tr_loss.item()) else "a weight")

    def _not_finite(self, what: str) -> None:
        folder = Path(self.args.output_dir)
        raise UserError(
            f"{folder.name}: {what} is not finite by step {self.state.global_step}: lower the learning rate "
            f"({self.args.learning_rate:g}), use warmup (--warmup_steps) or gradient clipping (--max_grad_norm), and "
            f"restart with --overwrite_output_dir or another --output_dir; {last_good([folder])}"
        )


class _Watch(TrainerCallback):
    """The hooks of `RunTrainer` in transformers' training loop."""

    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._go_on()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        # with several processes, accelerate's set_epoch does not reach the sampler of a loader that skips batches
        sampler: Any = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        rows: Any = getattr(sampler, "sampler", None)
        epoch = state.epoch or 0.0
        if hasattr(rows, "set_epoch"):
            rows.set_epoch(int(epoch + 1e-6))
        # a run that resumes within an epoch starts at a fractional epoch, and its reference is already copied
        if epoch > 0.5 and abs(epoch - round(epoch)) < 1e-6:
            self.trainer._move_reference("epoch")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._move_reference("step")
        self.trainer._stopping = self.trainer._signal()
        if self.trainer._stopping and not self.trainer._epoch_ends():
            self.trainer._save_anyway()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._ended_epoch_at = state.global_step
        if self.trainer._stopping:
            self.trainer._save_anyway()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._stopping = self.trainer._stopping or self.trainer._signal()
        if self.trainer._stopping and not self.trainer._epoch_ends():
            self.trainer._stop(self.trainer._stopping)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for name in ("loss", "eval_loss", "train_loss"):
            if logs and not math.isfinite(logs.get(name, 0.0)):
                self.trainer._not_finite({"loss": "the loss", "eval_loss": "the validation loss"}.get(name, "a loss"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._check_weights()
