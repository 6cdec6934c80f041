"""Steps that text and image runs share: open the run, find checkpoints, publish models, finish."""

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
from resdpo_trl.memory import trim_heap
from resdpo_trl.metrics import figure_rows, number, table
from resdpo_trl.run.files import ASIDE, replace_folder, step_of, torn
from resdpo_trl.run.folder import RunFolder, untrained, use_the_cores
from resdpo_trl.run.hub import Hub
from resdpo_trl.run.provenance import read_facts, seen_by, training_facts, write_facts
from resdpo_trl.run.report import load_run, write_report
from resdpo_trl.run.verdict import stage_of, verdict
from resdpo_trl.sources import LEAST_STEPS
from resdpo_trl.training.arguments import RunConfig
from resdpo_trl.training.callbacks import PushCallback
from resdpo_trl.training.processes import check_sharding, fewer_than_asked, parallelism


class Job:
    """A run and its folder. `training` is the last stage's `TrainingArguments`."""

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
            training: configuration of the last stage.
            options: options of the run.
            parts: the other configurations (dataclasses) by their names in run.json.
            before: configuration of the stage before the last one, by its name; empty if there is none.
            preset: the YAML file that the flags override, for run.json.
            given: names of the fields that flags set. Others may be adapted to small data. None adapts nothing.
        """
        check_sharding(training)
        self.training, self.options, self.given, self.before = training, options, given, before
        self.resume = training.resume_from_checkpoint is not None
        self.started = time.perf_counter()
        use_the_cores()
        self.run = RunFolder(training.output_dir, main_process=PartialState().is_main_process)
        # only `hub` keeps the token, because the arguments are pickled into every checkpoint
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
            raise NothingToDo(f"the run in {self.run.path} finished at {self.run.earlier['ended']}: nothing to resume")
        self.say = _say if self.run.main_process else silent
        if self.resume and not self.run.earlier:
            self.say(f"{self.run.path} contains no run to resume: starting a new one")

    def adapt(self, rows: int) -> dict[str, int]:
        """Reduce the batch size and the logging interval for few training rows. Return field -> new value.

        An epoch gets at least `LEAST_STEPS` steps, and a stage logs at least five lines of metrics, if possible.
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
        """A stage's training arguments with this run's folder. The run uploads to the Hub, so the trainer does not."""
        return dataclasses.replace(
            args,
            output_dir=str(self.run.checkpoints(stage)),
            run_name=f"{args.run_name or self.run.path.name} {stage}",  # a tracker has one run per stage
            push_to_hub=False,
            report_to=args.report_to or "none",
        )

    def facts(self, args: Any, trained: Iterable[str], validated: Iterable[str], **more: Any) -> dict[str, Any]:
        """The facts of training for a model's folder: settings, and digests of all rows that the model has seen."""
        reference = [read_facts(str(self.run.reference), None, "reference")] if self.run.reference.is_dir() else []
        seen, looked_at = seen_by(*reference)
        return training_facts(args, seen.union(trained), looked_at.union(validated), **more)

    def begin(self, data_fingerprint: dict[str, str], counts: dict[str, Any]) -> None:
        """Write the first files. Call it after the data are loaded: until then, a run to overwrite stays intact.

        Args:
            data_fingerprint: digest of each split.
            counts: the data section of summary.json.

        Raises:
            UserError: the data of a resumed run have changed, or its folder can't be written.
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
        """Push the checkpoints of the last stage, if --hub_strategy requires it."""
        if self.hub is not None and self.hub.strategy != "end":
            trainer.add_callback(PushCallback(self.hub))

    def hardware_line(self) -> str:
        """The device, the precision and the output folder, after a warning if fewer processes run than requested."""
        less = fewer_than_asked()
        precision = (
            "bfloat16" if self.training.bf16 else "float16 with loss scaling" if self.training.fp16 else "float32"
        )
        device = self.training.device.type
        threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
        processes = parallelism()["num_processes"]
        line = f"{device}{threads}, {processes} process(es), {precision}; output folder: {self.run.path}"
        return f"warning: {less}\n{line}" if less else line

    def _asked_checkpoint(self) -> Path | None:
        """The checkpoint that --resume_from_checkpoint names, or None. Raise a UserError if it is incomplete or of
        another run."""
        asked = self.training.resume_from_checkpoint
        if asked in (None, "last"):
            return None
        found = Path(asked)
        if found.resolve().parent.parent != (self.run.path / "checkpoints").resolve():
            raise UserError(
                f"--resume_from_checkpoint {asked}: not a checkpoint of {self.run.path}; omit the path, or name a "
                f"folder in {self.run.path / 'checkpoints'}"
            )
        reason = torn(found) if found.is_dir() else "there is no such folder"
        if reason is not None:
            raise UserError(f"--resume_from_checkpoint {asked}: {reason}")
        return found

    def past(self, stage: str, folder: Path, figures: Any) -> bool:
        """Whether a resumed run already has a stage's model and figures."""
        ended = self.resume and folder.is_dir() and bool(figures)
        if ended and self._asked is not None and self._asked.resolve().parent.name == stage:
            raise UserError(
                f"--resume_from_checkpoint {self._asked}: the stage {stage} has finished; omit the path to continue "
                "after it"
            )
        return ended

    def checkpoint(self, stage: str) -> str | None:
        """The checkpoint that a resumed stage starts from, or None.

        This removes the metrics written after it, and renames later checkpoints: incomplete ones, and those after the
        one that --resume_from_checkpoint names.
        """
        if not self.resume:
            return None
        named = self._asked is not None and self._asked.resolve().parent.name == stage
        found = self._asked if named else self.run.last_checkpoint(stage)
        PartialState().wait_for_everyone()  # every process must read before the main one writes
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
        """Train a stage, from its checkpoint if there is one. Return its seconds without evaluation and first step."""
        started = time.perf_counter()
        checkpoint = self.checkpoint(stage)
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - started - trainer.evaluation_seconds
        return seconds, step_of(Path(checkpoint)) if checkpoint else 0

    def publish(self, folder: Path, save: Callable[[str], Any], processor: Any, facts: dict[str, Any]) -> None:
        """Save a model, its tokenizer or image processor, and the facts of its training, atomically: the files are
        written to a temporary folder, which is then renamed."""
        aside = folder.with_name(folder.name + ASIDE)
        if self.run.main_process and aside.exists():
            shutil.rmtree(aside)
        PartialState().wait_for_everyone()
        trim_heap()  # saving needs memory that the activations of the last step have freed
        with self.run.writing(str(folder.relative_to(self.run.path))):
            save(str(aside))
            PartialState().wait_for_everyone()
            if self.run.main_process:
                processor.save_pretrained(str(aside))
                write_facts(aside, facts)
                (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle, unsafe to load
                if (aside / "ref").is_dir():
                    shutil.rmtree(aside / "ref")  # TRL saves the adapter of reference/ next to the policy's
                replace_folder(aside, folder)
        PartialState().wait_for_everyone()

    def end(self, table: Callable[[dict[str, Any]], str], write_card: Callable[[], None]) -> None:
        """Finish run.json, write the report and the model card, print the table, and upload to the Hub if requested."""
        name = "seconds_since_resume" if self.run.earlier else "total_seconds"  # a kill leaves no time
        throughput = self.run.summary.get("throughput", {}) | {name: time.perf_counter() - self.started}
        self.run.summarize(throughput=throughput)
        self.run.end()
        if self.run.main_process:
            write_report([self.run.path])
            write_card()
            found = load_run(self.run.path)
            self.say("\n".join(["", *verdict(found.summary, found.metrics)]))
        self.run.record(complete=True)  # from here on, there is nothing to resume
        untrained.discard(self.run)
        self.say(table(self.run.summary))
        self.say(f"open {self.run.path / 'report.html'}")
        if self.hub is not None and self.run.main_process:
            self.hub.push_model(self.run.trained)


def epochs(trainer: Any) -> dict[str, Any]:
    """The epoch with the lowest validation loss, and the one whose weights the trainer has after `train`.

    They may differ with --select last, and if --metric_for_best_model is not the loss.
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
    """The table row for the epochs of `epochs`, or no row if nothing was validated."""
    if stage.get("best_epoch") is None:
        return []
    text = f"{stage['best_epoch']:g} with lowest validation loss ({stage['best_validation_loss']:.4f})"
    if stage["kept_epoch"] is not None:
        same = stage["kept_epoch"] == stage["best_epoch"]
        why = "with --select last"
        if stage["select"] == "best":
            why = f"with best {stage['metric_for_best_model'].removeprefix('eval_')}"
        text += ", kept" if same else f"; kept: {stage['kept_epoch']:g}, {why}"
    return [("epoch", text)]


def describe_run(summary: dict[str, Any], unit: str) -> str:
    """Format the tables at the end of a run: the run itself, and the test figures. `unit` is pairs or images."""
    data, throughput, stage = summary["data"], summary["throughput"], stage_of(summary)
    rows = [(unit, f"{data['train']} train, {data['validation']} validation, {data['test']} test")]
    if losses := summary.get("sft", {}).get("validation"):
        rows.append(("SFT loss, validation", f"{losses['loss_before']:.3f} → {losses['loss_after']:.3f}"))
    if stage:
        speed = throughput.get(f"{stage}_pairs_per_second") or summary[stage].get("images_per_second")
        rows += [*describe_epochs(summary[stage]), (f"{unit} per second", number(speed, 1))]
    if "total_seconds" in throughput:
        rows.append(("total seconds", f"{throughput['total_seconds']:.0f}"))
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
    """Free a stage's model and optimizer before the next stage loads its own. The trainer is unusable after this."""
    trainer.accelerator.free_memory()
    # the learning-rate scheduler and the callback handler also refer to the optimizer and the model
    vars(trainer).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def silent(*_: Any) -> None:
    """Print nothing. Processes other than the main one use this as `say`."""
