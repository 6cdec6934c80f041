"""Images in memory: from a Hub id, a folder or a package to uint8 tensors in three splits, and their augmentation.

Every image is decoded once, before training, into one (N, 3, H, W) uint8 tensor per split. Decoding gives the pixels
that `datasets` gives, rotated according to the EXIF tag. A class is a label that at least one image has. Its number is
its position among the class names, which the saved model carries.

`Augmentation` transforms whole batches. torchvision's random transforms draw once per call, so that every image of a
batch is cropped alike. Here each image has its own crop and flip, a function of (seed, epoch, image) alone: they do not
depend on its batch, the number of workers or the number of processes. torchvision.transforms.v2 moves the pixels.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional

from resdpo_trl.errors import UserError
from resdpo_trl.sources import (
    SPLITS,
    DatasetConfig,
    check_not_empty,
    choose_splits,
    first_line,
    held_out_first,
    held_out_size,
    load_rows,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

QUICKSTART = "digits"
TORCHVISION_FOLDER = "cifar-10-batches-py"
DECODED_TOGETHER = 256  # images that one thread decodes at a time
LARGEST_IMAGE = 64_000_000  # pixels; 192 MB decoded
# what Pillow may take a file for: some of its readers run other programs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass
class ImageDataConfig(DatasetConfig):
    """Which labelled images to use, and how many."""

    _argument_group_name = "data"

    dataset_name: str = field(
        default=QUICKSTART,
        metadata={
            "help": "Labelled images: a Hub id (uoft-cs/cifar10), a folder of parquet files or of one folder of images "
            "a class, torchvision's CIFAR-10 folder, or 'digits', the quickstart's, which need no network."
        },
    )
    validation_fraction: float = field(
        default=0.02, metadata={"help": "Share held out from the training images where the data has no such split."}
    )
    test_fraction: float = field(
        default=0.2, metadata={"help": "Share held out for the test where the data has no such split."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of images; by default the only one."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column of labels; by default the only one with class names, or 'label'."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes 0, 1, …, where the data has none."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Resize every image to this height and width (pixels)."}
    )
    convert_rgb: bool = field(
        default=False, metadata={"help": "Turn greyscale, palette and other images into RGB instead of refusing them."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image_size {self.image_size}: must be at least 1")


@dataclass
class Images:
    """Labelled images: `pixels` (N, 3, H, W) uint8, `labels` (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def digests(self) -> list[str]:
        """(N,) a digest of each image's pixels, whatever its label."""
        return [hashlib.blake2b(row.data, digest_size=8).hexdigest() for row in self.pixels.flatten(1).numpy()]

    def fingerprint(self) -> str:
        """A digest of the content, the same however it was loaded."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        digest.update(np.ascontiguousarray(self.pixels.numpy()).data)
        return digest.hexdigest()


@dataclass
class LabelledImages:
    """Three splits, the names of the classes, and counts for summary.json."""

    splits: dict[str, Images]
    label_names: list[str]
    counts: dict[str, Any]

    def __getitem__(self, split: str) -> Images:
        return self.splits[split]


def load_images(config: ImageDataConfig, held_out: bool = False) -> LabelledImages:
    """Load, decode and split labelled images.

    The data's own validation and test splits are used where it has them; the rest is held out from its training
    images by a fixed permutation, so that no seed changes what the test is. Where a limit leaves images out, a fixed
    permutation chooses too, and a smaller limit's images are among a larger one's.

    Args:
        config: what to load.
        held_out: only a test split is wanted: the data's own, or all of a data set that has one split.

    Raises:
        UserError: missing columns, fewer than two classes, a label outside them, an image that does not decode or fit.
    """
    sources, names, notes = _sources(config, held_out)
    if len(names) < 2:
        raise UserError(
            f"--dataset_name {config.dataset_name}: {len(names)} class ({', '.join(names)}); a classifier needs at "
            "least two"
        )
    limits = {"test": config.max_test_samples, "validation": config.max_eval_samples}
    counts = {"source": config.dataset_name, **notes, "classes": len(names), "class_names": names}
    if held_out and (len(sources) == 1 or "test" in sources):
        images = sources["test"] if "test" in sources else next(iter(sources.values()))
        place = _limited(np.arange(len(images)), limits["test"])
        test = images if len(place) == len(images) else images[torch.from_numpy(place)]
        counts |= {"image_size": list(test.pixels.shape[2:]), "test": len(test)}
        return LabelledImages({"test": test}, names, counts)
    shares = {"test": config.test_fraction, "validation": config.validation_fraction}
    images = sources["train"]
    digests = {split: np.array(rows.digests()) for split, rows in sources.items()}
    drawn = np.random.default_rng(0).permutation(len(images))
    # the same, with an image's copies behind it: they go into one split
    _, first, copy_of = np.unique(digests["train"][drawn], return_index=True, return_inverse=True)
    order = drawn[np.argsort(first[copy_of], kind="stable")]
    places: dict[str, np.ndarray] = {}  # of each split's images in its source
    taken = 0
    for split in ("test", "validation"):
        if split in sources:
            places[split] = np.arange(len(sources[split]))
            continue
        wanted = held_out_size(len(images), shares[split], limits[split])
        places[split] = order[taken : taken + wanted]
        taken += wanted
    places["train"] = drawn[~np.isin(drawn, order[:taken])]
    found = {split: digests.get(split, digests["train"])[places[split]] for split in SPLITS}
    kept, copies = held_out_first({split: rows.tolist() for split, rows in found.items()})
    splits: dict[str, Images] = {}
    for split in SPLITS:
        place = places[split][kept[split]]
        place = place[: config.max_train_samples] if split == "train" else _limited(place, limits[split])
        source = sources.get(split, images)
        whole = len(place) == len(source) and split != "train"
        splits[split] = source if whole else source[torch.from_numpy(place)]
    counts |= {"copies_removed": copies, "image_size": list(images.pixels.shape[2:])}
    counts |= {split: len(splits[split]) for split in SPLITS}
    check_not_empty(counts)
    trained = splits["train"].labels.unique().tolist()
    counts["classes_without_training_images"] = [name for at, name in enumerate(names) if at not in trained]
    counts["cut_by_limits"] = sum(map(len, sources.values())) - sum(map(len, splits.values())) - sum(copies.values())
    counts["held_out_raised"] = [
        split
        for split, share in shares.items()
        if split not in sources and len(places[split]) > max(1, round(share * len(images)))
    ]
    return LabelledImages(splits, names, counts)


def _limited(place: np.ndarray, limit: int | None) -> np.ndarray:
    """As many of the places as the limit allows; the first ones would not do, for a folder's images come a class at a
    time."""
    if limit is None or limit >= len(place):
        return place
    return np.sort(np.random.default_rng(0).permutation(place)[:limit])


def _joined(parts: list[Images]) -> Images:
    """All the parts' images; a single part is not copied."""
    if len(parts) == 1:
        return parts[0]
    return Images(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))


