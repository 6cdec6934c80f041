"""Image classifiers: torchvision's ResNets and a small fast network, as transformers models.

A saved folder holds the weights (safetensors), the architecture, the label names and the preprocessing. After
`import resdpo_trl.image`

    transformers.pipeline("image-classification", model=FOLDER)

takes a PIL image, and `AutoModelForImageClassification.from_pretrained(FOLDER)` gives the model.
"""

from __future__ import annotations

import difflib
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
)
from transformers.modeling_outputs import ImageClassifierOutput

from resdpo_trl.errors import UserError
from resdpo_trl.sources import check_model_folder, first_line

if TYPE_CHECKING:
    from resdpo_trl.image.data import LabelledImages

FAST = "fast"


class ImageClassifierConfig(PreTrainedConfig):
    """Architecture of an `ImageClassifier`.

    Args:
        arch: a torchvision ResNet (`resnet18`, `resnext50_32x4d`, …) or `fast`.
        stem: `cifar` (3×3, stride 1, no max-pool) or `imagenet` (that of torchvision); `fast` has its own.
        head: `linear`, or `dropout` (dropout, linear to half the width, ReLU, dropout, linear).
        dropout: probability of the dropout head.
        widths: channels of the stages of `fast`.
        image_size: height and width of the images.
    """

    model_type = "resdpo_image_classifier"

    arch: str = "resnet18"
    stem: str = "cifar"
    head: str = "linear"
    dropout: float = 0.1
    widths: list[int] = field(default_factory=lambda: [64, 128, 256])
    image_size: int = 32


class ImageClassifier(PreTrainedModel):
    """A network from (B, 3, H, W) normalized images to (B, K) logits."""

    config_class = ImageClassifierConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ImageClassifierConfig):
        super().__init__(config)
        if config.arch == FAST:
            self.network: nn.Module = FastNet(config.widths)
            width = config.widths[-1]
        else:
            self.network, width = _torchvision_resnet(config)
        self.head = _head(config, width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the modules' own initialization as it is."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        logits = self.head(self.network(pixel_values))
        loss = F.cross_entropy(logits.float(), labels) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits)


class FastNet(nn.Module):
    """A small residual network with the techniques of airbench (https://arxiv.org/abs/2404.00498).

    A frozen 2×2 whitening convolution is followed by stages of a convolution, a max-pool and a residual convolution.
    The convolutions start as the identity. The batch norms have no learned scale, and follow recent batches. The
    output is the maximum over all positions, times 1/9 because the head's initial logits would be too large.

    (B, 3, H, W) -> (B, widths[-1])
    """

    def __init__(self, widths: list[int]):
        super().__init__()
        self.whitening = Whitening()
        inputs = [self.whitening.channels, *widths[:-1]]
        self.stages = nn.Sequential(*(_Stage(i, o) for i, o in zip(inputs, widths, strict=True)))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(F.gelu(self.whitening(images)))
        # not amax: its gradient finds the maximum by value; compiled in bfloat16, it finds none (0 / 0)
        return features.flatten(2).max(dim=2).values / 9


class Whitening(nn.Module):
    """A 2×2 convolution onto the principal directions of image patches and their negatives, scaled to unit variance.

    The weights are a buffer: they are fitted once and never trained.
    """

    channels = 24
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(self.channels, 3, 2, 2))

    @torch.no_grad()
    def fit(self, images: Tensor, epsilon: float = 5e-4) -> None:
        """Set the weights from (N, 3, H, W) normalized images; `epsilon` is added to the variance of each direction."""
        patches = F.unfold(images.float(), 2).transpose(1, 2).reshape(-1, 12).double()
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        # gray images vary along four of the twelve directions. A batch norm would multiply the gradient of a constant
        # channel by 300, so the varying directions replace the others
        varying = torch.nonzero(values >= 1e-6 * values[-1]).flatten()
        kept = varying[torch.arange(12) % len(varying)]
        values, vectors = values[kept], vectors[:, kept]
        directions = (vectors / (values + epsilon).sqrt()).T.reshape(12, 3, 2, 2)
        self.weight.copy_(torch.cat([directions, -directions]))

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.weight.to(images.dtype))


