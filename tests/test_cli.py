"""The command resdpo-trl finds recipes, presets and accelerate's configs by name."""

import sys

import pytest

from resdpo_trl import cli

COMMANDS = [
    "chat", "compare", "dpo", "dpo-cifar", "evaluate", "evaluate-cifar", "publish", "report", "reward", "sft", "sweep",
    "train-cifar",
]  # fmt: skip


@pytest.fixture
def resdpo_trl(monkeypatch, capfd):
    """Run the command in this process; gives (status, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["resdpo-trl", *words])
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        said = capfd.readouterr()
        return status, said.out, said.err

    return call


def test_every_recipe_is_a_command(resdpo_trl):
    assert sorted(cli.recipes()) == COMMANDS
    status, said, _ = resdpo_trl("--help")
    listed = [line.split()[0] for line in said.splitlines() if line.startswith("  ") and line[2] != " "]
    assert status == 0 and listed == sorted([*COMMANDS, "launch"])
    assert "hh/quickstart.yaml" in said and resdpo_trl()[1] == said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dop"], "unknown command dop; did you mean dpo?"),
        (["dpo_hh"], "unknown command dpo_hh; did you mean dpo?"),
        (["7"], "unknown command 7; resdpo-trl --help lists them"),
        (["launch", "--num_processes", "2", "nothing"], "unknown command nothing; resdpo-trl --help lists them"),
        (
            ["launch", "--config_file", "no.yaml", "dpo"],
            "--config_file no.yaml: no such file, and not one of cpu.yaml, deepspeed_zero2.yaml, deepspeed_zero3.yaml, "
            "fsdp2.yaml, multi_cpu.yaml, multi_gpu.yaml, single_gpu.yaml",
        ),
        (["dpo", "--bta", "3"], "unknown flag --bta; did you mean beta?"),
        (["launch", "--num_processes", "1", "dpo-cifar", "--sede", "3"], "unknown flag --sede; did you mean seed?"),
    ],
)  # fmt: skip
def test_a_wrong_name_is_one_line_and_status_2(resdpo_trl, words, line):
    assert resdpo_trl(*words) == (2, "", f"error: {line}\n")


def test_presets_go_by_name(resdpo_trl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said, _ = resdpo_trl("dpo", "--config", "hh/gpt2.yaml", "--help")
    assert status == 0 and "hh-rlhf]" in said
    assert "presets: cifar/fast.yaml, " in resdpo_trl("sft", "--config", "hh/no.yaml")[2]


def test_help_without_a_clone_names_the_commands():
    assert cli.as_commands(
        "usage: dpo_hh.py\naccelerate launch recipes/dpo_hh.py --config recipes/configs/hh/gpt2.yaml\n"
        "A=1 python recipes/train_cifar.py --x model.py\na reward model (recipes/reward_hh.py)"
    ) == (
        "usage: resdpo-trl dpo\nresdpo-trl dpo --config hh/gpt2.yaml\n"
        "A=1 resdpo-trl train-cifar --x model.py\na reward model (resdpo-trl reward)"
    )
