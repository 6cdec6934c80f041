"""The page of a sweep: its points against β, on the test pairs and on the frontier of reward and KL."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resdpo_trl.metrics import FIGURES, digits_of, number
from resdpo_trl.run.report import (
    GREY,
    INK,
    Plots,
    Run,
    curves,
    load_run,
    mark_end,
    run_title,
    section_of,
    styles,
    what_ran,
    write_page,
)
from resdpo_trl.run.verdict import STAGES, of_sweep, test_of

AXES = {"beta": "β", "learning_rate": "rate", "seed": "seed", "sft_epochs": "SFT epochs"}  # the axes of a sweep


@dataclass
class Sweep:
    """The tables of a sweep."""

    rows: list[dict[str, Any]]  # of table.csv
    frontier: list[dict[str, Any]]  # of frontier.csv

    def name_of(self, row: dict[str, Any], without: str = "") -> str:
        """A name for a point: its values on the axes on which points differ, except the axis `without`."""
        varied = [axis for axis in AXES if len({str(other[axis]) for other in self.rows}) > 1]
        parts = [
            f"{AXES[axis]} {row[axis] if isinstance(row[axis], str) else format(row[axis], 'g')}"
            for axis in varied
            if axis != without
        ]
        return ", ".join(parts) or ("" if without else f"β {row['beta']}")

    @property
    def done(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] == "done"]

    @property
    def best(self) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["best"]), None)


def write_sweep_page(folders: Sequence[Path], sweep: Sweep, target: Path, refresh: float | None = None) -> Path:
    """Write the page of a sweep with finished points in `folders`, and PNG copies of its plots in plots/."""
    runs, plots = [load_run(folder) for folder in folders], Plots(target.parent / "plots")
    points = {row["point"]: row for row in sweep.rows}
    for run in runs:
        run.name = sweep.name_of(points[run.path.name])
    best = sweep.name_of(sweep.best) if sweep.best else None
    opening, *said = of_sweep(sweep.rows) or [""]
    if sweep.best:
        opening = opening.replace(sweep.best["point"], sweep.name_of(sweep.best))
    stage = next((name for name in STAGES if any(row["stage"] == name for row in runs[0].metrics)), "sft")
    return write_page(
        target,
        {
            "title": f"Sweep of {len(sweep.rows)} points: {run_title(runs[0]) or target.parent.resolve().name}",
            "lead": opening,
            "verdict": said,
            "steps": _next_steps(runs, sweep),
            "notes": [*(note for run in runs for note in run.notes), *_failures(sweep)],
            "sections": [
                _against_beta(runs, sweep, plots),
                _points(sweep),
                _frontier(sweep, plots),
                curves(runs, stage, plots, best or ""),
                what_ran(runs[:1]),
            ],
        },
        refresh,
    )


def _next_steps(runs: list[Run], sweep: Sweep) -> list[tuple[str, str]]:
    run = next((run for run in runs if sweep.best and run.path.name == sweep.best["point"]), None)
    if run is None or "command" not in run.run:
        return []
    script, *flags = run.run["command"]
    return [
        ("Chat with the best point", f"python {Path(script).parent / 'chat.py'} {shlex.quote(str(run.path))}"),
        ("Its page", str(run.path / "report.html")),
        ("Its command (pass another --output_dir)", shlex.join(["accelerate", "launch", script, *flags])),
    ]


def _against_beta(runs: list[Run], sweep: Sweep, plots: Plots) -> dict[str, Any] | None:
    """The share of test pairs ranked right against β, with its 95% intervals."""
    betas = sorted({row["beta"] for row in sweep.done})
    if len(betas) < 2:
        return None
    others: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(sweep.done, key=lambda row: row["beta"]):
        others.setdefault(sweep.name_of(row, without="beta"), []).append(row)
    references = {test_of(run.summary).get("logps/ref_accuracies") for run in runs}  # one if all have the same SFT

    def paint(axes: Any) -> None:
        for place, (label, look) in enumerate(styles(list(others)).items()):
            rows = others[label]
            low, high = ([abs(row[f"accuracy_{side}"] - row["accuracy"]) for row in rows] for side in ("low", "high"))
            x, y = [row["beta"] * (1 + 0.03 * place) for row in rows], [row["accuracy"] for row in rows]
            axes.errorbar(x, y, [low, high], marker="o", markersize=4.5, capsize=3, label=label or None, **look)
        if sweep.best:
            axes.plot(sweep.best["beta"], sweep.best["accuracy"], "*", color=INK, markersize=12, label="best", zorder=9)
        if len(references) == 1 and None not in references:
            axes.axhline(*references, color=GREY, linestyle=":", linewidth=1.4, label="reference")
        axes.margins(y=0.12)
        axes.set_xscale("log")
        axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
        axes.minorticks_off()

    caption = "Share of test pairs ranked right, with 95% intervals"
    plot = plots.draw("against_beta", caption, paint, FIGURES["rewards/accuracies"].words, "β", legend_below=True)
    return section_of("against-beta", "Against β", plots=[plot])


def _failures(sweep: Sweep) -> list[str]:
    """A note for each point that did not end, and for each failed row of the frontier."""
    failed = {row["point"]: row["status"] for row in sweep.rows if row["status"] != "done"}
    notes = [f"{point}: {status}" for point, status in failed.items()]
    for row in sweep.frontier:
        if row["status"] != "done":
            step = f", step {row['step']:g}" if row["step"] != "" else ""
            why = "it did not end" if row["point"] in failed else row["status"]
            notes.append(f"{row['point']}{step} is missing from the frontier: {why}")
    return notes


def points_table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the points' table, in the terminal and on the page; `names` are those of the rows."""
    columns = [figure for figure in FIGURES.values() if figure.column]
    head = ["", *(figure.column.replace("_", " ") + figure.label.removeprefix(figure.words) for figure in columns)]
    head[2] += " (95% interval)"
    cells = []
    for name, row in zip(names, rows, strict=True):
        if row["status"] != "done":
            cells.append([name, row["status"].split(":")[0], *["–"] * (len(columns) + 1)])
            continue
        row = {name: None if value == "" else value for name, value in row.items()}  # a figure that is not finite
        figures = [number(row[figure.column], figure.digits - 1) for figure in columns]
        digits = digits_of(row["accuracy_low"], row["accuracy_high"])
        share, low, high = (number(row[f"accuracy{side}"], digits) for side in ("", "_low", "_high"))
        figures[1] = f"{share} ({low} to {high})"
        epochs = ("–" if row[column] is None else f"{row[column]:g}" for column in ("best_epoch", "kept_epoch"))
        cells.append([name, *figures, *epochs])
    return [*head, "lowest loss at", "kept"], cells


