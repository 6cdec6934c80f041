"""Compare any number of models on the same prompts: word-level differences, rewards, win rates.

# the quickstart's models on its held-out prompts, with rewards against the reference
accelerate launch recipes/compare_hh.py --models reference=runs/quickstart/reference policy=runs/quickstart/policy \\
  --reference reference --output_dir runs/answers

# the good and the bad model (dpo_hh.py --prefer rejected), judged by a reward model (reward_hh.py)
accelerate launch recipes/compare_hh.py --models good=runs/good/policy bad=runs/bad/policy \\
  --reference runs/good/reference --prompts questions.txt --reward_model runs/reward/reward_model --best_of_n 8

# judged in both orders by any OpenAI-compatible endpoint; the key comes only from the environment
JUDGE_API_KEY=… python recipes/compare_hh.py --models good=runs/good/policy bad=runs/bad/policy \\
  --judge_url https://api.openai.com/v1 --judge_model gpt-4o-mini
"""

from command_line import RecipeParser, run

from resdpo_trl.study.config import CompareConfig
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.training.arguments import RunConfig


def main() -> None:
    parser = RecipeParser((CompareConfig, TextModelConfig, RunConfig), description=__doc__)
    (config, model, options), preset = parser.parse()

    from resdpo_trl.study.compare import Comparison

    job = Comparison(config, model, options, preset)
    job.say_what_runs()
    job.answer()
    job.score()
    job.judge()
    job.finish()


if __name__ == "__main__":
    run(main)
