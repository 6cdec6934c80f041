"""Images in memory: from a Hub id, a folder or a package to uint8 tensors in three splits.

Every image is decoded once, before training, into one (N, 3, H, W) uint8 tensor a split.
"""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from resdpo_trl.errors import UserError
from resdpo_trl.sources import check_held_out, first_line, held_out_size, load_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

QUICKSTART = "digits"
SPLITS = ("train", "validation", "test")
TORCHVISION_FOLDER = "cifar-10-batches-py"
DECODED_TOGETHER = 256  # images that one thread decodes at a time
LARGEST_IMAGE = 64_000_000  # pixels; 192 MB decoded
MOST_CLASSES = 100_000
# what Pillow may take a file for: some of its readers run other programs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass
class ImageDataConfig:
    """Which labelled images to use, and how many."""

    _argument_group_name = "data"

    dataset_name: str = field(
        default=QUICKSTART,
        metadata={
            "help": "Labelled images: a Hub id (uoft-cs/cifar10), a folder of parquet files or of one folder of images "
            "a class, torchvision's CIFAR-10 folder, or 'digits', the quickstart's, which need no network."
        },
    )
    dataset_data_dir: str | None = field(default=None, metadata={"help": "Folder inside the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub data set."})
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
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most this many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most this many validation images."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Use at most this many test images."})
    validation_fraction: float = field(
        default=0.02, metadata={"help": "Share held out from the training images where the data has no such split."}
    )
    test_fraction: float = field(
        default=0.2, metadata={"help": "Share held out for the test where the data has no such split."}
    )

    def __post_init__(self) -> None:
        check_held_out(self)
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
    sources, names = _sources(config)
    if len(names) < 2:
        raise UserError(
            f"--dataset_name {config.dataset_name}: {len(names)} class ({', '.join(names)}); a classifier needs at "
            "least two"
        )
    kinds = {"validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}
    limits = {
        "train": config.max_train_samples,
        "validation": config.max_eval_samples,
        "test": config.max_test_samples,
    }
    shares = {"validation": config.validation_fraction, "test": config.test_fraction}
    counts: dict[str, Any] = {"source": config.dataset_name, "classes": len(names)}
    tests = [name for name in sources if len(sources) == 1 or name in kinds["test"]] if held_out else []
    if tests:
        test = _some(sources[tests[0]], limits["test"])
        return LabelledImages(
            {"test": test}, names, counts | {"image_size": list(test.pixels.shape[2:]), "test": len(test)}
        )
    own = {split: next((sources[name] for name in known if name in sources), None) for split, known in kinds.items()}
    rest = [name for name in sources if not any(name in known for known in kinds.values())]
    if not rest:
        raise UserError(f"--dataset_name {config.dataset_name}: no training split (found: {', '.join(sources)})")
    images = _joined([sources.pop(name) for name in rest])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    splits: dict[str, Images] = {}
    taken = 0
    for split in ("test", "validation"):
        held = own[split]
        if held is not None:
            splits[split] = _some(held, limits[split])
            continue
        wanted = held_out_size(len(images), shares[split], limits[split])
        splits[split] = images[order[taken : taken + wanted]]
        taken += wanted
    splits["train"] = images[order[taken:][: limits["train"]]]
    if min(len(splits[split]) for split in SPLITS) == 0:
        raise UserError(f"--dataset_name {config.dataset_name}: {len(images)} images are too few for three splits")
    counts |= {"image_size": list(images.pixels.shape[2:])}
    counts |= {split: len(splits[split]) for split in SPLITS}
    rows = len(images) + sum(len(held) for held in own.values() if held is not None)
    counts["cut_by_limits"] = rows - sum(map(len, splits.values()))
    counts["held_out_raised"] = [
        split
        for split, share in shares.items()
        if own[split] is None and counts[split] > max(1, round(share * len(images)))
    ]
    return LabelledImages({split: splits[split] for split in SPLITS}, names, counts)


def _joined(parts: list[Images]) -> Images:
    """All the parts' images; a single part is not copied."""
    if len(parts) == 1:
        return parts[0]
    return Images(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))


