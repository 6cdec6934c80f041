"""Images that the tests draw: each class is a colour, with a bright square somewhere."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from resdpo_trl.image.data import Images

COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200), (190, 190, 40)]


def draw(count: int, classes: int = 4, size: int = 16, seed: int = 0) -> Images:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    pixels = generator.integers(0, 60, (count, size, size, 3))
    for row, label in enumerate(labels):
        pixels[row] += np.asarray(COLOURS[label]) // 2
        y, x = generator.integers(0, size - 4, 2)
        pixels[row, y : y + 4, x : x + 4] = 250
    return Images(torch.from_numpy(pixels.astype(np.uint8)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def as_png(pixels: torch.Tensor) -> bytes:
    """(3, H, W) uint8 -> a PNG file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(path, images: Images, names=("red", "green", "blue", "yellow"), encode=as_png, features=None):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = features or Features({"img": ImageFeature(), "label": ClassLabel(names=list(names))})
    rows = {
        "img": [{"bytes": encode(pixels), "path": None} for pixels in images.pixels],
        "label": images.labels.tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder like the Hub's cifar10: train.parquet and test.parquet."""
    folder = tmp_path_factory.mktemp("images") / "drawn images"
    write_parquet(folder / "train.parquet", draw(160))
    write_parquet(folder / "test.parquet", draw(60, seed=1))
    return folder
