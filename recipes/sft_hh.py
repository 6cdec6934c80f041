"""Train only the reference of DPO, with SFT on the preferred answers of preference pairs.

# two CPU cores, no network: SmolLM2-135M on the quickstart's pairs
accelerate launch recipes/sft_hh.py --max_train_samples 400 --max_eval_samples 64 --max_length 160

# the SFT stage of GPT-2 on 3,000 pairs of Anthropic HH, on a GPU
accelerate launch recipes/sft_hh.py --config recipes/configs/hh/gpt2.yaml

# any causal language model on your own pairs; then DPO from it
accelerate launch recipes/sft_hh.py --model_name_or_path FOLDER_OR_ID --dataset_name pairs.jsonl --output_dir runs/sft
accelerate launch recipes/dpo_hh.py --reference runs/sft/reference --dataset_name pairs.jsonl
"""

from command_line import RecipeParser, run

from resdpo_trl.text.config import SamplesConfig, TextModelConfig, TextSFTConfig
from resdpo_trl.text.data import TextDataConfig
from resdpo_trl.training.arguments import RunConfig


def main() -> None:
    parser = RecipeParser(
        (TextDataConfig, TextModelConfig, TextSFTConfig, SamplesConfig, RunConfig), description=__doc__, section="sft"
    )
    (data, model, sft, samples, options), preset = parser.parse()

    # import heavy modules only after the command line is checked
    from resdpo_trl.text.pipeline import TextRun

    job = TextRun(data, model, samples, options, sft, preset=preset, given=parser.given)
    job.say_what_runs()
    pairs = job.prepare_pairs()
    job.make_reference(pairs)
    job.merge_adapter()
    job.write_samples(pairs)
    job.finish()


if __name__ == "__main__":
    run(main)
