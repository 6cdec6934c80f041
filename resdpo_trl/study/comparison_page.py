"""What the page of a comparison shows: win rates, rewards, and the answers side by side with their words compared."""

from __future__ import annotations

import difflib
import html
import re
from pathlib import Path
from typing import Any, Literal

from resdpo_trl.metrics import flaw, number, shown
from resdpo_trl.run.report import (
    PALETTE,
    Plots,
    Run,
    load_run,
    section_of,
    short_text,
    shown_text,
    what_ran,
    write_page,
)
from resdpo_trl.run.verdict import of_comparison

PAGE_BYTES = 3_500_000  # of answers; a page stays below 5 MB
ALIKE = 0.2  # below this share of common words, marks would cover everything and say nothing

Piece = tuple[Literal["same", "added", "removed"], str]


def write_comparison_page(folder: Path, output: str | Path | None = None) -> Path:
    """Write the page of a comparison, by default report.html in its folder."""
    run = load_run(folder)
    target = Path(output or run.path / "report.html")
    opening, *said = of_comparison(run.summary)
    sections = [_win_rates(run, Plots(target.parent / "plots")), _rewards(run), _figures(run), _answers(run)]
    page = {"title": title(run), "subtitle": subtitle(run), "lead": opening, "verdict": said, "notes": run.notes}
    return write_page(target, page | {"sections": [*sections, what_ran([run])], "wide": True})


def title(run: Run) -> str:
    names = list(run.summary["comparison"]["answers"])
    return f"Answers of {', '.join(names)} to {run.summary.get('data', {}).get('used')} prompts"


def subtitle(run: Run) -> str:
    found = run.summary["comparison"]
    prompts = run.summary.get("data", {})
    parts = [f"{len(found['answers'])} models", f"{prompts.get('used')} prompts", str(prompts.get("source"))]
    return "; ".join(
        parts + ([f"rewards against {found['reference']}, β {found['beta']}"] if found["reference"] else [])
    )


def compared_words(old: str, new: str) -> tuple[list[Piece], float]:
    """`new` in pieces, with the words that `old` has and `new` lacks between them, and the share of common words.

    Two texts with few words in common are given unmarked.
    """
    before, after = re.findall(r"\S+\s*", old), re.findall(r"\S+\s*", new)
    matcher = difflib.SequenceMatcher(None, [word.strip() for word in before], [word.strip() for word in after], False)
    share = matcher.ratio()
    if share < ALIKE or old.strip() == new.strip():
        return [("same", new)], share
    pieces: list[Piece] = []
    for kind, i, j, k, m in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(after[k:m])))
            continue
        if i < j:  # between words of the other text: it needs room on both sides
            room = " " if pieces and not pieces[-1][1][-1].isspace() else ""
            pieces.append(("removed", f"{room}{' '.join(word.strip() for word in before[i:j])} "))
        if k < m:
            pieces.append(("added", "".join(after[k:m])))
    return pieces, share


def _win_rates(run: Run, plots: Plots) -> dict[str, Any] | None:
    rates = run.summary.get("win_rates", [])
    if not rates:
        return None
    notes = []
    for name, found in run.summary.get("judges", {}).items():
        said = found["verdicts"]
        decided = said.get("first", 0) + said.get("second", 0)
        if decided:
            notes.append(f"{name} chose the answer shown first in {said.get('first', 0)} of {decided} decisions.")
        notes += [f"{name} gave no verdict {n} times: {reason}." for reason, n in found["no_verdict_because"].items()]
    text = (
        "Share of prompts won, a tie as half a win, with 95% Wilson intervals; prompts without a verdict are left out. "
    )
    if run.summary.get("judges"):
        text += (
            "A judge of pairs saw every pair in both orders: an answer won only where it won in both, equal answers "
            "are ties. " + " ".join(notes)
        )
    tables, drawn, counts = [], [], ("wins", "ties", "losses", "no_verdict")
    for place, judge in enumerate(dict.fromkeys(row["judge"] for row in rates)):
        mine = [row for row in rates if row["judge"] == judge]
        rows = [
            [f"{row['model']} against {row['against']}", *shown(row, "win_rate"), *(row[count] for count in counts)]
            for row in mine
        ]
        head = ["", "win rate", "95% interval", *(count.replace("_", " ") for count in counts)]
        tables.append({"title": f"By {judge}", "head": head, "rows": rows, "numbers": True})
        decided = [row for row in mine if row["n"]][:16]
        if decided:
            drawn.append(
                _intervals(plots, f"win_rates_{place}", f"Win rate of the first-named model, by {judge}", decided)
            )
    return section_of("win-rates", "Win rates", text=text, tables=tables, plots=drawn)


