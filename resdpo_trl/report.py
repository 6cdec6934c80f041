"""report.html: one self-contained page of one or several runs. What a model or a data set wrote is escaped in it."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resdpo_trl import __version__
from resdpo_trl.errors import UserError, printable
from resdpo_trl.files import write_whole
from resdpo_trl.run import read_object, read_rows
from resdpo_trl.sources import SMOLLM2, SMOLLM2_ID, source_name
from resdpo_trl.verdict import of_comparison, of_sweep, verdict

STAGES = ("dpo", "reward", "cross_entropy")  # what a run's summary may hold with test figures, in order
INK = "#010203"  # what plots are drawn with; in the page it becomes the text's colour, light or dark
PALETTE = ("#4a90e2", "#e07b26", "#3aa657", "#c0504d", "#8a63c7", "#1aa3a3", "#b8860b", "#d05a9e")
SHOWN_TEXT = 3000  # characters of a prompt or an answer
SHOWN_POINTS = 400  # of a curve
LARGEST_NUMBER = 1e100  # a plot's; beyond it differences overflow
# what a damaged file of a run leads to where it is read
DAMAGE = (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError)

# (metric, the axis's label)
CURVES = (
    ("loss", "loss"),
    ("rewards/margins", "margin of rewards"),
    ("rewards/accuracies", "share of pairs ranked right"),
    ("rewards/chosen", "reward, chosen"),
    ("rewards/rejected", "reward, rejected"),
    ("accuracy", "accuracy"),
    ("kl", "KL from reference, nats"),
)
TEST_NAMES = {
    "loss": "loss",
    "rewards/accuracies": "pairs ranked right",
    "rewards/margins": "margin of rewards",
    "rewards/chosen": "reward, chosen",
    "rewards/rejected": "reward, rejected",
    "logps/accuracies": "pairs ranked right by the policy's log-likelihood",
    "logps/ref_accuracies": "pairs ranked right by the reference's log-likelihood",
    "accuracy": "accuracy",
    "kl": "KL(policy‖reference), nats per image",
}
# of a sweep's points: what a command line sets for each of them, or for one run alone
OF_A_POINT = (
    "beta", "learning_rate", "seed", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "push_to_hub",
    "hub_model_id",
)  # fmt: skip
REPEATS = 3  # times that an answer must say the same before it counts as repeating itself


@dataclass
class Run:
    """What a run's folder says of itself; what is missing or torn stands in `notes`."""

    path: Path
    name: str
    run: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def curve(self, stage: str, split: str, name: str) -> tuple[list[float], list[float]]:
        """Epochs and values of a metric."""
        rows = [
            row
            for row in self.metrics
            if row.get("stage") == stage and row.get("split") == split and _is_number(row.get(name))
        ]
        rows = [row for row in rows if _is_number(row.get("epoch"))]
        return [float(row["epoch"]) for row in rows], [float(row[name]) for row in rows]


@dataclass
class Sweep:
    """What a sweep adds to the page of its points."""

    rows: list[dict[str, Any]]  # table.csv's
    frontier: list[dict[str, Any]]  # frontier.csv's

    def name_of(self, row: dict[str, Any]) -> str:
        """A point by the axes on which the sweep's points differ."""
        axes = (("beta", "β "), ("learning_rate", "rate "), ("seed", "seed "), ("sft_epochs", "SFT epochs "))
        varied = [(name, text) for name, text in axes if len({str(other[name]) for other in self.rows}) > 1]
        parts = [f"{text}{row[name]:g}" if _is_number(row[name]) else text + str(row[name]) for name, text in varied]
        return ", ".join(parts) or f"β {row['beta']}"


