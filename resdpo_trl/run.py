"""A run's folder: what it holds, how it is written, and what it refuses to harm.

    OUTPUT_DIR/
      run.json        command line, configuration, versions, hardware, processes, data fingerprint, start and end
      reference/      the SFT (or one-epoch) model
      policy/         the trained policy and its model card
      reward_model/   (reward_hh.py) the trained reward model and its model card
      compared/       (images) the models that the policy is compared with
      checkpoints/    one folder a stage, one checkpoint a save
      metrics.jsonl   one line a log: {"stage", "split", "step", "epoch", metric: value…}
      summary.json    the final figures
      samples.jsonl   (text) prompts and every model's answers
      scores.jsonl    one line a test pair or image: rewards and margin; the most wrong and most right ones with content
      verdicts.jsonl  (comparisons) one line a question that a judge was asked
      report.html     one self-contained page; plots/ has its plots as PNG

Only the main process writes. JSON is strict: a value that is not finite is written as null.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resdpo_trl.errors import UserError

PACKAGES = (
    "resdpo-trl", "torch", "torchvision", "transformers", "trl", "datasets", "peft", "accelerate", "bitsandbytes"
)  # fmt: skip
WRITTEN = (
    "run.json", "reference", "policy", "reward_model", "compared", "checkpoints", "metrics.jsonl", "summary.json",
    "samples.jsonl", "scores.jsonl", "verdicts.jsonl", "report.html", "plots",
)  # fmt: skip
SECRET = ("token", "api_key", "access_key", "secret", "password")  # what the name of a flag or variable ends with


class RunFolder:
    """The files of one run, at `path`."""

    def __init__(self, path: str | Path, main_process: bool = True):
        self.path = Path(path)
        self.main_process = main_process
        self.reference = self.path / "reference"
        self.policy = self.path / "policy"
        self.reward_model = self.path / "reward_model"
        self.summary: dict[str, Any] = {}
        self.resumed = False

    def open(self, overwrite: bool = False, resume: bool = False) -> None:
        """Make the folder ready to write, or say why not.

        Raises:
            UserError: the folder holds a run and neither `overwrite` nor `resume` was asked for, or it can't be
                written.
        """
        if overwrite and resume:
            raise UserError("--overwrite_output_dir and --resume_from_checkpoint exclude each other: choose one")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output_dir {self.path}: a file is there; name a folder")
        held = [name for name in WRITTEN if (self.path / name).exists()]
        if held and not overwrite and not resume:
            raise UserError(
                f"--output_dir {self.path} already holds a run ({held[0]}): continue it with "
                "--resume_from_checkpoint, replace it with --overwrite_output_dir, or name another folder"
            )
        _barrier()  # every process has looked before the main one writes
        if not self.main_process:
            return
        try:
            if overwrite:
                for name in held:
                    target = self.path / name
                    shutil.rmtree(target) if target.is_dir() else target.unlink()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} can't be written ({error.strerror}): name another") from None
        self.resumed = resume
        if resume and (self.path / "summary.json").exists():
            self.summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def last_checkpoint(self, stage: str) -> Path | None:
        """The newest checkpoint of a stage, or None."""
        found = [
            folder
            for folder in self.checkpoints(stage).glob("checkpoint-*")
            if (folder / "trainer_state.json").is_file() and folder.name.removeprefix("checkpoint-").isdigit()
        ]
        return max(found, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)

    def start(self, config: dict[str, Any], seed: int, **facts: Any) -> None:
        """Write run.json: everything needed to tell what ran, without secrets."""
        from resdpo_trl.processes import parallelism

        self._run = {
            "command": [_hidden(part, previous) for previous, part in zip(["", *sys.argv], sys.argv, strict=False)],
            "started": _now(),
            "ended": None,
            "seed": seed,
            "config": _without_secrets(config),
            "versions": {"python": platform.python_version(), **_versions()},
            "hardware": hardware(),
            **parallelism(),
            **facts,
        }
        if self.main_process and self.resumed and (self.path / "run.json").exists():
            earlier = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            self._run["resumed"] = [*earlier.get("resumed", []), self._run["started"]]
            self._run["started"] = earlier.get("started")
        self._write("run.json", self._run)

    def record(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self._run.update(facts)
        self._write("run.json", self._run)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, without secrets."""
        return dict(self._run["config"])

    @property
    def versions(self) -> dict[str, str]:
        return dict(self._run["versions"])

    @property
    def command(self) -> list[str]:
        """The command line, without secrets."""
        return list(self._run["command"])

    def end(self) -> None:
        self.record(ended=_now())

    def log(self, stage: str, split: str, step: int, epoch: float | None, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.main_process:
            line = {"stage": stage, "split": split, "step": step, "epoch": epoch, **metrics}
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")

    def logged(self, stage: str, split: str, step: int) -> dict[str, Any] | None:
        """The first line of metrics.jsonl for this stage, split and step, or None."""
        path = self.path / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            row = json.loads(line)
            if (row["stage"], row["split"], row["step"]) == (stage, split, step):
                return row
        return None

    def forget_metrics(self, stage: str, after_step: int) -> None:
        """Drop a stage's lines past the step that a resumed training starts from: it will write them again."""
        path = self.path / "metrics.jsonl"
        if not self.main_process or not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _belongs(line, stage, after_step)]
        replace_file(path, "".join(line + "\n" for line in kept))

    def summarize(self, **parts: Any) -> None:
        """Merge parts into summary.json."""
        self.summary.update(parts)
        self._write("summary.json", self.summary)

    def write_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write samples.jsonl or scores.jsonl."""
        if self.main_process:
            replace_file(self.path / name, "".join(to_json(row) + "\n" for row in rows))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        if self.main_process:
            replace_file(self.path / name, to_json(content, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON with floats at full precision; what is not finite becomes null."""
    return json.dumps(_strict(value), indent=indent, ensure_ascii=False, allow_nan=False)


