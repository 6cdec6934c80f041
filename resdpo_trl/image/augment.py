"""Augmentation of whole batches, with random numbers drawn once an epoch for every image.

torchvision's own random transforms draw once a call: every image of a batch would be cropped alike. Here each image
has its own crop and flip, a function of (seed, epoch, image) alone, so that the batch it lands in, the number of
workers and the number of processes change nothing. The pixel work is torchvision.transforms.v2's.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional

from resdpo_trl.errors import UserError


@dataclass
class AugmentConfig:
    """What happens to a training image before the network sees it."""

    _argument_group_name = "augmentation"

    crop_padding: int = field(
        default=2, metadata={"help": "Random crop after reflecting this many pixels on each side; 0 for none."}
    )
    flip: bool = field(
        default=True,
        metadata={
            "help": "Flip left and right: each image at random in the first epoch, then by turns "
            "(https://arxiv.org/abs/2404.00498)."
        },
    )
    affine_degrees: float = field(default=0.0, metadata={"help": "Rotate by up to this many degrees; 0 for none."})
    color_jitter: float = field(
        default=0.0, metadata={"help": "Change brightness, contrast and saturation by up to this share; 0 for none."}
    )

    def __post_init__(self) -> None:
        if self.crop_padding < 0 or self.affine_degrees < 0 or not 0 <= self.color_jitter < 1:
            raise UserError("--crop_padding and --affine_degrees must be at least 0, --color_jitter in [0, 1)")


class Augmentation:
    """Augments (B, 3, H, W) uint8 images of a data set of `count` images.

    Args:
        config: what to do.
        count: images in the data set.
        seed: with the epoch and an image's number it determines what happens to the image.
        device: where the images will be; the numbers wait there, so that no step waits for a copy.
    """

    def __init__(self, config: AugmentConfig, count: int, seed: int, device: torch.device | str = "cpu"):
        self.config, self.count, self.seed, self.device = config, count, seed, device
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw every image's numbers of this epoch."""
        padding = self.config.crop_padding
        first = torch.Generator().manual_seed(self.seed)
        flips = torch.rand(self.count, generator=first) < 0.5
        generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch, "augment"))
        shift = torch.randint(0, 2 * padding + 1, (self.count, 2), generator=generator)
        angle = (torch.rand(self.count, generator=generator) * 2 - 1) * math.radians(self.config.affine_degrees)
        jitter = 1 + (torch.rand(3, self.count, generator=generator) * 2 - 1) * self.config.color_jitter
        self._shift, self._flip = shift.to(self.device), (flips ^ bool(epoch % 2)).to(self.device)
        self._angle, self._jitter = angle.to(self.device), jitter.to(self.device)

    def __call__(self, pixels: Tensor, index: Tensor) -> Tensor:
        """Augment `pixels`, the images numbered `index` (B,); uint8, or float where rotated or jittered."""
        pixels = self._crop_and_flip(pixels, index)
        if self.config.affine_degrees or self.config.color_jitter:
            pixels = pixels.float()
        if self.config.affine_degrees:
            pixels = rotate(pixels, self._angle[index])
        if self.config.color_jitter:
            pixels = jitter(pixels, *self._jitter[:, index])
        return pixels

    def _crop_and_flip(self, pixels: Tensor, index: Tensor) -> Tensor:
        padding, flips = self.config.crop_padding, self.config.flip
        if not padding and not flips:
            return pixels
        height, width = pixels.shape[2:]
        if padding:
            pixels = functional.pad(pixels, [padding], padding_mode="reflect")
        # where a pixel comes from: (B, H) rows and (B, W) columns
        rows = torch.arange(height, device=self.device) + self._shift[index, 0, None]
        columns = torch.arange(width, device=self.device) + self._shift[index, 1, None]
        if flips:
            columns = torch.where(self._flip[index, None], columns.flip(1), columns)
        batch = torch.arange(len(pixels), device=self.device)[:, None, None]
        taken = pixels.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3), one gather
        return taken.permute(0, 3, 1, 2)


def hash_seed(seed: int, epoch: int, purpose: str) -> int:
    """A seed of its own for each purpose in each epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch} {purpose}".encode(), digest_size=7).digest(), "little")


def rotate(pixels: Tensor, angles: Tensor) -> Tensor:
    """Rotate (B, 3, H, W) float images counter-clockwise by (B,) radians; the border is reflected."""
    cosine, sine = angles.cos(), angles.sin()
    zero = torch.zeros_like(angles)
    matrices = torch.stack([torch.stack([cosine, -sine, zero], 1), torch.stack([sine, cosine, zero], 1)], 1)
    grid = F.affine_grid(matrices, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def jitter(pixels: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Scale brightness, contrast and saturation of (B, 3, H, W) float images in [0, 255] by (B,) factors each.

    As torchvision's adjust_brightness, adjust_contrast and adjust_saturation, in this order, with a factor an image.
    """

    def blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
        return (factor[:, None, None, None] * images + (1 - factor)[:, None, None, None] * other).clamp(0, 255)

    pixels = blend(pixels, 0.0, brightness)
    pixels = blend(pixels, functional.rgb_to_grayscale(pixels).mean(dim=(1, 2, 3), keepdim=True), contrast)
    return blend(pixels, functional.rgb_to_grayscale(pixels), saturation)
