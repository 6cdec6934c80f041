"""Images in memory: loading from a Hub id, a folder or a package, three splits, and augmentation.

Every image is decoded once, before training, into one (N, 3, H, W) uint8 tensor per split. Decoding gives the same
pixels as `datasets`, rotated according to the EXIF tag. A class is a label that at least one image has. Its number is
its position among the class names, which are saved with the model.

`Augmentation` transforms whole batches. torchvision's random transforms draw once per call and would give all images of
a batch the same crop. Here each image has its own crop and flip. They depend only on (seed, epoch, image), not on the
batch, the number of workers or the number of processes.
"""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional
from tqdm.auto import tqdm

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
from resdpo_trl.training.arguments import option

QUICKSTART = "digits"
DECODED_TOGETHER = 256  # images per decoding task
# Pillow's other readers are rare, and some of them run other programs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# flags that do not apply if the columns and classes are known
OF_COLUMNS = (
    "dataset_data_dir", "dataset_revision", "dataset_train_split", "dataset_validation_split", "dataset_test_split",
    "image_column", "label_column", "class_names",
)  # fmt: skip


@dataclass
class ImageDataConfig(DatasetConfig):
    """Which labeled images to use, and how many."""

    _argument_group_name = "data"

    dataset_name: str = option(
        QUICKSTART,
        "Labeled images: a Hub id (uoft-cs/cifar10), a folder of parquet files, a folder with one folder "
        "of images per class, torchvision's CIFAR-10 folder, or 'digits', those of the quickstart (no network).",
    )
    validation_fraction: float = option(0.02, "Share of the training images to hold out if the data has no such split.")
    test_fraction: float = option(0.2, "Share of the images to hold out for the test if the data has no such split.")
    image_column: str | None = option(None, "Column of images; by default the only one.")
    label_column: str | None = option(
        None, "Column of labels; by default the only column with class names, or 'label'."
    )
    class_names: list[str] | None = option(None, "Names of the classes 0, 1, … if the data has none.")
    image_size: int | None = option(None, "Resize every image to this height and width (pixels).")
    convert_rgb: bool = option(False, "Convert grayscale, palette and other images to RGB instead of refusing them.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image_size {self.image_size}: must be at least 1")


