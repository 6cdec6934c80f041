import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from resdpo_trl.errors import UserError
from resdpo_trl.image.data import ImageDataConfig, load_images
from tests.image.conftest import as_png, draw, write_parquet


def load(name, **options):
    return load_images(ImageDataConfig(dataset_name=str(name), **options))


def test_a_folder_of_parquet_files(image_folder):
    images = load(image_folder, validation_fraction=0.1)
    assert images.label_names == ["red", "green", "blue", "yellow"]
    assert images.counts == {
        "source": str(image_folder), "classes": 4, "image_size": [16, 16], "train": 144, "validation": 16, "test": 60
    }  # fmt: skip
    assert torch.equal(images["test"].pixels, draw(60, seed=1).pixels)
    assert torch.equal(images["test"].labels, draw(60, seed=1).labels)
    # what is held out and what is left are the training file's images, each once
    both = torch.cat([images["train"].pixels, images["validation"].pixels]).flatten(1)
    assert {bytes(row.numpy()) for row in both} == {bytes(row.numpy()) for row in draw(160).pixels.flatten(1)}


def test_the_same_images_whatever_the_limits(image_folder):
    full, less = load(image_folder), load(image_folder, max_train_samples=20, max_test_samples=7)
    assert len(less["train"]) == 20 and len(less["test"]) == 7
    assert torch.equal(less["train"].pixels, full["train"].pixels[:20])
    assert less["validation"].fingerprint() == full["validation"].fingerprint()
    assert less["train"].fingerprint() != full["train"].fingerprint()


def test_a_test_split_is_held_out_where_there_is_none(tmp_path):
    file = write_parquet(tmp_path / "one.parquet", draw(100))
    images = load(file, validation_fraction=0.1, test_fraction=0.3)
    assert [len(images[split]) for split in ("train", "validation", "test")] == [60, 10, 30]


def test_a_folder_of_one_folder_a_class(tmp_path):
    for split, count in (("train", 12), ("test", 6)):
        for number, pixels in enumerate(draw(count).pixels):
            place = tmp_path / split / ("cat" if number % 2 else "dog")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(as_png(pixels))
    images = load(tmp_path, validation_fraction=0.2)
    assert images.label_names == ["cat", "dog"]
    assert images["test"].labels.sum() == 3


@pytest.mark.parametrize(("labels", "names"), [([0, 1, 2], ["0", "1", "2"]), (["b", "a", "c"], ["a", "b", "c"])])
def test_labels_that_are_numbers_or_names(tmp_path, labels, names):
    kind = Value("int64" if isinstance(labels[0], int) else "string")
    rows = {"picture": [{"bytes": as_png(p), "path": None} for p in draw(30).pixels], "kind": labels * 10}
    Dataset.from_dict(rows, features=Features({"picture": ImageFeature(), "kind": kind})).to_parquet(
        str(tmp_path / "a.parquet")
    )
    images = load(tmp_path / "a.parquet", label_column="kind", validation_fraction=0.1)
    assert images.label_names == names
    assert set(torch.cat([images[split].labels for split in ("train", "validation", "test")]).tolist()) == {0, 1, 2}


def test_the_digits_of_scikit_learn():
    images = load("digits")
    assert images.counts["image_size"] == [32, 32]
    assert sum(images.counts[split] for split in ("train", "validation", "test")) == 1797
    assert torch.equal(images["train"].pixels[:, 0], images["train"].pixels[:, 2])
    assert images["train"].pixels.max() == 255


# --- what is refused -----------------------------------------------------------------------------------------------


def png(mode, size=(16, 16)):
    buffer = io.BytesIO()
    Image.fromarray(np.full(size[::-1], 99, np.uint8)).convert(mode).save(buffer, "png")
    return buffer.getvalue()


def with_row(replaced, number=5):
    """An encoder that writes `replaced` for one row."""
    rows = iter(range(10_000))
    return lambda pixels: replaced if next(rows) == number else as_png(pixels)


def test_greyscale_is_refused_with_the_flag_and_converted_when_asked(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", draw(20), encode=with_row(png("L")))
    with pytest.raises(UserError, match=r"train row 5 has mode L.*--convert_rgb"):
        load(file)
    images = load(file, convert_rgb=True)
    assert any((image == 99).all() for split in ("train", "validation", "test") for image in images[split].pixels)


def test_other_sizes_are_refused_with_the_flag_and_resized_when_asked(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", draw(20), encode=with_row(png("RGB", (20, 12))))
    with pytest.raises(UserError, match=r"train row 5 is 20×12 pixels, row 0 16×16: pass --image_size"):
        load(file)
    assert load(file, image_size=24)["train"].pixels.shape[2:] == (24, 24)


@pytest.mark.parametrize("broken", [b"not an image", as_png(draw(1).pixels[0])[:60], b""])
def test_an_image_that_does_not_decode_is_named(tmp_path, broken):
    file = write_parquet(tmp_path / "a.parquet", draw(20), encode=with_row(broken, 7))
    with pytest.raises(UserError, match=r"train row 7: the image does not decode"):
        load(file)


def test_a_label_outside_the_classes_is_named(tmp_path):
    images = draw(20)
    images.labels[9] = 8
    features = Features({"img": ImageFeature(), "label": Value("int64")})
    file = write_parquet(tmp_path / "a.parquet", images, features=features)
    with pytest.raises(UserError, match=r"train row 9 has label 8, outside the 4 classes"):
        load(file, class_names=["a", "b", "c", "d"])
    images.labels[9] = -1
    file = write_parquet(tmp_path / "b.parquet", images, features=features)
    with pytest.raises(UserError, match=r"train row 9 has label -1"):
        load(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "picture"}, r"--image_column picture: no such column \(found: img: Image, label: ClassLabel"),
        ({"image_column": "label"}, r"--image_column label: holds ClassLabel, not images"),
        ({"label_column": "kind"}, r"--label_column kind: no such column"),
        ({"label_column": "img"}, r"--label_column img: holds"),
        ({"class_names": ["a"]}, r"--class_names: 1 names for 4 classes"),
    ],
)
def test_columns_that_are_missing_or_of_another_type(image_folder, options, message):
    with pytest.raises(UserError, match=message):
        load(image_folder, **options)


def test_no_image_column(tmp_path):
    Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"no one column of images \(found: text: Value, label: Value\)"):
        load(tmp_path / "a.parquet")


def test_torchvisions_folder_is_checked_before_it_is_read(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80\x04not what was published")
    with pytest.raises(UserError, match="others than the published ones"):
        load(tmp_path)


def test_a_hub_id_without_a_network():
    with pytest.raises(UserError, match=r"cifar10: not a local path, and the Hub does not give it.*'digits'"):
        load("uoft-cs/cifar10")
