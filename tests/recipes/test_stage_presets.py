"""The stage before DPO: its section of a preset, its flags, and what it takes from those of DPO."""

import importlib

import pytest

from resdpo_trl.errors import UserError
from resdpo_trl.image.config import ImageCrossEntropyConfig, ImageDPOConfig, ImageModelConfig
from resdpo_trl.image.data import AugmentConfig, ImageDataConfig
from resdpo_trl.text.config import SamplesConfig, TextDPOConfig, TextModelConfig, TextRewardConfig, TextSFTConfig
from resdpo_trl.text.data import TextDataConfig
from resdpo_trl.training.arguments import RunConfig
from tests.recipes.conftest import ROOT

CONFIGS = ROOT / "recipes" / "configs"
TEXT, IMAGES = (TextDataConfig, TextModelConfig), (ImageDataConfig, ImageModelConfig, AugmentConfig)


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line as a recipe does; gives the last configuration."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    parser = importlib.import_module("command_line").RecipeParser

    def call(kinds, *words, **sections):
        found, _ = parser(kinds, **sections).parse(given=["--output_dir", "runs/x", "--use_cpu", *map(str, words)])
        return found

    return call


def sft_before_dpo(parse, *words):
    return parse((*TEXT, TextDPOConfig), *words, section="dpo", before=("sft", TextSFTConfig))[-1]


def same(alone, stage):
    """Whether two configurations of training are one, but for the run's folder."""
    found = [each.to_dict() | {"output_dir": None, "run_name": None} for each in (alone, stage)]
    return found[0] == found[1]


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("hh/*.yaml")), ids=lambda path: path.stem)
def test_sft_is_the_first_stage_of_a_text_preset(preset, parse):
    alone = parse((*TEXT, TextSFTConfig, SamplesConfig, RunConfig), "--config", preset, section="sft")[2]
    stage = sft_before_dpo(parse, "--config", preset)
    assert same(alone, stage) and stage.is_skipped == (preset.stem == "smollm2")
    *_, reward, stage = parse(
        (*TEXT, TextRewardConfig), "--config", preset, section="reward", before=("sft", TextSFTConfig)
    )
    assert same(alone, stage) and reward.learning_rate in (1e-5, 1e-4)


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("cifar/*.yaml")), ids=lambda path: path.stem)
def test_cross_entropy_is_the_first_stage_of_an_image_preset(preset, parse):
    alone = parse((*IMAGES, ImageCrossEntropyConfig, RunConfig), "--config", preset, section="reference")[3]
    before = ("reference", ImageCrossEntropyConfig)
    *_, dpo, stage = parse((*IMAGES, ImageDPOConfig), "--config", preset, section="dpo", before=before)
    assert same(alone, stage) and stage.num_train_epochs == 1 < dpo.num_train_epochs


def test_a_stage_takes_the_options_that_both_have(parse):
    options = {
        "lr_scheduler_type": "cosine", "eval_delay": 2, "dataloader_prefetch_factor": 3, "dataloader_num_workers": 1,
        "project": "p", "ddp_bucket_cap_mb": 5, "optim": "sgd", "optim_args": "momentum=0.9", "max_length": 64,
        "weight_decay": 0.5, "select": "last", "per_device_train_batch_size": 4, "seed": 7,
    }  # fmt: skip
    own = {"max_steps": 7, "learning_rate": 0.1, "loss_type": "hinge", "hub_model_id": "a/b", "num_train_epochs": 9}
    own |= {"metric_for_best_model": "eval_rewards/margins"}
    words = [word for name, value in (options | own).items() for word in (f"--{name}", value)]
    stage, plain = sft_before_dpo(parse, *words, "--reference_update", "polyak"), TextSFTConfig(use_cpu=True)
    assert {name: getattr(stage, name) for name in options} == options
    assert stage.report_to == []  # none
    assert {name: getattr(stage, name) for name in own} == {name: getattr(plain, name) for name in own}
    # its own flags go before both, wherever they are; arguments of another optimizer are none of its own
    stage = sft_before_dpo(parse, "--sft.optim", "adafactor", "--sft.weight-decay=0.25", "--sft.max_steps", 3, *words)
    assert (stage.optim, stage.optim_args, stage.weight_decay, stage.max_steps) == ("adafactor", None, 0.25, 3)


@pytest.mark.parametrize("asked", [(), ("--select", "last")])
def test_the_sft_stage_is_the_same_whether_or_not_the_reference_moves(parse, asked):
    frozen, moved = (sft_before_dpo(parse, *asked, "--reference_update", update) for update in ("frozen", "polyak"))
    assert same(frozen, moved) and frozen.select == ("last" if asked else "best")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sft.learning_rate", "0"], "--sft.learning_rate 0.0: must be above 0"),
        (["--sft.learning_rate", "x"], "argument --sft.learning_rate"),
        (["--sft.lerning_rate", "1"], "unknown flag --sft.lerning_rate; did you mean sft.learning_rate?"),
        (["--sft.packing"], "--sft.packing is not supported here"),
        (["--sft.hub_model_id", "a"], "--sft.hub_model_id applies to the whole run: pass --hub_model_id"),
        (["--sft_epochs", "1"], "unknown flag --sft_epochs; here it is --sft.num_train_epochs"),
        (["--sft_batch_size", "1"], "unknown flag --sft_batch_size; here it is --sft.per_device_train_batch_size"),
    ],
)
def test_a_stages_flags_are_refused_by_their_names(parse, words, message):
    with pytest.raises(UserError) as refused:
        sft_before_dpo(parse, *words)
    assert str(refused.value).startswith(message)


def test_a_presets_own_data_and_other_recipes_sections(parse, tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        "max_length: 32\ndata:\n  max_train_samples: 7\ndpo:\n  max_length: 64\nreward:\n  no_field: 1\n"
        "sft:\n  max_steps: 5\n  weight_decay: 0.5\n"
    )
    for words, rows in (([], 7), (["--dataset_name", "pairs.jsonl"], None)):
        data, _, dpo, sft = parse(
            (*TEXT, TextDPOConfig), "--config", preset, *words, section="dpo", before=("sft", TextSFTConfig)
        )
        assert (data.max_train_samples, dpo.max_length, dpo.max_steps, sft.max_steps) == (rows, 64, -1, 5)
        assert (sft.max_length, dpo.weight_decay, sft.weight_decay) == (64, 0.0, 0.5)
    preset.write_text("sft:\n  epochs: 5\n")
    with pytest.raises(UserError, match=r"mine.yaml: unknown field sft.epochs; "):
        sft_before_dpo(parse, "--config", preset)
