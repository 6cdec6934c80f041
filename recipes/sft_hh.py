"""SFT on the preferred answers of preference pairs: the reference that DPO starts from, on its own.

# two CPU cores, no network: the quickstart's pairs and its small GPT-2
accelerate launch recipes/sft_hh.py --learning_rate 1e-3 --completion_only_loss false --max_length 128

# any causal language model on your own pairs; then DPO from it
accelerate launch recipes/sft_hh.py --model_name_or_path FOLDER_OR_ID --dataset_name pairs.jsonl --output_dir runs/sft
accelerate launch recipes/dpo_hh.py --sft_checkpoint runs/sft/reference --dataset_name pairs.jsonl
"""

from command_line import RecipeParser, run

from resdpo_trl.arguments import RunConfig
from resdpo_trl.text.config import SamplesConfig, ScratchConfig, TextModelConfig, TextSFTConfig
from resdpo_trl.text.data import DataConfig


def main() -> None:
    parser = RecipeParser(
        (DataConfig, TextModelConfig, ScratchConfig, TextSFTConfig, SamplesConfig, RunConfig), description=__doc__
    )
    (data, model, scratch, sft, samples, options), preset = parser.parse()

    # heavy imports wait until the command line is known to be right
    from resdpo_trl.text.pipeline import TextRun

    job = TextRun(data, model, scratch, samples, options, sft, preset=preset)
    job.say_what_runs()
    pairs = job.prepare_pairs()
    job.make_reference(pairs)
    job.write_samples(pairs)
    job.finish()


if __name__ == "__main__":
    run(main)
