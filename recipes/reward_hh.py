"""Train a Bradley–Terry reward model on preference pairs, from the SFT checkpoint from which DPO also starts.

# two CPU cores, no network: the quickstart's pairs, and the reference of a finished run of dpo_hh.py
accelerate launch recipes/reward_hh.py --reference runs/quickstart/reference --learning_rate 1e-4 \\
  --output_dir runs/reward

# the same without a finished run: SFT first
accelerate launch recipes/reward_hh.py --learning_rate 1e-4

# GPT-2 on 3,000 pairs of Anthropic HH, on a GPU
accelerate launch recipes/reward_hh.py --config recipes/configs/hh/gpt2.yaml --num_train_epochs 1

# then: its accuracy and that of the implicit reward, on the same held-out pairs
accelerate launch recipes/evaluate_hh.py --model runs/quickstart/policy --reference runs/quickstart/reference \\
  --reward_model runs/reward/reward_model --max_test_samples 256
"""

from command_line import RecipeParser, run

from resdpo_trl.text.config import SamplesConfig, TextModelConfig, TextRewardConfig, TextSFTConfig
from resdpo_trl.text.data import TextDataConfig
from resdpo_trl.training.arguments import RunConfig


def main() -> None:
    parser = RecipeParser(
        (TextDataConfig, TextModelConfig, TextRewardConfig, RunConfig),
        description=__doc__,
        section="reward",
        before=("sft", TextSFTConfig),
    )
    (data, model, reward, options, sft), preset = parser.parse(default_preset="hh/quickstart.yaml")

    # import heavy modules only after the command line is checked
    from resdpo_trl.text.pipeline import TextRun

    job = TextRun(data, model, SamplesConfig(num_samples=0), options, reward, sft, preset, parser.given)
    job.say_what_runs()
    pairs = job.prepare_pairs()
    job.make_reference(pairs)
    job.make_reward_model(pairs)
    job.finish()


if __name__ == "__main__":
    run(main)