def _intervals(plots: Plots, name: str, caption: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def paint(axes: Any) -> None:
        for place, row in enumerate(reversed(rows)):
            axes.plot(row["interval_95"], [place, place], color=PALETTE[0], linewidth=2.2)
            axes.plot([row["win_rate"]], [place], "o", color=PALETTE[0])
        labels = [f"{_clip(row['model'])} : {_clip(row['against'])}" for row in reversed(rows)]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.axvline(0.5, color="#888888", linestyle=":", linewidth=1)
        axes.set_xlim(-0.02, 1.02)

    return plots.draw(name, caption, paint, "", "win rate")


def _rewards(run: Run) -> dict[str, Any] | None:
    found = run.summary["comparison"]
    policies = list(found["rewards"])
    if not policies and not found["reward_model"]:
        return None
    rows = []
    for name, figures in found["answers"].items():
        cells = []
        for policy in policies:
            cells += shown(found["rewards"][policy][name], "mean")
        if found["reward_model"]:
            cells += shown(figures, "reward_model")
        rows.append([name, *cells])
    head = ["answers of"]
    for policy in policies:
        head += [f"under {policy}", "95% interval"]
    if found["reward_model"]:
        head += ["reward model", "95% interval"]
    text = "Means over the prompts with 95% bootstrap intervals."
    if policies:
        text = (
            f"β·log(π/π_ref) of every model's answers under each policy, β = {found['beta']:g}, π_ref = "
            f"{found['reference']}. " + text
        )
        left_out = [name for name in found["models"] if name not in policies and name != found["reference"]]
        if left_out:
            text += f" Not under {', '.join(left_out)}: another tokenizer than the reference's."
    return section_of("rewards", "Rewards", text=text, tables=[{"head": head, "rows": rows, "numbers": True}])


def _figures(run: Run) -> dict[str, Any]:
    flaws = {name: [flaw(*row.get("answers", {}).get(name, {"": ""}).values()) for row in run.samples]
             for name in run.summary["comparison"]["answers"]}  # fmt: skip
    rows = [
        [
            name,
            *shown(found, "length_tokens"),
            number(found["cut"], 2),
            flaws[name].count("repeats itself"),
            flaws[name].count("ends at once"),
            number(found["distinct_1"], 3),
            number(found["distinct_2"], 3),
        ]
        for name, found in run.summary["comparison"]["answers"].items()
    ]
    head = ["", "tokens", "95% interval", "cut short", "repeat", "empty", "distinct-1", "distinct-2"]
    text = (
        "Tokens of an answer, the share of answers that the limit of tokens cut, how many repeat themselves or end at "
        "once, and the different tokens and pairs of tokens over all of them (distinct-1, distinct-2)."
    )
    return section_of(
        "figures", "The answers in figures", text=text, tables=[{"head": head, "rows": rows, "numbers": True}]
    )


def _answers(run: Run) -> dict[str, Any] | None:
    baseline = run.summary["comparison"]["baseline"]
    prompts: list[dict[str, Any]] = []
    size = 0
    for place, row in enumerate(run.samples, 1):
        texts = {name: shown_text(*kinds.values()) for name, kinds in row.get("answers", {}).items()}
        answers = []
        for name, text in texts.items():
            pieces: list[Piece] = [("same", text)]
            said = [*filter(None, [flaw(text)]), *_scores(row, name)]
            if name != baseline and baseline in texts:
                pieces, share = compared_words(texts[baseline], text)
                said.append(
                    f"same as {baseline}" if texts[baseline] == text else f"{share:.0%} of words shared with {baseline}"
                )
            answers.append({"name": name, "pieces": _without_edges(pieces) if text else [], "notes": said})
        prompt = shown_text(prompt_text(row.get("prompt", "")))
        title = f"{place}. {short_text(_last_turn(row.get('prompt', '')))}"
        shown = {"title": title, "prompt": prompt, "answers": answers, "outcomes": _outcomes(row)}
        size += len(html.escape(str(shown)).encode())
        if size > PAGE_BYTES:
            break
        prompts.append(shown)
    if not prompts:
        return None
    text = (
        f"Underlined words are not in the answer of {baseline}, words struck through only there; an answer that shares "
        "hardly a word with it is left unmarked."
    )
    if len(prompts) < len(run.samples):
        text += f" These are the first {len(prompts)} of {len(run.samples)} prompts; all are in samples.jsonl."
    return section_of("answers", "Answers side by side", text=text, pairs=prompts, marks=True)


def prompt_text(prompt: Any) -> str:
    """A prompt for a reader: a text as it is, messages with their roles."""
    if isinstance(prompt, list):
        if len(prompt) == 1:
            return str(prompt[0].get("content", ""))
        return "\n\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)
    return str(prompt)


def _last_turn(prompt: Any) -> str:
    """What was said last."""
    if isinstance(prompt, list):
        return str(prompt[-1].get("content", "")) if prompt else ""
    return str(prompt).removesuffix("Assistant:").rpartition("Human:")[2]


def _without_edges(pieces: list[Piece]) -> list[Piece]:
    """The pieces with the white space around marked words outside the marks."""
    shown: list[Piece] = []
    for kind, text in pieces:
        core = text.strip()
        before, _, after = text.partition(core) if core else (text, "", "")
        shown += [("same", before), (kind, core), ("same", after)] if kind != "same" else [(kind, text)]
    return [(kind, text) for kind, text in shown if text]


def _scores(row: dict[str, Any], name: str) -> list[str]:
    said = [f"reward under {policy} {value:+.3f}" for policy, value in (row.get("rewards", {}).get(name) or {}).items()]
    score = row.get("reward_model", {}).get(name)
    return said + ([f"reward model {score:+.3f}"] if score is not None else [])


def _outcomes(row: dict[str, Any]) -> list[str]:
    """Who won, a line a judge."""
    words = {1.0: "beats", 0.5: "ties with", 0.0: "loses to", None: "has no verdict against"}
    said: dict[str, list[str]] = {}
    for one in row.get("outcomes", []):
        said.setdefault(one["judge"], []).append(f"{one['model']} {words[one['outcome']]} {one['against']}")
    return [f"{judge}: {'; '.join(found)}" for judge, found in said.items()]


def _clip(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"
