"""Trainer callbacks that write metrics.jsonl, push checkpoints, and show a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from resdpo_trl.memory import trim_heap
from resdpo_trl.run.folder import RunFolder, untrained
from resdpo_trl.run.hub import Hub
from resdpo_trl.training.processes import parallelism

# the Trainer's summary of a stage, written to the throughput section of summary.json instead
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "total_flos", "train_loss")


class RunCallback(TrainerCallback):
    """Write every log of a stage to metrics.jsonl, and the actual parallelism of the model to run.json."""

    def __init__(self, trainer: Any, run: RunFolder, stage: str):
        self.trainer, self.run, self.stage = trainer, run, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = parallelism(self.trainer.model_wrapped)
        if found["num_processes"] > 1 and found["parallelism"] == "NO":
            raise RuntimeError("several processes run, but nothing averages their gradients")
        self.run.record(**found)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        untrained.discard(self.run)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if args.device.type == "cpu":
            # batches differ in width, which fragments glibc's heap: it grows by a third in a hundred steps of
            # SmolLM2-135M
            trim_heap()
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        split = "validation" if any(name.startswith("eval_") for name in logs) else "train"
        metrics = {
            name.removeprefix("eval_"): value
            for name, value in logs.items()
            if name != "epoch" and not name.endswith(TIMINGS)
        }
        self.run.log(self.stage, split, state.global_step, state.epoch, metrics)


class PushCallback(TrainerCallback):
    """Push each checkpoint to the Hub in the background."""

    def __init__(self, hub: Hub):
        self.hub = hub

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.hub.push_save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class BarCallback(ProgressCallback):
    """Show a progress bar per stage with the latest figures. If the bar is disabled, print a line per evaluation."""

    # short names, so that all figures fit in 80 columns
    shown: ClassVar = {
        "loss": "loss",
        "eval_loss": "eval_loss",
        "rewards/accuracies": "acc",
        "rewards/margins": "margin",
    }
    validated = ("loss", "accuracy", "rewards/accuracies", "rewards/margins")

    def __init__(self, description: str):
        super().__init__()
        self.description = description

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                desc=self.description,
                dynamic_ncols=True,
                delay=0,  # the recipes delay other bars, and clear them when they finish
                leave=True,
                disable=args.disable_tqdm or None,  # None disables it if stderr is not a terminal
            )
        self.current_step = 0

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if self.training_bar is not None and self.training_bar.disable and metrics:
            figures = [
                f"{name.split('/')[-1]} {metrics[f'eval_{name}']:.4f}"
                for name in self.validated
                if f"eval_{name}" in metrics
            ]
            print(
                f"{self.description}, epoch {state.epoch or 0:.4g}, step {state.global_step} of {state.max_steps}: "
                f"validation {', '.join(figures)}",
                flush=True,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            figures = {short: f"{logs[name]:.3f}" for name, short in self.shown.items() if name in logs}
            if figures:
                self.training_bar.set_postfix(figures, refresh=False)


def use_run_callbacks(trainer: Any, run: RunFolder, stage: str, description: str) -> None:
    """Replace a Trainer's progress callbacks by `BarCallback` and `RunCallback`."""
    for printed in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printed)
    trainer.add_callback(BarCallback(description))
    trainer.add_callback(RunCallback(trainer, run, stage))
    trainer.metrics_file = run.path / "metrics.jsonl"
