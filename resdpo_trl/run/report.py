"""report.html: one self-contained page of one or several runs.

A page is a dictionary with a title, an opening and sections. The template page.html renders it and escapes all text of
models and data. The pages of a sweep and of a comparison build their sections with the functions of this module and
pass them to `write_page`.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resdpo_trl import __version__
from resdpo_trl.errors import UserError, printable
from resdpo_trl.metrics import FIGURES, flaw, number, percent, shown
from resdpo_trl.run.files import read_jsonl, write_whole
from resdpo_trl.run.folder import read_object
from resdpo_trl.run.verdict import STAGES, before_and_after, test_of, verdict
from resdpo_trl.sources import SMOLLM2, SMOLLM2_ID, source_name

INK = "#010203"  # the color of plots; the page replaces it with its text color, light or dark
GREY = "#888888"
PALETTE = ("#4a90e2", "#e07b26", "#3aa657", "#c0504d", "#8a63c7", "#1aa3a3", "#b8860b", "#d05a9e")
SHOWN_TEXT = 3000  # characters of a prompt or an answer
SHOWN_POINTS = 400  # of a curve
SIDE_BY_SIDE = ("", "test accuracy", "95% interval", "KL from reference", "seconds", "images/s")
# flags that a sweep sets per point, or that apply only to a single run
OF_A_POINT = (
    "beta", "learning_rate", "seed", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub",
    "hub_model_id", "hub_token",
)  # fmt: skip


@dataclass
class Run:
    """The files of a run's folder; `notes` says what is missing or damaged."""

    path: Path
    name: str
    run: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def curve(self, stage: str, split: str, name: str) -> tuple[list[float], list[float]]:
        """Epochs and values of a figure."""
        rows = [row for row in self.metrics if (row["stage"], row["split"]) == (stage, split)]
        rows = [row for row in rows if row.get("epoch") is not None and row.get(name) is not None]
        return [row["epoch"] for row in rows], [row[name] for row in rows]


def load_run(folder: str | Path) -> Run:
    """Read a run's folder. A missing or damaged file becomes a note, so that the rest is still shown.

    Raises:
        UserError: the folder has no run.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name the --output_dir of a run")
    if not (path / "run.json").exists() and not (path / "summary.json").exists():
        raise UserError(f"{path}: not a run's folder: it has neither run.json nor summary.json")
    loaded = Run(path, printable(path.resolve().name))
    for name in ("run.json", "summary.json", "metrics.jsonl", "samples.jsonl", "scores.jsonl"):
        file, torn = path / name, list[str]()
        try:
            content = read_object(file) if file.suffix == ".json" else [row for _, row in read_jsonl(file, torn)]
            setattr(loaded, file.stem, content)
        except FileNotFoundError:
            loaded.notes += [f"{path.name} has no {name}."] if file.suffix == ".json" else []
        except (OSError, ValueError) as error:
            loaded.notes.append(f"{path.name}: {name} can't be read ({str(error)[:100]}).")
        loaded.notes += [f"{path.name}: {len(torn)} damaged line(s) of {name} are skipped."] if torn else []
    if loaded.run and loaded.run.get("ended") is None:
        loaded.notes.append(f"{path.name} has not ended: the figures are preliminary.")
    return loaded


def write_report(folders: Sequence[str | Path], output: str | Path | None = None, refresh: float | None = None) -> Path:
    """Write the page of these runs, with PNG copies of its plots in plots/ next to it.

    Args:
        folders: one or several runs.
        output: the page; by default report.html in the folder of a single run.
        refresh: seconds after which a browser reloads the page.
    """
    runs = [load_run(folder) for folder in folders]
    if output is None and len(runs) > 1:
        raise UserError("--output: needed for the page of several runs")
    target = Path(output) if output is not None else runs[0].path / "report.html"
    plots = Plots(target.parent / "plots")
    there = {row["stage"] for run in runs for row in run.metrics}
    stage = next((name for name in (*STAGES, "reference") if name in there), "sft")
    losses = [run.summary["dpo"] for run in runs if "dpo" in run.summary]
    page: dict[str, Any] = {
        "title": f"{len(runs)} runs: {', '.join(run.name for run in runs)}",
        "subtitle": "; ".join(dict.fromkeys(f"loss {' + '.join(dpo['loss_type'])}, β {dpo['beta']}" for dpo in losses)),
        "notes": [note for run in runs for note in run.notes],
    }
    sections = [_results(runs), _comparison(runs)]
    over_epochs = curves(runs, stage, plots)
    if len(runs) == 1:
        (run,) = runs
        first, *said = verdict(run.summary, run.metrics) or [""]
        page |= {"title": run_title(run) or run.name, "lead": first, "bars": _bars(run.summary), "verdict": said}
        page |= {"first": _first_answers(run), "steps": _next_steps(run)}
        sections = [over_epochs, _margins(run, plots), *sections]
        sections += [_extremes(run), _pictures(run), _cuts(run), _samples(run)]
    else:
        sections.append(over_epochs)
    return write_page(target, page | {"sections": [*sections, what_ran(runs)]}, refresh)


def write_page(target: Path, page: dict[str, Any], refresh: float | None = None) -> Path:
    """Render `page` with the template page.html and write it. Sections that are None are skipped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("resdpo_trl.run"),
        autoescape=True,
        trim_blocks=True,
        finalize=lambda value: printable(value, kept="\n\t") if type(value) is str else value,  # our SVG is a subclass
    )
    page = page | {"sections": list(filter(None, page["sections"])), "version": __version__, "refresh": refresh}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, environment.get_template("page.html").render(page))
    except OSError as error:
        raise UserError(f"{target}: can't be written ({error.strerror}); name another --output") from None
    return target


