"""The command line of the recipes: what --help shows, and what is said of flags that other tools have."""

import importlib
import re

import pytest

from tests.recipes.conftest import ROOT

TRAINING = ("dpo_hh.py", "dpo_cifar.py")


def options_of(text):
    """flag -> its help on one line, of what --help prints."""
    text = text[text.index("\noptions") :]  # after the recipe's docstring, which has flags of its own
    found = re.split(r"^  (?=--\w)", text, flags=re.MULTILINE)[1:]
    lines = [" ".join(each.split()) for each in found]
    flags = [line.split()[0] for line in lines]
    assert len(flags) == len(set(flags)), "a flag stands there twice"
    return dict(zip(flags, lines, strict=True))


@pytest.mark.parametrize("name", TRAINING)
def test_help_has_about_thirty_options_and_help_all_every_one(recipe, name):
    status, said, _ = recipe(name, "--help")
    options = options_of(said)
    assert status == 0 and 25 <= len(options) <= 38, len(options)
    assert "accelerate launch recipes/" in said and "-name X" not in said
    assert list(options).index("--beta") < list(options).index("--seed") < list(options).index("--verbose")
    status, said, _ = recipe(name, "--help_all")
    every = options_of(said)
    assert status == 0 and set(options) < set(every) and len(every) > 130
    assert {"--warmup_steps", "--lr_scheduler_type", "--weight_decay"} <= set(every)
    assert "data:" in said and "run:" in said


def test_the_values_shown_are_those_that_would_be_used(recipe):
    """Of the default preset, of the one named, of flags; and what a dataclass derives from others."""
    preset = (ROOT / "recipes" / "configs" / "hh" / "quickstart.yaml").read_text()
    options = options_of(recipe("dpo_hh.py", "--help")[1])
    for name in ("max_length", "per_device_train_batch_size", "max_train_samples", "beta"):
        (value,) = re.findall(rf"^ *{name}: (.*)", preset, re.MULTILINE)
        (shown,) = re.findall(r"\[([\d.e-]+)\]$", options[f"--{name}"])
        assert float(shown) == float(value), name
    assert options["--select"].endswith("[best]") and options["--sft.num_train_epochs"].endswith("[0.5]")
    options = options_of(recipe("dpo_hh.py", "--config", "hh/gpt2.yaml", "--beta", "0.7", "--help")[1])
    assert options["--beta"].endswith("[0.7]")
    assert options["--dataset_name"].replace(" ", "").endswith("[Anthropic/hh-rlhf]")  # argparse breaks at a hyphen
    options = options_of(recipe("dpo_hh.py", "--use_peft", "false", "--help")[1])
    assert options["--learning_rate"].endswith("[0.0002]") and options["--use_peft"].endswith("[False]")


@pytest.mark.parametrize("name", ["compare_hh.py", "evaluate_hh.py", "sweep_hh.py", "chat.py"])
def test_a_recipe_that_cannot_do_without_a_flag_has_help(recipe, name):
    status, said, _ = recipe(name, "--help")
    assert status == 0 and 5 < len(options_of(said)) < 40
    assert name != "sweep_hh.py" or ("--betas" in said and "--beta " not in said)


@pytest.fixture
def command_line(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return importlib.import_module("command_line")


def test_flags_of_other_tools_get_the_name_that_works_here(recipe, command_line):
    known = set(options_of(recipe("dpo_hh.py", "--help_all")[1]))
    known |= set(options_of(recipe("dpo_cifar.py", "--help_all")[1]))
    for name, here in command_line.ELSEWHERE.items():
        assert f"--{here.split()[0]}" in known, here
        assert f"--{name}" not in known, name
    status, _, said = recipe("dpo_hh.py", "--max_prompt_length", "128")
    assert status == 2
    assert said == (
        "error: unknown flag --max_prompt_length; here it is --max_length which counts the prompt with one response\n"
    )
    for name, here in (("warmup_ratio", "warmup_steps"), ("torch_dtype", "dtype"), ("evaluation-strategy", "eval_")):
        assert f"here it is --{here}" in recipe("dpo_hh.py", f"--{name}", "1")[2]
    # where the recipe has no such field, the nearest name is all that can be said
    assert "did you mean models?" in recipe("compare_hh.py", "--model", "x=y")[2]


def test_several_files_are_taken(command_line):
    from resdpo_trl.text.data import TextDataConfig

    parser = command_line.RecipeParser((TextDataConfig,))
    words = ["--dataset_name", "a b.jsonl", "c.csv", "--columns", "chosen=x", "rejected=y"]
    ((data,), _) = parser.parse(given=words)
    assert data.dataset_name == "'a b.jsonl' c.csv" and data.columns == ["chosen=x", "rejected=y"]
