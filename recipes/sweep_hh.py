"""Sweep β × learning rate × seed × SFT epochs, with a table and a page. Each number of SFT epochs has one reference.

# the quickstart's model and pairs, three values of β
python recipes/sweep_hh.py --betas 0.1 0.3 0.5 --output_dir runs/betas

# later: one more β; finished points are not run again
python recipes/sweep_hh.py --betas 0.1 0.3 0.5 0.7 --output_dir runs/betas --resume_from_checkpoint

# GPT-2 on HH, two rates, two points at once; every flag of dpo_hh.py may follow
python recipes/sweep_hh.py --config recipes/configs/hh/gpt2.yaml --betas 0.3 0.5 0.7 --learning_rates 1e-4 1e-5 --jobs 2

# references that were trained for different numbers of epochs
python recipes/sweep_hh.py --betas 0.1 0.3 --sft_epochs_list 1 2 4 --output_dir runs/references

# reward against KL of every checkpoint, by a trained reward model; also for a finished sweep
accelerate launch recipes/reward_hh.py --output_dir runs/reward
python recipes/sweep_hh.py --betas 0.1 0.3 0.5 --output_dir runs/betas --resume_from_checkpoint \\
  --reward_model runs/reward/reward_model

# only the command lines, for Slurm or Ray
python recipes/sweep_hh.py --betas 0.3 0.5 --output_dir runs/betas --print_commands
"""

import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path

from command_line import RecipeParser, on_one_process, options_of, run

from resdpo_trl.errors import UserError
from resdpo_trl.study.sweep import (
    SweepConfig,
    collect,
    command_of,
    describe,
    has_ended,
    points_of,
    remember,
    run_points,
)
from resdpo_trl.text.config import SamplesConfig, TextDPOConfig, TextModelConfig, TextSFTConfig
from resdpo_trl.text.data import TextDataConfig
from resdpo_trl.training.arguments import RunConfig

RECIPE = Path(__file__).resolve().parent / "dpo_hh.py"
ONE_RUN = (
    "betas", "learning_rates", "seeds", "sft_epochs_list", "jobs", "print_commands", "output_dir",
    "resume_from_checkpoint", "reward_model", "frontier_samples", "verbose",
)  # fmt: skip


def shared_flags(words: list[str]) -> list[str]:
    """The command line without the flags that the sweep sets for each point."""
    kept: list[str] = []
    for name, option in options_of(words):
        if name in ("overwrite_output_dir", "push_to_hub", "hub_token"):
            raise UserError(f"--{name} is for one run, not for a sweep: omit it")
        if name in ("beta", "learning_rate", "seed"):
            raise UserError(f"--{name} is set per point: pass --betas, --learning_rates or --seeds")
        kept += option if name not in ONE_RUN else []
    return kept


def main() -> None:
    on_one_process()
    shared = shared_flags(sys.argv[1:])
    parser = RecipeParser(
        (SweepConfig, TextDataConfig, TextModelConfig, TextDPOConfig, SamplesConfig, RunConfig),
        description=__doc__,
        section="dpo",
        before=("sft", TextSFTConfig),
    )
    parsed, preset = parser.parse(default_preset="hh/quickstart.yaml")
    sweep, data, model, dpo, samples, options, sft = parsed
    started = time.perf_counter()
    output_dir = Path(dpo.output_dir if "output_dir" in parser.given else "runs/sweep_hh")
    points = points_of(sweep, dpo.learning_rate, dpo.seed, output_dir, sft.num_train_epochs, dpo.reference)
    point_flags = list(shared)
    if preset is not None and "--config" not in " ".join(shared):
        point_flags = ["--config", os.path.relpath(preset), *shared]
    if sweep.reward_model:
        from resdpo_trl.text.reward import check_reward_model

        check_reward_model(sweep.reward_model, dpo.trust_remote_code)  # before hours of training
    remember(output_dir, shared, dpo.resume_from_checkpoint is not None)

    for point in [] if dpo.reference else {point.reference: point for point in points}.values():
        folder = point.reference.parent
        if has_ended(folder):
            continue
        from resdpo_trl.text.pipeline import TextRun

        resume = "last" if folder.exists() else None
        own_dpo = dataclasses.replace(dpo, output_dir=str(folder), resume_from_checkpoint=resume)
        own_sft = dataclasses.replace(sft, num_train_epochs=point.sft_epochs)
        job = TextRun(data, model, samples, options, own_dpo, own_sft, preset, parser.given)
        job.say_what_runs()
        pairs = job.prepare_pairs()
        job.make_reference(pairs)
        job.cache_reference(pairs)
        job.finish()
    if sweep.print_commands:
        print("\n".join(shlex.join(command_of(RECIPE, point, point_flags)) for point in points))
        return
    failures = run_points(
        RECIPE, points, point_flags, sweep.jobs, lambda failures: collect(points, failures, output_dir)
    )
    rows = collect(points, failures, output_dir)
    if sweep.reward_model:
        from resdpo_trl.study.frontier import Frontier
        from resdpo_trl.text.evaluate import EvaluateConfig

        config = EvaluateConfig(
            model="each checkpoint", reference="its point's", reward_model=sweep.reward_model,
            max_length=dpo.max_length, batch_size=dpo.per_device_eval_batch_size, num_samples=sweep.frontier_samples,
            max_new_tokens=samples.max_new_tokens, seed=dpo.seed, trust_remote_code=dpo.trust_remote_code,
            prefix_sharing=dpo.prefix_sharing, bf16=dpo.bf16,
        )  # fmt: skip
        Frontier(config, data, model).measure(points, failures, output_dir / "frontier.csv")
        rows = collect(points, failures, output_dir)
    print(describe(rows, output_dir, time.perf_counter() - started))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