def redacted(text: str) -> str:
    """Text without the tokens and keys that this process was given: by flag, by environment, by `hf auth login`."""
    from huggingface_hub import get_token

    flags = zip(sys.argv, [*sys.argv[1:], ""], strict=True)
    found = [value for flag, value in flags if _hidden(value, flag) == "[redacted]"]
    found += [word.partition("=")[2] for word in sys.argv if _hidden(word, "") != word]
    found += [value for name, value in os.environ.items() if name.lower().endswith(SECRET)]
    for value in {*found, get_token() or ""}:
        if len(value) >= 8:  # a shorter one would take words out of the text
            text = text.replace(value, "[redacted]")
    return text


def write_figures(path: str, figures: dict[str, Any]) -> None:
    """Write an evaluation's figures to the file of --output."""
    try:
        replace_file(Path(path), to_json(figures, indent=2) + "\n")
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
    """Give a CPU process its share of the cores where `accelerate launch` left it one thread.

    Without --cpu or a config file the launcher sets OMP_NUM_THREADS=1 whatever the machine has.
    """
    import torch

    if "ACCELERATE_MIXED_PRECISION" not in os.environ or torch.cuda.is_available() or torch.get_num_threads() > 1:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _barrier() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if hasattr(value, "item"):  # a numpy or torch number
        return _strict(value.item())
    return str(value)


def _without_secrets(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_secrets(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not (isinstance(value, str) and any(word in key.lower() for word in SECRET))
    }


def _hidden(part: str, previous: str) -> str:
    """A command-line word, unless it is the value of a flag like --hub_token."""
    if part.startswith("--"):
        flag, equals, _ = part.partition("=")
        secret = equals and flag.replace("-", "_").endswith(SECRET)
        return f"{flag}=[redacted]" if secret else part
    secret = previous.startswith("--") and previous.replace("-", "_").endswith(SECRET)
    return "[redacted]" if secret else part


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
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that this machine does not have
    return found


def _belongs(line: str, stage: str, after_step: int) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # a line torn by a crash
        return False
    # the test comes after training, at its last step
    return row.get("stage") != stage or (row.get("step", 0) <= after_step and row.get("split") != "test")


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
