import torch
from torchvision.transforms.v2 import functional

from resdpo_trl.image.data import Augmentation, AugmentConfig
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
    config = AugmentConfig(crop_padding=2)
    first, second = (Augmentation(config, len(IMAGES), seed=3) for _ in range(2))
    together = first(IMAGES, torch.arange(40))
    alone = torch.cat([second(IMAGES[n : n + 1], torch.tensor([n])) for n in range(40)])
    assert torch.equal(together, alone)
    first.set_epoch(1)
    assert not torch.equal(first(IMAGES, torch.arange(40)), together)
    first.set_epoch(0)
    assert torch.equal(first(IMAGES, torch.arange(40)), together)


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