def _some(images: Images, limit: int | None) -> Images:
    """At most `limit` of a split, in its own order.

    The first ones would not do: a folder's images come a class at a time.
    """
    if limit is None or limit >= len(images):
        return images
    kept = np.random.default_rng(0).permutation(len(images))[:limit]
    return images[torch.from_numpy(np.sort(kept))]


def _sources(config: ImageDataConfig) -> tuple[dict[str, Images], list[str]]:
    """Decoded images by the data's own split names, and the names of the classes."""
    if config.dataset_name == QUICKSTART:
        _refuse_column_flags(config)
        return {"train": _digits(config)}, [str(digit) for digit in range(10)]
    folder = Path(config.dataset_name)
    if folder.name == TORCHVISION_FOLDER or (folder / TORCHVISION_FOLDER).is_dir():
        _refuse_column_flags(config)
        return _torchvision_cifar10(folder.parent if folder.name == TORCHVISION_FOLDER else folder, config)
    rows = load_rows(config.dataset_name, config.dataset_data_dir, config.dataset_revision, QUICKSTART)
    image_column, label_column = _columns(next(iter(rows.values())), config)
    names = _label_names(next(iter(rows.values())), label_column, config)
    _check_first_image(rows, image_column, config)
    sources: dict[str, Images] = {}
    for name, part in rows.items():
        if {image_column, label_column} - set(part.column_names):
            raise UserError(
                f"--dataset_name {config.dataset_name}: split {name} lacks {image_column} or {label_column}"
            )
        labels = _labels(part, label_column, names, name, config)
        pixels = _decode(part, image_column, name, config)
        sources[name] = Images(pixels, labels)
        if pixels.shape[2:] != next(iter(sources.values())).pixels.shape[2:]:
            raise UserError(f"--dataset_name {config.dataset_name}: splits of different sizes: pass --image_size 32")
    return sources, names


def _refuse_column_flags(config: ImageDataConfig) -> None:
    """Raise a UserError for a flag that is of no use to images whose columns and classes are known."""
    for flag in ("dataset_data_dir", "dataset_revision", "image_column", "label_column", "class_names"):
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
            "--dataset_name digits needs the package scikit-learn: pip install 'resdpo-trl[quickstart]', or name "
            "images of your own"
        ) from None
    from torchvision.transforms.v2 import functional

    bunch, size = load_digits(), config.image_size or 32
    _check_memory(len(bunch.target), size, size, config)
    grey = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    pixels = functional.resize(grey, [size, size]).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    return Images(pixels.contiguous(), torch.from_numpy(bunch.target).long())


def _torchvision_cifar10(root: Path, config: ImageDataConfig) -> tuple[dict[str, Images], list[str]]:
    """torchvision's CIFAR-10, whose files are unpickled only where their checksums are the published ones."""
    from PIL import Image
    from torchvision.datasets import CIFAR10

    sources, size = {}, config.image_size or 32
    _check_memory(60_000, size, size, config)
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


def _label_names(rows: Dataset, column: str, config: ImageDataConfig) -> list[str]:
    """The classes: the data's, the flag's, or the labels found."""
    from datasets import ClassLabel, Value

    kind = rows.features[column]
    if isinstance(kind, ClassLabel):
        if config.class_names is not None and len(config.class_names) != kind.num_classes:
            raise UserError(f"--class_names: {len(config.class_names)} names for {kind.num_classes} classes")
        return list(config.class_names or kind.names)
    if not isinstance(kind, Value) or not any(word in kind.dtype for word in ("int", "string")):
        raise UserError(f"--label_column {column}: holds {kind}, not class labels, whole numbers or names")
    if config.class_names is not None:
        return list(config.class_names)
    values = [value for value in rows.unique(column) if value is not None]
    if "string" in kind.dtype:
        return sorted(values)
    largest = max(values, default=-1)
    if largest >= MOST_CLASSES:
        raise UserError(
            f"--label_column {column}: label {largest}; class numbers begin at 0 and end below {MOST_CLASSES}"
        )
    return [str(number) for number in range(largest + 1)]


