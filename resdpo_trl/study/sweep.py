"""A sweep runs one command line per point, one after another or several at once, each in its own folder.

    OUTPUT_DIR/
      sweep.json      the flags that all points share
      sft/            the run that made the reference of the points; sft_epochsN/ for --sft_epochs_list
      points/NAME/    one run per point
      table.csv       one line per point
      frontier.csv    with --reward_model: one line per checkpoint, its reward and its KL from the reference
      report.html     all points on one page; plots/ has its plots as PNG

A finished point is not run again. An interrupted one continues from its last checkpoint.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from resdpo_trl.errors import UserError
from resdpo_trl.metrics import FIGURES, table
from resdpo_trl.run.files import is_locked, lock, write_whole
from resdpo_trl.run.folder import read_object
from resdpo_trl.run.verdict import of_sweep
from resdpo_trl.sources import first_line
from resdpo_trl.study.sweep_page import AXES, Sweep, points_table, write_sweep_page
from resdpo_trl.training.arguments import option

FIGURE_OF = {figure.column: name for name, figure in FIGURES.items() if figure.column}  # column -> figure
COLUMNS = (
    "point", *AXES, "status", "best", "loss", "accuracy", "accuracy_low", "accuracy_high", *list(FIGURE_OF)[2:], "n",
    "validation_loss", "validation_accuracy", "best_epoch", "kept_epoch", "seconds", "folder",
)  # fmt: skip
FRONTIER_COLUMNS = (
    "point", *AXES, "epoch", "step", "kl", "kl_low", "kl_high", "reward", "reward_low", "reward_high", "n", "status",
    "key",
)  # fmt: skip
TEXTS = ("point", "status", "best", "folder", "key")  # columns that hold no numbers


@dataclass
class SweepConfig:
    """The points of a sweep: every combination of these."""

    _argument_group_name = "sweep"

    betas: list[float] = option([0.1], "Values of --beta.")
    learning_rates: list[float] | None = option(None, "Values of --learning_rate; by default its value.")
    seeds: list[int] | None = option(
        None, "Values of --seed for DPO; by default its value. SFT does not depend on them."
    )
    sft_epochs_list: list[float] | None = option(
        None, "Values of --sft.num_train_epochs; by default its value. One SFT per value, none for 0."
    )
    reward_model: str | None = option(
        None,
        "A reward model, to measure every checkpoint's reward and KL from the reference. It may be added "
        "to a finished sweep with --resume_from_checkpoint.",
    )
    frontier_samples: int = option(128, "Held-out prompts that each checkpoint answers for --reward_model.")
    jobs: int = option(1, "Points to run at once; they share the cores or the GPUs.")
    print_commands: bool = option(
        False, "Make the reference and print the points' command lines, for Slurm or Ray; run no point."
    )

    def __post_init__(self) -> None:
        for flag, least in (("jobs", 1), ("frontier_samples", 2)):
            if getattr(self, flag) < least:
                raise UserError(f"--{flag} {getattr(self, flag)}: must be at least {least}")
        for flag in ("betas", "learning_rates"):
            for value in getattr(self, flag) or ():
                if not value > 0:
                    raise UserError(f"--{flag} {value}: must be above 0")
        for value in self.sft_epochs_list or ():
            if not value >= 0:
                raise UserError(f"--sft_epochs_list {value}: must be at least 0")


@dataclass(frozen=True)
class Point:
    """One run of the sweep."""

    beta: float
    learning_rate: float
    seed: int
    sft_epochs: float | str
    folder: Path
    reference: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def flags(self) -> list[str]:
        return [
            "--beta", repr(self.beta), "--learning_rate", repr(self.learning_rate), "--seed", str(self.seed),
            "--output_dir", str(self.folder), "--reference", str(self.reference),
        ]  # fmt: skip


def points_of(
    config: SweepConfig,
    learning_rate: float,
    seed: int,
    output_dir: Path,
    sft_epochs: float = 1.0,
    reference: str | None = None,
) -> list[Point]:
    """Every distinct combination.

    `learning_rate`, `seed` and `sft_epochs` are the values of axes that the configuration does not set. The names of
    points with the value `sft_epochs` do not include it, so that the axis can be added to a sweep later. With a
    finished `reference`, there is no SFT.
    """
    if reference and config.sft_epochs_list:
        raise UserError("--sft_epochs_list runs SFT and --reference skips it: omit one of them")
    grid = itertools.product(
        dict.fromkeys(config.sft_epochs_list or [sft_epochs]),
        dict.fromkeys(config.betas),
        dict.fromkeys(config.learning_rates or [learning_rate]),
        dict.fromkeys(config.seeds or [seed]),
    )
    points = []
    for epochs, beta, rate, draw in grid:
        name, sft = f"beta{beta:g}_lr{rate:g}_seed{draw}", output_dir / "sft"
        if epochs != sft_epochs:
            name, sft = f"{name}_sft{epochs:g}", output_dir / f"sft_epochs{epochs:g}"
        start = Path(reference) if reference else sft / "reference"
        points.append(Point(beta, rate, draw, "" if reference else epochs, output_dir / "points" / name, start))
    return points


def remember(output_dir: Path, shared: Sequence[str], resume: bool) -> None:
    """Write sweep.json. In an earlier sweep's folder, check that it has the same shared flags."""
    path = output_dir / "sweep.json"
    if path.exists():
        if not resume:
            raise UserError(
                f"--output_dir {output_dir} already holds a sweep: continue it or add points with "
                "--resume_from_checkpoint, or name another folder"
            )
        try:
            earlier = " ".join(read_object(path)["flags"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} can't be read ({first_line(error)}): delete it, and pass the same flags") from None
        if earlier != " ".join(shared):
            raise UserError(
                f"--output_dir {output_dir} holds a sweep with other flags ({earlier or 'none'}): pass the same ones, "
                "or name another folder"
            )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if not lock(output_dir):
            raise UserError(f"--output_dir {output_dir}: another process is running this sweep; wait until it ends")
        write_whole(path, json.dumps({"flags": list(shared)}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} can't be written ({error.strerror}): name another") from None


def has_ended(folder: Path) -> bool:
    """Whether a run has ended and has written its report."""
    try:
        return bool(read_object(folder / "run.json").get("complete"))
    except (OSError, ValueError):
        return False


def command_of(recipe: Path, point: Point, shared: Sequence[str]) -> list[str]:
    """The command line of a point. It resumes a point that was interrupted."""
    resume = ["--resume_from_checkpoint"] if point.folder.exists() else []
    return [sys.executable, str(recipe), *shared, *point.flags(), *resume]


def run_points(
    recipe: Path,
    points: Sequence[Point],
    shared: Sequence[str],
    jobs: int,
    after_each: Callable[[dict[str, str]], Any] = lambda failures: None,
) -> dict[str, str]:
    """Run the points that have not ended; return {name: error} of those that failed.

    A failure does not stop the other points. A point's output goes to its log.txt. SIGTERM and Ctrl-C end the running
    points, and no further point starts. `after_each` gets the failures so far whenever a point has ended.
    """
    gpus, slot, numbers = _gpus(), threading.local(), itertools.count()
    failures: dict[str, str] = {}
    running: list[subprocess.Popen[bytes]] = []
    stopped = threading.Event()

    def run(point: Point) -> None:
        command = command_of(recipe, point, shared)
        point.folder.mkdir(parents=True, exist_ok=True)
        while is_locked(point.folder) and not stopped.wait(1):
            pass  # the point still runs from a killed sweep
        if stopped.is_set() or has_ended(point.folder):
            return
        own = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
        if gpus:
            own = {"CUDA_VISIBLE_DEVICES": slot.gpu}
        with open(point.folder / "log.txt", "ab") as log:
            process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)  # noqa: S603  (our own)
            running.append(process)
            if status := process.wait():
                failures[point.name] = _why(point.folder / "log.txt", status)

    def begin() -> None:
        """Assign a GPU to a thread. Threads share GPUs if there are more threads."""
        slot.gpu = gpus[next(numbers) % len(gpus)] if gpus else None

    with (
        ThreadPoolExecutor(max_workers=jobs, initializer=begin) as pool,
        tqdm(total=len(points), desc="Points", delay=0, leave=True) as bar,
    ):
        try:
            for future in [pool.submit(run, point) for point in points]:
                future.result()
                bar.update()
                after_each(failures)
        except KeyboardInterrupt:
            stopped.set()
            for process in running:
                process.terminate()  # it saves after its step
            raise
    return failures


def collect(points: Sequence[Point], failures: dict[str, str], output_dir: Path) -> list[dict[str, Any]]:
    """Write table.csv and report.html (with frontier.csv if it exists), and return the table's rows."""
    rows = []
    for point in points:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"point": point.name, "folder": str(point.folder)}
        row |= {axis: getattr(point, axis) for axis in AXES}
        row["status"] = f"failed: {failures[point.name]}" if point.name in failures else "not run"
        if has_ended(point.folder):
            summary = read_object(point.folder / "summary.json")
            dpo, test = summary["dpo"], summary["dpo"]["test"]
            row["status"] = "done"
            row |= {column: test[name] for column, name in FIGURE_OF.items()}
            row["n"] = test["n"]
            row["accuracy_low"], row["accuracy_high"] = test["interval_95"]["rewards/accuracies"]
            row |= {f"validation_{column}": dpo["validation"][FIGURE_OF[column]] for column in ("loss", "accuracy")}
            row |= {name: dpo.get(name, "") for name in ("best_epoch", "kept_epoch")}
            row["seconds"] = summary["throughput"].get("total_seconds", "")
        rows.append(row)
    best = best_of(rows, points)
    if best is not None:
        best["best"] = "best"
    write_rows(output_dir / "table.csv", COLUMNS, rows)
    if any(row["status"] == "done" for row in rows):
        write_sweep_report(output_dir)
    return rows


