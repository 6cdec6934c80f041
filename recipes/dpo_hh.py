"""Train a reference with SFT on the preferred answers, then a policy with DPO, and test both on held-out pairs.

# two CPU cores, no network, minutes: SmolLM2-135M on chit-chat
accelerate launch recipes/dpo_hh.py

# the same model on your own pairs
accelerate launch recipes/dpo_hh.py --dataset_name pairs.jsonl

# the same model on Anthropic HH, and GPT-2 on 3,000 of its pairs, on a GPU
accelerate launch recipes/dpo_hh.py --config recipes/configs/hh/smollm2.yaml
accelerate launch recipes/dpo_hh.py --config recipes/configs/hh/gpt2.yaml

# LoRA on any causal language model; --merge_adapter saves a full model instead of the adapter
accelerate launch recipes/dpo_hh.py --model_name_or_path FOLDER_OR_ID --dataset_name pairs.jsonl --use_peft \\
  --merge_adapter
"""

from command_line import RecipeParser, run

from resdpo_trl.text.config import SamplesConfig, TextDPOConfig, TextModelConfig, TextSFTConfig
from resdpo_trl.text.data import TextDataConfig
from resdpo_trl.training.arguments import RunConfig


def main() -> None:
    parser = RecipeParser(
        (TextDataConfig, TextModelConfig, TextDPOConfig, SamplesConfig, RunConfig),
        description=__doc__,
        section="dpo",
        before=("sft", TextSFTConfig),
    )
    (data, model, dpo, samples, options, sft), preset = parser.parse(default_preset="hh/quickstart.yaml")

    # import heavy modules only after the command line is checked
    from resdpo_trl.text.pipeline import TextRun

    job = TextRun(data, model, samples, options, dpo, sft, preset, parser.given)
    job.say_what_runs()
    pairs = job.prepare_pairs()
    job.make_reference(pairs)
    job.make_policy(pairs)
    job.merge_adapter()
    job.write_samples(pairs)
    job.finish()


if __name__ == "__main__":
    run(main)