def _points(sweep: Sweep) -> dict[str, Any]:
    """The table of the points, with the best marked."""
    names = [sweep.name_of(row) + (" — best" if row["best"] else "") for row in sweep.rows]
    head, rows = points_table(sweep.rows, names)
    counts = sorted({row["n"] for row in sweep.done})
    text = (
        f"Means over {', '.join(f'{n:g}' for n in counts)} held-out pairs. The best point and the epoch that each "
        "point kept were chosen on the validation pairs. 'lowest loss at' is the epoch of the lowest validation loss. "
        "Every figure is in table.csv."
    )
    tables = [{"head": head, "rows": rows, "numbers": True}]
    return section_of("points", "The points on the test pairs", text=text, tables=tables)


def _frontier(sweep: Sweep, plots: Plots) -> dict[str, Any] | None:
    """Expected reward against KL (Figure 2, left, of https://arxiv.org/abs/2305.18290), from frontier.csv."""
    done = [row for row in sweep.frontier if row["status"] == "done"]
    lines = {sweep.name_of(point): [row for row in done if row["point"] == point["point"]] for point in sweep.rows}
    looks = styles(list(lines))
    lines = {name: rows for name, rows in lines.items() if rows}
    references = [row for row in done if row["point"] == "reference"]
    if not lines:
        return None
    best = sweep.name_of(sweep.best) if sweep.best else None

    def paint(axes: Any) -> None:
        for name, rows in lines.items():
            kls, rewards = [row["kl"] for row in rows], [row["reward"] for row in rows]
            label, width = (f"{name} (best)", 3.0) if name == best else (name, 1.6)
            axes.plot(kls, rewards, marker="o", markersize=5, label=label, linewidth=width, **looks[name])
            low, high = ([row[f"reward_{side}"] for row in rows] for side in ("low", "high"))
            axes.vlines(kls, low, high, color=looks[name]["color"], alpha=0.3, linewidth=1)
            mark_end(axes, kls, rewards, looks[name]["color"], f"{rows[-1]['epoch']:g}")
        kls, rewards = [row["kl"] for row in references], [row["reward"] for row in references]
        axes.plot(kls, rewards, "D", color=GREY, markersize=6, label="reference" if references else None)

    caption = "Expected reward against KL(policy‖reference), both from the same sampled answers"
    counts = ", ".join(sorted({f"{row['n']:g}" for row in done}))
    text = (
        f"Each dot is one checkpoint: the trained reward model's mean reward of its sampled answers to {counts} "
        "held-out prompts, and log π − log π_ref of the same answers, an unbiased estimate of the KL per answer. Lines "
        "join a point's epochs (the last is labeled). Thin bars are 95% intervals of the reward. A higher reward at "
        "the same KL is better (Figure 2, left, of the DPO paper). The rows and both intervals are in frontier.csv."
    )
    plot = plots.draw("frontier", caption, paint, "reward", "KL(policy‖reference), nats per answer", legend_below=True)
    return section_of("frontier", "Reward and KL", text=text, plots=[plot])
