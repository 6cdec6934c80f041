import math

import pytest
import torch
from torchvision.transforms.v2 import functional

from resdpo_trl.image.data import Augmentation, AugmentConfig, jitter, rotate
from tests.image.conftest import draw

IMAGES = draw(40).pixels


def test_every_image_is_the_crop_and_flip_that_was_drawn_for_it():
    augmentation = Augmentation(AugmentConfig(crop_padding=3), len(IMAGES), seed=1)
    index = torch.randperm(len(IMAGES))[:25]
    out = augmentation(IMAGES[index], index)
    padded = functional.pad(IMAGES, [3], padding_mode="reflect")
    seen = set()
    for place, number in enumerate(index.tolist()):
        y, x = augmentation._shift[number].tolist()
        expected = functional.crop(padded[number], y, x, 16, 16)
        if augmentation._flip[number]:
            expected = functional.horizontal_flip(expected)
        assert torch.equal(out[place], expected)
        seen.add((y, x, bool(augmentation._flip[number])))
    assert len(seen) > 15  # per image, not per batch


def test_the_same_image_whatever_its_batch_and_another_in_each_epoch():
    config = AugmentConfig(crop_padding=2, affine_degrees=10, color_jitter=0.1)
    first, second = (Augmentation(config, len(IMAGES), seed=3) for _ in range(2))
    together = first(IMAGES, torch.arange(40))
    alone = torch.cat([second(IMAGES[n : n + 1], torch.tensor([n])) for n in range(40)])
    torch.testing.assert_close(together, alone)
    first.set_epoch(1)
    assert not torch.allclose(first(IMAGES, torch.arange(40)), together)
    first.set_epoch(0)
    torch.testing.assert_close(first(IMAGES, torch.arange(40)), together)


def test_flips_alternate():
    augmentation = Augmentation(AugmentConfig(crop_padding=0), len(IMAGES), seed=3)
    flipped = []
    for epoch in range(3):
        augmentation.set_epoch(epoch)
        out = augmentation(IMAGES, torch.arange(40))
        flipped.append(torch.tensor([not torch.equal(a, b) for a, b in zip(out, IMAGES, strict=True)]))
    assert 8 < flipped[0].sum() < 32
    assert torch.equal(flipped[1], ~flipped[0])
    assert torch.equal(flipped[2], flipped[0])


def test_nothing_asked_is_nothing_done():
    augmentation = Augmentation(AugmentConfig(crop_padding=0, flip=False), len(IMAGES), seed=0)
    assert torch.equal(augmentation(IMAGES, torch.arange(40)), IMAGES)


@pytest.mark.parametrize("degrees", [0.0, 7.0, -90.0])
def test_rotation_is_torchvisions_inside_the_image(degrees):
    pixels = functional.gaussian_blur(IMAGES[:3].float(), [5, 5])
    ours = rotate(pixels, torch.full((3,), math.radians(degrees)))
    theirs = functional.rotate(pixels, degrees, interpolation=functional.InterpolationMode.BILINEAR)
    torch.testing.assert_close(ours[..., 5:11, 5:11], theirs[..., 5:11, 5:11], atol=0.5, rtol=0)


def test_jitter_is_torchvisions_one_factor_an_image():
    factors = torch.tensor([[0.9, 1.1, 1.0], [1.05, 0.8, 1.2], [1.1, 0.9, 1.3]])
    ours = jitter(IMAGES[:3].float(), *factors)
    for number, image in enumerate(IMAGES[:3].float() / 255):
        expected = functional.adjust_brightness(image, factors[0, number].item())
        expected = functional.adjust_contrast(expected, factors[1, number].item())
        expected = functional.adjust_saturation(expected, factors[2, number].item())
        torch.testing.assert_close(ours[number], expected * 255, atol=0.05, rtol=0)
