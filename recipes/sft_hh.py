"""SFT on the preferred answers of preference pairs: the reference that DPO starts from, on its own.

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

# the presets are dpo_hh.py's: what they say of its first stage is this recipe's training
OF_DPO = ("beta", "output_dir", "learning_rate", "num_train_epochs")
OF_SFT = {
    "sft_epochs": "num_train_epochs",
    "sft_learning_rate": "learning_rate",
    "sft_batch_size": "per_device_train_batch_size",
    "sft_completion_only_loss": "completion_only_loss",
}


def main() -> None:
    parser = RecipeParser(
        (TextDataConfig, TextModelConfig, TextSFTConfig, SamplesConfig, RunConfig), description=__doc__
    )
    (data, model, sft, samples, options), preset = parser.parse(not_from_presets=OF_DPO, renamed_in_presets=OF_SFT)

    # heavy imports wait until the command line is known to be right
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
