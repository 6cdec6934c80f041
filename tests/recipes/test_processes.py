"""Two gloo processes against one: the same losses, figures and weights; who writes; what ends a job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import DeepSpeedPlugin

from resdpo_trl.errors import UserError
from resdpo_trl.text.config import TextDPOConfig
from resdpo_trl.training.processes import check_sharding, fewer_than_asked
from tests import processes_job
from tests.recipes.conftest import ROOT

CONFIGS = ROOT / "accelerate_configs"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The trainings of `processes_job` in this process, and on two processes."""
    folder = tmp_path_factory.mktemp("two")
    started = start("accelerate", "launch", "--config_file", CONFIGS / "multi_cpu.yaml", job(), folder)
    one = processes_job.run(tmp_path_factory.mktemp("one"))
    _, said = started.communicate(timeout=300)
    assert started.returncode == 0, said[-3000:]
    return one, *(json.loads((folder / f"process{rank}.json").read_text()) for rank in (0, 1))


def job() -> str:
    return processes_job.__file__


def start(*command, **environment) -> subprocess.Popen:
    program = Path(sys.executable).with_name(command[0])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [str(program), *map(str, command[1:])], cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("training", processes_job.TRAININGS)
def test_two_processes_follow_one(both, training):
    one, first, second = (found[training] for found in both)
    assert (one["num_processes"], one["parallelism"]) == (1, "NO")
    assert (first["num_processes"], first["parallelism"]) == (2, "MULTI_CPU")
    assert one["steps"] == first["steps"] >= (20 if training in ("sft", "dpo") else 1)
    assert one.get("read") == first.get("read")
    assert max(entry["grad_norm"] for entry in one["logged"] if "grad_norm" in entry) > 0.1  # it does learn
    assert len(one["logged"]) == len(first["logged"])
    for own, theirs in zip(one["logged"], first["logged"], strict=True):
        assert set(own) == set(theirs)
        for name, value in own.items():
            assert theirs[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (own["epoch"], name)
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-6)
    # every process ends with the same policy and, where it moves, with the same reference
    assert (first["weights"], first.get("reference")) == (second["weights"], second.get("reference"))


def test_the_best_epoch_is_one_decision(both):
    """The main process's, on every process; it comes before the last epoch, which is the other process's own."""
    own = [{int(step): loss for step, loss in each["best epoch"]["losses"].items()} for each in both]
    bests = [min(losses, key=losses.get) for losses in own]
    assert bests == [min(own[0]), min(own[0]), max(own[0])]
    for found in (each["best epoch"] for each in both):
        best = bests[0]
        assert found["best"] == f"checkpoint-{best}" and found["recorded"].endswith(found["best"]) and found["kept"]


def test_a_moving_reference_has_the_main_processs_batch_norms(both):
    _, first, second = (found["images, batch norms"] for found in both)
    assert first["reference"] == second["reference"]


def test_the_reference_is_computed_once_and_read_by_all(both):
    assert both[1]["dpo"]["read"] == 0
    for found in both[1:]:
        assert found["dpo, read from the cache"]["read"] == processes_job.ROWS + processes_job.HELD_OUT


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(["--config_file", str(path), "recipes/dpo_hh.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    content = yaml.safe_load(path.read_text())
    assert load_config_from_file(str(path)).to_dict()["num_processes"] == content["num_processes"]
    assert arguments.num_processes == content["num_processes"]
    kinds = {"multi_gpu": arguments.multi_gpu, "multi_cpu": arguments.multi_gpu, "fsdp2": arguments.use_fsdp}
    assert kinds.get(path.stem, arguments.use_deepspeed if "deepspeed" in path.stem else True)
    if path.stem == "fsdp2":
        assert (int(arguments.fsdp_version), arguments.fsdp_cpu_ram_efficient_loading) == (2, False)
    if "deepspeed" in path.stem:
        assert str(arguments.zero_stage) == path.stem[-1]


def test_fewer_processes_than_asked_are_said(monkeypatch):
    """The variables are those that accelerate 1.15 sets for `--cpu --num_processes 2`, which starts one process."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert fewer_than_asked() is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "started one" in fewer_than_asked() and "\n" not in fewer_than_asked()


ZERO3 = {"zero_stage": 3, "zero3_init_flag": False, "zero3_save_16bit_model": True}


@pytest.mark.parametrize(
    ("environment", "options", "zero", "said"),
    [
        ({}, {}, None, None),
        ({}, {}, ZERO3, None),
        ({}, {"reference_update": "polyak"}, None, "--reference_update polyak"),
        ({}, {"save_only_model": True}, None, "--save_only_model is not supported with FSDP or DeepSpeed"),
        ({}, {"auto_find_batch_size": True}, None, "--auto_find_batch_size is not supported"),
        ({"FSDP_VERSION": "1"}, {}, None, "fsdp_version: 1 is not supported"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, None, "fsdp_cpu_ram_efficient_loading: true"),
        ({}, {}, ZERO3 | {"zero3_init_flag": True}, "zero3_init_flag: true"),
        ({}, {}, ZERO3 | {"zero3_save_16bit_model": False}, "zero3_save_16bit_model: false"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, None, "parallelism_config .*context.* is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, None, "Megatron-LM is not supported"),
    ],
)
def test_what_sharding_refuses(monkeypatch, tmp_path, environment, options, zero, said):
    monkeypatch.setattr("resdpo_trl.training.processes.is_sharded", lambda: True)  # there is no GPU to shard over
    args = TextDPOConfig(output_dir=str(tmp_path), **options)
    sharded_by = "ACCELERATE_USE_FSDP" if zero is None else "ACCELERATE_USE_DEEPSPEED"
    for name, value in ({sharded_by: "true", "FSDP_VERSION": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    args.deepspeed_plugin = zero and DeepSpeedPlugin(**zero)
    if said is None:
        check_sharding(args)
    else:
        with pytest.raises(UserError, match=said):
            check_sharding(args)


@pytest.mark.parametrize("arch", ["fast", "resnet18"])
def test_batch_norms_over_all_processes_are_the_same_model(arch):
    """As far as it goes without GPUs, where alone they train: the same state dict, the same outputs in evaluation."""
    from resdpo_trl.image.model import ImageClassifierConfig, build_classifier, share_statistics

    config = ImageClassifierConfig(arch=arch, widths=[24, 24], image_size=16, num_labels=4)
    pixels = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = build_classifier(config, 0, pixels)
    model(pixels)  # running statistics of its own
    model.eval()
    before, state = model(pixels).logits, {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, _ in model.named_parameters()}
    share_statistics(model)
    kinds = [type(module) for module in model.modules()]
    assert torch.nn.SyncBatchNorm in kinds and torch.nn.BatchNorm2d not in kinds
    assert {name for name, _ in model.named_parameters()} == trained
    assert set(model.state_dict()) == set(state)
    torch.testing.assert_close(model.state_dict(), state)
    torch.testing.assert_close(model(pixels).logits, before)
