"""What the text job and the image job do alike: open the run, find checkpoints, publish models, end."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from resdpo_trl.errors import NothingToDo, UserError, printable
from resdpo_trl.metrics import figure_rows, number, table
from resdpo_trl.run.files import ASIDE, replace_folder, step_of, torn
from resdpo_trl.run.folder import RunFolder, trim_heap, untrained, use_the_cores
from resdpo_trl.run.hub import Hub
from resdpo_trl.run.provenance import read_facts, seen_by, training_facts, write_facts
from resdpo_trl.run.report import load_run, write_report
from resdpo_trl.run.verdict import stage_of, verdict
from resdpo_trl.sources import LEAST_STEPS
from resdpo_trl.training.arguments import RunConfig
from resdpo_trl.training.callbacks import PushCallback
from resdpo_trl.training.processes import check_sharding, fewer_than_asked, parallelism


class Job:
    """One run in one folder. `training` holds transformers' `TrainingArguments` of the stage that ends it."""

    def __init__(
        self,
        training: Any,
        options: RunConfig,
        parts: dict[str, Any],
        before: dict[str, Any],
        preset: Path | None,
        given: Collection[str] | None,
    ):
        """
        Args:
            training: configuration of the stage that ends the run.
            options: the run's.
            parts: the other configurations, dataclasses, by their names in run.json.
            before: the stage before the last one, by its name; empty where there is none.
            preset: the YAML file under the flags, for run.json.
            given: names of the fields that flags give: what they do not give is adapted to small data (None: nothing).
        """
        check_sharding(training)
        self.training, self.options, self.given, self.before = training, options, given, before
        self.resume = training.resume_from_checkpoint is not None
        self.started = time.perf_counter()
        use_the_cores()
        self.run = RunFolder(training.output_dir, main_process=PartialState().is_main_process)
        # the Hub keeps the token: the arguments are pickled into every checkpoint
        token, training.hub_token = training.hub_token, None
        self.hub = self._hub(token) if training.push_to_hub else None
        self.run.open(overwrite=options.overwrite_output_dir, resume=self.resume)
        if self.run.main_process and not self.resume:
            untrained.add(self.run)
        self._asked = self._asked_checkpoint()
        self._config = {"preset": str(preset) if preset else None, "training": training.to_dict()}
        self._config |= {name: dataclasses.asdict(part) for name, part in (parts | {"run": options}).items()}
        self._config |= {name: args.to_dict() | {"output_dir": training.output_dir} for name, args in before.items()}
        self.run.check_inputs(self._config)
        self.run.check_config(self._config)
        if self.run.earlier.get("complete"):
            raise NothingToDo(f"the run in {self.run.path} ended at {self.run.earlier['ended']}: nothing to resume")
        self.say = _say if self.run.main_process else silent
        if self.resume and not self.run.earlier:
            self.say(f"{self.run.path} holds no run: nothing to resume, so this is its beginning")

    def adapt(self, rows: int) -> dict[str, int]:
        """Smaller batches and a denser log where `rows` training rows are few: field -> its new value.

        An epoch gets at least `LEAST_STEPS` steps, and a training five lines of metrics.
        """
        args, adapted = self.training, dict[str, int]()
        if self.given is None:
            return adapted
        rows_a_step = args.gradient_accumulation_steps * args.world_size  # with one row on each device
        most = rows // (LEAST_STEPS * rows_a_step)
        size = args.per_device_train_batch_size
        if most < size and "per_device_train_batch_size" not in self.given:
            size = adapted["per_device_train_batch_size"] = 2 ** (max(1, most).bit_length() - 1)
        steps = math.ceil(rows / (size * rows_a_step) * args.num_train_epochs)
        steps = args.max_steps if args.max_steps > 0 else steps
        if steps < 5 * args.logging_steps and args.logging_steps > 1 and "logging_steps" not in self.given:
            adapted["logging_steps"] = max(1, steps // 5)
        for field, value in adapted.items():
            setattr(args, field, value)
            for name, stage in self.before.items():
                if f"{name}.{field}" not in self.given and getattr(stage, field) > value:
                    setattr(stage, field, value)
        return adapted

    def arguments(self, stage: str, args: Any) -> Any:
        """A stage's training arguments in this run's folder; the Hub is the run's, not a trainer's."""
        return dataclasses.replace(
            args,
            output_dir=str(self.run.checkpoints(stage)),
            run_name=f"{args.run_name or self.run.path.name} {stage}",  # a tracker has one run per stage
            push_to_hub=False,
            report_to=args.report_to or "none",
        )

    def facts(self, args: Any, trained: Iterable[str], validated: Iterable[str], **more: Any) -> dict[str, Any]:
        """What a model's folder tells of its training: its settings, and digests of all rows that it has seen."""
        reference = [read_facts(str(self.run.reference), None, "reference")] if self.run.reference.is_dir() else []
        seen, looked_at = seen_by(*reference)
        return training_facts(args, seen.union(trained), looked_at.union(validated), **more)

    def begin(self, data_fingerprint: dict[str, str], counts: dict[str, Any]) -> None:
        """Write the first files, once the data are there: until then a run that is overwritten is whole.

        Args:
            data_fingerprint: digest of each split.
            counts: what summary.json says of the data.

        Raises:
            UserError: a run is resumed with other data than it began with, or its folder can't be written.
        """
        self.run.start(self._config, self.training.seed, data_fingerprint)
        self.run.summarize(data=counts)
        PartialState().wait_for_everyone()

    def _hub(self, token: str | None) -> Hub:
        args = self.training
        return Hub(
            self.run.path, args.hub_model_id, args.hub_private_repo, token, args.hub_revision,
            args.hub_strategy.value, args.hub_always_push,
        )  # fmt: skip

    def push_saves(self, trainer: Any) -> None:
        """Push the checkpoints of the stage that ends the run, if --hub_strategy asks for it."""
        if self.hub is not None and self.hub.strategy != "end":
            trainer.add_callback(PushCallback(self.hub))

    def hardware_line(self) -> str:
        """What the run uses, and where its files go; a warning before it where that is less than was asked for."""
        less = fewer_than_asked()
        precision = (
            "bfloat16" if self.training.bf16 else "float16 with loss scaling" if self.training.fp16 else "float32"
        )
        device = self.training.device.type
        threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
        processes = parallelism()["num_processes"]
        line = f"{device}{threads}, {processes} process(es), {precision}; files go to {self.run.path}"
        return f"warning: {less}\n{line}" if less else line

    def _asked_checkpoint(self) -> Path | None:
        """The checkpoint that --resume_from_checkpoint names, if it names one; a UserError where it is none of this
        run or not whole."""
        asked = self.training.resume_from_checkpoint
        if asked in (None, "last"):
            return None
        found = Path(asked)
        if found.resolve().parent.parent != (self.run.path / "checkpoints").resolve():
            raise UserError(
                f"--resume_from_checkpoint {asked}: not a checkpoint of {self.run.path}; leave the path out, or name "
                f"a folder in {self.run.path / 'checkpoints'}"
            )
        reason = torn(found) if found.is_dir() else "there is no such folder"
        if reason is not None:
            raise UserError(f"--resume_from_checkpoint {asked}: {reason}")
        return found

    def past(self, stage: str, folder: Path, figures: Any) -> bool:
        """Whether a resumed run has a stage's model and its figures already."""
        ended = self.resume and folder.is_dir() and bool(figures)
        if ended and self._asked is not None and self._asked.resolve().parent.name == stage:
            raise UserError(
                f"--resume_from_checkpoint {self._asked}: the stage {stage} has ended; leave the path out to go on "
                "after it"
            )
        return ended

    def checkpoint(self, stage: str) -> str | None:
        """The checkpoint that a resumed stage starts from, or None.

        The metrics written after it are dropped, and checkpoints past it are renamed: torn ones, and those past the
        one that --resume_from_checkpoint names.
        """
        if not self.resume:
            return None
        named = self._asked is not None and self._asked.resolve().parent.name == stage
        found = self._asked if named else self.run.last_checkpoint(stage)
        PartialState().wait_for_everyone()  # every process has looked before the main one writes
        step, logged = -1, set()
        if found is not None:
            state = json.loads((found / "trainer_state.json").read_text(encoding="utf-8"))
            step = state["global_step"]
            logged = {
                "validation" if any(name.startswith("eval_") for name in row) else "train"
                for row in state["log_history"]
                if row["step"] == step
            }
        self.run.set_aside(stage, step)
        self.run.forget_metrics(stage, step, logged)
        PartialState().wait_for_everyone()
        return str(found) if found else None

    def train(self, trainer: Any, stage: str) -> tuple[float, int]:
        """Train a stage, from its checkpoint if there is one: the seconds without evaluation, and its first step."""
        started = time.perf_counter()
        checkpoint = self.checkpoint(stage)
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - started - trainer.evaluation_seconds
        return seconds, step_of(Path(checkpoint)) if checkpoint else 0

    def publish(self, folder: Path, save: Callable[[str], Any], processor: Any, facts: dict[str, Any]) -> None:
        """Save a model, its tokenizer or image processor and the facts of its training whole or not at all: aside, then
        renamed."""
        aside = folder.with_name(folder.name + ASIDE)
        if self.run.main_process and aside.exists():
            shutil.rmtree(aside)
        PartialState().wait_for_everyone()
        trim_heap()  # what is written takes room that the last step's activations no longer need
        with self.run.writing(str(folder.relative_to(self.run.path))):
            save(str(aside))
            PartialState().wait_for_everyone()
            if self.run.main_process:
                processor.save_pretrained(str(aside))
                write_facts(aside, facts)
                (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody should load
                if (aside / "ref").is_dir():
                    shutil.rmtree(aside / "ref")  # the adapter of reference/, which TRL keeps next to the policy's
                replace_folder(aside, folder)
        PartialState().wait_for_everyone()

    def end(self, table: Callable[[dict[str, Any]], str], write_card: Callable[[], None]) -> None:
        """run.json's end, the report, the model card with its plots, the table, and the Hub if asked."""
        name = "seconds_since_resume" if self.run.earlier else "total_seconds"  # nobody knows when a kill came
        throughput = self.run.summary.get("throughput", {}) | {name: time.perf_counter() - self.started}
        self.run.summarize(throughput=throughput)
        self.run.end()
        if self.run.main_process:
            write_report([self.run.path])
            write_card()
            found = load_run(self.run.path)
            self.say("\n".join(["", *verdict(found.summary, found.metrics)]))
        self.run.record(complete=True)  # from here on there is nothing to resume
        untrained.discard(self.run)
        self.say(table(self.run.summary))
        self.say(f"open {self.run.path / 'report.html'}")
        if self.hub is not None and self.run.main_process:
            self.hub.push_model(self.run.trained)


def epochs(trainer: Any) -> dict[str, Any]:
    """The epoch of least validation loss, and the one whose weights the trainer holds after `train`.

    They differ with --select last, and where another figure than the loss chooses (--metric_for_best_model).
    """
    state = trainer.state
    evaluated = [row for row in state.log_history if row["step"] > 0 and math.isfinite(row.get("eval_loss", math.nan))]
    best = min(evaluated, key=lambda row: row["eval_loss"], default=None)
    kept, step = state.epoch, state.global_step
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        step = step_of(Path(state.best_model_checkpoint))
        kept = next((row["epoch"] for row in evaluated if row["step"] == step), None)
    return {
        "select": trainer.args.select,
        "metric_for_best_model": trainer.args.metric_for_best_model,
        "best_epoch": best["epoch"] if best else None,
        "best_validation_loss": best["eval_loss"] if best else None,
        "kept_epoch": kept,
        "kept_step": step,
    }


def describe_epochs(stage: dict[str, Any]) -> list[tuple[str, str]]:
    """The table's row that names the epochs of `epochs`; none where nothing was validated."""
    if stage.get("best_epoch") is None:
        return []
    text = f"{stage['best_epoch']:g} of least validation loss ({stage['best_validation_loss']:.4f})"
    if stage["kept_epoch"] is not None:
        same = stage["kept_epoch"] == stage["best_epoch"]
        why = "by --select last"
        if stage["select"] == "best":
            why = f"of best {stage['metric_for_best_model'].removeprefix('eval_')}"
        text += ", kept" if same else f"; kept: {stage['kept_epoch']:g}, {why}"
    return [("epoch", text)]


def describe_run(summary: dict[str, Any], unit: str) -> str:
    """The tables at the end of a run: what ran, and the test figures. `unit` is pairs or images."""
    data, throughput, stage = summary["data"], summary["throughput"], stage_of(summary)
    rows = [(unit, f"{data['train']} train, {data['validation']} validation, {data['test']} test")]
    if losses := summary.get("sft", {}).get("validation"):
        rows.append(("SFT loss, validation", f"{losses['loss_before']:.3f} → {losses['loss_after']:.3f}"))
    if stage:
        speed = throughput.get(f"{stage}_pairs_per_second") or summary[stage].get("images_per_second")
        rows += [*describe_epochs(summary[stage]), (f"{unit} per second", number(speed, 1))]
    if "total_seconds" in throughput:
        rows.append(("seconds in all", f"{throughput['total_seconds']:.0f}"))
    else:
        rows.append(("seconds since the last resume", f"{throughput['seconds_since_resume']:.0f}"))
    if not stage:
        return "\n" + table(rows)
    test = summary[stage]["test"]
    figures = table(figure_rows(test), (f"on {test['n']} test {unit}", "mean", "95% interval"))
    return f"\n{table(rows)}\n\n{figures}"


def _say(text: str) -> None:
    print(printable(text, kept="\n"), flush=True)


def free(trainer: Any) -> None:
    """Let go of a stage's model and optimizer before the next one loads its own. Nothing may use the trainer after."""
    trainer.accelerator.free_memory()
    # the learning-rate schedule and the callback handler hold the optimizer and the model too
    vars(trainer).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def silent(*_: Any) -> None:
    """What processes other than the main one say."""
