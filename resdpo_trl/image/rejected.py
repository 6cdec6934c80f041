"""Rejected classes for labelled images: what makes a preference pair of a label.

The true class is chosen. A rejected class is

    random    any of the K classes; where it is the true one the pair carries no signal and is masked
    uniform   any of the K−1 wrong classes alike
    hard      a wrong class drawn with the reference's probabilities, renormalized over the wrong classes
    all       every wrong class at once: the exact expectation of `uniform`, with nothing drawn
"""

from __future__ import annotations

import torch
from torch import Tensor

from resdpo_trl.image.augment import hash_seed
from resdpo_trl.metrics import wrong_classes

SAMPLING = ("random", "uniform", "hard", "all")


class RejectedClasses:
    """Draws rejected classes: a function of (seed, epoch, image), and of the reference for `hard`.

    Args:
        sampling: one of `SAMPLING`.
        labels: (N,) true classes of the training images.
        classes: K.
        seed: with the epoch and an image's number it determines the draw.
    """

    def __init__(self, sampling: str, labels: Tensor, classes: int, seed: int):
        self.sampling, self.labels, self.classes, self.seed = sampling, labels, classes, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch, "rejected"))
        self._uniform = torch.rand(len(self.labels), generator=generator).to(self.labels.device)

    def __call__(self, index: Tensor, ref_logps: Tensor) -> Tensor:
        """(B, T) rejected classes of the images numbered `index` (B,), given `ref_logps` (B, K) under the reference.

        T is K−1 for `all` and 1 otherwise.
        """
        labels, draw = self.labels[index], self._uniform[index]
        wrong = wrong_classes(labels, self.classes)
        if self.sampling == "all":
            return wrong
        if self.sampling == "random":
            return (draw * self.classes).long().clamp(max=self.classes - 1)[:, None]
        if self.sampling == "uniform":
            place = (draw * (self.classes - 1)).long()
        else:  # hard: the inverse of the cumulative distribution at the image's own draw
            place = (ref_logps.gather(1, wrong).softmax(1).cumsum(1) <= draw[:, None]).sum(1)
        return wrong.gather(1, place.clamp(max=self.classes - 2)[:, None])