def _labels(rows: Dataset, column: str, names: list[str], split: str, config: ImageDataConfig) -> Tensor:
    """(N,) class numbers, every one inside the classes."""
    values = rows[column][:]
    places = {name: number for number, name in enumerate(names)}
    numbers = [places.get(value, -1) if isinstance(value, str) else -1 if value is None else value for value in values]
    labels = torch.tensor(numbers, dtype=torch.long)
    wrong = ((labels < 0) | (labels >= len(names))).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"--dataset_name {config.dataset_name}: {split} row {row} has label {values[row]!r}, outside the "
            f"{len(names)} classes; mend it, drop the row, or name the classes with --class_names"
        )
    return labels


def _decode(rows: Dataset, column: str, split: str, config: ImageDataConfig) -> Tensor:
    """(N, 3, H, W) uint8; a UserError with the row of the first image that does not decode or fit."""
    from tqdm.auto import tqdm

    encoded = _encoded(rows, column)
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


def _encoded(rows: Dataset, column: str) -> Dataset:
    """The column of images alone, each as {"bytes", "path"}."""
    from datasets import Image

    return rows.cast_column(column, Image(decode=False)).select_columns([column])


def _check_first_image(parts: dict[str, Dataset], column: str, config: ImageDataConfig) -> None:
    """Raise a UserError where the images of all parts, each as large as the first, do not fit in memory."""
    name, rows = next(iter(parts.items()))
    if len(rows):
        first = _decode_one(
            _encoded(rows, column)[0][column], f"--dataset_name {config.dataset_name}: {name} row 0", config
        )
        _check_memory(sum(map(len, parts.values())), first.shape[0], first.shape[1], config)


def _check_memory(count: int, height: int, width: int, config: ImageDataConfig) -> None:
    """Raise a UserError where `count` images are more than the memory that is free.

    They are in memory twice while they are split: as they were decoded, and in the splits' order.
    """
    import psutil

    needed, free = 2 * count * 3 * height * width, psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--dataset_name {config.dataset_name}: {width}×{height} pixels: {count} such images take "
            f"{needed / 2**30:.1f} GiB while they are split and {free / 2**30:.1f} GiB of memory are free; pass a "
            "smaller --image_size"
        )


def _decode_one(image: dict[str, Any] | None, place: str, config: ImageDataConfig) -> np.ndarray:
    """(H, W, 3) uint8."""
    from PIL import Image

    if not image or (image.get("bytes") is None and image.get("path") is None):
        raise UserError(f"{place} has no image; drop the row")
    if image.get("bytes") is None and not Path(image["path"]).is_file():  # a device or a pipe may never end
        raise UserError(f"{place}: its path is no file; drop the row")
    source = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    try:
        with Image.open(source, formats=FORMATS) as opened:
            if opened.width * opened.height > LARGEST_IMAGE:
                raise UserError(
                    f"{place} is {opened.width}×{opened.height} pixels, more than {LARGEST_IMAGE:,}; shrink it or drop "
                    "the row"
                )
            opened.load()
            mode = opened.mode
            picture = opened.convert("RGB") if mode != "RGB" and config.convert_rgb else opened.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{place}: the image does not decode ({first_line(error)}); mend it or drop the row") from None
    if picture.mode != "RGB":
        raise UserError(f"{place} has mode {mode}, not RGB: pass --convert_rgb to convert such images")
    return np.asarray(_resized(picture, config.image_size) if config.image_size else picture)


def _resized(picture: Image.Image, size: int) -> Image.Image:
    from PIL import Image

    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BILINEAR)