def load_run(folder: str | Path) -> Run:
    """Read a run's folder; a UserError where it is none.

    Missing and torn files leave a note: a crash while writing must not hide the rest.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name the --output_dir of a run")
    if not (path / "run.json").exists() and not (path / "summary.json").exists():
        raise UserError(f"{path}: not a run's folder (neither run.json nor summary.json in it)")
    notes: list[str] = []
    loaded = Run(
        path=path,
        name=printable(path.resolve().name),
        run=_read_object(path / "run.json", notes),
        summary=_read_object(path / "summary.json", notes),
        metrics=_read_rows(path / "metrics.jsonl", notes),
        samples=_read_rows(path / "samples.jsonl", [] if not (path / "samples.jsonl").exists() else notes),
        scores=_read_rows(path / "scores.jsonl", [] if not (path / "scores.jsonl").exists() else notes),
        notes=notes,
    )
    if not loaded.metrics and "comparison" not in loaded.summary:
        notes.append(f"{path.name} has no metrics: there are no curves.")
    versions = loaded.run.get("versions")
    written = versions.get("resdpo-trl", __version__) if isinstance(versions, dict) else __version__
    if written != __version__:
        notes.append(
            f"{path.name} was written by resdpo-trl {written} and this page by {__version__}: what it did not "
            "write is not shown."
        )
    if loaded.run and loaded.run.get("ended") is None:
        notes.append(f"{path.name} has not ended: the figures are those that it had written.")
    return loaded


def write_report(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    sweep: Sweep | None = None,
    refresh: float | None = None,
) -> Path:
    """Write the page of these runs, and PNG copies of its plots in plots/ beside it.

    Args:
        folders: one or several runs.
        output: the page; report.html in the folder of a single run by default.
        sweep: the table and the frontier of the sweep whose points these runs are.
        refresh: seconds after which a browser loads the page again.
    """
    runs = [load_run(folder) for folder in folders]
    if sweep is not None:
        points = {row["point"]: row for row in sweep.rows}
        for run in runs:
            run.name = sweep.name_of(points[run.path.name])
    if output is None and len(runs) > 1:
        raise UserError("--output: name the page that several runs share")
    target = Path(output) if output is not None else runs[0].path / "report.html"
    plots = Plots(target.parent / "plots")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        page = render(runs, plots, sweep, target.parent.resolve().name, refresh)
        write_whole(target, page)
    except OSError as error:
        raise UserError(f"{target}: can't be written ({error.strerror}); name another --output") from None
    return target


def render(
    runs: list[Run], plots: Plots, sweep: Sweep | None = None, name: str = "", refresh: float | None = None
) -> str:
    """The page as text; `name` is the sweep's, `refresh` as `write_report` has it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("resdpo_trl"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value, kept="\n\t") if type(value) is str else value,  # Markup is ours
    )
    environment.globals["refresh"] = refresh
    single = runs[0] if len(runs) == 1 and sweep is None else None
    page: dict[str, Any] = {"version": __version__, "lead": "", "strip": [], "verdict": [], "first": None, "steps": []}
    if single and "comparison" in single.summary:
        from resdpo_trl.study import comparison_page

        opening, *said = of_comparison(single.summary)
        sections = [section for section in comparison_page.sections(single, plots) if section]
        page |= {"title": comparison_page.title(single), "subtitle": comparison_page.subtitle(single)}
        page |= {"lead": opening, "verdict": said, "notes": single.notes, "sections": sections}
        return environment.get_template("comparison.html").render(page)
    there = {str(row.get("stage")) for run in runs for row in run.metrics}
    stage = next((name for name in STAGES if name in there), "sft")
    notes = [note for run in runs for note in run.notes]

    def part(function: Callable[..., Any], *of: Any) -> Any:
        """A part of the page; a note where a damaged file does not give it, so that the rest is still seen."""
        try:
            return function(*of)
        except DAMAGE as error:
            what = function.__name__.strip("_").replace("_", " ")
            notes.append(
                f"The part '{what}' is left out, for a file is damaged ({type(error).__name__}: {error!s:.80})."
            )
            return None

    if sweep is not None:
        page |= {"title": part(_sweep_title, runs, sweep) or f"Sweep {printable(name)}: {len(sweep.rows)} points"}
        opening, *said = part(of_sweep, sweep.rows) or [""]
        page |= {"lead": opening, "verdict": said, "steps": part(_sweep_steps, runs, sweep) or []}
        sections = [part(_against_beta, runs, sweep, plots), part(_points, sweep), part(_frontier, sweep, plots)]
        sections.append(part(_curves, runs, stage, plots, _best_name(sweep)))
        notes += _failures(sweep)
    else:
        page |= {"title": f"{len(runs)} runs: {', '.join(run.name for run in runs)}"}
        sections = [part(_results, runs), part(_comparison, runs), part(_curves, runs, stage, plots)]
        sections.append(part(_accuracy_and_kl, runs, plots))
    if single:
        page |= {"title": part(_title, single) or single.name, "lead": part(lead, single.summary) or ""}
        page |= {"strip": part(_strip, single) or [], "steps": part(_next_steps, single) or []}
        page |= {"first": part(_first_answers, single), "verdict": part(_verdict, single) or []}
        sections = [sections[2], part(_margins, single, plots), sections[0], sections[1], sections[3]]
        sections += [part(_extremes, single), part(_pictures, single), part(_confusion, single)]
        sections += [part(_cuts, single), part(_samples, single)]
    sections.append(part(what_ran, runs, sweep is not None))
    return environment.get_template("report.html").render(
        page
        | {
            "subtitle": part(_subtitle, runs) or "",
            "notes": notes,
            "sections": [section for section in sections if section],
        }
    )


# --- what a single run's page opens with -----------------------------------------------------------------------------


def _title(run: Run) -> str | None:
    """What the run made, of which model and data."""
    config = run.run.get("config", {})
    made = {"dpo": "DPO", "reward": "A reward model", "cross_entropy": "Cross-entropy", "sft": "SFT"}
    what = next((text for stage, text in made.items() if stage in run.summary), None)
    model = config.get("model", {}).get("model_name_or_path") or config.get("model", {}).get("arch")
    model = model or config.get("sft_stage", {}).get("reference") or ("smollm2" if "model" in config else None)
    if not what or not model or "data" not in run.summary:
        return None
    model = SMOLLM2_ID if model == SMOLLM2 else model
    return f"{what} of {Path(str(model)).name} on {source_name(str(run.summary['data']['source']))}"


def _before_and_after(summary: dict[str, Any]) -> list[tuple[str, float, list[float], int]]:
    """(name, share, its 95% interval, n) of the reference and of the model that was trained."""
    test, found = _test(summary), []
    if "accuracy" in test:
        sides = [
            ("reference", summary.get("reference", {}).get("test", {}), "accuracy"),
            ("policy", test, "accuracy"),
        ]
    elif "reward" in summary:
        sides = [("reward model", test, "rewards/accuracies")]
    else:
        sides = [("reference", test, "logps/ref_accuracies"), ("policy", test, "rewards/accuracies")]
    for name, figures, metric in sides:
        if _is_number(figures.get(metric)) and metric in figures.get("interval_95", {}):
            found.append((name, float(figures[metric]), figures["interval_95"][metric], figures["n"]))
    return found