def _sources(config: ImageDataConfig, held_out: bool) -> tuple[dict[str, Images], list[str], dict[str, Any]]:
    """Decoded images of the data's own splits by `SPLITS`, the names of the classes, and what was left out."""
    notes: dict[str, Any] = {"splits_left_out": [], "classes_without_images": []}
    if config.dataset_name == QUICKSTART:
        _refuse_column_flags(config)
        return {"train": _digits(config)}, [str(digit) for digit in range(10)], notes
    folder = Path(config.dataset_name)
    if folder.name == TORCHVISION_FOLDER or (folder / TORCHVISION_FOLDER).is_dir():
        _refuse_column_flags(config)
        sources, names = _torchvision_cifar10(folder.parent if folder.name == TORCHVISION_FOLDER else folder, config)
        return sources, names, notes
    rows = load_rows(config.dataset_name, config.dataset_data_dir, config.dataset_revision, QUICKSTART)
    used, notes["splits_left_out"] = choose_splits(rows, config, held_out)
    rows = {name: rows[name] for own in used.values() for name in own}
    image_column, label_column = _columns(next(iter(rows.values())), config)
    for name, part in rows.items():
        if {image_column, label_column} - set(part.column_names):
            raise UserError(
                f"--dataset_name {config.dataset_name}: split {name} lacks {image_column} or {label_column}"
            )
    names, notes["classes_without_images"], labels = _labels(rows, label_column, config)
    parts: dict[str, Images] = {}
    for name, part in rows.items():
        parts[name] = Images(_decode(part, image_column, name, config), labels[name])
        if parts[name].pixels.shape[2:] != next(iter(parts.values())).pixels.shape[2:]:
            raise UserError(f"--dataset_name {config.dataset_name}: splits of different sizes: pass --image_size 32")
    return {split: _joined([parts.pop(name) for name in own]) for split, own in used.items()}, names, notes


