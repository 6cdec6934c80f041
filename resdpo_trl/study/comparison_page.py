"""The page of a comparison: win rates, rewards, and the answers side by side with word-level differences."""

from __future__ import annotations

import difflib
import html
import re
from pathlib import Path
from typing import Any, Literal

from resdpo_trl.metrics import flaw, number, percent, shown, table
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
ALIKE = 0.2  # below this share of common words, nearly all words would be marked

Piece = tuple[Literal["same", "added", "removed"], str]


def write_comparison_page(folder: Path, output: str | Path | None = None) -> Path:
    """Write the page of a comparison, by default report.html in its folder."""
    run = load_run(folder)
    target = Path(output or run.path / "report.html")
    found = run.summary["comparison"]
    opening, *said = of_comparison(run.summary)
    against = f"; rewards against {found['reference']}, β = {found['beta']:g}" if found["reference"] else ""
    page = {
        "title": f"Answers of {', '.join(found['answers'])} to {run.summary['data']['used']} prompts",
        "subtitle": f"Prompts: {run.summary['data']['source']}{against}",
        "lead": opening,
        "verdict": [] if run.summary.get("win_rates") else said,  # the table has every win rate
        "notes": run.notes,
        "wide": True,
    }
    sections = [_win_rates(run, Plots(target.parent / "plots")), _rewards(run), _figures(run), _answers(run)]
    return write_page(target, page | {"sections": [*sections, what_ran([run])]})


def describe(folder: Path) -> str:
    """The verdict, the figures of the answers and the rewards, for the terminal."""
    run = load_run(folder)
    lines = ["", *of_comparison(run.summary)]
    for section in filter(None, (_figures(run), _rewards(run))):
        lines += ["", *(table(each["rows"], each["head"]) for each in section["tables"])]
    for name, found in run.summary.get("judges", {}).items():
        lines += [f"  no verdict by {name}, {n} times: {why}" for why, n in found["no_verdict_because"].items()]
    return "\n".join(lines)


def compared_words(old: str, new: str) -> list[Piece]:
    """The pieces of `new`, and between them the words that only `old` has.

    Texts with few words in common are not marked. White space around marked words is outside the marks.
    """
    before, after = old.split(), re.findall(r"\S+\s*", new)
    matcher = difflib.SequenceMatcher(None, before, [word.strip() for word in after], False)
    if matcher.ratio() < ALIKE or old.strip() == new.strip():
        return [("same", new)]
    pieces: list[Piece] = []
    for kind, i, j, k, m in matcher.get_opcodes():
        text = "".join(after[k:m])
        if kind == "equal":
            pieces.append(("same", text))
            continue
        if i < j:  # removed words need a space on both sides
            room = " " if pieces and not pieces[-1][1][-1].isspace() else ""
            pieces += [("same", room), ("removed", " ".join(before[i:j])), ("same", " ")]
        if text:
            pieces += [("added", text.rstrip()), ("same", text[len(text.rstrip()) :])]
    return [piece for piece in pieces if piece[1]]


def _win_rates(run: Run, plots: Plots) -> dict[str, Any] | None:
    rates = run.summary.get("win_rates", [])
    if not rates:
        return None
    text = (
        "A win rate is the share of n prompts won, with a tie as half a win. Intervals are 95% Wilson intervals. "
        "Prompts without a verdict are not part of n."
    )
    for name, found in run.summary["judges"].items():
        text += (
            f" {name} saw every pair in both orders. An answer wins only if it wins in both. Equal answers are ties."
        )
        first, second = (found["verdicts"].get(place, 0) for place in ("first", "second"))
        if first + second:
            text += f" It chose the answer shown first in {first} of {first + second} decisions."
        text += "".join(f" It gave no verdict {n} times: {why}." for why, n in found["no_verdict_because"].items())
    tables, drawn = [], []
    for place, judge in enumerate(dict.fromkeys(row["judge"] for row in rates)):
        mine = [row for row in rates if row["judge"] == judge]
        rows = [
            [f"{row['model']} against {row['against']}", *_share(row), row["n"], row["ties"], row["no_verdict"]]
            for row in mine
        ]
        head = ["", "win rate", "95% interval", "n", "ties", "no verdict"]
        tables.append({"title": f"By {judge}", "head": head, "rows": rows, "numbers": True})
        if decided := [row for row in mine if row["n"]][:16]:
            caption = f"Win rate of the first-named model, by {judge}"
            drawn.append(_intervals(plots, f"win_rates_{place}", caption, decided))
    return section_of("win-rates", "Win rates", text=text, tables=tables, plots=drawn)


def _share(row: dict[str, Any]) -> list[str]:
    """A win rate and its interval in percent."""
    if not row["n"]:
        return [number(None), ""]
    rate, low, high = (percent(share, row["n"]) for share in (row["win_rate"], *row["interval_95"]))
    return [rate, f"{low} to {high}"]


