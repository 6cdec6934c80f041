"""Kills runs at random moments, resumes them, and counts those that end as if they had never been killed.

python benchmarks/kills.py --kills 100
python benchmarks/kills.py --kills 40 --signal TERM

A moment is a random time or a random file operation within the run; a resumed run is killed again half of the time. A
run has survived when its weights are the same bit for bit, its metrics, scores and answers line for line, and its
summary but for the times. One JSON line a kind of run, then one for all.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.recipes.killing import KINDS, Server, survive, write_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills to try, over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--keep", type=Path, help="folder that keeps the runs that did not survive")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    data, server, total = write_data(folder), Server(folder), {"kills": 0, "survived": 0}
    for number, kind in enumerate(given.kinds):
        recipe, arguments = KINDS[kind]
        whole = folder / "whole"
        usual = server.run(recipe, [*arguments, *data[recipe], "--output_dir", whole], folder / "whole.log")
        if usual["status"] != 0:
            sys.exit((folder / "whole.log").read_text())
        wanted = (given.kills - total["kills"]) // (len(given.kinds) - number)
        row = {"kind": kind, "kills": 0, "survived": 0, "at_a_file_operation": 0, "runs": 0}
        while row["kills"] < wanted:
            run = folder / "killed"
            seed = given.seed * 100_000 + number * 1000 + row["runs"]
            found = survive(server, kind, data, whole, run, seed, usual, signal.Signals["SIG" + given.signal])
            row["runs"] += 1
            row["kills"] += found["kills"]
            row["survived"] += 0 if found["wrong"] else found["kills"]
            row["at_a_file_operation"] += sum("kill_at" in how for how in found["moments"])
            if found["wrong"]:
                print(f"{kind}: {found}", file=sys.stderr)
                if given.keep is not None:
                    target = given.keep / f"{recipe}-{row['runs']}"
                    shutil.copytree(run, target, dirs_exist_ok=True)
                    shutil.copytree(whole, target / "whole", dirs_exist_ok=True)
                    shutil.copy(run.with_suffix(".log"), target)
            shutil.rmtree(run, ignore_errors=True)
            run.with_suffix(".log").unlink(missing_ok=True)
        row |= {"operations_of_a_run": len(usual["operations"]), "seconds_of_a_run": round(usual["seconds"], 2)}
        print(json.dumps(row), flush=True)
        total = {name: total[name] + row[name] for name in total}
        shutil.rmtree(whole)
    print(json.dumps({"kind": "all", **total}))
    server.close()
    shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
