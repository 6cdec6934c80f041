"""Every preference loss from one reference, as one Markdown table and one plot (accuracy against KL).

    accelerate launch recipes/dpo_hh.py --output_dir runs/quickstart
    python benchmarks/losses.py runs/quickstart/reference --output_dir runs/losses

Pairs, LoRA, batch and β are the quickstart's. The losses form three families. The first loss of a family is trained at
each rate, and the family gets the rate with the lowest validation loss of these. Test pairs choose nothing. All runs
share the reference and the cache of its log-probabilities. A run that has ended is not run again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from resdpo_trl.study.sweep import has_ended

RECIPES = Path(__file__).parents[1] / "recipes"
FAMILIES = {
    "bounded slope of the margin": ("sigmoid", "robust", "exo_pair", "discopop", "aot", "sigmoid_norm"),
    "a target for the margin": ("ipo", "hinge"),
    "each response by itself": ("apo_zero", "apo_down", "nca_pair", "bco_pair", "sppo_hard", "aot_unpaired"),
}
# at zero smoothing `robust` is `sigmoid` and `exo_pair` is undefined; 5 is the β of the paper of `sigmoid_norm`
OWN_FLAGS = {
    "robust": ("--label_smoothing", 0.1),
    "exo_pair": ("--label_smoothing", 1e-3),
    "sigmoid_norm": ("--beta", 5),
}
COLOURS = dict(zip(FAMILIES, ("#4a90e2", "#c0504d", "#3aa657"), strict=True))


def launch(recipe: str, *flags: Any) -> None:
    subprocess.run([sys.executable, str(RECIPES / recipe), *map(str, flags)], check=True, stdout=sys.stderr)


def trained(loss: str, rate: str, given: argparse.Namespace) -> Path:
    """The folder of a run of this loss at this rate, which is trained unless it is there."""
    run: Path = given.output_dir / f"{loss}_{rate}"
    if not has_ended(run):
        launch(
            "dpo_hh.py", "--reference", given.reference, "--loss_type", loss, "--learning_rate", rate,
            *OWN_FLAGS.get(loss, ()), "--max_train_samples", given.max_train_samples, "--max_eval_samples", 256,
            "--num_samples", 0, "--save_strategy", "no", "--select", "last", "--disable_tqdm", "true",
            "--overwrite_output_dir", "--output_dir", run,
        )  # fmt: skip
    return run


def judged(run: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run's policy on the test pairs, by the sigmoid loss with β 0.1 whatever it was trained with."""
    figures = run / "evaluation.json"
    if not figures.is_file():
        launch(
            "evaluate_hh.py", "--model", run / "policy", "--reference", given.reference, "--loss_type", "sigmoid",
            "--beta", 0.1, "--max_eval_samples", 256, "--max_test_samples", given.max_test_samples, "--num_samples", 64,
            "--output", figures,
        )  # fmt: skip
        shutil.rmtree(run / "policy")
    found = json.loads(figures.read_text())
    pairs, answers = found["pairs"], found["answers"]
    low, high = answers["interval_95"]["cut"]
    intervals = pairs["interval_95"] | {"kl": answers["interval_95"]["kl"], "ended": (1 - high, 1 - low)}
    return pairs | {"kl": answers["kl"], "ended": 1 - answers["cut"], "interval_95": intervals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rates", nargs="*", default=["5e-4", "1e-3", "2e-3"])
    parser.add_argument("--max_train_samples", type=int, default=512)
    parser.add_argument("--max_test_samples", type=int, default=1100)
    given = parser.parse_args()
    given.output_dir.mkdir(parents=True, exist_ok=True)

    print("| loss | rate | its validation loss, n = 256 |\n| --- | --- | --- |")
    rates = {}
    for family, (loss, *_) in FAMILIES.items():
        tried = {}
        for rate in given.rates:
            summary = json.loads((trained(loss, rate, given) / "summary.json").read_text())
            tried[rate] = summary["dpo"]["validation"]["loss"]
            print(f"| {loss} | {rate} | {tried[rate]:.4f} |", flush=True)
        rates[family] = min(tried, key=tried.__getitem__)

    print(
        "\n| loss | accuracy | KL, nats | ended | sigmoid loss | margin | chosen reward | rate | pairs/s |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    points = []
    for family, losses in FAMILIES.items():
        for loss in losses:
            run = trained(loss, rates[family], given)
            found = judged(run, given)
            speed = json.loads((run / "summary.json").read_text())["throughput"]["dpo_pairs_per_second"]
            intervals = found["interval_95"]
            names = ("rewards/accuracies", "kl", "ended", "loss", "rewards/margins", "rewards/chosen")
            said = [
                f"{found[name]:.{digits}f} ({intervals[name][0]:.{digits}f} to {intervals[name][1]:.{digits}f})"
                for name, digits in zip(names, (3, 1, 2, 3, 2, 2), strict=True)
            ]
            print(f"| `{loss}` | {' | '.join(said)} | {rates[family]} | {speed:.2f} |", flush=True)
            points.append((family, loss, found))

    with rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(8, 5.4), layout="constrained")
        axes = figure.subplots()
        for family, loss, found in points:
            at = (found["kl"], found["rewards/accuracies"])
            low, high = found["interval_95"]["rewards/accuracies"]
            axes.errorbar(*at, yerr=[[at[1] - low], [high - at[1]]], fmt="o", color=COLOURS[family], linewidth=0.8)
            right = [one["kl"] for _, _, one in points if abs(one["rewards/accuracies"] - at[1]) < 0.015]
            crowded = any(at[0] < kl < 1.3 * at[0] for kl in right)
            axes.annotate(
                loss, at, xytext=(-5, 3) if crowded else (5, 3), ha="right" if crowded else "left",
                textcoords="offset points", fontsize=8, color=COLOURS[family],
            )  # fmt: skip
        axes.set(
            xscale="log",
            xlabel="KL(policy‖reference) of an answer, nats",
            ylabel="test pairs ranked right, 95% interval",
        )
        axes.set_xticks([2, 5, 10, 20, 50, 100], labels=["2", "5", "10", "20", "50", "100"])
        for family, colour in COLOURS.items():
            axes.plot([], [], "o", color=colour, label=family)
        axes.legend(loc="lower left", fontsize=8)
        figure.savefig(given.output_dir / "accuracy_kl.png", dpi=110)


if __name__ == "__main__":
    main()
