"""A Trainer that can be killed at any moment and goes on to the same end.

transformers saves weights, optimizer, schedule and random states. What it leaves to be done, and what is done here:

- a checkpoint is written aside and renamed when all of it is on the disk, so that a kill leaves no half of one;
- what the next log line is made of (the loss and the figures since the last one) is part of it;
- so is what was still owed: a signal saves before the step's evaluation, which the resumed run makes up for;
- a run that is resumed at its last step trains no further (transformers 5.23 trains one step too many);
- the best checkpoint is looked for where the run stands now, also when its folder was moved;
- which step is the best is decided by the main process, for all: transformers lets each process compare its own figure
  and look for the folder, so that one may load the best weights and another keep the last;
- SIGTERM and Ctrl-C end training after a step and its checkpoint, on every process after the same one;
- a loss or weights that are not finite end training, before they are saved as a good checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from resdpo_trl.errors import UserError
from resdpo_trl.run.files import disk_trouble, last_whole, not_written, read_manifest, replace_folder, write_manifest
from resdpo_trl.run.folder import trim_heap
from resdpo_trl.training.processes import own_part
from resdpo_trl.training.signals import AfterTheStep, Interrupted

UNFINISHED = "unfinished"  # the folder beside the checkpoints in which the next one is written


class Resumable(Trainer):
    """A Trainer whose checkpoints are whole; to be named before TRL's trainers among a class's bases.

    A subclass with a state of its own between two log lines extends `log_state` and `load_log_state`, and one with
    files of its own extends `save_more`.
    """

    args: Any
    metrics_file: Path | None = None  # lines that must be on the disk before a checkpoint after them is

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._signals = AfterTheStep()
        self._cpu_group: Any = None  # agreeing on a signal over it, processes do not wait for their GPUs
        self._aside: str | None = None  # where a checkpoint is being written
        self._resumed_from: str | None = None
        self._best_recorded: str | None = None
        self._ended_epoch_at = -1  # the step whose epoch's end was dealt with
        self._stopping = 0  # the signal that ends training once this step is saved
        self._owed = {"evaluate": False, "save": False}
        self._due = True  # whether the checkpoint would have been saved without a signal
        self.add_callback(_Watch(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `train`.

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, and a checkpoint.
            UserError: the loss or the weights are not finite, or a checkpoint can't be written.
        """
        if resume_from_checkpoint is True and (found := last_whole(Path(self.args.output_dir))):
            resume_from_checkpoint = str(found)
        if isinstance(resume_from_checkpoint, str):
            self._resumed_from = resume_from_checkpoint
            state = json.loads((Path(self._resumed_from) / "trainer_state.json").read_text(encoding="utf-8"))
            self._best_recorded = state.get("best_model_checkpoint")
        if self.args.world_size > 1 and self._cpu_group is None:
            self._cpu_group = torch.distributed.new_group(backend="gloo")
        with AfterTheStep() as self._signals:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        if signum := self._signal():  # it came after the last step
            raise Interrupted(signum)
        return result

    @property
    def mean_training_loss(self) -> float:
        """The mean over all steps, those before a resumption too."""
        return self._total_loss_scalar / max(self.state.global_step, 1)

    # --- what a checkpoint holds -----------------------------------------------------------------------------------

    def save_more(self, checkpoint: Path) -> None:
        """Write a subclass's own files; on every process."""

    def log_state(self) -> dict[str, Any]:
        """What this process has gathered since the last log line, as JSON."""
        state = {"loss": self._tr_loss.item(), "total": self._total_loss_scalar, "step": self._globalstep_last_logged}
        trl: Any = self
        if hasattr(self, "_total_train_tokens"):  # TRL's trainers
            state |= {"tokens": trl._total_train_tokens, "figures": trl._metrics["train"]}
        return state

    def load_log_state(self, state: dict[str, Any]) -> None:
        self._tr_loss.fill_(state["loss"])
        self._total_loss_scalar, self._globalstep_last_logged = state["total"], state["step"]
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
        trim_heap()  # what is written takes room that the last step's activations no longer need
        with self._writing(target, aside):
            if self.args.should_save and aside.exists():
                shutil.rmtree(aside)
            self.accelerator.wait_for_everyone()
            self._aside = str(aside)
            try:
                # past TRL's, which also drafts a model card: the run writes its own
                Trainer._save_checkpoint(self, model, trial)
            finally:
                self._aside = None
            unfinished = aside / target.name
            unfinished.mkdir(parents=True, exist_ok=True)  # another process than the main one may come first
            self.save_more(unfinished)
            (unfinished / f"log_state_{self.args.process_index}.json").write_text(json.dumps(self.log_state()))
            # what was saved for a signal alone is not kept as the best
            is_best = self.state.best_global_step == step and self._due
            self.state.best_model_checkpoint = str(target) if is_best else best
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / "trainer_state.json"))
                ended = self._ended_epoch_at == step
                last = step >= self.state.max_steps or float(self.state.epoch).is_integer()
                write_manifest(unfinished, owed=self._owed | {"epoch_end": last and not ended})
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
        decided: list[Any] = [super()._determine_best_metric(metrics, trial), state.best_metric, state.best_global_step]
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(decided, 0, group=self._cpu_group)
        is_new, state.best_metric, state.best_global_step = decided
        return bool(is_new)

    @contextmanager
    def _writing(self, target: Path, aside: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = disk_trouble(error)
            if reason is None:
                raise
            shutil.rmtree(aside, ignore_errors=True)  # its room is needed
            raise not_written(target, reason, self._last_good()) from error

    # --- going on ----------------------------------------------------------------------------------------------------

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        found = super()._init_training_state(*args, **kwargs)
        if self._resumed_from and self._best_recorded:
            best = Path(self.args.output_dir) / Path(self._best_recorded).name
            found_best: list[Any] = [str(best) if best.is_dir() else None]
            if self.args.world_size > 1:
                torch.distributed.broadcast_object_list(found_best, 0, group=self._cpu_group)
            self.state.best_model_checkpoint = found_best[0]
        return found

    def _go_on(self) -> None:
        """After the checkpoint is loaded and before the first step: the log's state, and what was owed."""
        if self._resumed_from is None:
            return
        self.args.eval_on_start = False  # it was done when the stage started
        checkpoint = Path(self._resumed_from)
        log_state = checkpoint / f"log_state_{self.args.process_index}.json"
        if log_state.is_file():  # not where another tool wrote the checkpoint, or fewer processes
            self.load_log_state(json.loads(log_state.read_text(encoding="utf-8")))
        owed = read_manifest(checkpoint).get("owed", {})
        if not any(owed.values()):
            return
        self._load_rng_state(self._resumed_from)
        if owed["evaluate"]:
            self.control.should_evaluate = True
            self._settle(due=owed["save"])
        if owed["epoch_end"]:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._settle(due=self.control.should_save)

    def _settle(self, due: bool) -> None:
        """Evaluate as asked, then save in the place of the checkpoint that owed it."""
        self.control.should_save = True
        self._due = due
        epoch = float(self.state.epoch or 0)
        self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, epoch, None, 0.0)
        self._due = True

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at the last step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # --- stopping ----------------------------------------------------------------------------------------------------

    def _signal(self) -> int:
        """The signal that any process has received, or 0; every process calls it at the same step."""
        if self.args.world_size == 1:
            return self._signals.received
        received = torch.tensor(self._signals.received)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._cpu_group)
        return int(received)

    def _stop(self, signum: int) -> None:
        saved = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        raise Interrupted(
            signum,
            f"stopped after step {self.state.global_step} of {self.state.max_steps}; {saved} is whole: the same "
            "command with --resume_from_checkpoint goes on from it",
        )

    def _check_weights(self) -> None:
        """Raise a UserError where the loss since the last log, or a trained weight, is not finite."""
        model: Any = self.model
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = [own_part(parameter).detach() for parameter in weights]
        finite = [each.isfinite().all() for each in [self._tr_loss, *weights] if each.numel()]
        wrong = torch.stack([each.to(self._tr_loss.device) for each in finite]).logical_not().any().float()
        if self.accelerator.reduce(wrong).item():
            self._not_finite("the loss" if not math.isfinite(self._tr_loss.item()) else "a weight")

    def _not_finite(self, what: str) -> None:
        raise UserError(
            f"{Path(self.args.output_dir).name}: {what} is not finite by step {self.state.global_step}: lower the "
            f"learning rate ({self.args.learning_rate:g}), warm up (--warmup_steps) or clip (--max_grad_norm), and "
            f"start again with --overwrite_output_dir or another --output_dir; {self._last_good()}"
        )

    def _last_good(self) -> str:
        found = last_whole(Path(self.args.output_dir))
        return f"the last good checkpoint is {found}" if found else "no checkpoint of this stage was saved yet"


class _Watch(TrainerCallback):
    """Where transformers' loop lets `Resumable` look in."""

    def __init__(self, trainer: Resumable):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._go_on()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        # on several processes accelerate's set_epoch does not reach the sampler of a loader that skips batches
        sampler: Any = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        rows: Any = getattr(sampler, "sampler", None)
        if hasattr(rows, "set_epoch"):
            rows.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._stopping = trainer._signal()
        if trainer._stopping:  # save first: who sends a signal may not wait for an evaluation
            trainer._owed = {"evaluate": control.should_evaluate, "save": control.should_save}
            trainer._due = control.should_save
            control.should_evaluate, control.should_save = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._ended_epoch_at = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signum = self.trainer._stopping or self.trainer._signal()
        if signum:
            self.trainer._stop(signum)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for name in ("loss", "eval_loss", "train_loss"):
            if logs and not math.isfinite(logs.get(name, 0.0)):
                self.trainer._not_finite({"loss": "the loss", "eval_loss": "the validation loss"}.get(name, "a loss"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._check_weights()
