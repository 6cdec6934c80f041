"""What a Trainer tells a run: lines in metrics.jsonl, and a progress bar instead of printed dictionaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from resdpo_trl.hub import Hub
from resdpo_trl.processes import parallelism
from resdpo_trl.run import RunFolder

# the Trainer's own summary of a stage; it goes to summary.json's throughput
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "total_flos", "train_loss", "model_preparation_time")


class MetricsCallback(TrainerCallback):
    """Write every log of a stage to the run's metrics.jsonl."""

    def __init__(self, run: RunFolder, stage: str):
        self.run = run
        self.stage = stage

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
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
    """Push each checkpoint to the Hub, in the background."""

    def __init__(self, hub: Hub, card: str):
        self.hub = hub
        self.card = card

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.hub.push_save(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.card)


class ParallelismCallback(TrainerCallback):
    """Write to run.json how the model was really wrapped when training began."""

    def __init__(self, trainer: Any, run: RunFolder):
        self.trainer = trainer
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = parallelism(self.trainer.model_wrapped)
        if found["num_processes"] > 1 and found["parallelism"] == "NO":
            raise RuntimeError("several processes, and nothing that averages their gradients: each would train alone")
        self.run.record(**found)


class BarCallback(ProgressCallback):
    """One bar a stage, with the newest figures behind it."""

    shown = ("loss", "eval_loss", "rewards/accuracies", "rewards/margins")

    def __init__(self, description: str):
        super().__init__()
        self.description = description

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.description)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            figures = {name.split("/")[-1]: f"{logs[name]:.3f}" for name in self.shown if name in logs}
            if figures:
                self.training_bar.set_postfix(figures, refresh=False)


def use_run_callbacks(trainer: Any, run: RunFolder, stage: str, description: str) -> None:
    """Give a Trainer this project's bar and metrics file."""
    from transformers import PrinterCallback

    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(BarCallback(description))
    trainer.add_callback(MetricsCallback(run, stage))
    trainer.add_callback(ParallelismCallback(trainer, run))
    trainer.metrics_file = run.path / "metrics.jsonl"
