"""What an image classifier is made of, as a configuration of transformers'. The weights' part stands in `.model`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

FAST = "fast"


class ImageClassifierConfig(PreTrainedConfig):
    """Architecture of an `ImageClassifier`.

    Args:
        arch: a ResNet of torchvision's (`resnet18`, `resnext50_32x4d`, …) or `fast`.
        stem: `cifar` (3×3, stride 1, no max-pool) or `imagenet` (torchvision's own); `fast` has its own.
        head: `linear`, or `dropout` (dropout, linear to half the width, ReLU, dropout, linear).
        dropout: probability of the dropout head.
        widths: channels of the stages of `fast`.
        image_size: height and width of the images it was made for.
    """

    model_type = "resdpo_image_classifier"

    def __init__(
        self,
        arch: str = "resnet18",
        stem: str = "cifar",
        head: str = "linear",
        dropout: float = 0.1,
        widths: list[int] | tuple[int, ...] = (64, 128, 256),
        image_size: int = 32,
        **kwargs: Any,
    ):
        self.arch = arch
        self.stem = stem
        self.head = head
        self.dropout = dropout
        self.widths = list(widths)
        self.image_size = image_size
        super().__init__(**kwargs)


# `import resdpo_trl` sees to it that this runs before AutoConfig is used
AutoConfig.register(ImageClassifierConfig.model_type, ImageClassifierConfig)
