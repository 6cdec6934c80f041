"""The page of one or several finished or unfinished runs; every run writes its own report.html when it ends.

# one run: report.html in its folder
python recipes/report.py runs/quickstart

# a sweep, from its table and its points
python recipes/report.py runs/sweep_hh

# several runs side by side
python recipes/report.py runs/beta01 runs/beta03 runs/beta05 --output runs/betas.html
"""

from pathlib import Path

from command_line import RecipeParser, on_one_process, run

from resdpo_trl.errors import UserError
from resdpo_trl.report import write_report
from resdpo_trl.sweep import write_sweep_report


def main() -> None:
    on_one_process()
    parser = RecipeParser((), description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --output_dir of a run, or of one sweep")
    parser.add_argument("--output", help="the page; report.html in the run's folder by default")
    options = parser.parse_args()
    sweeps = [folder for folder in options.runs if (Path(folder) / "sweep.json").exists()]
    if sweeps and len(options.runs) > 1:
        raise UserError(f"{sweeps[0]} is a sweep, which has a page of its own: name it alone")
    if sweeps:
        print(write_sweep_report(Path(sweeps[0]), options.output))
    else:
        print(write_report(options.runs, options.output))


if __name__ == "__main__":
    run(main)
