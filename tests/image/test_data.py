import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from resdpo_trl.errors import UserError
from resdpo_trl.image.data import ImageDataConfig, load_images
from tests.image.conftest import as_png, draw, write_parquet


def load(name, **options):
    return load_images(ImageDataConfig(dataset_name=str(name), **options))


def test_a_folder_of_parquet_files(image_folder):
    images = load(image_folder, validation_fraction=0.2)
    assert images.label_names == ["red", "green", "blue", "yellow"]
    assert images.counts == {
        "source": str(image_folder), "classes": 4, "image_size": [16, 16], "train": 128, "validation": 32, "test": 60,
        "cut_by_limits": 0, "held_out_raised": [],
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


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_limit_takes_images_of_every_class(tmp_path, split):
    """Folders of one folder a class come a class at a time: the first rows would be of one class."""
    for part, count in (("train", 40), (split, 60)):
        for number, pixels in enumerate(draw(count).pixels):
            place = tmp_path / part / f"class {number * 3 // count}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(as_png(pixels))
    flag = {"test": "max_test_samples", "validation": "max_eval_samples"}[split]
    whole, many, few = (load(tmp_path, **{flag: limit})[split] for limit in (None, 30, 12))
    assert [len(images) for images in (whole, many, few)] == [60, 30, 12]
    assert set(few.labels.tolist()) == {0, 1, 2}
    rows = [[bytes(image.numpy()) for image in images.pixels] for images in (whole, many, few)]
    assert set(rows[2]) < set(rows[1]) < set(rows[0])
    assert load(tmp_path, **{flag: 60})[split].fingerprint() == whole.fingerprint()


def test_training_files_of_any_name_are_one_split(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", draw(30))
    write_parquet(tmp_path / "data" / "test.parquet", draw(12, seed=1))
    both = load_dataset(str(tmp_path / "data"))
    both["more"] = both["train"].select(range(20))
    both.save_to_disk(str(tmp_path / "saved"))
    images = load(tmp_path / "saved", validation_fraction=0.2)
    assert [len(images[split]) for split in ("train", "validation", "test")] == [40, 10, 12]


def test_a_test_split_is_held_out_where_there_is_none(tmp_path):
    file = write_parquet(tmp_path / "one.parquet", draw(100))
    images = load(file, validation_fraction=0.2, test_fraction=0.3)
    assert [len(images[split]) for split in ("train", "validation", "test")] == [50, 20, 30]


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


def test_the_digits_have_any_size():
    assert load("digits", image_size=24)["train"].pixels.shape[1:] == (3, 24, 24)


@pytest.fixture
def torchvisions_folder(tmp_path, monkeypatch):
    """A folder as torchvision's, of 40 drawn images, with checksums that torchvision takes for the published ones."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    images = draw(40, size=32)
    rows, labels = images.pixels.flatten(1).numpy(), images.labels.tolist()
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", {"data": rows[:30], "labels": labels[:30]})])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", {"data": rows[30:], "labels": labels[30:]})])
    name, checksum = write("batches.meta", {"label_names": ["red", "green", "blue", "yellow"]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    return tmp_path, images


def test_torchvisions_folder_and_its_other_sizes(tmp_path, torchvisions_folder):
    folder, drawn = torchvisions_folder
    images = load(folder)
    assert images.label_names == ["red", "green", "blue", "yellow"]
    assert torch.equal(images["test"].pixels, drawn.pixels[30:]) and torch.equal(
        images["test"].labels, drawn.labels[30:]
    )
    # resized they are the pixels that files of the same images give
    write_parquet(tmp_path / "files" / "train.parquet", drawn[:30])
    write_parquet(tmp_path / "files" / "test.parquet", drawn[30:])
    resized, files = load(folder / "cifar-10-batches-py", image_size=20), load(tmp_path / "files", image_size=20)
    for split in ("train", "validation", "test"):
        assert resized[split].pixels.shape[2:] == (20, 20)
        assert resized[split].fingerprint() == files[split].fingerprint()


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


@pytest.mark.parametrize(
    "options", [{"class_names": ["a", "b"]}, {"label_column": "kind"}, {"dataset_data_dir": "x"}], ids=str
)
def test_flags_that_the_digits_and_torchvisions_folder_have_no_use_for(torchvisions_folder, options):
    for name in ("digits", torchvisions_folder[0]):
        with pytest.raises(UserError, match=f"--{next(iter(options))} is of no use with --dataset_name .*: drop it"):
            load(name, **options)


def test_one_class_is_refused(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", draw(20, classes=1), names=("red",))
    with pytest.raises(UserError, match=r"1 class \(red\); a classifier needs at least two"):
        load(file)


def test_memory_is_checked_for_all_splits_and_their_copy(image_folder, monkeypatch):
    import psutil

    needed = 2 * 220 * 3 * 16 * 16  # as decoded, and once more in the splits' order
    for free, enough in ((needed - 1, False), (needed, True)):
        memory = psutil.virtual_memory()._replace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        if enough:
            load(image_folder)
        else:
            with pytest.raises(UserError, match=r"16×16 pixels: 220 such images take .* pass a smaller --image_size"):
                load(image_folder)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=10**6))
    with pytest.raises(UserError, match="1797 such images"):
        load("digits")


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
