"""The page of one or several finished or unfinished runs; every run writes its own report.html when it ends.

# one run: report.html in its folder
python recipes/report.py runs/quickstart

# several runs side by side
python recipes/report.py runs/beta01 runs/beta03 runs/beta05 --output runs/betas.html
"""

import argparse

from command_line import on_one_process, run

from resdpo_trl.report import write_report


def main() -> None:
    on_one_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --output_dir of a run")
    parser.add_argument("--output", help="the page; report.html in the run's folder by default")
    options = parser.parse_args()
    print(write_report(options.runs, options.output))


if __name__ == "__main__":
    run(main)