class _Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = _identity_convolution(inputs, outputs)
        self.norm1 = _FastNorm(outputs)
        self.conv2 = _identity_convolution(outputs, outputs)
        self.norm2 = _FastNorm(outputs)

    def forward(self, features: Tensor) -> Tensor:
        features = F.gelu(self.norm1(F.max_pool2d(self.conv1(features), 2)))
        return features + F.gelu(self.norm2(self.conv2(features)))


def _identity_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:inputs])
    return convolution


class _FastNorm(nn.BatchNorm2d):
    """A batch norm whose statistics follow recent batches, with a bias and a fixed scale of 1."""

    def __init__(self, channels: int):
        super().__init__(channels, momentum=0.4)
        del self.weight
        self.register_buffer("weight", torch.ones(channels))  # from_pretrained would unfreeze a parameter


def share_statistics(model: nn.Module) -> None:
    """Convert every batch norm in place to SyncBatchNorm, with statistics over the images of all processes.

    It trains on GPUs only. The state dict does not change. `SyncBatchNorm.convert_sync_batchnorm` would make the frozen
    scale of `_FastNorm` a parameter.
    """
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.__class__, norm.process_group = nn.SyncBatchNorm, None  # type: ignore[assignment]


def architectures() -> list[str]:
    """The values of `arch`."""
    return [FAST, *models.list_models(models, include=("*resnet*", "resnext*"))]


def check_architecture(arch: str) -> None:
    """Raise a UserError with the nearest names for an unknown architecture."""
    known = architectures()
    if arch not in known:
        near = difflib.get_close_matches(arch, known, 3, cutoff=0.4)
        raise UserError(
            f"--arch {arch}: unknown; " + (f"did you mean {', '.join(near)}?" if near else f"one of {', '.join(known)}")
        )


