"""Small trainings, the same on any number of processes: what one process gives, `accelerate launch` compares.

accelerate launch --config_file accelerate_configs/multi_cpu.yaml tests/processes_job.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: `tests` is found from the root

from resdpo_trl.image.config import ImageCrossEntropyConfig, ImageDPOConfig
from resdpo_trl.image.data import AugmentConfig, Images
from resdpo_trl.image.model import ImageClassifierConfig, build_classifier, image_processor
from resdpo_trl.image.trainer import ImageCrossEntropyTrainer, ImageDPOTrainer
from resdpo_trl.text.config import TextDPOConfig, TextRewardConfig, TextSFTConfig
from resdpo_trl.text.reward import TextRewardTrainer, reward_rows
from resdpo_trl.text.tokens import sft_rows
from resdpo_trl.text.trainer import TextDPOTrainer, TextSFTTrainer
from resdpo_trl.training.processes import parallelism
from tests.conftest import random_pairs, tiny_model, train_tokenizer

GLOBAL_BATCH = 8
HELD_OUT = 9
ROWS = 41  # an epoch's last batch has one row: the second process has none of its own


def shared(folder: Path, **options):
    """Options of every training; what is printed is the loss of each step."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": GLOBAL_BATCH // PartialState().num_processes,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "disable_tqdm": True,
    } | options


def language_model():
    return tiny_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def reward_model():
    """The language model's configuration under a head of one number, its weights drawn by one seed."""
    config = language_model().config
    config.num_labels = 1
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def pairs(count: int, seed: int) -> Dataset:
    rows = random_pairs(count, seed)
    return Dataset.from_list([row | {"length": sum(map(len, row.values()))} for row in rows])


def classifier(norms: bool = False) -> nn.Module:
    """Without batch norms unless asked: where there is no GPU they see each process's own images."""
    names = {number: str(number) for number in range(10)}
    config = ImageClassifierConfig(arch="fast", widths=[24, 24, 24], image_size=16, id2label=names)
    model = build_classifier(config, 0, images().pixels / 255.0 - 0.5)
    for stage in () if norms else model.network.stages:
        stage.norm1, stage.norm2 = nn.Identity(), nn.Identity()
    return model


def images(count: int = ROWS, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.randint(0, 10, (count,), generator=generator))