def lead(summary: dict[str, Any]) -> str:
    """One sentence: before and after, on unseen rows; empty where there are no test figures."""
    found = {name: (share, n) for name, share, _, n in _before_and_after(summary)}
    if not found:
        return ""
    (name, (share, n)), before = list(found.items())[-1], found.get("reference")
    after = _percent(share, n)
    if "accuracy" in _test(summary):
        said = f"The {name} classifies {after} of {n} unseen images right"
        return said + (f"; the reference {_percent(*before)}." if before else ".")
    what = "The policy's implicit reward" if name == "policy" else f"The {name}"
    said = f"{what} ranks {after} of {n} unseen pairs right"
    return said + (f"; the reference's log-likelihood {_percent(*before)}." if before else ".")


def _verdict(run: Run) -> list[str]:
    """The verdict without its first sentence where the lead and the bars say the same."""
    found = verdict(run.summary, run.metrics)
    return found[1:] if _before_and_after(run.summary) else found


def _strip(run: Run) -> list[dict[str, Any]]:
    """The intervals as bars from 0 to 100%."""
    return [
        {
            "name": name,
            "value": _percent(share, n),
            "note": f"95% interval {_percent(low, n)} to {_percent(high, n)}",
            "at": f"{100 * share:.2f}",
            "low": f"{100 * low:.2f}",
            "width": f"{100 * (high - low):.2f}",
        }
        for name, share, (low, high), n in _before_and_after(run.summary)
    ]


def _first_answers(run: Run) -> dict[str, Any] | None:
    """Reference, policy and the people's answer to the first prompt."""
    row = next(iter(run.samples), None)
    if not row or not row.get("answers"):
        return None
    said = {name: kinds.get("greedy", "") for name, kinds in row["answers"].items() if name != "base"}
    answers = [*said.items(), ("people's answer", row.get("chosen", ""))]
    return {
        "prompt": shown_text(row.get("prompt", "")),
        "answers": [{"name": _marked(name, text), "text": shown_text(text)} for name, text in answers],
    }


def _next_steps(run: Run) -> list[tuple[str, str]]:
    """(what, command) of what may follow."""
    if run.run.get("ended") is None or not run.run.get("command"):
        return []
    script, *flags = run.run["command"]
    recipes, folder = Path(script).parent, shlex.quote(str(run.path))

    def command(recipe: str, arguments: str) -> str:
        return f"python {recipes / recipe} {arguments}"

    steps = []
    if "dpo" in run.summary and run.samples:
        steps.append(("Talk to the reference and the policy", command("chat.py", folder)))
    if "dpo" in run.summary and "classes" not in run.summary.get("data", {}):
        beta = run.summary["dpo"]["beta"]
        kept, dropping = [], False
        for word in flags:
            if word.startswith("--"):
                dropping = word.partition("=")[0].lstrip("-").replace("-", "_") in OF_A_POINT
            if not dropping:
                kept.append(shlex.quote(word))
        betas = " ".join(f"{factor * beta:.2g}" for factor in (1 / 3, 1, 3))
        steps.append(("Try other strengths of β", command("sweep_hh.py", " ".join([f"--betas {betas}", *kept]))))
    steps.append(("Publish it", command("publish.py", f"{folder} --hub_model_id NAME")))
    return steps


