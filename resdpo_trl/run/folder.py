"""A run's folder: what it holds, how it is written, and what it refuses to harm.

    OUTPUT_DIR/
      run.json        command line, configuration, versions, hardware, processes, data fingerprint, start and end
      reference/      the SFT (or one-epoch) model
      policy/         the trained policy and its model card
      reward_model/   (reward_hh.py) the trained reward model and its model card
      compared/       (images) the models that the policy is compared with
      answers/        (comparisons) token ids of every model's answers
      checkpoints/    one folder per stage, one checkpoint per save
      metrics.jsonl   one line per log: {"stage", "split", "step", "epoch", metric: value…}
      summary.json    the final figures
      samples.jsonl   (text) prompts and every model's answers
      scores.jsonl    one line per test pair or image: rewards and margin; the extreme ones have their content
      verdicts.jsonl  (comparisons) one line per question that a judge was asked
      report.html     one self-contained page; plots/ has its plots as PNG

Only the main process writes. JSON is strict: a value that is not finite is written as null.
"""

from __future__ import annotations

import contextlib
import ctypes
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
    "run.json", "reference", "policy", "reward_model", "compared", "answers", "checkpoints", "metrics.jsonl",
    "summary.json", "samples.jsonl", "scores.jsonl", "verdicts.jsonl", "report.html", "plots",
)  # fmt: skip
# how the options begin in which a resumed run may differ: where it reports, what it keeps, how it loads
FREE = (
    "preset", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "run_name", "project", "report_to",
    "disable_tqdm", "log_level", "save_total_limit", "ddp_timeout", "use_cpu", "push_to_hub", "reference_cache_dir",
    "enable_jit_checkpoint", "_n_gpu", "hub_", "dataloader_", "logging_dir", "trackio_",
)  # fmt: skip
SECRET = ("token", "api_key", "access_key", "secret", "password")  # what the name of a flag or variable ends with


untrained: set[RunFolder] = set()  # this process's runs that have trained no step yet; `discard` them if it fails