def _refuse_column_flags(config: ImageDataConfig) -> None:
    """Raise a UserError for a flag that is of no use to images whose columns and classes are known."""
    for flag in (
        "dataset_data_dir", "dataset_revision", "dataset_train_split", "dataset_validation_split",
        "dataset_test_split", "image_column", "label_column", "class_names",
    ):  # fmt: skip
        if getattr(config, flag) is not None:
            raise UserError(
                f"--{flag} is of no use with --dataset_name {config.dataset_name}, whose columns and classes are "
                "known: drop it"
            )


def _digits(config: ImageDataConfig) -> Images:
    """scikit-learn's handwritten digits, 8×8 grey levels of 0 to 16, as RGB of --image_size, or 32×32."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "--dataset_name digits needs the package scikit-learn: pip install scikit-learn, or name images of your own"
        ) from None
    bunch, size = load_digits(), config.image_size or 32
    grey = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    pixels = functional.resize(grey, [size, size]).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    return Images(pixels.contiguous(), torch.from_numpy(bunch.target).long())


def _torchvision_cifar10(root: Path, config: ImageDataConfig) -> tuple[dict[str, Images], list[str]]:
    """torchvision's CIFAR-10, whose files are unpickled only where their checksums are the published ones."""
    from PIL import Image
    from torchvision.datasets import CIFAR10

    sources, size = {}, config.image_size or 32
    for split in ("train", "test"):
        try:
            data = CIFAR10(str(root), train=split == "train", download=False)
        except RuntimeError:
            raise UserError(
                f"--dataset_name {root}: {TORCHVISION_FOLDER} lacks files or holds others than the published ones (by "
                "their checksums), and pickles of unknown origin are not read: unpack cifar-10-python.tar.gz anew"
            ) from None
        rows = data.data
        if size != 32:
            rows = np.stack([np.asarray(_resized(Image.fromarray(row), size)) for row in rows])
        pixels = torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous()
        sources[split] = Images(pixels, torch.tensor(data.targets))
    return sources, list(data.classes)


def _columns(rows: Dataset, config: ImageDataConfig) -> tuple[str, str]:
    from datasets import ClassLabel, Image

    found = ", ".join(f"{name}: {type(kind).__name__}" for name, kind in rows.features.items()) or "none"
    for flag in ("image_column", "label_column"):
        asked = getattr(config, flag)
        if asked is not None and asked not in rows.column_names:
            raise UserError(f"--{flag} {asked}: no such column (found: {found})")
    images = [name for name, kind in rows.features.items() if isinstance(kind, Image)]
    classes = [name for name, kind in rows.features.items() if isinstance(kind, ClassLabel)]
    image = config.image_column or (images[0] if len(images) == 1 else None)
    label = config.label_column or (classes[0] if len(classes) == 1 else "label" if "label" in rows.features else None)
    for column, flag, what in ((image, "image_column", "images"), (label, "label_column", "labels")):
        if column is None:
            raise UserError(
                f"--dataset_name {config.dataset_name}: no one column of {what} (found: {found}); name it with --{flag}"
            )
    assert image is not None and label is not None
    if not isinstance(rows.features[image], Image):
        raise UserError(f"--image_column {image}: holds {type(rows.features[image]).__name__}, not images ({found})")
    return image, label