def section_of(identity: str, title: str, **parts: Any) -> dict[str, Any]:
    """A section for the template: `parts` are its text, tables, plots, pairs, pictures or code."""
    return {"id": identity, "title": title, **parts}


# --- opening ---------------------------------------------------------------------------------------------------------


def run_title(run: Run) -> str | None:
    """The stage, model and data of the run as a title; None if its files lack them."""
    config = run.run.get("config", {})
    made = {"dpo": "DPO", "reward": "A reward model", "cross_entropy": "Cross-entropy", "sft": "SFT"}
    what = next((text for stage, text in made.items() if stage in run.summary), None)
    if what is None or "model" not in config:
        return None
    arch, reference = config["model"].get("arch"), config.get("training", {}).get("reference")
    if reference:
        model = "/".join(Path(reference).parts[-2:])
    elif arch:
        model = f"a {arch} network"
    else:
        named = config["model"].get("model_name_or_path") or SMOLLM2
        model = Path(SMOLLM2_ID if named == SMOLLM2 else named).name
    return f"{what} of {model} on {source_name(run.summary['data']['source'])}"


def _bars(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Shares with their intervals, as bars from 0 to 100%."""
    scores = {"reference": "reference, log-likelihood", "policy": "policy, reward"}
    names = {} if "accuracy" in test_of(summary) else scores
    return [
        {"name": names.get(name, name), "value": percent(share, n)}
        | {"note": f"95% interval {percent(low, n)} to {percent(high, n)}"}
        | {"at": f"{share:.2%}", "low": f"{low:.2%}", "width": f"{high - low:.2%}"}
        for name, share, (low, high), n in before_and_after(summary)
    ]


def _first_answers(run: Run) -> dict[str, Any] | None:
    """The first prompt with the answers of reference and policy, and the chosen answer."""
    for row in run.samples[:1]:
        said = {name: kinds["greedy"] for name, kinds in row["answers"].items() if name != "base" and "greedy" in kinds}
        return _pair(row, "", [_answer(*each) for each in [*said.items(), ("chosen answer", row["chosen"])]])
    return None


def _next_steps(run: Run) -> list[tuple[str, str]]:
    """(description, command) of the next steps after a finished run."""
    if run.run.get("ended") is None:
        return []
    folder, flags = shlex.quote(str(run.path)), run.run["command"][1:]
    steps = []
    if "dpo" in run.summary and run.samples:
        steps.append(("Chat with the reference and the policy", f"resdpo-trl chat {folder}"))
    if "dpo" in run.summary and "classes" not in run.summary["data"]:
        kept, dropped = [], False
        for word in flags:
            if word.startswith("--"):
                dropped = word.partition("=")[0].lstrip("-").replace("-", "_") in OF_A_POINT
            kept += [] if dropped else [shlex.quote(word)]
        betas = " ".join(f"{factor * run.summary['dpo']['beta']:.2g}" for factor in (1 / 3, 1, 3))
        steps.append(("Try other values of β", " ".join([f"resdpo-trl sweep --betas {betas}", *kept])))
    return [*steps, ("Publish the model", f"resdpo-trl publish {folder} --hub_model_id NAME")]


def _pair(row: dict[str, Any], title: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """A prompt with its answers for the template."""
    return {"title": title or short_text(row["prompt"]), "prompt": shown_text(row["prompt"]), "answers": answers}


def _answer(name: str, text: str, marked: bool = True) -> dict[str, Any]:
    """An answer for the template; if it is `marked`, its name includes its flaw."""
    found = flaw(text) if marked else None
    return {"name": f"{name} — {found}" if found else name, "pieces": [("same", shown_text(text))] if text else []}


# --- plots -----------------------------------------------------------------------------------------------------------


class Plots:
    """Plots as SVG for the page, with a PNG copy of each in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def draw(
        self, name: str, caption: str, paint: Callable[[Any], None], y: str, x: str, legend_below: bool = False
    ) -> dict[str, Any]:
        """The plot that `paint` draws on matplotlib's axes. A legend below the axes has room for many runs."""
        import markupsafe
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        style: Any = {
            "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
            "font.size": 10, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False,
            "legend.frameon": False, "legend.fontsize": 9, "font.family": "sans-serif", "text.parse_math": False,
            "svg.hashsalt": name, "axes.grid": True, "axes.grid.axis": "y", "grid.color": GREY, "grid.alpha": 0.25,
        }  # fmt: skip
        with rc_context(style):
            figure = Figure(figsize=(4.4, 3.0), layout="constrained")
            axes = figure.add_subplot(xlabel=x, ylabel=y)
            paint(axes)
            labels = axes.get_legend_handles_labels()[1]
            if labels and legend_below:
                columns = 1 if max(map(len, labels)) > 24 else 2
                figure.set_figheight(3.0 + 0.22 * math.ceil(len(labels) / columns))
                figure.legend(loc="outside lower center", ncols=columns)
            elif labels:
                axes.legend()
            svg = io.StringIO()
            figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            self.folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.folder / f"{name}.png", dpi=200, facecolor="white")
        text = svg.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        # the ids of the figures on a page must differ
        text = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text.replace(INK, "currentColor"))
        return {"svg": markupsafe.Markup(text), "caption": caption}  # noqa: S704  (matplotlib escapes the names)


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A color for each name, and a new line style each time the colors repeat."""
    looks = itertools.product(("-", "--", ":", "-."), PALETTE)
    return {name: {"color": color, "linestyle": line} for name, (line, color) in zip(names, itertools.cycle(looks))}


def mark_end(axes: Any, x: Sequence[float], y: Sequence[float], color: str, text: str) -> None:
    """Write `text` at the end of a line, to show its direction."""
    axes.annotate(text, (x[-1], y[-1]), (5, 4), textcoords="offset points", fontsize=9, color=color, zorder=9)


def curves(runs: list[Run], stage: str, plots: Plots, best: str | None = None) -> dict[str, Any] | None:
    """Every figure against the epoch, SFT's loss first. The run named `best` has a thicker line."""
    single = len(runs) == 1 and best is None
    drawn, looks = [], styles([run.name for run in runs])
    wanted = [(stage, name, figure.words) for name, figure in FIGURES.items()]
    if single:
        before = {"sft": "SFT loss, nats per token", "reference": "cross-entropy of the reference, nats"}
        wanted = [(of, "loss", words) for of, words in before.items() if of != stage] + wanted
    for of, name, words in wanted:
        lines = []  # (epochs, values, how matplotlib draws them)
        for run in runs:
            for split, least in (("train", 2), ("validation", 1)):
                how = {"linewidth": 1.1 if single else 0.8, "alpha": 0.85 if single else 0.5, **looks[run.name]}
                if split == "validation":
                    how |= {"linewidth": 1.8, "alpha": 1, "marker": "o", "markersize": 4.5, "label": run.name}
                    how |= {"linewidth": 3.0, "zorder": 3, "label": f"{run.name} (best)"} if run.name == best else {}
                how |= {"color": PALETTE[split == "validation"], "label": split} if single else {}
                epochs, values = run.curve(of, split, name)
                every = max(1, len(values) // SHOWN_POINTS)
                lines += [(epochs[::every], values[::every], how)] if len(values) >= least else []
        if not lines:
            continue

        def paint(axes: Any, lines: Any = lines, name: str = name, of: str = of) -> None:
            for epochs, values, how in lines:
                axes.plot(epochs, values, **how)
            kept = runs[0].summary.get(of, {}).get("kept_epoch")
            if single and kept is not None:
                axes.axvline(kept, color=GREY, linestyle="--", linewidth=1, label="epoch kept")
            if name == "loss" and of in ("dpo", "reward") and all(map(_is_sigmoid, runs)):
                axes.axhline(math.log(2), color=GREY, linestyle=":", linewidth=1)

        slug = re.sub(r"\W+", "_", name) if of == stage else f"{of}_{name}"
        drawn.append(plots.draw(slug, words, paint, words, "epoch", legend_below=not single))
    if not drawn:
        return None
    text = "Thin lines show training, averaged over the steps between two log lines. Dots show validation."
    if best:
        text += f" The thick line is the best point on the validation pairs: {best}."
    return section_of("curves", "Curves", text=text, plots=drawn)


def _margins(run: Run, plots: Plots) -> dict[str, Any] | None:
    margins = [row["margin"] for row in run.scores if row.get("margin") is not None]
    if len(margins) < 10:
        return None
    wrong = [margin for margin in margins if margin <= 0]
    right = [margin for margin in margins if margin > 0]

    def paint(axes: Any) -> None:
        edges = bin_edges(margins)
        axes.hist(wrong, bins=edges, color=PALETTE[3], label=f"ranked wrong ({len(wrong)})")
        axes.hist(right, bins=edges, color=PALETTE[2], label=f"right ({len(right)})")

    kind = "images" if "label" in run.scores[0] else "pairs"
    caption = f"Margins of the {len(margins)} test {kind}: chosen minus rejected reward"
    plot = plots.draw("test_margins", caption, paint, kind, "margin")
    return section_of("margins", "Margins on the test data", plots=[plot])


def bin_edges(values: Sequence[float]) -> list[float]:
    """Edges of about 40 bins that cover all values. Zero is an edge, so that no bin has both signs."""
    least, most = min(values), max(values)
    width = (most - least) / 40 or 1.0
    edges = [width * k for k in range(math.floor(least / width), math.floor(most / width) + 2)]
    edges[0], edges[-1] = min(edges[0], least), max(edges[-1], most)  # rounding may exclude them
    return edges


# --- sections --------------------------------------------------------------------------------------------------------


def _results(runs: list[Run]) -> dict[str, Any] | None:
    """The means over the test data."""
    tests = [test_of(run.summary) for run in runs]
    names = [name for name in FIGURES if any(test.get(name) is not None for test in tests)]
    if not names:
        return None
    single = len(runs) == 1
    rows = []
    for name in names:
        cells = [shown(test, name) for test in tests]
        several = [f"{mean} ({interval})" if interval else mean for mean, interval in cells]
        rows.append([FIGURES[name].label, *(cells[0] if single else several)])
    head = ["", "mean", "95% interval"] if single else ["", *(run.name for run in runs)]
    counts = ", ".join(str(test["n"]) for test in tests if test)
    unit = "images" if any("classes" in run.summary.get("data", {}) for run in runs) else "pairs"
    text = (
        f"Means over {counts} held-out {unit} that neither training nor the choice of the epoch used. "
        "Intervals are Wilson intervals for shares and bootstrap intervals for means. Arrows point to better values."
        + (" Random guessing has a loss of ln 2 = 0.6931." if all(map(_is_sigmoid, runs)) else "")
    )
    return section_of("results", "On the test data", text=text, tables=[{"head": head, "rows": rows, "numbers": True}])


def side_by_side(summary: dict[str, Any]) -> list[list[str]]:
    """The rows of `SIDE_BY_SIDE` for the reference, the policies and the baseline of an image run."""
    mode = "{rejected_sampling}/{reference_update}".format(**summary["dpo"])
    models = {"reference": summary["reference"], f"DPO, {mode}": summary["dpo"]}
    for name, found in summary.get("compared", {}).items():
        models[name if name == "cross-entropy" else f"DPO, {name}"] = found
    rows = []
    for name, found in models.items():
        test, speed = found["test"], [number(found.get("seconds"), 1), number(found.get("images_per_second"), 0)]
        rows.append([name, *shown(test, "accuracy", 4), shown(test, "kl", 3)[0], *speed])
    return rows


def _comparison(runs: list[Run]) -> dict[str, Any] | None:
    rows = []
    for run in runs:
        for name, *cells in side_by_side(run.summary) if run.summary.get("compared") else ():
            rows.append([name if len(runs) == 1 else f"{run.name}: {name}", *cells])
    table = {"head": SIDE_BY_SIDE, "rows": rows, "numbers": True}
    return section_of("comparison", "Side by side", tables=[table]) if rows else None


def _extremes(run: Run) -> dict[str, Any] | None:
    rows = sorted((row for row in run.scores if "prompt" in row), key=lambda row: row["margin"] or 0.0)
    pairs = []
    for row in [*rows[: len(rows) // 2], *reversed(rows[len(rows) // 2 :])]:
        side = "ranked right" if (row["margin"] or 0.0) > 0 else "ranked wrong"
        title = f"{side}, margin {number(row['margin'])}: {short_text(row['prompt'])}"
        pairs.append(_pair(row, title, [_answer(name, row[name], marked=False) for name in ("chosen", "rejected")]))
    title, text = "Pairs with the lowest and the highest margins", "Prompts are shown as the models see them."
    return section_of("extremes", title, text=text, pairs=pairs) if pairs else None


def _samples(run: Run) -> dict[str, Any] | None:
    pairs, flaws = [], dict[str, Counter[str | None]]()
    for row in run.samples:
        said = {f"{model}, {kind}": text for model, kinds in row["answers"].items() for kind, text in kinds.items()}
        for name, text in said.items():
            flaws.setdefault(name, Counter())[flaw(text)] += 1
        answers = [_answer(name, text) for name, text in said.items()]
        answers += [_answer(f"data, {name}", row[name], marked=False) for name in ("chosen", "rejected")]
        pairs.append(_pair(row, "", answers))
    kinds = ("repeats itself", "ends at once")
    rows = [[name, *(found[kind] for kind in kinds), found.total()] for name, found in flaws.items()]
    table = {"head": ["", *kinds, "answers"], "rows": rows, "numbers": True}
    parts: dict[str, Any] = {"text": "Answers to held-out prompts.", "tables": [table], "pairs": pairs}
    return section_of("answers", "Answers", **parts) if pairs else None


def _pictures(run: Run) -> dict[str, Any] | None:
    pictures = [
        {"png": row["png"], "label": row["label"], "right": row["policy"][0] == row["label"]}
        | {side: f"{row[side][0]} {row[side][1]:.2f}" for side in ("reference", "policy")}
        for row in sorted(run.scores, key=lambda row: row.get("margin") or 0.0)
        if "png" in row
    ]
    text = (
        "The images with the smallest mean margin, then those with the largest, each with the most probable class "
        "under reference and policy."
    )
    title = "Images with the lowest and the highest margins"
    return section_of("images", title, text=text, pictures=pictures) if pictures else None


def _cuts(run: Run) -> dict[str, Any] | None:
    """The numbers of rows that were used, dropped and truncated."""
    data = run.summary.get("data")
    if not data:
        return None
    rows = [["used", ", ".join(f"{data[split]} {split}" for split in ("train", "validation", "test") if split in data)]]
    dropped = ", ".join(f"{n} {reason}" for reason, n in data.get("dropped", {}).items() if n)
    rows.append(["dropped", dropped or "none"])
    rows += [["skipped by limits", str(data["cut_by_limits"])]] if data.get("cut_by_limits") else []
    if "cap" in data:
        cap = {name: sum(split[name] for split in data["cap"].values()) for name in data["cap"]["train"]}
        text = f"shortened prompts: {cap['prompts_shortened']}; dropped turns: {cap['turns_dropped']}; truncated "
        text += f"responses: {cap['chosen_cut'] + cap['rejected_cut']}; lost pairs: {cap['pairs_lost']}"
        rows.append([f"cap of {data['max_length']} tokens", text])
    return section_of("cuts", "Data", tables=[{"rows": rows}])


def what_ran(runs: list[Run]) -> dict[str, Any]:
    """The facts and the command line of every run, and the configuration of a single one; folded."""
    tables, code = [], []
    for run in runs:
        facts: dict[str, Any] = {
            name: run.run.get(name) for name in ("started", "ended", "seed", "num_processes", "parallelism")
        }
        if found := run.run.get("hardware"):
            cpu = f"{found['cpu']}, {found['cpu_threads']} threads, {found['memory_bytes'] / 2**30:.0f} GiB"
            facts["hardware"] = "; ".join([cpu, *found["gpus"]])
        facts["throughput"] = ", ".join(f"{k}: {v:.4g}" for k, v in run.summary.get("throughput", {}).items())
        if run.run.get("resumed"):
            facts["throughput"] += "; since the last resume"
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in run.run.get("versions", {}).items())
        rows = [[name, fact] for name, fact in facts.items() if fact not in (None, "")]
        tables.append({"title": run.name if len(runs) > 1 else "", "rows": [["folder", run.path.name], *rows]})
        code += [" ".join(run.run["command"])] if "command" in run.run else []
    if len(runs) == 1 and "config" in runs[0].run:
        code.append(json.dumps(_without_empty(runs[0].run["config"]), indent=1, ensure_ascii=False))
    return section_of("run", "What ran", tables=tables, code=code, folded=True)


def _without_empty(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the options that are off or empty."""
    cleaned = {name: _without_empty(value) if isinstance(value, dict) else value for name, value in config.items()}
    return {name: value for name, value in cleaned.items() if value not in (None, "", [], {}, False)}


def _is_sigmoid(run: Run) -> bool:
    """Whether the loss is the Bradley–Terry loss, which is ln 2 for random guessing."""
    return "reward" in run.summary or run.summary.get("dpo", {}).get("loss_type") == ["sigmoid"]


def shown_text(text: str) -> str:
    """Text truncated to `SHOWN_TEXT` characters."""
    text = text.strip()
    return text if len(text) <= SHOWN_TEXT else text[:SHOWN_TEXT] + " …"


def short_text(text: str) -> str:
    """The last turn of a dialogue, or any other text, in one line of at most 90 characters."""
    return textwrap.shorten(text.strip().removesuffix("Assistant:").rpartition("Human:")[2], 90, placeholder=" …")