@dataclass
class Images:
    """Labeled images: `pixels` (N, 3, H, W) uint8, `labels` (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def take(self, places: np.ndarray) -> Images:
        """The images at these indices, without a copy if they are all images in order."""
        return self if np.array_equal(places, np.arange(len(self))) else self[torch.from_numpy(places)]

    def digests(self) -> list[str]:
        """A digest of each image's pixels, without its label."""
        return [hashlib.blake2b(row.data, digest_size=8).hexdigest() for row in self.pixels.flatten(1).numpy()]

    def fingerprint(self) -> str:
        """A digest of pixels and labels that does not depend on how they were loaded."""
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
    """Load, decode and split labeled images.

    The data's own validation and test splits are used if they exist. Otherwise, a fixed permutation holds them out
    from the training images, so that the test images do not depend on a seed. A fixed permutation also chooses the
    images under a limit, and the images of a smaller limit are a subset of those of a larger one.

    Args:
        config: what to load.
        held_out: load only a test split: the data's own, or all images of a data set with one split.

    Raises:
        UserError: a column, class, label or image is missing or invalid, or the images differ in size.
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
        images = sources.get("test", next(iter(sources.values())))
        test = images.take(_limited(np.arange(len(images)), limits["test"]))
        counts |= {"image_size": list(test.pixels.shape[2:]), "test": len(test)}
        return LabelledImages({"test": test}, names, counts)
    shares = {"test": config.test_fraction, "validation": config.validation_fraction}
    images = sources["train"]
    digests = {split: np.array(rows.digests()) for split, rows in sources.items()}
    drawn = np.random.default_rng(0).permutation(len(images))
    # the same order, but with copies next to each other, so that they go into one split
    _, first, copy_of = np.unique(digests["train"][drawn], return_index=True, return_inverse=True)
    order = drawn[np.argsort(first[copy_of], kind="stable")]
    places: dict[str, np.ndarray] = {}  # indices of each split's images in its source
    taken = 0
    for split in ("test", "validation"):
        if split in sources:
            places[split] = np.arange(len(sources[split]))
        else:
            wanted = held_out_size(len(images), shares[split], limits[split])
            places[split] = order[taken : taken + wanted]
            taken += wanted
    places["train"] = drawn[~np.isin(drawn, order[:taken])]
    kept, copies = held_out_first(
        {split: digests.get(split, digests["train"])[places[split]].tolist() for split in SPLITS}
    )
    splits: dict[str, Images] = {}
    for split in SPLITS:
        place = places[split][kept[split]]
        place = place[: config.max_train_samples] if split == "train" else _limited(place, limits[split])
        splits[split] = sources.get(split, images).take(place)
    counts |= {"copies_removed": copies, "image_size": list(images.pixels.shape[2:])}
    counts |= {split: len(rows) for split, rows in splits.items()}
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


def _limited(places: np.ndarray, limit: int | None) -> np.ndarray:
    """At most `limit` of the indices, drawn at random: the first images of a folder are all of one class."""
    if limit is None or limit >= len(places):
        return places
    return np.sort(np.random.default_rng(0).permutation(places)[:limit])


def _sources(config: ImageDataConfig, held_out: bool) -> tuple[dict[str, Images], list[str], dict[str, Any]]:
    """The decoded images of the data's own splits, the names of the classes, and what was skipped."""
    place = f"--dataset_name {config.dataset_name}"
    notes: dict[str, Any] = {"splits_left_out": [], "classes_without_images": []}
    folder = Path(config.dataset_name)
    root = folder.parent if folder.name == CIFAR10.base_folder else folder
    if config.dataset_name == QUICKSTART or (root / CIFAR10.base_folder).is_dir():
        for flag in OF_COLUMNS:
            if getattr(config, flag) is not None:
                raise UserError(f"--{flag} does not apply to {place}, whose columns and classes are known: omit it")
        if config.dataset_name == QUICKSTART:
            return {"train": _digits(config)}, [str(digit) for digit in range(10)], notes
        return *_torchvision_cifar10(root, config), notes
    found = load_rows(config.dataset_name, config.dataset_data_dir, config.dataset_revision, QUICKSTART)
    used, notes["splits_left_out"] = choose_splits(found, config, held_out)
    rows = {name: found[name] for own in used.values() for name in own}
    image_column, label_column = _columns(next(iter(rows.values())), config)
    for name, part in rows.items():
        if {image_column, label_column} - set(part.column_names):
            raise UserError(f"{place}: split {name} lacks {image_column} or {label_column}")
    names, notes["classes_without_images"], labels = _labels(rows, label_column, config)
    parts = {name: Images(_decode(part, image_column, name, config), labels[name]) for name, part in rows.items()}
    if len({part.pixels.shape[2:] for part in parts.values()}) > 1:
        raise UserError(f"{place}: the splits have different image sizes: pass --image_size 32")
    return {split: _joined([parts.pop(name) for name in own]) for split, own in used.items()}, names, notes


def _joined(parts: list[Images]) -> Images:
    """All images of the parts; a single part is not copied."""
    if len(parts) == 1:
        return parts[0]
    return Images(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))


def _digits(config: ImageDataConfig) -> Images:
    """scikit-learn's handwritten digits (8×8, gray levels 0 to 16) as RGB of --image_size, by default 32×32."""
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
    """torchvision's CIFAR-10. Its files are unpickled only if their checksums are the published ones."""
    sources = {}
    for split in ("train", "test"):
        try:
            data = CIFAR10(str(root), train=split == "train", download=False)
        except RuntimeError:
            raise UserError(
                f"--dataset_name {root}: {CIFAR10.base_folder} has missing files or wrong checksums, and pickles of "
                "unknown origin are not loaded: unpack cifar-10-python.tar.gz again"
            ) from None
        rows = np.stack([np.asarray(_resized(Image.fromarray(row), config.image_size)) for row in data.data])
        sources[split] = Images(torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))
    return sources, list(data.classes)