def write_sweep_report(output_dir: Path, output: str | None = None, refresh: float | None = None) -> Path:
    """Write the page of a sweep from its own files, by default as report.html in its folder."""
    rows = read_rows(output_dir / "table.csv", COLUMNS)
    frontier = read_rows(output_dir / "frontier.csv", FRONTIER_COLUMNS)
    done = [output_dir / "points" / row["point"] for row in rows if row["status"] == "done"]
    if not done:
        raise UserError(
            f"{output_dir}: no point of this sweep has ended yet; --resume_from_checkpoint continues an interrupted one"
        )
    return write_sweep_page(done, Sweep(rows, frontier), Path(output or output_dir / "report.html"), refresh)


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write a table as CSV, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of table.csv or frontier.csv, with numbers as floats. A UserError names a damaged file."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            if list(reader.fieldnames or ()) != list(columns):
                raise ValueError("unexpected columns")
            rows = list(reader)
            if any(cell is None for row in rows for cell in row.values()):
                raise ValueError("a cell is missing")
            return [
                {name: float(cell) if cell and name not in TEXTS else cell for name, cell in row.items()}
                for row in rows
            ]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} can't be read ({first_line(error)}): delete it, and run the sweep with --resume_from_checkpoint"
        ) from None


def best_of(rows: Sequence[dict[str, Any]], points: Sequence[Point]) -> dict[str, Any] | None:
    """The row of the best point on the validation pairs, never on the test; None if no point has ended.

    With only the sigmoid loss, the best point has the lowest loss: the Bradley–Terry cross-entropy of the preferences
    has the same scale for every β. Other losses depend on β, so the best point has the highest accuracy.
    """
    done = [row for row in rows if row["status"] == "done"]
    ended = [point.folder / "summary.json" for point in points if has_ended(point.folder)]
    if all(read_object(path)["dpo"]["loss_type"] == ["sigmoid"] for path in ended):
        done = [row for row in done if row["validation_loss"] is not None]  # of a point that diverged
        return min(done, key=lambda row: row["validation_loss"], default=None)
    return max(done, key=lambda row: row["validation_accuracy"], default=None)


def describe(rows: Sequence[dict[str, Any]], output_dir: Path, seconds: float) -> str:
    """The verdict and the table for the terminal; the best point has a star."""
    head, cells = points_table(rows, [f"{row['point']} *" if row["best"] else row["point"] for row in rows])
    lines = ["", *of_sweep(rows), "", table(cells, head)]
    lines += [f"  {row['point']}  {row['status']}" for row in rows if row["status"] != "done"]
    counts = ", ".join(map(str, sorted({row["n"] for row in rows if row["n"] != ""}))) or "–"
    lines += [
        "",
        f"  figures of the test pairs, n = {counts}; * best on validation; kept: epoch of the weights; {seconds:.0f} s",
        *(f"  {path}" for name in ("table.csv", "frontier.csv") if (path := output_dir / name).exists()),
    ]
    return "\n".join([*lines, "", f"open {output_dir / 'report.html'}"])


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def _why(log: Path, status: int) -> str:
    """The exit status and the last error line of a log, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "")
    return f"status {status}, {said[-200:]}"
