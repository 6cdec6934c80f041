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
            if all((Path(folder) / "run.json").exists() for folder in options.runs):  # the data is loaded
                print(f"open {write_report(options.runs, options.output, refresh=options.watch)}")
            time.sleep(options.watch)
    except KeyboardInterrupt:
        pass  # the last page does not reload itself
    first = Path(options.runs[0])
    if sweeps:
        print(write_sweep_report(first, options.output))
    elif len(options.runs) == 1 and "comparison" in load_run(first).summary:
        print(write_comparison_page(first, options.output))
    else:
        print(write_report(options.runs, options.output))


def _trains(folder: str) -> bool:
    return Path(folder).is_dir() and is_locked(Path(folder))


if __name__ == "__main__":
    run(main)