def flaw(text: str) -> str | None:
    """What is wrong with an answer that a reader would skip: it `ends at once` or `repeats itself`.

    It repeats itself where the same words stand `REPEATS` times in a row, six words in all at least, or where one
    sentence occurs `REPEATS` times. Only the part that the page shows is read.
    """
    words = text[:SHOWN_TEXT].split()
    if not words:
        return "ends at once"
    for length in range(1, len(words) // REPEATS + 1):
        run = 0
        for at in range(length, len(words)):
            run = run + 1 if words[at] == words[at - length] else 0
            if run >= max((REPEATS - 1) * length, 6 - length):
                return "repeats itself"
    sentences = Counter(part.strip() for part in re.split(r"[.!?\n]", text[:SHOWN_TEXT]) if len(part.split()) > 1)
    return "repeats itself" if max(sentences.values(), default=0) >= REPEATS else None


def _marked(name: str, text: str) -> str:
    found = flaw(str(text))
    return f"{name} — {found}" if found else name


def _percent(share: float, n: int) -> str:
    """A share with the digits that n deserves: a whole percentage below a thousand, tenths from there on."""
    return f"{100 * share:.{1 if n >= 1000 else 0}f}%"


def digits_of(low: Any, high: Any) -> int:
    """Decimals that a figure with this 95% interval deserves.

    Half the interval keeps one significant digit, two where it begins with 1, 2 or 3 (the rule of the Particle Data
    Group, https://pdg.lbl.gov/2020/reviews/rpp2020-rev-rpp-intro.pdf, section 5.3, simplified).
    """
    if not _is_number(low) or not _is_number(high) or high <= low:
        return 3
    half = (high - low) / 2
    exponent = math.floor(math.log10(half))
    return min(6, max(0, -exponent + (half / 10**exponent < 3.55)))


class Plots:
    """Line and bar plots as SVG for the page, with a PNG copy of each in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def draw(
        self,
        name: str,
        caption: str,
        paint: Callable[[Any], None],
        ylabel: str,
        xlabel: str,
        legend_below: bool = False,
    ) -> dict[str, Any]:
        import markupsafe
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        style: Any = {
            "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
            "font.size": 10, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False,
            "legend.frameon": False, "legend.fontsize": 9, "font.family": "sans-serif", "text.parse_math": False,
            "svg.hashsalt": name,
        }  # fmt: skip
        with rc_context(style):
            figure = Figure(figsize=(4.4, 3.0), layout="constrained")
            axes = figure.add_subplot()
            paint(axes)
            labels = axes.get_legend_handles_labels()[1]
            columns = 1 if max(map(len, labels), default=0) > 24 else 2
            if legend_below and labels:  # as tall as it needs to be: many runs must not shrink the plot
                figure.set_figheight(3.0 + 0.22 * math.ceil(len(labels) / columns))
                figure.legend(loc="outside lower center", ncols=columns)
            axes.set_ylabel(ylabel)
            axes.set_xlabel(xlabel)
            axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.8)
            if labels and not legend_below:
                axes.legend()
            svg = io.StringIO()
            figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            self.folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.folder / f"{name}.png", dpi=200, facecolor="white")
        text = svg.getvalue()
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        text = text.replace(INK, "currentColor")
        # ids are made unique: several figures share the page
        text = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
        # matplotlib has written the numbers and escaped the names
        return {"svg": markupsafe.Markup(text), "caption": caption}  # noqa: S704


def _results(runs: list[Run]) -> dict[str, Any] | None:
    tests = [_test(run.summary) for run in runs]
    if not any(tests):
        return None
    rows = []
    for name, text in TEST_NAMES.items():
        cells = []
        for test in tests:
            bounds = test.get("interval_95", {}).get(name, (None, None))
            digits = digits_of(*bounds)
            cells.append(shown_number(test.get(name), digits))
            if len(runs) == 1:
                cells.append(_interval(bounds[0], bounds[1], digits))
        if set(cells) - {"–", ""}:
            rows.append([text, *cells])
    head = ["", "mean", "95% interval"] if len(runs) == 1 else ["", *(run.name for run in runs)]
    counts = ", ".join(f"{test['n']}" for test in tests if test and "n" in test)
    return section_of(
        "results",
        "On the test data",
        text=f"Means over {counts} held-out pairs or images that training and the choice of the epoch did not see. "
        "Intervals are Wilson's for shares and bootstrap intervals for other means."
        + (" A coin's loss is ln 2 = 0.6931." if all(_is_sigmoid(run) for run in runs) else ""),
        tables=[{"head": head, "rows": rows, "numbers": True}],
    )


def _comparison(runs: list[Run]) -> dict[str, Any] | None:
    rows = []
    for run in runs:
        compared = run.summary.get("compared")
        if not compared:
            continue
        dpo = run.summary["dpo"]
        models = [("reference", run.summary.get("reference", {}))]
        models.append((f"DPO, {dpo.get('rejected_sampling')}/{dpo.get('reference_update')}", dpo))
        models += [(name if name == "cross-entropy" else f"DPO, {name}", found) for name, found in compared.items()]
        for name, found in models:
            test = found.get("test", {})
            bounds = test.get("interval_95", {}).get("accuracy", (None, None))
            digits = digits_of(*bounds)
            rows.append(
                [
                    name if len(runs) == 1 else f"{run.name}: {name}",
                    shown_number(test.get("accuracy"), digits),
                    _interval(bounds[0], bounds[1], digits),
                    shown_number(test.get("kl"), 3),
                    shown_number(found.get("seconds"), 1),
                    shown_number(found.get("images_per_second"), 0),
                ]
            )
    if not rows:
        return None
    head = ["", "test accuracy", "95% interval", "KL from reference", "seconds", "images/s"]
    return section_of("comparison", "Side by side", tables=[{"head": head, "rows": rows, "numbers": True}])


def _curves(runs: list[Run], stage: str, plots: Plots, best: str | None = None) -> dict[str, Any] | None:
    """Every metric against the epoch, SFT's loss first; of several runs the one named `best` is drawn thicker."""
    single = len(runs) == 1 and best is None
    before = [] if stage == "sft" or not single else [("sft", "loss", "SFT loss, nats per token")]
    drawn = []
    for of, name, words in [*before, *((stage, name, words) for name, words in CURVES)]:
        series = []  # (label, split, epochs, values)
        for run in runs:
            for split in ("train", "validation"):
                epochs, values = run.curve(of, split, name)
                if len(values) > (0 if split == "validation" else 1):
                    series.append((run.name, split, *_thinned(epochs, values)))
        if not series:
            continue

        def paint(axes: Any, series: Any = series, name: str = name, of: str = of) -> None:
            styles = _styles([run.name for run in runs])
            for label, split, epochs, values in series:
                held_out = split == "validation"
                colour, line = (PALETTE[1 if held_out else 0], "-") if single else styles[label]
                text = split if single else (f"{label} (best)" if label == best else label) if held_out else None
                axes.plot(
                    epochs, values, color=colour, label=text, linestyle=line,
                    linewidth=(3.0 if label == best else 1.8) if held_out else 1.1 if single else 0.8,
                    marker="o" if held_out else None, markersize=4.5,
                    alpha=1.0 if held_out else 0.85 if single else 0.5,
                )  # fmt: skip
            if single and (kept := _chosen_epoch(runs[0], of)) is not None:
                axes.axvline(kept, color="#888888", linestyle="--", linewidth=1, label="epoch kept")
            if name == "loss" and of in ("dpo", "reward") and all(_is_sigmoid(run) for run in runs):
                axes.axhline(math.log(2), color="#888888", linestyle=":", linewidth=1)

        slug = re.sub(r"\W+", "_", name) if of == stage else f"{of}_{name}"
        drawn.append(plots.draw(slug, words, paint, words, "epoch", legend_below=not single))
    if not drawn:
        return None
    text = "Thin lines are training, averaged over the steps between two log lines; dots are validation."
    if best is not None:
        text += f" The thick line is the best point on the validation pairs: {best}."
    return section_of("curves", "Curves", text=text, plots=drawn)


def _styles(names: list[str]) -> dict[str, tuple[str, str]]:
    """A colour for each name, and another kind of line where the colours begin anew."""
    kinds = ("-", "--", ":", "-.")
    return {name: (PALETTE[at % len(PALETTE)], kinds[at // len(PALETTE) % len(kinds)]) for at, name in enumerate(names)}


def _accuracy_and_kl(runs: list[Run], plots: Plots) -> dict[str, Any] | None:
    """Images: accuracy against the exact KL from the reference over the epochs, as DPO's Figure 2 has reward."""
    series = {}
    for run in runs:
        for stage in dict.fromkeys(str(row.get("stage")) for row in run.metrics):
            kls, accuracies = run.curve(stage, "validation", "kl")[1], run.curve(stage, "validation", "accuracy")[1]
            if stage.startswith("dpo") and kls and len(kls) == len(accuracies):
                mode = stage.removeprefix("dpo").removeprefix("-").replace("-", "/")
                if not mode and "rejected_sampling" in run.summary.get("dpo", {}):
                    mode = f"{run.summary['dpo']['rejected_sampling']}/{run.summary['dpo']['reference_update']}"
                label = ", ".join([run.name] * (len(runs) > 1) + [mode] * bool(mode)) or "policy"
                series[label] = (kls, accuracies)
    if not series:
        return None

    def paint(axes: Any) -> None:
        styles = _styles(list(series))
        for label, (kls, accuracies) in series.items():
            colour, line = styles[label]
            axes.plot(kls, accuracies, color=colour, linestyle=line, marker="o", markersize=4.5, label=label)
            _number_epochs(axes, kls, accuracies, colour, str(len(kls)))

    caption = "Accuracy against the exact KL(policy‖reference) on the validation images, epoch by epoch"
    text = (
        "Each line is one policy, its points joined over the epochs, the last of which is numbered. The KL is exact, a "
        "sum over the classes; of a reference that moves it is the KL from where it stood at that epoch's end."
    )
    plot = plots.draw(
        "accuracy_kl", caption, paint, "accuracy", "KL(policy‖reference), nats per image", legend_below=True
    )
    return section_of("frontier", "Accuracy and KL", text=text, plots=[plot])


def _number_epochs(axes: Any, x: list[float], y: list[float], colour: str, last: str) -> None:
    """The number of the last epoch at the end of a line, so that its direction is seen."""
    axes.annotate(last, (x[-1], y[-1]), (5, 4), textcoords="offset points", fontsize=9, color=colour, zorder=9)


# --- a sweep ---------------------------------------------------------------------------------------------------------


def _best(runs: list[Run], sweep: Sweep) -> tuple[Run, dict[str, Any]] | None:
    """The winner's run and row."""
    row = next((row for row in sweep.rows if row["best"]), None)
    run = next((run for run in runs if row and run.path.name == row["point"]), None)
    return (run, row) if run and row else None


def _sweep_title(runs: list[Run], sweep: Sweep) -> str | None:
    said = _title(runs[0])
    return f"Sweep of {len(sweep.rows)} points: {said}" if said else None


def _reference_share(runs: list[Run]) -> float | None:
    """The share of the test pairs that the reference's log-likelihood ranks right, where all points have the same."""
    found = {_test(run.summary).get("logps/ref_accuracies") for run in runs}
    return found.pop() if len(found) == 1 else None


def _sweep_steps(runs: list[Run], sweep: Sweep) -> list[tuple[str, str]]:
    found = _best(runs, sweep)
    if not found or not found[0].run.get("command"):
        return []
    run = found[0]
    folder = shlex.quote(str(run.path))
    script, *flags = run.run["command"]
    return [
        ("Talk to the best point", f"python {Path(script).parent / 'chat.py'} {folder}"),
        ("Its page", str(run.path / "report.html")),
        ("Its command", " ".join(["accelerate launch", *map(shlex.quote, [script, *flags])])),
    ]


def _against_beta(runs: list[Run], sweep: Sweep, plots: Plots) -> dict[str, Any] | None:
    """The share of test pairs ranked right against β, with its 95% intervals."""
    done = [row for row in sweep.rows if row["status"] == "done" and _is_number(row["beta"])]
    if len({row["beta"] for row in done}) < 2:
        return None
    others: dict[str, list[dict[str, Any]]] = {}
    for row in done:
        others.setdefault(sweep.name_of(row | {"beta": None}).removeprefix("β None").strip(", "), []).append(row)
    share = _reference_share(runs)

    def paint(axes: Any) -> None:
        styles = _styles(list(others))
        for place, (label, rows) in enumerate(others.items()):
            rows.sort(key=lambda row: row["beta"])
            x = [row["beta"] * (1 + 0.03 * place) for row in rows]
            y = [row["accuracy"] for row in rows]
            low, high = ([abs(row[f"accuracy_{side}"] - row["accuracy"]) for row in rows] for side in ("low", "high"))
            colour, line = styles[label]
            axes.errorbar(
                x, y, [low, high], color=colour, linestyle=line, marker="o", markersize=4.5, capsize=3, linewidth=1.4,
                label=label or None,
            )  # fmt: skip
        for row in done:
            if row["best"]:
                axes.plot(row["beta"], row["accuracy"], "*", color=INK, markersize=12, label="best", zorder=9)
        if share is not None:
            axes.axhline(share, color="#888888", linestyle=":", linewidth=1.4, label="reference")
        axes.set_xscale("log")
        betas = sorted({row["beta"] for row in done})
        axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
        axes.minorticks_off()

    caption = "Share of test pairs ranked right, with 95% intervals"
    plot = plots.draw("against_beta", caption, paint, "share ranked right", "β", legend_below=True)
    return section_of("against-beta", "Against β", plots=[plot])


def _best_name(sweep: Sweep) -> str | None:
    return next((sweep.name_of(row) for row in sweep.rows if row["best"]), None)


def _failures(sweep: Sweep) -> list[str]:
    """A note for each point that did not end, and each row that the frontier lacks."""
    notes = [f"{row['point']}: {row['status']}" for row in sweep.rows if row["status"] != "done"]
    named = {row["point"] for row in sweep.rows if row["status"] != "done"}
    for row in sweep.frontier:
        if row["status"] != "done":
            step = f", step {row['step']:g}" if _is_number(row["step"]) else ""
            why = "it did not end" if row["point"] in named else row["status"]
            notes.append(f"{row['point']}{step} is left out of the frontier: {why}")
    return [printable(note) for note in notes]


def _points(sweep: Sweep) -> dict[str, Any]:
    """The table of a sweep's points, the best marked."""
    rows = []
    for row in sweep.rows:
        name = sweep.name_of(row) + (" — best" if row["best"] else "")
        if row["status"] != "done":
            rows.append([name, row["status"].split(":")[0], *["–"] * 6])
            continue
        rows.append(
            [
                name,
                shown_number(row["loss"], 3),
                shown_number(row["accuracy"], digits := digits_of(row["accuracy_low"], row["accuracy_high"]))
                + f" ({_interval(row['accuracy_low'], row['accuracy_high'], digits)})",
                *(shown_number(row[column], 2) for column in ("margin", "reward_chosen", "reward_rejected")),
                f"{row['best_epoch']:g}" if _is_number(row["best_epoch"]) else "–",
                f"{row['kept_epoch']:g}" if _is_number(row["kept_epoch"]) else "–",
            ]
        )
    counts = sorted({row["n"] for row in sweep.rows if _is_number(row["n"])})
    head = ["", "loss", "accuracy (95% interval)", "margin", "chosen", "rejected", "least loss at", "kept"]
    return section_of(
        "points",
        "The points on the test pairs",
        text=f"Means over {', '.join(f'{n:g}' for n in counts)} held-out pairs. The best "
        "point was chosen on the validation pairs, and so was the epoch that each point kept; 'least loss at' is the "
        "epoch of least validation loss. Every figure is in table.csv.",
        tables=[{"head": head, "rows": rows, "numbers": True}],
    )


def _frontier(sweep: Sweep, plots: Plots) -> dict[str, Any] | None:
    """Expected reward against KL (Figure 2, left, of https://arxiv.org/abs/2305.18290), from frontier.csv."""
    done = [row for row in sweep.frontier if row["status"] == "done"]
    points = {row["point"]: row for row in sweep.rows}
    lines = {name: [row for row in done if row["point"] == name] for name in points}
    lines = {name: rows for name, rows in lines.items() if rows}
    references = [row for row in done if row["point"] == "reference"]
    if not lines:
        return None
    names = {name: sweep.name_of(points[name]) for name in lines}
    best = _best_name(sweep)

    def paint(axes: Any) -> None:
        styles = _styles([sweep.name_of(row) for row in sweep.rows])
        for name, rows in lines.items():
            colour, line = styles[names[name]]
            kls, rewards = [row["kl"] for row in rows], [row["reward"] for row in rows]
            label = f"{names[name]} (best)" if names[name] == best else names[name]
            axes.plot(
                kls, rewards, color=colour, linestyle=line, marker="o", markersize=5, label=label,
                linewidth=3.0 if names[name] == best else 1.6,
            )  # fmt: skip
            for row in rows:
                axes.plot(
                    [row["kl"]] * 2, [row["reward_low"], row["reward_high"]], color=colour, alpha=0.3, linewidth=1
                )
            _number_epochs(axes, kls, rewards, colour, f"{rows[-1]['epoch']:g}")
        for number, row in enumerate(references):
            text = "reference" if number == 0 else None
            axes.plot([row["kl"]], [row["reward"]], "D", color="#888888", markersize=6, label=text)

    counts = ", ".join(sorted({f"{row['n']:g}" for row in done}))
    caption = "Expected reward against KL(policy‖reference), both from the same sampled answers"
    text = (
        f"Each dot is one checkpoint: the mean reward of its sampled answers to {counts} held-out prompts by the "
        "trained reward model, and log π − log π_ref of the same answers, an unbiased estimate of the KL per answer. A "
        "line joins a point's epochs (the last is numbered); thin bars are 95% intervals of the reward. "
        "Higher at the same KL is better: the figure of the DPO paper (Figure 2, left). Its rows, with both "
        "intervals, are in frontier.csv."
    )
    plot = plots.draw("frontier", caption, paint, "reward", "KL(policy‖reference), nats per answer", legend_below=True)
    return section_of("frontier", "Reward and KL", text=text, plots=[plot])


def _margins(run: Run, plots: Plots) -> dict[str, Any] | None:
    margins = [float(row["margin"]) for row in run.scores if _is_number(row.get("margin"))]
    if len(margins) < 10:
        return None
    wrong = sum(value <= 0 for value in margins)

    def paint(axes: Any) -> None:
        edges = bin_edges(margins)
        axes.hist([m for m in margins if m <= 0], bins=edges, color=PALETTE[3], label=f"ranked wrong ({wrong})")
        axes.hist([m for m in margins if m > 0], bins=edges, color=PALETTE[2], label=f"right ({len(margins) - wrong})")

    kind = "images" if "label" in run.scores[0] else "pairs"
    caption = f"Margins of the {len(margins)} test {kind}: chosen minus rejected reward"
    return section_of(
        "margins", "Margins on the test data", plots=[plots.draw("test_margins", caption, paint, kind, "margin")]
    )


def bin_edges(values: Sequence[float]) -> list[float]:
    """Edges of about 40 bins that hold all values and part at zero, so that no bin has both signs."""
    least, most = min(values), max(values)
    width = (most - least) / 40 or 1.0
    edges = [width * k for k in range(math.floor(least / width), math.floor(most / width) + 2)]
    edges[0], edges[-1] = min(edges[0], least), max(edges[-1], most)  # the products are rounded
    return edges


def _extremes(run: Run) -> dict[str, Any] | None:
    rows = [row for row in run.scores if "prompt" in row and _is_number(row.get("margin"))]
    if not rows:
        return None
    rows.sort(key=lambda row: row["margin"])
    half = len(rows) // 2
    pairs = []
    for row in [*rows[:half], *reversed(rows[half:])]:
        side = "ranked wrong" if row["margin"] <= 0 else "ranked right"
        pairs.append(
            {
                "title": f"{side}, margin {row['margin']:.3f}: {short_text(row['prompt'])}",
                "prompt": shown_text(row["prompt"]),
                "answers": [{"name": name, "text": shown_text(row[name])} for name in ("chosen", "rejected")],
            }
        )
    return section_of(
        "extremes", "The pairs ranked most wrongly and most rightly", text="Prompts as the models saw them.",
        pairs=pairs,
    )  # fmt: skip


def _samples(run: Run) -> dict[str, Any] | None:
    pairs = []
    flaws: dict[str, Counter[str]] = {}
    for row in run.samples:
        answers = []
        for model, kinds in row.get("answers", {}).items():
            for kind, text in kinds.items():
                answers.append({"name": _marked(f"{model}, {kind}", text), "text": shown_text(text)})
                flaws.setdefault(f"{model}, {kind}", Counter())[flaw(str(text)) or ""] += 1
        people = [{"name": f"people, {name}", "text": shown_text(row.get(name, ""))} for name in ("chosen", "rejected")]
        prompt = row.get("prompt", "")
        pairs.append({"title": short_text(prompt), "prompt": shown_text(prompt), "answers": answers + people})
    if not pairs:
        return None
    kinds = ("repeats itself", "ends at once")
    rows = [[name, *(str(found[kind]) for kind in kinds), str(found.total())] for name, found in flaws.items()]
    tables = [{"head": ["", *kinds, "answers"], "rows": rows, "numbers": True}]
    text = "Held-out prompts, answered greedily and by one sample each."
    return section_of("answers", "Answers", text=text, tables=tables, pairs=pairs)


def _pictures(run: Run) -> dict[str, Any] | None:
    pictures = [
        {
            "png": row["png"],
            "label": row["label"],
            "reference": f"{row['reference'][0]} {row['reference'][1]:.2f}",
            "policy": f"{row['policy'][0]} {row['policy'][1]:.2f}",
            "right": row["policy"][0] == row["label"],
        }
        for row in sorted(run.scores, key=lambda row: row.get("margin") or 0.0)
        if re.fullmatch(r"[A-Za-z0-9+/=]+", str(row.get("png", "")))
    ]
    if not pictures:
        return None
    text = (
        "The images whose mean margin is least, then those whose is largest, with the class that reference and policy "
        "give most probability."
    )
    return section_of("images", "Images ranked most wrongly and most rightly", text=text, pictures=pictures)


def _confusion(run: Run) -> dict[str, Any] | None:
    found = run.summary.get("confusion")
    if not found:
        return None
    names, policy, reference = found["classes"], found["policy"], found["reference"]
    moved = []
    for k, name in enumerate(names):
        total = sum(policy[k]) or 1
        moved.append((name, reference[k][k] / total, policy[k][k] / total))
    moved.sort(key=lambda row: abs(row[2] - row[1]), reverse=True)
    by_class = {
        "title": "Accuracy by class, the most moved first",
        "head": ["", "reference", "policy", "change"],
        "rows": [[name, f"{old:.2f}", f"{new:.2f}", f"{new - old:+.2f}"] for name, old, new in moved[:50]],
        "numbers": True,
    }
    matrix = {
        "title": "Predictions of the policy (rows: true class)",
        "head": ["", *names],
        "rows": [[name, *row] for name, row in zip(names, policy, strict=True)],
        "numbers": True,
        "kind": "confusion",
    }
    return section_of("classes", "Classes", tables=[by_class, matrix] if len(names) <= 30 else [by_class])


def _cuts(run: Run) -> dict[str, Any] | None:
    """What became of the rows: used, dropped, cut."""
    data = run.summary.get("data", {})
    facts = {
        "used": ", ".join(f"{data[split]} {split}" for split in ("train", "validation", "test") if split in data),
        "dropped": ", ".join(f"{n} {reason}" for reason, n in data.get("dropped", {}).items() if n) or "none",
        "cut by the cap": _cap(data),
    }
    rows = [[name, fact] for name, fact in facts.items() if fact]
    return section_of("cuts", "Data", tables=[{"rows": rows}]) if data else None


def what_ran(runs: list[Run], one_table: bool = False) -> dict[str, Any]:
    """The facts of every run, or of the first where they are a sweep's points, and every command line; folded."""
    tables, code = [], []
    for run in runs:
        facts = {
            "folder": run.path.name,
            "started": run.run.get("started"),
            "ended": run.run.get("ended"),
            "seed": run.run.get("seed"),
            "processes": ", ".join(
                str(run.run[name]) for name in ("num_processes", "parallelism") if run.run.get(name) not in (None, "NO")
            ),
            "hardware": _hardware(run.run.get("hardware", {})),
            "throughput": ", ".join(f"{k}: {v:.4g}" for k, v in run.summary.get("throughput", {}).items())
            + ("; what was resumed counts from there" if run.run.get("resumed") else ""),
            "versions": ", ".join(f"{name} {version}" for name, version in run.run.get("versions", {}).items()),
        }
        rows = [[name, str(fact)] for name, fact in facts.items() if fact not in (None, "")]
        if not one_table or run is runs[0]:
            tables.append({"title": run.name if len(runs) > 1 else "", "rows": rows})
        if run.run.get("command"):
            code.append(" ".join(run.run["command"]))
        if run.run.get("config") and len(runs) == 1:
            code.append(json.dumps(_said(run.run["config"]), indent=1, ensure_ascii=False))
    return section_of("run", "What ran", tables=tables, code=code, folded=True)


def _said(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what is left at nothing."""
    cleaned: dict[str, Any] = {}
    for name, value in config.items():
        value = _said(value) if isinstance(value, dict) else value
        if value not in (None, "", [], {}, False):
            cleaned[name] = value
    return cleaned


def _test(summary: dict[str, Any]) -> dict[str, Any]:
    """The test figures of the stage that ended a run; empty where there are none."""
    found: dict[str, Any] = next((summary[stage] for stage in STAGES if stage in summary), {})
    return found.get("test") or {}


def _subtitle(runs: list[Run]) -> str:
    dpo = [run.summary["dpo"] for run in runs if "dpo" in run.summary]
    parts = []
    if dpo:
        losses = sorted({" + ".join(found.get("loss_type", [])) for found in dpo})
        betas = sorted({str(found.get("beta")) for found in dpo})
        parts.append(f"DPO, {', '.join(losses)}, β {', '.join(betas)}")
    if any("reward" in run.summary for run in runs):
        parts.append("reward model, Bradley–Terry")
    sources = sorted({source_name(str(run.summary["data"]["source"])) for run in runs if "data" in run.summary})
    return "; ".join([*parts, *sources])


def section_of(identity: str, title: str, **parts: Any) -> dict[str, Any]:
    """A section as the template takes it: `parts` are its text, tables, plots, pairs, pictures or code."""
    empty: dict[str, Any] = {
        "text": "", "tables": [], "plots": [], "pairs": [], "pictures": [], "code": [], "folded": False
    }  # fmt: skip
    plain: dict[str, Any] = {"title": "", "head": [], "numbers": False, "kind": ""}
    parts["tables"] = [plain | table for table in parts.get("tables", [])]
    return {"id": identity, "title": title, **empty, **parts}


def _chosen_epoch(run: Run, stage: str) -> float | None:
    """The epoch whose weights were kept."""
    kept = run.summary.get(stage, {}).get("kept_epoch")
    return float(kept) if _is_number(kept) else None


def _thinned(epochs: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    every = max(1, len(values) // SHOWN_POINTS)
    return epochs[::every], values[::every]


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        notes.append(f"{path.parent.name} has no {path.name}.")
    except (OSError, ValueError) as error:
        notes.append(f"{path.parent.name}: {path.name} can't be read ({str(error)[:100]}).")
    return {}


def _read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows, torn = [], 0
    for line, row in read_rows(path):
        if row is not None:
            rows.append(row)
        else:
            torn += bool(line.strip())
    if torn:
        notes.append(f"{path.parent.name}: {torn} torn line(s) of {path.name} are left out.")
    return rows


def _hardware(found: dict[str, Any]) -> str | None:
    if not found:
        return None
    memory = f", {found['memory_bytes'] / 2**30:.0f} GiB" if _is_number(found.get("memory_bytes")) else ""
    gpus = ", ".join(found.get("gpus", []))
    return f"{found.get('cpu')}, {found.get('cpu_threads')} threads{memory}" + (f"; {gpus}" if gpus else "")


def _cap(data: dict[str, Any]) -> str | None:
    if "cap" not in data:
        return None
    cap = {name: sum(split[name] for split in data["cap"].values()) for name in data["cap"]["train"]}
    return (
        f"{data.get('max_length')} tokens: {cap['prompts_shortened']} prompts lost {cap['turns_dropped']} turns, "
        f"{cap['chosen_cut'] + cap['rejected_cut']} responses cut, {cap['pairs_lost']} pairs lost"
    )


def _is_sigmoid(run: Run) -> bool:
    """Whether the loss is that of Bradley–Terry, ln 2 for a coin."""
    return "reward" in run.summary or run.summary.get("dpo", {}).get("loss_type") == ["sigmoid"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER


def shown_number(value: Any, digits: int = 4) -> str:
    """A number of a file with so many digits, a dash for whatever else stands there."""
    return f"{value:.{digits}f}" if _is_number(value) else "–"


def _interval(low: Any, high: Any, digits: int) -> str:
    return f"{low:.{digits}f} to {high:.{digits}f}" if _is_number(low) and _is_number(high) else ""


def shown_text(text: Any) -> str:
    """Text cut at `SHOWN_TEXT`."""
    shown = str(text).strip()
    return shown if len(shown) <= SHOWN_TEXT else shown[:SHOWN_TEXT] + " …"


def short_text(text: Any) -> str:
    """Its last 90 characters in one line."""
    words = " ".join(shown_text(text).split())
    return words if len(words) <= 90 else "… " + words[-88:]