def _intervals(plots: Plots, name: str, caption: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def paint(axes: Any) -> None:
        axes.figure.set_figheight(1.2 + 0.35 * len(rows))
        for place, row in enumerate(reversed(rows)):
            axes.plot([100 * bound for bound in row["interval_95"]], [place, place], color=PALETTE[0], linewidth=2.2)
            axes.plot([100 * row["win_rate"]], [place], "o", color=PALETTE[0])
        labels = [f"{row['model'][:24]} : {row['against'][:24]}" for row in reversed(rows)]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.axvline(50, color="gray", linestyle=":", linewidth=1)
        axes.set_xlim(-2, 102)

    return plots.draw(name, caption, paint, "", "win rate, %")


def _rewards(run: Run) -> dict[str, Any] | None:
    found = run.summary["comparison"]
    policies = list(found["rewards"])
    if not policies and not found["reward_model"]:
        return None
    columns = {f"under {policy}": (found["rewards"][policy], "mean") for policy in policies}
    if found["reward_model"]:
        columns["reward model"] = (found["answers"], "reward_model")
    head = ["reward of answers", *(cell for name in columns for cell in (name, "95% interval"))]
    rows = [
        [name, *(cell for figures, figure in columns.values() for cell in shown(figures[name], figure))]
        for name in found["answers"]
    ]
    text = "The table has means over the prompts with 95% bootstrap intervals."
    if policies:
        text = (
            f"A reward is β·log(π/π_ref) of an answer under a policy, with β = {found['beta']:g} and π_ref = "
            f"{found['reference']}. " + text
        )
        left_out = [name for name in found["models"] if name not in policies and name != found["reference"]]
        if left_out:
            text += f" Policies with another tokenizer than the reference have no rewards: {', '.join(left_out)}."
    return section_of("rewards", "Rewards", text=text, tables=[{"head": head, "rows": rows, "numbers": True}])


def _figures(run: Run) -> dict[str, Any]:
    rows = []
    for name, found in run.summary["comparison"]["answers"].items():
        n = found["n"]
        flaws = [flaw(*row["answers"][name].values()) for row in run.samples if name in row["answers"]]
        shares = (found["cut"], *(flaws.count(kind) / n for kind in ("repeats itself", "ends at once")))
        distinct = [number(found[f"distinct_{size}"], 3) for size in (1, 2)]
        rows.append([name, *shown(found, "length_tokens"), *(percent(share, n) for share in shares), *distinct, n])
    head = ["", "tokens", "95% interval", "truncated", "repeat", "empty", "distinct-1", "distinct-2", "n"]
    text = (
        "The table has the tokens per answer, the shares of n answers that are truncated, repeat themselves or are "
        "empty, and the shares of distinct tokens and pairs of tokens (distinct-1, distinct-2)."
    )
    tables = [{"head": head, "rows": rows, "numbers": True}]
    return section_of("figures", "The answers in figures", text=text, tables=tables)


def _answers(run: Run) -> dict[str, Any] | None:
    baseline = next(iter(run.summary["comparison"]["models"]))
    prompts: list[dict[str, Any]] = []
    size = 0
    for place, row in enumerate(run.samples, 1):
        texts = {name: shown_text(*kinds.values()) for name, kinds in row["answers"].items()}
        answers = []
        for name, text in texts.items():
            marked = compared_words(texts[baseline], text) if baseline in texts else [("same", text)]
            said = [*filter(None, [flaw(text)]), *_scores(row, name)]
            said += [f"same as {baseline}"] if name != baseline and texts.get(baseline) == text else []
            answers.append({"name": name, "pieces": marked if text else [], "notes": said})
        prompt = row["prompt"]
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        shown: dict[str, Any] = {"title": f"{place}. {short_text(last)}", "prompt": shown_text(prompt_text(prompt))}
        shown |= {"answers": answers, "outcomes": _outcomes(row)}
        size += len(html.escape(str(shown)).encode())
        if size > PAGE_BYTES:
            break
        prompts.append(shown)
    if not prompts:
        return None
    text = (
        f"Underlined words are not in the answer of {baseline}. Struck-through words are only in that answer. An "
        "answer with few words in common is not marked."
    )
    if len(prompts) < len(run.samples):
        text += f" These are the first {len(prompts)} of {len(run.samples)} prompts; all are in samples.jsonl."
    return section_of("answers", "Answers side by side", text=text, pairs=prompts, marks=True)


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as text. Messages have their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _scores(row: dict[str, Any], name: str) -> list[str]:
    said = [f"reward under {policy} {value:+.3f}" for policy, value in row["rewards"][name].items()]
    score = row["reward_model"].get(name)
    return said + ([f"reward model {score:+.3f}"] if score is not None else [])


def _outcomes(row: dict[str, Any]) -> list[str]:
    """The winners, one line per judge."""
    words = {1.0: "beats", 0.5: "ties with", 0.0: "loses to", None: "has no verdict against"}
    said: dict[str, list[str]] = {}
    for one in row["outcomes"]:
        said.setdefault(one["judge"], []).append(f"{one['model']} {words[one['outcome']]} {one['against']}")
    return [f"{judge}: {'; '.join(found)}" for judge, found in said.items()]