class RunFolder:
    """The files of one run, at `path`."""

    def __init__(self, path: str | Path, main_process: bool = True):
        self.path = Path(path)
        self.main_process = main_process
        self.reference = self.path / "reference"
        self.policy = self.path / "policy"
        self.reward_model = self.path / "reward_model"
        self.summary: dict[str, Any] = {}
        self.earlier: dict[str, Any] = {}  # run.json of the run that is resumed
        self.facts: dict[str, Any] = {}  # run.json as it is, without secrets
        self._made = self._started = False  # whether this process made the folder, and began to write into it
        self._replaced: list[Path] = []  # files and folders of the run that is overwritten, which `start` deletes

    @property
    def trained(self) -> Path:
        """The model that a run is about: its policy, its reward model, or the reference where it made nothing more."""
        return next((folder for folder in (self.policy, self.reward_model) if folder.is_dir()), self.reference)

    def open(self, overwrite: bool = False, resume: bool = False) -> None:
        """Make the folder ready to write, or say why not. A run that is overwritten stays until `start`.

        Raises:
            UserError: the folder holds a run and neither `overwrite` nor `resume` was asked for, or it can't be
                written.
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
        PartialState().wait_for_everyone()  # every process has looked before the main one writes
        if not self.main_process:
            return
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            if not lock(self.path):
                raise UserError(f"--output_dir {self.path}: another process is writing this run; wait until it ends")
            tidy(self.path, WRITTEN)
            for folder in (self.path / "compared", *(self.path / "checkpoints").glob("*/")):
                if folder.is_dir():
                    tidy(folder)
        except OSError as error:
            raise self._not_writable(error) from None

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(f"--output_dir {self.path} can't be written ({error.strerror}): name another")

    def check_inputs(self, config: dict[str, Any]) -> None:
        """Raise a UserError where a flag names something inside the run that is overwritten, which would be gone."""
        doomed = [path.resolve() for path in self._replaced]
        for name, value in config.items():
            if isinstance(value, dict):
                self.check_inputs(value)
            for word in value if isinstance(value, list) else [value]:
                named = str(word).partition("=")[2] if name == "models" else str(word)  # NAME=PATH
                if os.path.exists(named) and any(Path(named).resolve().is_relative_to(path) for path in doomed):
                    raise UserError(
                        f"--{name} {named}: lies in the run that --overwrite_output_dir replaces: pass another "
                        "--output_dir, or copy it elsewhere first"
                    )

    def check_config(self, config: dict[str, Any]) -> None:
        """Raise a UserError where a resumed run is asked for something else than what it began as."""
        now = json.loads(to_json(_without_secrets(config)))
        for part, name, before, value in _differences(self.earlier.get("config", {}), now):
            if not name.startswith(FREE):
                raise UserError(
                    f"--{name} was {before} when the run in {self.path} began and is {value} now"
                    + (f" ({part})" if part else "")
                    + ": pass what it was, or start again with --overwrite_output_dir or another --output_dir"
                )

    def writing(self, what: str) -> contextlib.AbstractContextManager[None]:
        """`files.writing` of a file or folder of this run."""
        return writing(self.path / what, (self.path / "checkpoints").glob("*/"))

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def last_checkpoint(self, stage: str) -> Path | None:
        """The newest whole checkpoint of a stage, or None; newer ones that are not whole are skipped with a warning."""
        for folder in checkpoints_of(self.checkpoints(stage)):
            reason = torn(folder)
            if reason is None:
                return folder
            logger.warning(f"{folder} is skipped: {reason}")
        return None

    def set_aside(self, stage: str, after_step: int) -> None:
        """Rename the checkpoints of a stage past the one that a resumed training starts from, torn ones among them."""
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
        """Write run.json: what runs, without secrets. The run that is overwritten is deleted now.

        Raises:
            UserError: a run is resumed with other data than it began with, or the folder can't be written.
        """
        from resdpo_trl.training.processes import parallelism

        if self.earlier.get("data_fingerprint", data_fingerprint) != data_fingerprint:
            raise UserError(
                f"the data have changed since the run in {self.path} began: bring them back, or start again with "
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
        """Delete what this process has written: a run that trained no step has nothing to go on from."""
        _delete([self.path / name for name in WRITTEN] if self._started else [])
        if self._made:
            with contextlib.suppress(OSError):  # somebody else has put something into it
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
        """Drop a stage's lines past the step that a resumed training starts from: it will write them again.

        `at_step` are the splits whose line of that very step came before the checkpoint.
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
    """Strict JSON with floats at full precision; what is not finite becomes null."""
    plain = json.loads(json.dumps(value, default=_plain), parse_constant=lambda _: None)
    # the name of a file may hold bytes that are no UTF-8
    return json.dumps(plain, indent=indent, ensure_ascii=False).encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    """What JSON can say of a set, of a number of numpy or torch, or of anything else."""
    if isinstance(value, set | frozenset):
        return list(value)
    return value.item() if hasattr(value, "item") else str(value)


def redacted(text: str) -> str:
    """Text without the tokens and keys that this process was given: by flag, by environment, by `hf auth login`."""
    from huggingface_hub import get_token

    words = [part for word in sys.argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    given = [*os.environ.items(), *((flag, value) for flag, value in pairwise(words) if flag.startswith("--"))]
    secrets = {value for name, value in given if name.lower().replace("-", "_").endswith(SECRET)}
    for secret in (secrets | {get_token() or ""}) - {""}:
        # a short one would take words out of the text, but not where it is a word of the command line
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
    """What this process runs on."""
    import psutil
    import torch

    return {
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def use_the_cores() -> None:
    """Give a CPU process its share of the cores where `accelerate launch` left it one thread, and reuse its memory.

    Without --cpu or a config file the launcher sets OMP_NUM_THREADS=1 whatever the machine has.
    """
    import torch

    if not torch.cuda.is_available():
        _reuse_freed_memory()
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or torch.cuda.is_available() or torch.get_num_threads() > 1:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _reuse_freed_memory() -> None:
    """Let glibc keep large freed blocks until `trim_heap`.

    By default it maps every tensor above 32 MiB anew, and each of its pages faults at the first write. benchmarks/LOG.md
    has what that costs.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if set_option is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        set_option(m_mmap_threshold, 1 << 30)
        set_option(m_trim_threshold, (1 << 31) - 1)


def trim_heap() -> None:
    """Give the operating system what has been freed; where the C library is glibc, which keeps it.

    After a training step that is its activations, over a gigabyte.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


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
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an extra that this machine does not have
            found[package] = importlib.metadata.version(package)
    return found


def _belongs(row: dict[str, Any], stage: str, after_step: int, at_step: Container[str]) -> bool:
    if row["stage"] != stage:
        return True
    split, step = row["split"], row["step"]  # the test comes after training
    return split != "test" and (step < after_step or (step == after_step and split in at_step))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
