"""Each rule of the verdict: a case in which it speaks, and a close one in which it does not."""

import math

import pytest

from resdpo_trl.run.verdict import (
    of_comparison,
    of_divergence,
    of_epochs,
    of_held_out,
    of_sft,
    of_sweep,
    of_the_margin,
    of_the_test,
    verdict,
)


def pairs(accuracy, low, high, n=256):
    interval = {"rewards/accuracies": [low, high], "logps/ref_accuracies": [0.59, 0.7]}
    test = {"rewards/accuracies": accuracy, "logps/ref_accuracies": 0.65, "n": n, "interval_95": interval}
    return {"dpo": {"test": test}}


@pytest.mark.parametrize(
    ("figures", "judged", "advice"),
    [
        ((0.84, 0.79, 0.88), ", better than chance", []),
        (
            (0.54, 0.48, 0.60),
            ", which is not distinguishable from chance",
            ["Use more test pairs, or train on more pairs."],
        ),
        (
            (0.40, 0.34, 0.46),
            ", worse than chance",
            ["Look at a few pairs: chosen and rejected may be swapped (--prefer)."],
        ),
    ],
)
def test_pairs_against_chance(figures, judged, advice):
    share, low, high = (f"{100 * value:.0f}%" for value in figures)
    said = (
        f"The policy's implicit reward ranks {share} of 256 unseen pairs right (95% interval {low} to {high}){judged}"
    )
    assert of_the_test(pairs(*figures)) == [f"{said}; the reference's log-likelihood 65%.", *advice]
    (said, *_) = of_the_test({"reward": pairs(*figures)["dpo"]})
    assert said.startswith(f"The reward model ranks {share} of 256") and said.endswith(f"{judged}.")


@pytest.mark.parametrize(
    ("before", "end"),
    [
        (0.788, ", more than the reference (79%)."),
        (0.97, "; the reference's 97% is in this interval: no difference is shown."),
        (0.995, ", fewer than the reference (100%)."),
        (None, "(95% interval 96% to 99%)."),
    ],
)
def test_images_against_the_reference(before, end):
    test = {"accuracy": 0.978, "n": 359, "interval_95": {"accuracy": [0.961, 0.992]}}
    summary = {"dpo": {"test": test}, "reference": {"test": test | {"accuracy": before}} if before else {"given": "x"}}
    (said,) = of_the_test(summary)
    assert said.startswith("The policy classifies 98% of 359 unseen images right") and said.endswith(end)


def test_divergence():
    assert of_divergence(208.0, math.log(2)) == [
        "The test loss is 208, and 0.693 before training: training diverged. Lower --learning_rate."
    ]
    assert "not finite" in of_divergence(None, 0.7)[0]
    assert of_divergence(1.5, math.log(2)) == [] and of_divergence(1.5, None) == []


def margins(chosen, rejected):
    return {"rewards/margins": chosen - rejected, "rewards/chosen": chosen, "rewards/rejected": rejected}


def test_a_policy_that_is_still_its_reference():
    (said,) = of_the_margin(margins(0.01, -0.002))
    assert said.startswith("The policy barely moved (margin 0.012): raise --learning_rate or train longer")
    assert of_the_margin(margins(0.3, -0.2)) == []


def test_rewards_that_fall_together():
    assert of_the_margin(margins(-2.3, -3.5)) == ["Both rewards fell: that is normal while the margin grows."]
    assert of_the_margin(margins(-3.5, -2.3)) == [] and of_the_margin(margins(0.1, -3.5)) == []


def test_a_validation_loss_that_turned_or_still_falls():
    (said,) = of_epochs([(1, 0.6), (2, 0.5), (3, 0.7)], 2)
    assert said.startswith("The validation loss has risen since epoch 2 (0.500 to 0.700; that epoch is kept): train")
    assert said.endswith("train fewer epochs, or with a larger --beta.")
    assert "kept" not in of_epochs([(1, 0.6), (2, 0.5), (3, 0.7)], 3)[0]
    assert of_epochs([(1, 0.5), (2, 0.7)], 1, dpo=False)[0].endswith("train fewer epochs.")
    (said,) = of_epochs([(1, 0.6), (2, 0.5)], 2)
    assert said.endswith("(0.600 to 0.500): train longer.")
    assert of_epochs([(1, 0.500), (2, 0.505)], 1) == []  # noise
    assert of_epochs([(1, 0.125), (2, 0.130)], 1) and of_epochs([(1, 0.125), (2, 0.130)], 1, rows=180) == []
    assert of_epochs([(1, 0.505), (2, 0.500)], 2) == [] and of_epochs([(1, 0.6)], 1) == []


