"""A reward model's run from the pairs to its folder, and evaluate_hh.py with it."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.conftest import save_model, train_tokenizer, write_pairs
from tests.recipes.conftest import not_ended, rows_of
from tests.text.test_reward import tiny_reward_model

SMALL = ["--max_length", "64", "--use_cpu", "--logging_steps", "2", "--max_train_samples", "48"]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in write_pairs(120)))
    return path


@pytest.fixture
def language_model(tmp_path, tokenizer):
    return save_model(tmp_path / "language model", tokenizer, "llama")


def test_from_sft_to_a_reward_model_and_its_evaluation(recipe, tmp_path, pairs_file, model_folder):
    """SFT first; then the same figures again from the folder, by evaluate_hh.py."""
    folder = tmp_path / "run"
    status, said, wrong = recipe(
        "reward_hh.py", "--dataset_name", pairs_file, "--output_dir", folder, *SMALL,
        "--model_name_or_path", model_folder, "--sft.num_train_epochs", "1", "--sft.learning_rate", "1e-3",
        "--learning_rate", "3e-3", "--num_train_epochs", "2", "--center_rewards_coefficient", "0.01",
        "--max_train_samples", 120,  # a pair is trained on or tested on
    )  # fmt: skip
    assert status == 0, wrong
    assert said.startswith(f"SFT and a reward model of {model_folder} on {pairs_file.name}")
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "reference", "reward_model", "checkpoints", "metrics.jsonl", "summary.json", "scores.jsonl",
        "report.html", "plots",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    test = summary["reward"]["test"]
    assert test["n"] == summary["data"]["test"]
    low, high = test["interval_95"]["rewards/accuracies"]
    assert low <= test["rewards/accuracies"] <= high
    assert summary["reward"]["best_epoch"] in (1.0, 2.0)
    assert "pairs ranked right" in said and "with lowest validation loss" in said
    assert {(row["stage"], row["split"]) for row in rows_of(folder / "metrics.jsonl")} == {
        ("sft", "train"), ("sft", "validation"), ("reward", "train"), ("reward", "validation"), ("reward", "test"),
    }  # fmt: skip
    card = (folder / "reward_model" / "README.md").read_text()
    assert "reward-trainer" in card and "AutoModelForSequenceClassification" in card
    assert 'id="results"' in (folder / "report.html").read_text()

    # a policy that differs from the reference, so that there is an implicit reward to rank by
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(folder / "reference")
    with torch.no_grad():
        policy.transformer.wte.weight.add_(0.05 * torch.randn_like(policy.transformer.wte.weight))
    policy.save_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(folder / "reference").save_pretrained(tmp_path / "policy")
    arguments = ["--dataset_name", pairs_file, "--max_length", 64, "--num_samples", 4, "--max_new_tokens", 6]
    arguments += ["--model", tmp_path / "policy", "--reference", folder / "reference"]
    status, said, wrong = recipe(
        "evaluate_hh.py", *arguments, "--reward_model", folder / "reward_model", "--output", tmp_path / "figures.json"
    )
    assert status == 0, wrong
    figures = json.loads((tmp_path / "figures.json").read_text())["reward_model"]
    for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen"):
        assert figures["pairs"][name] == pytest.approx(test[name], abs=1e-5), name
    assert figures["rank_correlation"]["margins"]["n"] == test["n"]
    assert figures["rank_correlation"]["rewards"]["n"] == 2 * test["n"]
    assert -1 <= figures["rank_correlation"]["margins"]["spearman"] <= 1
    assert figures["answers"]["n"] == 4
    assert "pairs ranked right by the reward model" in said and "rank correlation of margins" in said

    # a reward model of another family reads the text with its own tokenizer; a language model is refused
    other = train_tokenizer([row["chosen"] for row in write_pairs(40)], 320)
    tiny_reward_model(vocab_size=len(other)).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    status, _, wrong = recipe("evaluate_hh.py", *arguments, "--reward_model", tmp_path / "other")
    assert status == 0, wrong
    status, _, wrong = recipe("evaluate_hh.py", *arguments, "--reward_model", tmp_path / "policy")
    assert status == 2 and "not a reward model (GPT2LMHeadModel)" in wrong


def test_resumed_it_ends_as_the_whole_run(recipe, tmp_path, pairs_file, language_model):
    import shutil

    arguments = ["--dataset_name", pairs_file, "--reference", language_model, "--num_train_epochs", "2"]
    arguments += [*SMALL, "--learning_rate", "1e-3", "--select", "last", "--per_device_train_batch_size", "16"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    status, _, wrong = recipe("reward_hh.py", *arguments, "--output_dir", whole)
    assert status == 0, wrong
    assert all((saved / "checkpoint.json").is_file() for saved in (whole / "checkpoints" / "reward").iterdir())
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "reward_model")
    not_ended(torn)
    shutil.rmtree(torn / "checkpoints" / "reward" / "checkpoint-6")
    status, _, wrong = recipe("reward_hh.py", *arguments, "--output_dir", torn, "--resume_from_checkpoint")
    assert status == 0, wrong
    first, second = ((path / "reward_model" / "model.safetensors").read_bytes() for path in (whole, torn))
    assert first == second
    assert json.loads((whole / "summary.json").read_text())["reward"]["kept_epoch"] == 2


def test_lora_trains_the_head_and_is_merged(recipe, tmp_path, pairs_file, language_model):
    arguments = ["--dataset_name", pairs_file, "--model_name_or_path", language_model, "--use_peft", "--lora_r", "4"]
    arguments += [*SMALL, "--learning_rate", "1e-2", "--sft.learning_rate", "1e-2", "--output_dir", tmp_path / "d"]
    arguments += ["--max_train_samples", 120]  # a pair is trained on or tested on
    status, _, wrong = recipe("reward_hh.py", *arguments)
    assert status == 0, wrong
    assert (tmp_path / "d" / "reference" / "adapter_config.json").is_file()
    assert not (tmp_path / "d" / "reward_model" / "adapter_config.json").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "d" / "reward_model")
    scores = rows_of(tmp_path / "d" / "scores.jsonl")
    assert len({row["chosen_reward"] for row in scores}) > 5
    # the merged folder gives the figures of the run, up to bfloat16's rounding of the sum W + B·A
    status, _, wrong = recipe(
        "evaluate_hh.py", "--model", language_model, "--reference", language_model, "--reward_model",
        tmp_path / "d" / "reward_model", "--dataset_name", pairs_file, "--max_length", 64, "--num_samples", 0,
        "--output", tmp_path / "f.json",
    )  # fmt: skip
    assert status == 0, wrong
    test = json.loads((tmp_path / "d" / "summary.json").read_text())["reward"]["test"]
    figures = json.loads((tmp_path / "f.json").read_text())["reward_model"]
    assert figures["pairs"]["rewards/margins"] == pytest.approx(test["rewards/margins"], abs=2e-3)
    assert figures["rank_correlation"]["margins"]["spearman"] is None  # the policy is the reference
    assert loaded.config.num_labels == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--reference", "./nowhere"], "--reference ./nowhere: no such folder"),
        (["--beta", "0.1"], "unknown flag --beta"),
        (["--load_in_4bit"], "--load_in_4bit and --load_in_8bit"),
        (["--select", "first"], "--select"),
        (["--select", "best", "--load_best_model_at_end", "false"], "contradicts --select best"),
        (["--select", "best", "--eval_strategy", "no"], "pass --select last"),
    ],
)
def test_bad_flags(recipe, tmp_path, arguments, said):
    status, _, wrong = recipe("reward_hh.py", "--output_dir", tmp_path / "r", *arguments)
    assert status == 2, wrong
    assert said in wrong
