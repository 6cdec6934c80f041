"""Values that make no sense are refused in one line that names the flag, before anything is loaded."""

import math

import pytest

from resdpo_trl.errors import UserError
from resdpo_trl.image.config import ImageCrossEntropyConfig, ImageDPOConfig
from resdpo_trl.text.config import TextDPOConfig, TextRewardConfig, TextSFTConfig

ABOVE_ZERO = (0.0, -1.0, math.nan, math.inf)


@pytest.mark.parametrize("value", ABOVE_ZERO)
@pytest.mark.parametrize(
    ("config", "name"),
    [
        *(
            (config, name)
            for config in (TextDPOConfig, ImageCrossEntropyConfig)
            for name in ("learning_rate", "num_train_epochs")
        ),
        (TextSFTConfig, "learning_rate"),
    ],
)
def test_rates_and_epochs_are_above_zero(config, name, value):
    with pytest.raises(UserError, match=f"^--{name} {value}: must be above 0"):
        config(**{name: value})


@pytest.mark.parametrize(
    "config", [TextDPOConfig, TextSFTConfig, TextRewardConfig, ImageDPOConfig, ImageCrossEntropyConfig]
)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("per_device_train_batch_size", 0, "must be at least 1"),
        ("per_device_eval_batch_size", 0, "must be at least 1"),
        ("gradient_accumulation_steps", 0, "must be at least 1"),
        ("seed", -1, "must be between 0 and 4294967295"),
        ("seed", 2**32, "must be between 0 and 4294967295"),
    ],
)
def test_counts_and_seeds(config, name, value, message):
    with pytest.raises(UserError, match=f"^--{name} {value}: {message}"):
        config(**{name: value})


@pytest.mark.parametrize("config", [TextDPOConfig, ImageCrossEntropyConfig])
@pytest.mark.parametrize("folder", ["", None])
def test_a_run_needs_a_folder(config, folder):
    with pytest.raises(UserError, match=r"^--output_dir: pass a folder"):
        config(output_dir=folder)


@pytest.mark.parametrize("config", [TextDPOConfig, ImageDPOConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": math.inf}, "--beta inf: must be above 0"),
        ({"beta": math.nan}, "--beta nan: must be above 0"),
        ({"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0, math.nan]}, "^--loss_weights must be finite"),
        ({"discopop_tau": 0.0}, "^--discopop_tau must be a finite number above 0"),
        ({"loss_type": ["hinge"], "label_smoothing": 0.1}, r"^--label_smoothing 0\.1 .* not to hinge"),
    ],
)
def test_losses(config, options, message):
    with pytest.raises(UserError, match=message):
        config(use_cpu=True, **options)
    config(use_cpu=True, loss_type=["exo_pair"], label_smoothing=1e-3)


def test_steps_go_before_epochs():
    assert ImageCrossEntropyConfig(use_cpu=True, max_steps=5, num_train_epochs=0).max_steps == 5
    assert TextSFTConfig(use_cpu=True, num_train_epochs=0).is_skipped  # the model as it is
    assert not TextSFTConfig(use_cpu=True, num_train_epochs=0, max_steps=5).is_skipped
    with pytest.raises(UserError, match="--num_train_epochs nan"):
        TextSFTConfig(num_train_epochs=math.nan)


def test_padding_is_refused_where_it_is_asked_for():
    assert TextDPOConfig(use_cpu=True).pad_to_multiple_of is None
    with pytest.raises(UserError, match="--pad_to_multiple_of is not supported here"):
        TextDPOConfig(use_cpu=True, pad_to_multiple_of=8)