def _labels(
    parts: dict[str, Dataset], column: str, config: ImageDataConfig
) -> tuple[list[str], list[str], dict[str, Tensor]]:
    """The classes that images have, and each split's labels.

    The classes come in the order of their names, of the data or of --class_names; where there are none they are the
    labels in rising order, numbers as numbers. A name that no image has is no class: a wrong class drawn among such
    names would teach nothing, and be ranked right for nothing.

    Returns:
        The names of the classes, the names that no image has, and (N,) class numbers of each split.
    """
    place = f"--dataset_name {config.dataset_name}"
    kinds = {split: _label_kind(rows, column) for split, rows in parts.items()}
    if len(set(kinds.values())) > 1:
        described = ", ".join(f"{kind} in {split}" for split, kind in kinds.items())
        raise UserError(f"--label_column {column}: {described}; give every split the same kind of labels")
    if config.class_names is not None and len(set(config.class_names)) < len(config.class_names):
        raise UserError("--class_names: two classes have one name")
    found: dict[str, list[Any]] = {}
    named: dict[Any, None] = {}  # a set that keeps its order
    for split, rows in parts.items():
        values = rows[column][:]
        own = getattr(rows.features[column], "names", None)
        if own is not None and config.class_names is not None and len(own) != len(config.class_names):
            raise UserError(f"--class_names: {len(config.class_names)} names for {len(own)} classes")
        names = config.class_names or own
        named |= dict.fromkeys(names or ())
        for row, value in enumerate(values):
            if isinstance(value, str):
                known = not names or value in named
            else:  # a number below 0 says in most data sets that there is no label
                known = value is not None and 0 <= value < (len(names) if names else math.inf)
            if not known:
                raise UserError(
                    f"{place}: {split} row {row} has label {value!r}"
                    + (f", outside the {len(names)} classes" if names else ", which is no class")
                    + "; fix it, drop the row, or name the classes with --class_names"
                )
        found[split] = [names[value] if names and not isinstance(value, str) else value for value in values]
    occur = {value for values in found.values() for value in values}
    classes = [name for name in (named or sorted(occur)) if name in occur]
    number = {name: at for at, name in enumerate(classes)}
    labels = {
        split: torch.tensor([number[value] for value in values], dtype=torch.long) for split, values in found.items()
    }
    return [str(name) for name in classes], [str(name) for name in named if name not in occur], labels


def _label_kind(rows: Dataset, column: str) -> str:
    from datasets import ClassLabel, Value

    kind = rows.features[column]
    if isinstance(kind, ClassLabel):
        return "class names"
    for word, described in (("int", "whole numbers"), ("string", "texts")):
        if isinstance(kind, Value) and word in kind.dtype:
            return described
    raise UserError(f"--label_column {column}: holds {kind}, not class labels, whole numbers or names")


