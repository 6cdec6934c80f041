"""β × learning rate × seed from one SFT and one pass of the reference: a table, and all points on one page.

# the quickstart's model and pairs, three values of β
python recipes/sweep_hh.py --betas 0.1 0.3 0.5 --output_dir runs/betas

# later: one more β; the points that are there are not run again
python recipes/sweep_hh.py --betas 0.1 0.3 0.5 0.7 --output_dir runs/betas --resume_from_checkpoint

# GPT-2 on HH, two rates, two points at once; every flag of dpo_hh.py may follow
python recipes/sweep_hh.py --config recipes/configs/hh/gpt2.yaml --betas 0.3 0.5 0.7 --learning_rates 1e-4 1e-5 --jobs 2

# the command lines alone, for Slurm or ray
python recipes/sweep_hh.py --betas 0.3 0.5 --output_dir runs/betas --print_commands
"""

import os
import shlex
import sys
import time
from pathlib import Path

from command_line import RecipeParser, run

from resdpo_trl.arguments import RunConfig
from resdpo_trl.errors import UserError
from resdpo_trl.sweep import SweepConfig, collect, command_of, describe, has_ended, points_of, remember, run_points
from resdpo_trl.text.config import SamplesConfig, ScratchConfig, SFTStageConfig, TextDPOConfig, TextModelConfig
from resdpo_trl.text.data import DataConfig

RECIPE = Path(__file__).resolve().parent / "dpo_hh.py"
ONE_RUN = ("betas", "learning_rates", "seeds", "jobs", "print_commands", "output_dir", "resume_from_checkpoint")


def shared_flags(words: list[str]) -> list[str]:
    """The command line without the flags that the sweep sets for each point."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0].lstrip("-").replace("-", "_")
            if name in ("overwrite_output_dir", "push_to_hub"):
                raise UserError(f"--{name} is for one run, not for a sweep: leave it out")
            if name in ("beta", "learning_rate", "seed"):
                raise UserError(f"--{name} is each point's own: pass --betas, --learning_rates or --seeds")
            dropping = name in ONE_RUN
        if not dropping:
            kept.append(word)
    return kept


def main() -> None:
    shared = shared_flags(sys.argv[1:])
    parser = RecipeParser(
        (
            SweepConfig, DataConfig, TextModelConfig, ScratchConfig, SFTStageConfig, TextDPOConfig, SamplesConfig,
            RunConfig,
        ),
        description=__doc__,
    )  # fmt: skip
    parsed, preset = parser.parse(default_preset="hh/quickstart.yaml")
    sweep, data, model, scratch, sft, dpo, samples, options = parsed
    started = time.perf_counter()
    named = any(word.partition("=")[0].replace("-", "_") == "__output_dir" for word in sys.argv[1:])
    output_dir = Path(dpo.output_dir if named else "runs/sweep_hh")
    points = points_of(sweep, dpo.learning_rate, dpo.seed, output_dir)
    reference = sft.sft_checkpoint or str(output_dir / "sft" / "reference")
    from_one_reference = shared if sft.sft_checkpoint else [*shared, "--sft_checkpoint", reference]
    if preset is not None and "--config" not in " ".join(shared):
        from_one_reference = ["--config", os.path.relpath(preset), *from_one_reference]
    remember(output_dir, shared, dpo.resume_from_checkpoint is not None)

    if not sft.sft_checkpoint and not has_ended(output_dir / "sft"):
        from resdpo_trl.text.pipeline import TextRun

        dpo.output_dir = str(output_dir / "sft")
        dpo.resume_from_checkpoint = "last" if (output_dir / "sft").exists() else None
        job = TextRun(data, model, scratch, samples, options, dpo, sft, preset)
        job.say_what_runs()
        pairs = job.prepare_pairs()
        job.make_reference(pairs)
        job.finish()
    if sweep.print_commands:
        print("\n".join(shlex.join(command_of(RECIPE, point, from_one_reference)) for point in points))
        return
    failures = run_points(RECIPE, points, from_one_reference, sweep.jobs)
    rows = collect(points, failures, output_dir)
    print(describe(rows, output_dir, time.perf_counter() - started))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
