"""The figure of docs/method.md, from the files of a text run: what the sigmoid's weight does while DPO trains.

make quickstart
python docs/gradient_weight.py runs/quickstart docs/gradient_weight.svg
"""

import math
import sys

from matplotlib import rc_context
from matplotlib.figure import Figure

from resdpo_trl.run.report import load_run


def main(folder: str, output: str) -> None:
    run = load_run(folder)
    margins = [row["margin"] for row in run.scores]
    weights = [1 / (1 + math.exp(margin)) for margin in margins]  # σ(r̂_l − r̂_w)
    style = {
        "font.size": 9, "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "font.family": "sans-serif", "svg.hashsalt": "gradient_weight",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        left.plot(
            *run.curve("dpo", "train", "gradient_weights/chosen"), color="#4a90e2", label="mean of a step's pairs"
        )
        left.axhline(0.5, color="#888888", linestyle=":", linewidth=1, label="before training")
        left.set(xlabel="epoch", ylabel="weight σ(r̂_l − r̂_w)", title="weight, training", ylim=(0, 0.6))
        for split, line in (("train", "-"), ("validation", "o--")):
            for side, colour in (("chosen", "#3aa657"), ("rejected", "#c0504d")):
                curve = run.curve("dpo", split, f"rewards/{side}")
                middle.plot(*curve, line, color=colour, label=f"{side}, {split}", markersize=4, linewidth=1.2)
        middle.axhline(0, color="#888888", linestyle=":", linewidth=1)
        middle.set(xlabel="epoch", ylabel="implicit reward", title="both rewards")
        right.hist(
            [w for w in weights if w >= 0.5], bins=[k / 40 for k in range(41)], color="#c0504d", label="ranked wrong"
        )
        right.hist(
            [w for w in weights if w < 0.5], bins=[k / 40 for k in range(41)], color="#3aa657", label="ranked right"
        )
        right.set(xlabel="weight σ(r̂_l − r̂_w)", ylabel="test pairs", title=f"{len(weights)} test pairs, epoch kept")
        for axes in (left, middle, right):
            axes.legend(fontsize=7)
        figure.savefig(output, facecolor="white", metadata={"Date": None, "Creator": None})
    curve = run.curve("dpo", "train", "gradient_weights/chosen")
    print(
        f"mean training weight {curve[1][0]:.3f} at epoch {curve[0][0]:.2f}, {curve[1][-1]:.3f} at {curve[0][-1]:.2f}"
    )
    print(f"test weights: mean {sum(weights) / len(weights):.3f}, {min(weights):.3f} to {max(weights):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
