"""A sweep: one command line a point, run one after another or several at once, each in a folder of its own.

    OUTPUT_DIR/
      sweep.json      the flags that all points share
      sft/            the run that made the reference which all points start from
      points/NAME/    one run a point
      table.csv       one line a point
      report.html     all points on one page

A point that has ended is not run again; one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resdpo_trl.errors import UserError
from resdpo_trl.files import is_locked, write_whole
from resdpo_trl.report import write_report

COLUMNS = (
    "point", "beta", "learning_rate", "seed", "status", "loss", "accuracy", "accuracy_low", "accuracy_high", "margin",
    "reward_chosen", "reward_rejected", "n", "seconds", "folder",
)  # fmt: skip


@dataclass
class SweepConfig:
    """The points of a sweep: every combination of these."""

    _argument_group_name = "sweep"

    betas: list[float] = field(default_factory=lambda: [0.1], metadata={"help": "Values of --beta."})
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Values of --learning_rate; its own by default."}
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Values of --seed for DPO; its own by default. All points share one SFT."}
    )
    jobs: int = field(default=1, metadata={"help": "Points to run at once; they share the cores or the GPUs."})
    print_commands: bool = field(
        default=False,
        metadata={"help": "Make the reference, then print the points' command lines, for Slurm or ray, and end."},
    )

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"--jobs {self.jobs}: must be at least 1")
        wrong = [beta for beta in self.betas if not beta > 0]
        if wrong:
            raise UserError(f"--betas {wrong[0]}: must be above 0 (0.1 to 0.5 are usual)")
        wrong = [rate for rate in self.learning_rates or [] if not rate > 0]
        if wrong:
            raise UserError(f"--learning_rates {wrong[0]}: must be above 0")


@dataclass(frozen=True)
class Point:
    """One run of the sweep."""

    beta: float
    learning_rate: float
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def flags(self) -> list[str]:
        return [
            "--beta", repr(self.beta), "--learning_rate", repr(self.learning_rate), "--seed", str(self.seed),
            "--output_dir", str(self.folder),
        ]  # fmt: skip


def points_of(config: SweepConfig, learning_rate: float, seed: int, output_dir: Path) -> list[Point]:
    """Every combination, each once; `learning_rate` and `seed` stand in where no values are given."""
    grid = itertools.product(
        dict.fromkeys(config.betas),
        dict.fromkeys(config.learning_rates or [learning_rate]),
        dict.fromkeys(config.seeds or [seed]),
    )
    return [
        Point(beta, rate, number, output_dir / "points" / f"beta{beta:g}_lr{rate:g}_seed{number}")
        for beta, rate, number in grid
    ]


def remember(output_dir: Path, shared: Sequence[str], resume: bool) -> None:
    """Write sweep.json, or check that the points which are there were run with the same shared flags."""
    path = output_dir / "sweep.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8")).get("flags")
        if not resume:
            raise UserError(
                f"--output_dir {output_dir} already holds a sweep: continue it or add points with "
                "--resume_from_checkpoint, or name another folder"
            )
        if earlier != list(shared):
            raise UserError(
                f"--output_dir {output_dir} holds a sweep with other flags ({' '.join(earlier) or 'none'}): pass the "
                "same ones, or name another folder"
            )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"flags": list(shared)}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} can't be written ({error.strerror}): name another") from None


def has_ended(folder: Path) -> bool:
    """Whether a run has come to its end, with its report."""
    try:
        return bool(json.loads((folder / "run.json").read_text(encoding="utf-8")).get("complete"))
    except (FileNotFoundError, ValueError):
        return False


def command_of(recipe: Path, point: Point, shared: Sequence[str]) -> list[str]:
    """The command line of a point; it goes on where it was interrupted."""
    resume = ["--resume_from_checkpoint"] if point.folder.exists() else []
    return [sys.executable, str(recipe), *shared, *point.flags(), *resume]


def run_points(recipe: Path, points: Sequence[Point], shared: Sequence[str], jobs: int) -> dict[str, str]:
    """Run the points that have not ended; name -> what went wrong, of those that failed. The others are run all the
    same, and what a point prints goes to its log.txt. SIGTERM and Ctrl-C are passed on, and no further point is begun.
    """
    from tqdm.auto import tqdm

    waiting = [point for point in points if not has_ended(point.folder)]
    gpus = _gpus()
    failures: dict[str, str] = {}
    running: list[subprocess.Popen[bytes]] = []
    stopped = threading.Event()

    def run(number: int, point: Point) -> tuple[Point, str | None]:
        environment = dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
        elif jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        command = command_of(recipe, point, shared)
        point.folder.mkdir(parents=True, exist_ok=True)
        while is_locked(point.folder) and not stopped.wait(1):
            pass  # a sweep that was killed has left the point running
        if stopped.is_set() or has_ended(point.folder):
            return point, None
        with open(point.folder / "log.txt", "ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # noqa: S603  (our own recipe)
            running.append(process)
            status = process.wait()
        return point, None if status == 0 else _why(point.folder / "log.txt", status)

    with (
        ThreadPoolExecutor(max_workers=jobs) as pool,
        tqdm(total=len(points), initial=len(points) - len(waiting), desc="Points") as bar,
    ):
        try:
            for future in [pool.submit(run, number, point) for number, point in enumerate(waiting)]:
                point, wrong = future.result()
                if wrong is not None:
                    failures[point.name] = wrong
                bar.update()
        except KeyboardInterrupt:
            stopped.set()
            for process in running:
                process.terminate()  # it saves after its step
            raise
    return failures


def collect(points: Sequence[Point], failures: dict[str, str], output_dir: Path) -> list[dict[str, Any]]:
    """table.csv and report.html of the points; the table's rows."""
    rows = []
    for point in points:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {
            "point": point.name,
            "beta": point.beta,
            "learning_rate": point.learning_rate,
            "seed": point.seed,
            "folder": str(point.folder),
            "status": f"failed: {failures[point.name]}" if point.name in failures else "not run",
        }
        if has_ended(point.folder):
            summary = json.loads((point.folder / "summary.json").read_text(encoding="utf-8"))
            test = summary["dpo"]["test"]
            low, high = test["interval_95"]["rewards/accuracies"]
            row |= {
                "status": "done",
                "loss": test["loss"],
                "accuracy": test["rewards/accuracies"],
                "accuracy_low": low,
                "accuracy_high": high,
                "margin": test["rewards/margins"],
                "reward_chosen": test["rewards/chosen"],
                "reward_rejected": test["rewards/rejected"],
                "n": test["n"],
                "seconds": summary["throughput"]["total_seconds"],
            }
        rows.append(row)
    aside = output_dir / "table.csv.tmp"
    with open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(aside, output_dir / "table.csv")
    done = [point.folder for point in points if has_ended(point.folder)]
    if done:
        write_report(done, output_dir / "report.html")
    return rows


def describe(rows: Sequence[dict[str, Any]], output_dir: Path, seconds: float) -> str:
    """The table for the terminal."""
    head = f"{'loss':>8}{'accuracy':>10}{'95% interval':>18}{'margin':>9}{'chosen':>9}{'rejected':>10}"
    lines = ["", f"  {'point':<32}{head}"]
    for row in rows:
        if row["status"] != "done":
            lines.append(f"  {row['point']:<32}{row['status']}")
            continue
        interval = f"{row['accuracy_low']:.3f} to {row['accuracy_high']:.3f}"
        lines.append(
            f"  {row['point']:<32}{row['loss']:>8.4f}{row['accuracy']:>10.3f}{interval:>18}{row['margin']:>9.3f}"
            f"{row['reward_chosen']:>9.3f}{row['reward_rejected']:>10.3f}"
        )
    counts = {row["n"] for row in rows if row["n"] != ""}
    lines += ["", f"  n = {', '.join(map(str, sorted(counts))) or '-'}; {seconds:.0f} s; {output_dir / 'table.csv'}"]
    return "\n".join([*lines, f"  {output_dir / 'report.html'}", ""])


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def _why(log: Path, status: int) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "")
    return f"status {status}, {said[-200:]}"
