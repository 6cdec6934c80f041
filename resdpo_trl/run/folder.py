"""A run's folder: its files, how they are written, and the checks that protect an earlier run.

    OUTPUT_DIR/
      run.json        command line, configuration, versions, hardware, processes, data fingerprint, start and end
      reference/      the SFT (or one-epoch) model
      policy/         the trained policy and its model card
      reward_model/   (reward_hh.py) the trained reward model and its model card
      compared/       (images) the models that the policy is compared with
      checkpoints/    one folder per stage, one checkpoint per save
      metrics.jsonl   one line per log: {"stage", "split", "step", "epoch", metric: value…}
      summary.json    the final figures
      samples.jsonl   (text) prompts and every model's answers
      scores.jsonl    one line per test pair or image: rewards and margin; with content if extreme
      verdicts.jsonl  (comparisons) one line per question to a judge
      report.html     one self-contained page; plots/ has its plots as PNG

Only the main process writes. JSON is strict: a value that is not finite is written as null.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Container, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from resdpo_trl.errors import UserError
from resdpo_trl.memory import reuse_freed_memory
from resdpo_trl.run.files import (
    checkpoints_of,
    lock,
    read_jsonl,
    step_of,
    tidy,
    torn,
    write_whole,
    writing,
)

logger = logging.getLogger(__name__)
PACKAGES = (
    "resdpo-trl", "torch", "torchvision", "transformers", "trl", "datasets", "peft", "accelerate", "bitsandbytes"
)  # fmt: skip
WRITTEN = (
    "run.json", "reference", "policy", "reward_model", "compared", "checkpoints", "metrics.jsonl",
    "summary.json", "samples.jsonl", "scores.jsonl", "verdicts.jsonl", "report.html", "plots",
)  # fmt: skip
# prefixes of the options that may differ in a resumed run: reporting, what it keeps, how it loads data
FREE = (
    "preset", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "run_name", "project", "report_to",
    "disable_tqdm", "log_level", "save_total_limit", "ddp_timeout", "use_cpu", "push_to_hub", "reference_cache_dir",
    "enable_jit_checkpoint", "_n_gpu", "hub_", "dataloader_", "logging_dir", "trackio_",
    "judge_",
)  # fmt: skip
SECRET = ("token", "api_key", "access_key", "secret", "password")  # in the names of secret flags and variables


untrained: set[RunFolder] = set()  # this process's runs without a trained step; `discard` deletes them on failure


class RunFolder:
    """The files of one run, at `path`."""

    def __init__(self, path: str | Path, main_process: bool = True):
        self.path = Path(path)
        self.main_process = main_process
        self.reference = self.path / "reference"
        self.policy = self.path / "policy"
        self.reward_model = self.path / "reward_model"
        self.summary: dict[str, Any] = {}
        self.earlier: dict[str, Any] = {}  # run.json of the resumed run
        self.facts: dict[str, Any] = {}  # the content of run.json
        self._made = self._started = False  # whether this process created the folder, and whether it wrote to it
        self._replaced: list[Path] = []  # files and folders of an overwritten run; `start` deletes them

    @property
    def trained(self) -> Path:
        """The final model of a run: its policy, its reward model, or else its reference."""
        return next((folder for folder in (self.policy, self.reward_model) if folder.is_dir()), self.reference)

    def open(self, overwrite: bool = False, resume: bool = False) -> None:
        """Prepare the folder for writing. `start`, not this method, deletes a run that is overwritten.

        Raises:
            UserError: `overwrite` and `resume` are both true, or the folder holds a run and both are false, or another
                process writes to the folder, or it can't be written.
        """
        from accelerate import PartialState

        if overwrite and resume:
            raise UserError("--overwrite_output_dir and --resume_from_checkpoint exclude each other: choose one")
        held = [self.path / name for name in WRITTEN if (self.path / name).exists()]
        if held and not overwrite and not resume:
            raise UserError(
                f"--output_dir {self.path} already holds a run ({held[0].name}): continue it with "
                "--resume_from_checkpoint, replace it with --overwrite_output_dir, or name another folder"
            )
        self._replaced = held if overwrite else []
        if resume and (self.path / "summary.json").exists():
            self.summary = self._read("summary.json")
        if resume and (self.path / "run.json").exists():
            self.earlier = self.facts = self._read("run.json")
        PartialState().wait_for_everyone()  # every process reads before the main one writes
        if not self.main_process:
            return
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            if not lock(self.path):
                raise UserError(f"--output_dir {self.path}: another process is writing to this run; wait until it ends")
            tidy(self.path, WRITTEN)
            for folder in (self.path / "compared", *(self.path / "checkpoints").glob("*/")):
                if folder.is_dir():
                    tidy(folder)
        except OSError as error:
            raise self._not_writable(error) from None

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(f"--output_dir {self.path} can't be written ({error.strerror}): name another folder")

    def check_inputs(self, config: dict[str, Any]) -> None:
        """Raise a UserError if a flag names a path inside the run that is overwritten."""
        doomed = [path.resolve() for path in self._replaced]
        for name, value in config.items():
            if isinstance(value, dict):
                self.check_inputs(value)
            for word in value if isinstance(value, list) else [value]:
                named = str(word).partition("=")[2] if name == "models" else str(word)  # NAME=PATH
                if os.path.exists(named) and any(Path(named).resolve().is_relative_to(path) for path in doomed):
                    raise UserError(
                        f"--{name} {named}: is in the run that --overwrite_output_dir replaces: pass another "
                        "--output_dir, or copy it elsewhere first"
                    )

    def check_config(self, config: dict[str, Any]) -> None:
        """Raise a UserError if an option of a resumed run differs from its value at the start."""
        now = json.loads(to_json(_without_secrets(config)))
        for part, name, before, value in _differences(self.earlier.get("config", {}), now):
            if not name.startswith(FREE):
                raise UserError(
                    f"--{name} was {before} when the run in {self.path} started and is {value} now"
                    + (f" ({part})" if part else "")
                    + ": pass the earlier value, or start again with --overwrite_output_dir or another --output_dir"
                )

    def writing(self, what: str) -> contextlib.AbstractContextManager[None]:
        """`files.writing` for a file or folder of this run."""
        return writing(self.path / what, (self.path / "checkpoints").glob("*/"))

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def last_checkpoint(self, stage: str) -> Path | None:
        """The newest complete checkpoint of a stage, or None. Newer, incomplete ones are skipped with a warning."""
        for folder in checkpoints_of(self.checkpoints(stage)):
            reason = torn(folder)
            if reason is None:
                return folder
            logger.warning(f"{folder} is skipped: {reason}")
        return None

    def set_aside(self, stage: str, after_step: int) -> None:
        """Rename a stage's checkpoints after the step from which training resumes, including incomplete ones."""
        folder = self.checkpoints(stage)
        if not self.main_process or not folder.is_dir():
            return
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
        for checkpoint in checkpoints_of(folder):
            if step_of(checkpoint) > after_step:
                aside = checkpoint.with_name(f"passed-over-{checkpoint.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(checkpoint, aside)

    def start(self, config: dict[str, Any], seed: int, data_fingerprint: dict[str, str] | None = None) -> None:
        """Write run.json, without secrets. A run that is overwritten is deleted first.

        Raises:
            UserError: the data of a resumed run have changed, or the folder can't be written.
        """
        from resdpo_trl.training.processes import parallelism

        if self.earlier.get("data_fingerprint", data_fingerprint) != data_fingerprint:
            raise UserError(
                f"the data have changed since the run in {self.path} started: restore them, or start again with "
                "--overwrite_output_dir or another --output_dir"
            )
        try:
            _delete(self._replaced if self.main_process else [])
        except OSError as error:
            raise self._not_writable(error) from None
        self._started = True
        self.facts = {
            "command": [redacted(word) for word in sys.argv],
            "started": _now(),
            "ended": None,
            "seed": seed,
            "config": _without_secrets(config),
            "versions": {"python": platform.python_version(), **_versions()},
            "hardware": hardware(),
            **parallelism(),
        }
        if data_fingerprint is not None:
            self.facts["data_fingerprint"] = data_fingerprint
        if self.earlier:
            self.facts["resumed"] = [*self.earlier.get("resumed", []), self.facts["started"]]
            self.facts["started"] = self.earlier["started"]
        self._write("run.json", self.facts)

    def record(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.facts.update(facts)
        self._write("run.json", self.facts)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, without secrets."""
        return dict(self.facts["config"])

    def end(self) -> None:
        self.record(ended=_now())

    def discard(self) -> None:
        """Delete what this process has written. A run that has trained no step has nothing to resume from."""
        _delete([self.path / name for name in WRITTEN] if self._started else [])
        if self._made:
            with contextlib.suppress(OSError):  # it has files that this process did not write
                self.path.rmdir()

    def log(self, stage: str, split: str, step: int, epoch: float | None, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.main_process:
            line = {"stage": stage, "split": split, "step": step, "epoch": epoch, **metrics}
            with self.writing("metrics.jsonl"), open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")

    def logged(self, stage: str, split: str, step: int) -> dict[str, Any] | None:
        """The first line of metrics.jsonl for this stage, split and step, or None."""
        path = self.path / "metrics.jsonl"
        for _, row in read_jsonl(path, []) if path.exists() else ():
            if (row["stage"], row["split"], row["step"]) == (stage, split, step):
                return row
        return None

    def forget_metrics(self, stage: str, after_step: int, at_step: Container[str] = ()) -> None:
        """Drop a stage's lines after the step from which training resumes: it will write them again.

        `at_step` has the splits whose line of that step was written before the checkpoint.
        """
        path = self.path / "metrics.jsonl"
        if not self.main_process or not path.exists():
            return
        kept = [row for _, row in read_jsonl(path, []) if _belongs(row, stage, after_step, at_step)]
        write_whole(path, "".join(to_json(row) + "\n" for row in kept))

    def summarize(self, **parts: Any) -> None:
        """Merge parts into summary.json."""
        self.summary.update(parts)
        self._write("summary.json", self.summary)

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write samples.jsonl or scores.jsonl."""
        if self.main_process:
            with self.writing(name):
                write_whole(self.path / name, "".join(to_json(row) + "\n" for row in rows))

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return read_object(self.path / name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path / name} can't be read ({error}): fix it, or start again with --overwrite_output_dir"
            ) from None

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if self.main_process:
            with self.writing(name):
                write_whole(self.path / name, to_json(content, indent=2) + "\n")


def _delete(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run. Raises a ValueError if it is damaged, an OSError if it is missing."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON with floats at full precision. Values that are not finite become null."""
    plain = json.loads(json.dumps(value, default=_plain), parse_constant=lambda _: None)
    # a file name may have bytes that are not UTF-8
    return json.dumps(plain, indent=indent, ensure_ascii=False).encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    """A JSON value for a set, a NumPy or torch number, or any other object."""
    if isinstance(value, set | frozenset):
        return list(value)
    return value.item() if hasattr(value, "item") else str(value)


def redacted(text: str) -> str:
    """Text without the tokens and keys that came from flags, the environment or `hf auth login`."""
    from huggingface_hub import get_token

    words = [part for word in sys.argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = [*os.environ.items(), *((flag, value) for flag, value in pairwise(words) if flag.startswith("--"))]
    secrets = {value for name, value in given if name.lower().replace("-", "_").endswith(SECRET)}
    for secret in (secrets | {get_token() or ""}) - {""}:
        # a short secret may be part of ordinary text: replace it only if it is a whole argument or value
        if len(secret) >= 8 or text == secret or text.endswith(f"={secret}"):
            text = text.replace(secret, "[redacted]")
    return text


def write_figures(path: str, figures: dict[str, Any]) -> None:
    """Write an evaluation's figures to the file of --output."""
    try:
        write_whole(Path(path), to_json(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output {path}: can't be written ({error.strerror}); name another") from None


def hardware() -> dict[str, Any]:
    """The hardware that this process runs on."""
    import psutil
    import torch

    return {
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def use_the_cores() -> None:
    """Give a CPU process its share of the cores if `accelerate launch` limited it to one thread, and reuse its memory.

    Without --cpu or a config file, the launcher sets OMP_NUM_THREADS=1 on every machine.
    """
    import torch

    if not torch.cuda.is_available():
        reuse_freed_memory()
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or torch.cuda.is_available() or torch.get_num_threads() > 1:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _without_secrets(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_secrets(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not (isinstance(value, str) and any(word in key.lower() for word in SECRET))
    }


def _differences(earlier: dict[str, Any], now: dict[str, Any], part: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """(section, option, value before, value now) of the options that differ."""
    for name in earlier.keys() & now.keys():
        if isinstance(earlier[name], dict) and isinstance(now[name], dict):
            yield from _differences(earlier[name], now[name], name)
        elif earlier[name] != now[name]:
            yield part, name, earlier[name], now[name]


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an extra that is not installed
            found[package] = importlib.metadata.version(package)
    return found


def _belongs(row: dict[str, Any], stage: str, after_step: int, at_step: Container[str]) -> bool:
    if row["stage"] != stage:
        return True
    split, step = row["split"], row["step"]  # the test comes after training
    return split != "test" and (step < after_step or (step == after_step and split in at_step))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