def build_classifier(
    config: ImageClassifierConfig, seed: int, images: Tensor | None = None, pretrained_weights: str | None = None
) -> ImageClassifier:
    """A classifier with random weights, or with those of torchvision.

    Args:
        config: its architecture, with label names.
        seed: draws the weights.
        images: (N, 3, H, W) normalized training images, from which `fast` fits its whitening.
        pretrained_weights: a torchvision name (`IMAGENET1K_V2`, `DEFAULT`) or a .safetensors file; layers of another
            shape (a CIFAR stem, the head) keep random weights.

    Raises:
        UserError: the images are too small for `fast`, or the weights are missing or of another architecture.
    """
    least = 2 ** len(config.widths) + 1  # the whitening removes a pixel, and each stage halves the size
    if config.arch == FAST and config.image_size < least:
        raise UserError(
            f"--arch fast: --widths {' '.join(map(str, config.widths))} halve an image {len(config.widths)} times and "
            f"need {least}×{least} pixels or more, and these have {config.image_size}×{config.image_size}: pass "
            f"--image_size {least} or more, or fewer --widths"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImageClassifier(config)
    if config.arch == FAST:
        if pretrained_weights:
            raise UserError("--pretrained_weights: torchvision has none for --arch fast; name a ResNet")
        assert images is not None and isinstance(model.network, FastNet)
        model.network.whitening.fit(images)
    elif pretrained_weights:
        _load_weights(model.network, config.arch, pretrained_weights)
    return model


def load_classifier(name: str, flag: str) -> ImageClassifier:
    """Load a saved classifier from a folder or the Hub."""
    check_model_folder(name, flag)
    try:
        model = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{flag} {name}: can't be loaded ({first_line(error)})") from None
    if not isinstance(model, ImageClassifier):
        raise UserError(f"{flag} {name}: a {type(model).__name__}, not an ImageClassifier as train_cifar.py saves it")
    return model


def load_processor(name: str, flag: str) -> ViTImageProcessor:
    """Load the preprocessing that was saved with a classifier."""
    try:
        return ViTImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {name}: its preprocessor_config.json can't be loaded ({first_line(error)})") from None


def as_numbered_by(model: ImageClassifier, images: LabelledImages, flag: str, name: str) -> LabelledImages:
    """The images with their classes numbered as in a loaded classifier; the data may lack some of them.

    Raises:
        UserError: the classifier lacks a class or takes another image size; the message has `flag` and `name`.
    """
    own = [label for _, label in sorted((model.config.id2label or {}).items())]
    unknown = [label for label in images.label_names if label not in own]
    if unknown:
        raise UserError(
            f"{flag} {name}: the data has a class {unknown[0]}, which is not one of its {len(own)} classes "
            f"({', '.join(own[:10])}{', …' if len(own) > 10 else ''}): pass the data that it was trained on, or "
            "its names as --class_names if the classes are the same"
        )
    size, (height, width) = model.config.image_size, images["test"].pixels.shape[2:]
    if (height, width) != (size, size):
        raise UserError(
            f"{flag} {name}: it takes {size}×{size} images and the data has {width}×{height}: pass --image_size {size}"
        )
    number = torch.tensor([own.index(label) for label in images.label_names])
    splits = {split: replace(rows, labels=number[rows.labels]) for split, rows in images.splits.items()}
    return replace(images, splits=splits, label_names=own)


def image_processor(image_size: int, mean: list[float], std: list[float]) -> ViTImageProcessor:
    """The preprocessing of a PIL image: resize, scale to [0, 1], normalize per channel."""
    return ViTImageProcessor(
        size={"height": image_size, "width": image_size}, image_mean=mean, image_std=std, do_convert_rgb=True
    )


def _torchvision_resnet(config: ImageClassifierConfig) -> tuple[nn.Module, int]:
    """torchvision's network without its last layer, and the width of its features."""
    network = models.get_model(config.arch, weights=None)
    if config.stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    width = network.fc.in_features
    network.fc = nn.Identity()
    return network, width


def _head(config: ImageClassifierConfig, width: int) -> nn.Module:
    classes = int(config.num_labels or 0)
    if config.head == "linear":
        return nn.Linear(width, classes)
    return nn.Sequential(
        nn.Dropout(config.dropout),
        nn.Linear(width, width // 2),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(width // 2, classes),
    )


def _load_weights(network: nn.Module, arch: str, weights: str) -> None:
    """Load the torchvision weights of that name, or those of a .safetensors file, if their shapes fit."""
    known = models.get_model_weights(arch).__members__
    try:
        if weights in known:
            state = known[weights].get_state_dict(check_hash=True, weights_only=True)
        elif weights.endswith(".safetensors"):
            state = load_file(weights)
        else:
            raise UserError(
                f"--pretrained_weights {weights}: {arch} has {', '.join(known)}; or name a .safetensors file"
            )
    except (OSError, SafetensorError) as error:
        raise UserError(f"--pretrained_weights {weights}: can't be loaded ({first_line(error)})") from None
    own = network.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    # torchvision's first weights have no counters of batches, which nothing reads at a fixed momentum
    missing = {name for name in set(own) - set(fitting) if not name.endswith("num_batches_tracked")}
    if missing - {"conv1.weight"}:
        raise UserError(
            f"--pretrained_weights {weights}: not the weights of {arch} ({len(missing)} of {len(own)} tensors are "
            f"missing or of another shape, {sorted(missing)[0]} first)"
        )
    network.load_state_dict(fitting, strict=False)


AutoConfig.register(ImageClassifierConfig.model_type, ImageClassifierConfig)
AutoModelForImageClassification.register(ImageClassifierConfig, ImageClassifier)
