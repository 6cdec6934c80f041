"""Run the commands of the pages in `RUN` in small sizes, and compare what they print with the pages.

    python docs/run_commands.py [PAGE.md ...]

The commands of a page run in order, in a scratch folder, with the flags of `SMALL` added; the pages run at the same
time. A command fails the check if its exit status is not 0. A plain block of any page whose first line is that of a
run's output shows that output:

- its labels (the first words of indented lines) must be those of the run, in the same order;
- a block with a run's output folder must match a run of a page that was run;
- if the command ran at its own size, every figure with a 95% interval must lie in the run's interval, and the run's
  figure in the page's.

What is not run (the Hub, other `make` targets, other tools) is listed.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from check import FENCE, SCRIPT, as_recipe, commands, pages
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RUN = ("README.md", "docs/your_data.md", "docs/images.md")
QUICKSTART = ["python", "recipes/dpo_hh.py", "--output_dir", "runs/quickstart", "--overwrite_output_dir"]
SIZES = "--max_train_samples 48 --max_eval_samples 16 --max_test_samples 32 --num_train_epochs 1"
SMALL = {  # by recipe; a command without an entry runs as it is written
    "dpo_hh.py": f"{SIZES} --model_name_or_path TINY --num_samples 2 --max_new_tokens 8",
    "sft_hh.py": f"{SIZES} --model_name_or_path TINY --num_samples 2 --max_new_tokens 8",
    "chat.py": "--max_new_tokens 8",
    "dpo_cifar.py": f"{SIZES} --widths 24 24 24",
    "evaluate_hh.py": "--max_test_samples 32",
}
HUB = ("publish.py", "--push_to_hub")  # what needs the Hub
LABEL = re.compile(r"^ {2}(\S.*?)(?: {2}|$)", re.MULTILINE)
FIGURE = re.compile(r"^ {2}(\S.*?) {2,}(-?[\d.]+) +(?:95% interval +)?(-?[\d.]+) to (-?[\d.]+)", re.MULTILINE)


class Run(NamedTuple):
    page: str
    words: list[str]
    whole: bool  # at its own size
    status: int
    output: str
    errors: str


def small(words: list[str]) -> tuple[list[str], bool] | None:
    """The command to run, and whether it is whole; None for what is not run."""
    if words == ["make", "quickstart"]:
        return [*QUICKSTART, *f"{SIZES} --num_samples 1 --max_new_tokens 8".split()], False
    words = as_recipe(words)
    at = next((k for k, word in enumerate(words) if SCRIPT.fullmatch(word)), None)
    if at is None or any(word.endswith(HUB) for word in words):
        return None
    recipe, flags = Path(words[at]).name, words[at + 1 :]
    if recipe == "dpo_cifar.py" and "--config" not in flags and "--dataset_name" not in flags:
        return ["python", *words[at:]], True  # the digits
    added = SMALL.get(recipe, "").split()
    if "--config" in flags and "--dataset_name" not in flags:  # a preset names data of the Hub
        added += ["--dataset_name", "digits" if recipe == "dpo_cifar.py" else "pairs.jsonl"]
    return ["python", *words[at:], *added], not added


def fill(folder: Path) -> None:
    """The files that the commands name, and a tiny model."""
    for name in ("recipes", "accelerate_configs", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for file, start in (("pairs.jsonl", 0), ("test.jsonl", 200)):
        rows = [
            {"prompt": f"What is {n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": f"I think it is {2 * n + 1}."}
            for n in range(start, start + 120)
        ]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with (folder / "answers.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "better", "worse"])
        writer.writerows([row["prompt"], row["chosen"], row["rejected"]] for row in rows)
    for number in range(120):  # two classes, light and dark
        place = folder / "photos" / ("dark" if number % 2 else "light")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, number, number) if number % 2 else (255 - number, 255, 255)).save(
            place / f"{number}.png"
        )
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from tiny import save_tiny_model

    save_tiny_model(str(folder / "TINY"))


def run_page(page: str, folder: Path) -> tuple[list[Run], list[str]]:
    """The runs of a page's commands, and the commands that were not run."""
    runs, skipped = [], []
    for words in commands(ROOT / page):
        if not words or words[0] == "source":
            continue
        chosen = small(words)
        if chosen is None:
            skipped.append(f"{page}: not run: {shlex.join(words)}")
            continue
        (_, *rest), whole = chosen
        done = subprocess.run(
            [sys.executable, *rest], cwd=folder, capture_output=True, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        runs.append(Run(page, words, whole, done.returncode, done.stdout, done.stderr))
    return runs, skipped


def differences(shown: str, run: Run) -> list[str]:
    """What a page's block shows that the run did not print, or not within the intervals."""
    # how many pairs a table is of is no label
    labels, printed = ([re.sub(r"\d+", "N", label) for label in LABEL.findall(text)] for text in (shown, run.output))
    if labels != printed:
        lost = [label for label in labels if label not in printed] or ["their order"]
        return [f"the run does not print {', '.join(map(repr, lost))}"]
    found = []
    measured = {label: tuple(map(float, figures)) for label, *figures in FIGURE.findall(run.output)}
    for label, *figures in FIGURE.findall(shown) if run.whole else ():
        value, low, high = map(float, figures)
        own, own_low, own_high = measured[label]
        if not (own_low <= value <= own_high and low <= own <= high):
            found.append(f"{label} is {value:g} ({low:g} to {high:g}); the run: {own:g} ({own_low:g} to {own_high:g})")
    return found


def compare(runs: list[Run]) -> tuple[list[str], int]:
    """The problems of all pages' blocks of output, and how many blocks were compared."""
    found, compared, ran = [], 0, {run.page for run in runs}
    first_lines = {run.output.partition("\n")[0]: run for run in runs if run.output.strip()}
    for page in pages(ROOT):
        for _, language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            run = first_lines.get(block.partition("\n")[0])
            if not language and not run and "output folder: " in block and page.relative_to(ROOT).as_posix() in ran:
                found.append(f"{page.relative_to(ROOT)}: no command prints {block.partition(chr(10))[0]!r}")
            if not language and run:
                compared += 1
                place = f"{page.relative_to(ROOT)}: {shlex.join(run.words)}"
                found += [f"{place}: {text}" for text in differences(block, run)]
    return found, compared


def main() -> None:
    names = sys.argv[1:] or RUN
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(names)) as pool:
        folders = [Path(scratch, str(number)) for number in range(len(names))]
        for folder in folders:
            folder.mkdir()
            fill(folder)
        done = list(pool.map(run_page, names, folders))
    runs = [run for found, _ in done for run in found]
    problems = [
        f"{run.page}: {shlex.join(run.words)}: exit status {run.status}: {(run.errors.strip() or '?').splitlines()[-1]}"
        for run in runs
        if run.status
    ]
    different, compared = compare([run for run in runs if not run.status])
    for line in [line for _, skipped in done for line in skipped] + problems + different:
        print(line)
    print(f"{len(runs)} commands run, {compared} blocks of output compared, {len(problems + different)} problems")
    sys.exit(1 if problems or different else 0)


if __name__ == "__main__":
    main()