def _columns(rows: datasets.Dataset, config: ImageDataConfig) -> list[str]:
    """The columns of images and of labels: those of the flags, or the only candidates."""
    features = rows.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = named if len(named) == 1 else [name for name in features if name == "label"]
    columns: list[Any] = []
    for what, allowed, usual in (("image", images, images), ("label", list(features), labels)):
        asked = getattr(config, f"{what}_column")
        column = asked or (usual[0] if len(usual) == 1 else None)
        if column not in allowed:
            found = ", ".join(f"{name}: {type(kind).__name__}" for name, kind in features.items()) or "none"
            if asked:
                raise UserError(f"--{what}_column {asked}: no such column of {what}s (found: {found})")
            raise UserError(
                f"--dataset_name {config.dataset_name}: no single column of {what}s (found: {found}); name it with "
                f"--{what}_column, or sort the images into one subfolder per class, two at least"
            )
        columns.append(column)
    return columns


def _labels(
    parts: dict[str, datasets.Dataset], column: str, config: ImageDataConfig
) -> tuple[list[str], list[str], dict[str, Tensor]]:
    """The classes that occur, and each split's labels.

    The classes are in the order of their names in the data or in --class_names. Without names, they are the labels in
    ascending order. A name without images is not a class: as a rejected class it would teach nothing and would always
    be ranked right.

    Returns:
        The names of the classes, the names that no image has, and (N,) class numbers of each split.
    """
    kinds = {split: _label_kind(rows.features[column]) for split, rows in parts.items()}
    if len(set(kinds.values())) > 1 or None in kinds.values():
        described = ", ".join(f"{kind or parts[split].features[column]} in {split}" for split, kind in kinds.items())
        raise UserError(f"--label_column {column}: {described}; needs class names, integers or strings, of one kind")
    found: dict[str, list[Any]] = {}
    named: dict[Any, None] = {}  # an ordered set
    for split, rows in parts.items():
        own = getattr(rows.features[column], "names", None)
        names = config.class_names or own or []
        if own and len(own) != len(names):
            raise UserError(f"--class_names: {len(names)} names for {len(own)} classes")
        named |= dict.fromkeys(names)
        values = rows[column][:]
        if names:
            name_of: dict[Any, Any] = dict(enumerate(names)) | {name: name for name in names}
        else:  # in most data sets a negative number means that there is no label
            name_of = {each: each for each in set(values) if isinstance(each, str) or (each is not None and each >= 0)}
        found[split] = [name_of.get(value) for value in values]
        if None in found[split]:
            row = found[split].index(None)
            raise UserError(
                f"--dataset_name {config.dataset_name}: {split} row {row} has label {values[row]!r}"
                + (f", outside the {len(names)} classes" if names else ", which is not a class")
                + "; fix it, drop the row, or name the classes with --class_names"
            )
    occur = set().union(*found.values())
    classes = [name for name in (named or sorted(occur)) if name in occur]
    number = {name: at for at, name in enumerate(classes)}
    labels = {
        split: torch.tensor([number[value] for value in values], dtype=torch.long) for split, values in found.items()
    }
    return [str(name) for name in classes], [str(name) for name in named if name not in occur], labels


def _label_kind(kind: Any) -> str | None:
    """The kind of labels in a column; None if they are not supported."""
    if isinstance(kind, datasets.ClassLabel):
        return "class names"
    dtype = kind.dtype if isinstance(kind, datasets.Value) else ""
    return "integers" if "int" in dtype else "strings" if "string" in dtype else None


def _decode(rows: datasets.Dataset, column: str, split: str, config: ImageDataConfig) -> Tensor:
    """(N, 3, H, W) uint8; a UserError names the first row that does not decode or has another size."""
    encoded = rows.cast_column(column, datasets.Image(decode=False)).select_columns([column])  # {"bytes", "path"} each
    if not len(encoded):
        raise UserError(f"--dataset_name {config.dataset_name}: split {split} has no rows")
    place = f"--dataset_name {config.dataset_name}: {split} row"
    height, width = _decode_one(encoded[0][column], f"{place} 0", config).shape[:2]
    pixels = np.empty((len(encoded), 3, height, width), dtype=np.uint8)

    def decode(start: int) -> None:
        for row, image in enumerate(encoded[start : start + DECODED_TOGETHER][column], start):
            decoded = _decode_one(image, f"{place} {row}", config)
            if decoded.shape[:2] != (height, width):
                raise UserError(
                    f"{place} {row} is {decoded.shape[1]}×{decoded.shape[0]} pixels, row 0 {width}×{height}: pass "
                    f"--image_size {min(height, width)} to resize every image"
                )
            pixels[row] = decoded.transpose(2, 0, 1)

    starts = range(0, len(encoded), DECODED_TOGETHER)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # Pillow releases the GIL while it decodes
        for _ in tqdm(pool.map(decode, starts), "Decoding", len(starts), leave=False, delay=2):
            pass
    return torch.from_numpy(pixels)