def test_few_held_out_rows():
    (said,) = of_held_out(19, 3, 256)
    assert said.startswith("19 validation rows are too few to choose an epoch")
    assert of_held_out(19, 1, 256) == [] and of_held_out(64, 3, 256) == []
    (said,) = of_held_out(64, 3, 25)
    assert said.startswith("25 test rows give a share to ±20 percentage points")


def test_sft():
    losses = {"validation": {"loss_before": 3.2, "loss_after": 2.9, "n": 64}}
    assert of_sft(losses) == ["SFT lowered the validation loss from 3.200 to 2.900 on 64 rows."]
    assert of_sft({"validation": losses["validation"] | {"loss_after": 3.3}})[0].startswith("SFT did not help")
    assert of_sft({"skipped": "a model"}) == []


def point(beta, low, high, best="", **changes):
    row = {"point": f"beta{beta}", "beta": beta, "learning_rate": 1e-4, "status": "done", "best": best, "n": 256}
    return row | {"accuracy": (low + high) / 2, "accuracy_low": low, "accuracy_high": high} | changes


def test_sweeps():
    rows = [point(0.1, 0.55, 0.65), point(0.3, 0.6, 0.7, "best"), point(0.5, 0.45, 0.55)]
    first, second = of_sweep(rows)
    assert first.startswith("beta0.3 is the best on the validation pairs; it ranks 65% of 256 test pairs right")
    assert second == "The intervals of 1 of 2 other points overlap its own: no difference is shown."
    assert "the largest that was tried: also try larger ones (--betas)" in of_sweep(rows[:2])[-1]
    assert of_sweep([point(0.1, 0.4, 0.6), point(0.3, 0.49, 0.6, "best")])[0].startswith("No point beats the reference")


def test_comparisons():
    def row(rate, low, high):
        named = {"model": "policy", "against": "reference", "judge": "reward model", "n": 50}
        return named | {"win_rate": rate, "interval_95": [low, high]}

    assert of_comparison({"win_rates": [row(0.7, 0.56, 0.81)]}) == [
        "policy wins 70% of 50 prompts against reference, judged by reward model (95% interval 56% to 81%)."
    ]
    assert of_comparison({"win_rates": [row(0.3, 0.2, 0.44)]}) == [
        "reference wins 70% of 50 prompts against policy, judged by reward model (95% interval 56% to 80%)."
    ]
    assert of_comparison({"win_rates": [row(0.5, 0.37, 0.63)]})[0].endswith("no difference is shown; use more prompts.")
    assert of_comparison({"win_rates": [row(None, None, None) | {"n": 0}]}) == [
        "reward model gave no verdict on policy against reference."
    ]
    answers = {"reference": {"cut": 0.5, "n": 32}, "policy": {"cut": 0.25, "n": 32}}
    assert of_comparison({"comparison": {"answers": answers}}) == [
        "Of 32 answers per model, these end on their own: reference 50%, policy 75%.",
        "No judge compared the answers: pass --reward_model or --judge_url for win rates.",
    ]


def test_a_whole_run():
    """A diverged run of images: nothing on its margin; the loss before training is the first logged one."""
    test = {"loss": 208.0, "accuracy": 0.5, "n": 359, "interval_95": {"accuracy": [0.45, 0.55]}, **margins(-1, -2)}
    summary = {
        "data": {"classes": 10},
        "reference": {"test": {"accuracy": 0.79, "n": 359, "interval_95": {"accuracy": [0.75, 0.83]}}},
        "dpo": {"loss_type": ["s_dpo"], "test": test, "validation": {"n": 180}, "kept_epoch": 2.0},
    }
    rows = [("train", 0.1, 2.3), ("train", 0.2, 2.0), ("validation", 1.0, 1.0), ("validation", 2.0, 200.0)]
    metrics = [{"stage": "dpo", "split": s, "epoch": epoch, "loss": loss} for s, epoch, loss in rows]
    said = verdict(summary, metrics)
    assert [sentence[:24] for sentence in said] == [
        "The policy classifies 50", "The test loss is 208, an", "The validation loss has ",
    ]  # fmt: skip
    assert "2.3 before training" in said[1]
    assert verdict({}, []) == []