def _decode(rows: Dataset, column: str, split: str, config: ImageDataConfig) -> Tensor:
    """(N, 3, H, W) uint8; a UserError with the row of the first image that does not decode or fit."""
    from datasets import Image
    from tqdm.auto import tqdm

    encoded = rows.cast_column(column, Image(decode=False)).select_columns([column])  # each {"bytes", "path"}
    place = f"--dataset_name {config.dataset_name}: {split} row"

    def decode(start: int) -> list[np.ndarray]:
        batch = encoded[start : start + DECODED_TOGETHER][column]
        return [_decode_one(image, f"{place} {start + k}", config) for k, image in enumerate(batch)]

    pixels: np.ndarray | None = None
    starts = range(0, len(encoded), DECODED_TOGETHER)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # PIL lets go of the interpreter while it decodes
        done = pool.map(decode, starts)
        for start, images in zip(starts, tqdm(done, "Decoding", len(starts), leave=False, delay=2), strict=True):
            for row, image in enumerate(images, start):
                if pixels is None:
                    pixels = np.empty((len(encoded), 3, *image.shape[:2]), dtype=np.uint8)
                if image.shape[:2] != pixels.shape[2:]:
                    raise UserError(
                        f"{place} {row} is {image.shape[1]}×{image.shape[0]} pixels, row 0 {pixels.shape[3]}×"
                        f"{pixels.shape[2]}: pass --image_size {min(pixels.shape[2:])} to resize every image"
                    )
                pixels[row] = image.transpose(2, 0, 1)
    if pixels is None:
        raise UserError(f"--dataset_name {config.dataset_name}: split {split} has no rows")
    return torch.from_numpy(pixels)


def _decode_one(image: dict[str, Any] | None, place: str, config: ImageDataConfig) -> np.ndarray:
    """(H, W, 3) uint8, turned as the EXIF tag says."""
    from PIL import Image, ImageOps

    if not image or (image.get("bytes") is None and image.get("path") is None):
        raise UserError(f"{place} has no image; drop the row")
    if image.get("bytes") is None and not Path(image["path"]).is_file():  # a device or a pipe may never end
        raise UserError(f"{place}: its path is no file; drop the row")
    if image.get("path"):
        place = f"{image['path']} ({place})"
    source = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    try:
        with Image.open(source, formats=FORMATS) as opened:
            if opened.width * opened.height > LARGEST_IMAGE:
                raise UserError(
                    f"{place} is {opened.width}×{opened.height} pixels, more than {LARGEST_IMAGE:,}; shrink it or drop "
                    "the row"
                )
            opened.load()
            whitest = _whitest(opened, place)
            picture = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{place}: the image does not decode ({first_line(error)}); fix it or drop the row") from None
    if picture.mode != "RGB" and not config.convert_rgb:
        raise UserError(f"{place} has mode {picture.mode}, not RGB: pass --convert_rgb to convert such images")
    if whitest is not None:
        picture = Image.fromarray(np.round(np.asarray(picture) * (255 / whitest)).astype(np.uint8))
    if "transparency" in picture.info:  # of a palette: Pillow warns where it goes in one step
        picture = picture.convert("RGBA")
    picture = picture.convert("RGB")  # without opacity, as `transformers.pipeline` reads an image
    return np.asarray(_resized(picture, config.image_size) if config.image_size else picture)


def _whitest(picture: Image.Image, place: str) -> int | None:
    """What a pixel of more than 8 bits has where it is white; None for 8 bits, which Pillow converts as they are.

    Pillow gives such pixels as the file has them, and its own conversion cuts them off at 255.
    """
    if not picture.mode.startswith(("I", "F")):
        return None
    if picture.format in ("PNG", "PPM") and picture.mode != "F":  # what a PGM's own maximum is, Pillow scales to this
        return 65535
    tags = getattr(picture, "tag_v2", {})
    bits, white_is_zero = tags.get(258, (0,))[0], tags.get(262) == 0  # BitsPerSample, PhotometricInterpretation
    if picture.mode.startswith("I;16") and not white_is_zero:
        return int(2**bits - 1)
    raise UserError(
        f"{place}: a {picture.format} of mode {picture.mode}, of which nothing says what value is white; save it with "
        "8 bits a channel, or drop the row"
    )


def _resized(picture: Image.Image, size: int) -> Image.Image:
    from PIL import Image

    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BILINEAR)


# --- augmentation ---------------------------------------------------------------------------------------------------


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