def figures_of(trainer) -> dict:
    """Every figure that the trainer logs, and the weights that it leaves."""
    trainer.train()
    left_out = ("runtime", "per_second", "flos", "padding", "num_tokens", "step", "preparation")
    logged = [
        {name: value for name, value in entry.items() if not any(word in name for word in left_out)}
        for entry in trainer.state.log_history
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {
        "steps": trainer.state.global_step,
        "logged": logged,
        "weights": sum(float(value.double().abs().sum()) for value in model.state_dict().values()),
        **parallelism(trainer.model_wrapped),
    }
    if getattr(trainer, "ref_model", None) is not None:
        reference = trainer.accelerator.unwrap_model(trainer.ref_model).state_dict()
        found["reference"] = sum(float(value.double().abs().sum()) for value in reference.values())
    return found


TRAININGS = (
    "sft", "dpo", "dpo, read from the cache", "dpo, accumulated", "dpo, polyak", "reward", "cross-entropy",
    "images, all", "images, random",
)  # fmt: skip


def run(folder: Path) -> dict:
    """What each of `TRAININGS` gives on this process, and two more that differ with the processes."""
    PartialState(cpu=True)
    return text(folder) | of_images(folder) | {"best epoch": best_epoch(folder)}


class OwnFigures(ImageCrossEntropyTrainer):
    """The main process sees the validation figures with the other sign, so that its best epoch is the first one, where
    that of the others is the last: as rounding may turn two like figures round."""

    def figures(self, rows: Images, description: str) -> dict[str, float]:
        figures = super().figures(rows, description)
        return {name: -value for name, value in figures.items()} if self.is_world_process_zero() else figures


def best_epoch(folder: Path) -> dict:
    """A training whose best epoch is not the last one, and on which the processes do not agree.

    Returns:
        This process's losses, the step that this process takes for the best, and whether it ends with its weights.
    """
    options = {"save_strategy": "epoch", "load_best_model_at_end": True, "learning_rate": 1e-2}
    options |= {"metric_for_best_model": "loss", "greater_is_better": False}
    trainer = OwnFigures(
        classifier(),
        ImageCrossEntropyConfig(**shared(folder / "best", **options), dataloader_drop_last=False),
        train=images(),
        validation=images(HELD_OUT, 1),
        processor=image_processor(16, [0.5] * 3, [0.5] * 3),
        augment=AugmentConfig(),
    )
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    saved = load_file(best / "model.safetensors")
    model = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return {
        "losses": {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row},
        "best": best.name,
        "recorded": json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"],
        "kept": all(torch.equal(value, saved[name]) for name, value in model.items()),
    }


def text(folder: Path) -> dict:
    tokenizer = train_tokenizer(["a"], 300)
    train, validation = pairs(ROWS, 0), pairs(HELD_OUT, 1)
    sft = TextSFTTrainer(
        model=language_model(),
        args=TextSFTConfig(**shared(folder / "sft", eval_on_start=True), max_length=128),
        train_dataset=sft_rows(train, True),
        eval_dataset=sft_rows(validation, True),
        processing_class=tokenizer,
    )
    found = {"sft": figures_of(sft)}
    cache = {"reference_cache_dir": str(folder / "cache")}
    short = {"reference_cache_dir": "none", "num_train_epochs": 1}
    rows = 4 // PartialState().num_processes
    for name, options in {
        "dpo": cache,
        "dpo, read from the cache": short | cache,
        "dpo, accumulated": short | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": rows},
        "dpo, polyak": short | {"reference_update": "polyak", "polyak_tau": 0.1, "prefix_sharing": False},
    }.items():
        trainer = TextDPOTrainer(
            model=language_model(),
            ref_model=language_model() if "polyak" in name else None,
            args=TextDPOConfig(**shared(folder / "dpo", **options), max_length=128),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
        )
        found[name] = figures_of(trainer) | {"read": trainer.reference_pairs_read}
    reward = TextRewardTrainer(
        model=reward_model(),
        args=TextRewardConfig(**shared(folder / "reward"), max_length=128, center_rewards_coefficient=0.1),
        train_dataset=reward_rows(train),
        eval_dataset=reward_rows(validation),
        processing_class=tokenizer,
    )
    return found | {"reward": figures_of(reward)}


def of_images(folder: Path) -> dict:
    options = {"processor": image_processor(16, [0.5] * 3, [0.5] * 3), "augment": AugmentConfig()}
    options |= {"train": images(), "validation": images(HELD_OUT, 1)}
    arguments = shared(folder, dataloader_drop_last=False, learning_rate=1e-2, num_train_epochs=2)
    trainer = ImageCrossEntropyTrainer(classifier(), ImageCrossEntropyConfig(**arguments), **options)
    found = {"cross-entropy": figures_of(trainer)}
    for sampling in ("all", "random"):
        args = ImageDPOConfig(**arguments, rejected_sampling=sampling, reference_update="copy")
        found[f"images, {sampling}"] = figures_of(ImageDPOTrainer(classifier(), classifier(), args, **options))
    arguments["dataloader_drop_last"] = True  # a batch norm can do nothing with one image
    args = ImageDPOConfig(**arguments, reference_update="polyak", polyak_tau=0.1)
    trainer = ImageDPOTrainer(classifier(norms=True), classifier(norms=True), args, **options)
    found["images, batch norms"] = figures_of(trainer)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    every = run(folder)
    (folder / f"process{PartialState().process_index}.json").write_text(json.dumps(every))