def _decode_one(image: dict[str, Any] | None, place: str, config: ImageDataConfig) -> np.ndarray:
    """(H, W, 3) uint8, rotated according to the EXIF tag."""
    content, path = (image[name] for name in ("bytes", "path")) if image else (None, None)
    if content is None and not Path(path or "").is_file():  # reading a device or a pipe may never end
        raise UserError(f"{place} has no image{', and its path is not a file' if path else ''}; drop the row")
    place = f"{path} ({place})" if path else place
    try:
        with Image.open(path or "" if content is None else io.BytesIO(content), formats=FORMATS) as opened:
            picture = ImageOps.exif_transpose(opened)
    except Exception as error:  # Pillow raises many kinds of errors on damaged bytes
        raise UserError(f"{place}: the image does not decode ({first_line(error)}); fix it or drop the row") from None
    if picture.mode.startswith(("I", "F")):  # Pillow would clip them at 255
        raise UserError(
            f"{place}: mode {picture.mode} has more than 8 bits per channel; save it with 8 bits, or drop the row"
        )
    if picture.mode != "RGB" and not config.convert_rgb:
        raise UserError(f"{place} has mode {picture.mode}, not RGB: pass --convert_rgb to convert such images")
    if "transparency" in picture.info:  # of a palette: Pillow warns about a direct conversion
        picture = picture.convert("RGBA")
    picture = picture.convert("RGB")  # without alpha, as in `transformers.pipeline`
    return np.asarray(_resized(picture, config.image_size))


def _resized(picture: Image.Image, size: int | None) -> Image.Image:
    if size is None or picture.size == (size, size):
        return picture
    return picture.resize((size, size), Image.Resampling.BILINEAR)


# --- augmentation ---------------------------------------------------------------------------------------------------


@dataclass
class AugmentConfig:
    """Augmentation of the training images."""

    _argument_group_name = "augmentation"

    crop_padding: int = option(2, "Reflect this many pixels on each side, then crop at random; 0 disables it.")
    flip: bool = option(
        True,
        "Flip images horizontally: at random in the first epoch, then alternately (https://arxiv.org/abs/2404.00498).",
    )

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise UserError(f"--crop_padding {self.crop_padding}: must be at least 0")


class Augmentation:
    """Augments (B, 3, H, W) uint8 images of a data set of `count` images.

    Args:
        config: the augmentation.
        count: images in the data set.
        seed: with the epoch and an image's number, it determines the image's crop and flip.
        device: where the images are. The random numbers are there too, so that no step waits for a copy.
    """

    def __init__(self, config: AugmentConfig, count: int, seed: int, device: torch.device | str = "cpu"):
        self.config, self.count, self.seed, self.device = config, count, seed, device
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the crops and flips of all images for this epoch."""
        flips = torch.rand(self.count, generator=torch.Generator().manual_seed(self.seed)) < 0.5
        self._flip = ((flips ^ bool(epoch % 2)) & self.config.flip).to(self.device)
        generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch, "augment"))
        places = 2 * self.config.crop_padding + 1
        self._shift = torch.randint(0, places, (self.count, 2), generator=generator).to(self.device)

    def __call__(self, pixels: Tensor, index: Tensor) -> Tensor:
        """Augment `pixels`, the images numbered `index` (B,)."""
        height, width = pixels.shape[2:]
        if self.config.crop_padding:
            pixels = functional.pad(pixels, [self.config.crop_padding], padding_mode="reflect")
        # where a pixel comes from: (B, H) rows and (B, W) columns
        rows = torch.arange(height, device=self.device) + self._shift[index, 0, None]
        columns = torch.arange(width, device=self.device) + self._shift[index, 1, None]
        columns = torch.where(self._flip[index, None], columns.flip(1), columns)
        batch = torch.arange(len(pixels), device=self.device)[:, None, None]
        return pixels.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def hash_seed(seed: int, epoch: int, purpose: str) -> int:
    """A separate seed for each purpose in each epoch."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch} {purpose}".encode(), digest_size=7).digest(), "little")
