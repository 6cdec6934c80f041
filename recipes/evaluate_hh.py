"""DPO loss, accuracies, rewards, length baselines and sampled answers of any checkpoint, with intervals.

# the quickstart's policy against its reference, on its held-out pairs; β and maximum length are those of the training
accelerate launch recipes/evaluate_hh.py --model runs/quickstart/policy --reference runs/quickstart/reference \\
  --max_test_samples 256 --output runs/quickstart/evaluation.json

# on all pairs of a file except those that the training has used
accelerate launch recipes/evaluate_hh.py --model runs/a/policy --reference runs/a/reference --dataset_name pairs.jsonl

# two checkpoints of one reference, with paired tests of their difference
accelerate launch recipes/evaluate_hh.py --model runs/a/policy --other_model runs/b/policy \\
  --reference runs/a/reference --dataset_name pairs.jsonl

# also the figures of a trained reward model on the same pairs, and the agreement of the two rewards
accelerate launch recipes/evaluate_hh.py --model runs/quickstart/policy --reference runs/quickstart/reference \\
  --reward_model runs/reward/reward_model --max_test_samples 256
"""

from command_line import RecipeParser, on_one_process, run

from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.text.data import TextDataConfig
from resdpo_trl.text.evaluate import EvaluateConfig, describe, evaluate


def main() -> None:
    on_one_process()
    parser = RecipeParser((EvaluateConfig, TextDataConfig, TextModelConfig), description=__doc__)
    (config, data, model), _ = parser.parse()
    print(describe(evaluate(config, data, model)))


if __name__ == "__main__":
    run(main)
