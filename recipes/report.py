"""Write the page of one or several runs, finished or not. Every run writes its own report.html when it ends.

# one run: report.html in its folder
python recipes/report.py runs/quickstart

# a sweep, from its table and its points
python recipes/report.py runs/sweep_hh

# a run that is training: the page is rewritten every ten seconds, and reloads itself
python recipes/report.py runs/quickstart --watch

# several runs side by side
python recipes/report.py runs/beta01 runs/beta03 runs/beta05 --output runs/betas.html
"""

import math
import time
from pathlib import Path

from command_line import RecipeParser, on_one_process, run

from resdpo_trl.errors import UserError
from resdpo_trl.run.files import is_locked
from resdpo_trl.run.report import load_run, write_report
from resdpo_trl.study.comparison_page import write_comparison_page
from resdpo_trl.study.sweep import write_sweep_report


def main() -> None:
    on_one_process()
    parser = RecipeParser((), description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --output_dir of a run, or of one sweep")
    parser.add_argument("--output", help="the page; report.html in the run's folder by default")
    parser.add_argument(
        "--watch", metavar="SECONDS", type=float, nargs="?", const=10.0,
        help="rewrite the page after this many seconds (10) while the run trains; the page reloads itself",
    )  # fmt: skip
    options = parser.parse_args()
    if options.watch is not None and not 0 < options.watch < math.inf:
        raise UserError(f"--watch {options.watch}: must be above 0 seconds, and finite")
    sweeps = [folder for folder in options.runs if (Path(folder) / "sweep.json").exists()]
    if sweeps and len(options.runs) > 1:
        raise UserError(f"{sweeps[0]} is a sweep and has its own page: name it alone")
    try:
        while options.watch is not None and any(map(_trains, options.runs)):
            if _has_figures(options.runs):
                print(f"open {_write(options.runs, options.output, options.watch)}")
            time.sleep(options.watch)
    except KeyboardInterrupt:
        pass  # the last page does not reload itself
    print(_write(options.runs, options.output))


def _has_figures(runs: list[str]) -> bool:
    """Whether there is something to show: a run has read its data, a point of a sweep has ended."""
    first = Path(runs[0])
    if (first / "sweep.json").exists():
        return (first / "table.csv").exists()
    return all((Path(folder) / "run.json").exists() for folder in runs) and not _compares(runs)


def _write(runs: list[str], output: str | None, refresh: float | None = None) -> Path:
    first = Path(runs[0])
    if (first / "sweep.json").exists():
        return write_sweep_report(first, output, refresh)
    if _compares(runs):
        if "comparison" not in load_run(first).summary:
            raise UserError(f"{first}: this comparison has not ended; its page is written at the end")
        return write_comparison_page(first, output)
    return write_report(runs, output, refresh)


def _compares(runs: list[str]) -> bool:
    return len(runs) == 1 and "comparison" in load_run(runs[0]).run.get("config", {})


def _trains(folder: str) -> bool:
    return Path(folder).is_dir() and is_locked(Path(folder))


if __name__ == "__main__":
    run(main)
