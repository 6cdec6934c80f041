"""The recipes of a first stage take the presets of the whole: what these say of that stage is their training."""

import importlib
from pathlib import Path

import pytest

from resdpo_trl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"


def parsed(monkeypatch, recipe, kinds, arguments):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    module = importlib.import_module(recipe)
    parser = importlib.import_module("command_line").RecipeParser(kinds)
    renamed = module.OF_SFT if recipe == "sft_hh" else module.OF_REFERENCE
    found, _ = parser.parse(given=arguments, not_from_presets=module.OF_DPO, renamed_in_presets=renamed)
    return found


def without_the_folder(arguments):
    return {name: value for name, value in arguments.to_dict().items() if name not in ("output_dir", "run_name")}


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("hh/*.yaml")), ids=lambda path: path.stem)
def test_sft_is_the_first_stage_of_a_text_preset(preset, monkeypatch):
    from resdpo_trl.text.config import (
        SamplesConfig,
        SFTStageConfig,
        TextDPOConfig,
        TextModelConfig,
        TextSFTConfig,
        sft_stage,
    )
    from resdpo_trl.text.data import TextDataConfig
    from resdpo_trl.training.arguments import RunConfig

    shared = (TextDataConfig, TextModelConfig)
    arguments = ["--config", str(preset)]
    of_sft = (*shared, TextSFTConfig, SamplesConfig, RunConfig)
    if "sft_epochs: 0\n" in preset.read_text():
        with pytest.raises(UserError, match=r"--num_train_epochs 0\.0: must be above 0"):
            parsed(monkeypatch, "sft_hh", of_sft, arguments)
        return
    *_, alone, _, _ = parsed(monkeypatch, "sft_hh", of_sft, arguments)
    command_line = importlib.import_module("command_line")
    (_, _, stage, dpo, *_), _ = command_line.RecipeParser(
        (*shared, SFTStageConfig, TextDPOConfig, SamplesConfig, RunConfig)
    ).parse(given=arguments)
    assert set(importlib.import_module("sft_hh").OF_SFT) == set(vars(stage)) - {"reference"}
    assert alone.learning_rate == stage.sft_learning_rate and alone.num_train_epochs == stage.sft_epochs
    assert without_the_folder(alone) == without_the_folder(sft_stage(dpo, stage))


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("cifar/*.yaml")), ids=lambda path: path.stem)
def test_cross_entropy_is_the_first_stage_of_an_image_preset(preset, monkeypatch):
    from resdpo_trl.image.config import (
        ImageCrossEntropyConfig,
        ImageDPOConfig,
        ImageModelConfig,
        ReferenceStageConfig,
        reference_stage,
    )
    from resdpo_trl.image.data import AugmentConfig, ImageDataConfig
    from resdpo_trl.training.arguments import RunConfig

    shared = (ImageDataConfig, ImageModelConfig, AugmentConfig)
    arguments = ["--config", str(preset)]
    *_, alone, _ = parsed(monkeypatch, "train_cifar", (*shared, ImageCrossEntropyConfig, RunConfig), arguments)
    command_line = importlib.import_module("command_line")
    (_, _, _, stage, dpo, _), _ = command_line.RecipeParser(
        (*shared, ReferenceStageConfig, ImageDPOConfig, RunConfig)
    ).parse(given=arguments)
    assert set(importlib.import_module("train_cifar").OF_REFERENCE) == set(vars(stage)) - {"reference"}
    assert alone.learning_rate == stage.reference_learning_rate and alone.num_train_epochs == stage.reference_epochs
    assert without_the_folder(alone) == without_the_folder(reference_stage(dpo, stage))
