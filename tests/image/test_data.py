import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from resdpo_trl.errors import UserError
from resdpo_trl.image.data import ImageDataConfig, Images, load_images
from resdpo_trl.image.pipeline import describe_images
from tests.image.conftest import as_png, draw, write_parquet


def load(name, **options):
    return load_images(ImageDataConfig(dataset_name=str(name), **options))


def test_a_folder_of_parquet_files(image_folder):
    images = load(image_folder, validation_fraction=0.2)
    assert images.label_names == ["red", "green", "blue", "yellow"]
    assert images.counts == {
        "source": str(image_folder), "splits_left_out": [], "copies_removed": {"train": 0, "validation": 0},
        "classes": 4, "class_names": images.label_names, "classes_without_images": [],
        "classes_without_training_images": [], "image_size": [16, 16], "train": 128, "validation": 32, "test": 60,
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


def saved(folder, **splits: Images):
    """A data set of these splits as save_to_disk leaves it."""
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["red", "green", "blue", "yellow"])})
    rows = {
        name: {
            "img": [{"bytes": as_png(each), "path": None} for each in images.pixels],
            "label": images.labels.tolist(),
        }
        for name, images in splits.items()
    }
    DatasetDict({name: Dataset.from_dict(each, features=features) for name, each in rows.items()}).save_to_disk(folder)
    return folder


def test_splits_of_unknown_names_are_not_trained_on(tmp_path):
    """As of stanford_cars' siblings on the Hub: copies of the test images under other names."""
    test = draw(12, seed=1)
    darker = Images((test.pixels // 2), test.labels)
    folder = saved(tmp_path / "d", train=draw(30), test=test, contrast=darker, gaussian_noise=draw(12, seed=2))
    images = load(folder, validation_fraction=0.1)
    assert [len(images[split]) for split in ("train", "validation", "test")] == [25, 5, 12]
    assert images.counts["splits_left_out"] == ["contrast", "gaussian_noise"]
    assert "unused splits: contrast, gaussian_noise (" in describe_images(images.counts)
    both = torch.cat([images["train"].pixels, images["validation"].pixels]).flatten(1)
    assert {bytes(row.numpy()) for row in both} == {bytes(row.numpy()) for row in draw(30).pixels.flatten(1)}
    named = load(folder, validation_fraction=0.1, dataset_train_split=["train", "gaussian_noise"])
    assert len(named["train"]) + len(named["validation"]) == 42
    assert named.counts["splits_left_out"] == ["contrast"]
    other = load(folder, dataset_test_split="contrast", dataset_validation_split="test")
    assert torch.equal(other["test"].pixels, darker.pixels)
    assert torch.equal(other["validation"].pixels, test.pixels)


def test_an_image_of_a_held_out_split_is_not_trained_on(tmp_path):
    """By the decoded pixels: here as another file, with another label."""
    train, validation, test = draw(30), draw(10, seed=1), draw(10, seed=2)
    train.pixels[[3, 4, 20]] = test.pixels[[0, 5, 9]]
    train.pixels[7] = train.pixels[8] = validation.pixels[2]
    validation.pixels[6] = test.pixels[1]
    images = load(saved(tmp_path / "own", train=train, validation=validation, test=test))
    assert images.counts["copies_removed"] == {"train": 5, "validation": 1}
    assert [len(images[split]) for split in ("train", "validation", "test")] == [25, 9, 10]
    assert "also in a held-out split: 5 from train, 1 from validation" in describe_images(images.counts)
    # and where the splits are made here, of training images that are there twice
    twice = Images(torch.cat([train.pixels, draw(30).pixels]), torch.cat([train.labels, draw(30).labels]))
    images = load(saved(tmp_path / "one", train=twice), validation_fraction=0.2, test_fraction=0.2)
    sets = [
        {bytes(row.numpy()) for row in images[split].pixels.flatten(1)} for split in ("train", "validation", "test")
    ]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert sum(images.counts["copies_removed"].values()) + sum(map(len, images.splits.values())) == 60
    # the same images whatever the limits
    less = load(tmp_path / "own", max_train_samples=9, max_test_samples=2)
    assert torch.equal(less["train"].pixels, load(tmp_path / "own")["train"].pixels[:9])


def test_the_copies_of_an_image_go_into_one_split(tmp_path):
    """Twelve images, each twenty times: no split is left empty, and what is trained on is not what is tested on."""
    twelve = draw(12)
    every = Images(twelve.pixels.repeat(20, 1, 1, 1), twelve.labels.repeat(20))
    images = load(saved(tmp_path / "d", train=every), validation_fraction=0.1, test_fraction=0.25)
    sets = [{bytes(row.numpy()) for row in images[split].pixels.flatten(1)} for split in images.splits]
    assert [len(images[split]) for split in ("test", "validation")] == [60, 32]
    assert len(images["train"]) + images.counts["copies_removed"]["train"] == 148 and len(sets[0]) >= 7
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_a_validation_split_that_is_the_test_split_is_refused(tmp_path):
    folder = saved(tmp_path / "d", train=draw(30), validation=draw(10, seed=1), test=draw(10, seed=1))
    with pytest.raises(UserError, match="validation has no usable rows; all its 10 rows are also in a held-out"):
        load(folder)


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


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1, 2], ["0", "1", "2"]),
        ([1, 2, 3], ["1", "2", "3"]),
        ([901, 9001, 101], ["101", "901", "9001"]),
        (["b", "a", "c"], ["a", "b", "c"]),
    ],
)
def test_classes_are_the_labels_that_occur(tmp_path, labels, names):
    drawn = draw(30)
    write_labelled(tmp_path / "train.parquet", drawn, labels * 10)
    write_labelled(tmp_path / "test.parquet", draw(6, seed=1), labels[:2] * 3)
    images = load(tmp_path, label_column="kind", validation_fraction=0.1)
    assert images.label_names == images.counts["class_names"] == names
    assert f"3 classes ({', '.join(names)})" in describe_images(images.counts)
    assert [images.label_names[label] for label in images["test"].labels] == [str(each) for each in labels[:2] * 3]
    of = {bytes(row.numpy()): str(label) for row, label in zip(drawn.pixels, labels * 10, strict=True)}
    for split in ("train", "validation"):
        for row, label in zip(images[split].pixels, images[split].labels, strict=True):
            assert of[bytes(row.numpy())] == images.label_names[label]


def write_labelled(path, images, labels):
    kind = Value("int64" if isinstance(labels[0], int) else "string")
    rows = {"picture": [{"bytes": as_png(p), "path": None} for p in images.pixels], "kind": labels}
    Dataset.from_dict(rows, features=Features({"picture": ImageFeature(), "kind": kind})).to_parquet(str(path))


def test_a_name_that_no_image_has_is_no_class(tmp_path):
    """Of 1,000 names two occur: a wrong class drawn among all would nearly always be one without images."""
    images = draw(40, classes=2)
    images.labels[:] = torch.where(images.labels == 0, 101, 901)
    names = [f"class {number}" for number in range(1000)]
    found = load(write_parquet(tmp_path / "train.parquet", images, names=names))
    assert found.label_names == ["class 101", "class 901"]
    assert found.counts["classes_without_images"] == [name for name in names if name not in found.label_names]
    assert "998 of the data's class names have no image (class 0, class 1, " in describe_images(found.counts)
    assert set(found["train"].labels.tolist()) == {0, 1}


def test_a_class_without_training_images_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", draw(40, classes=2))
    write_parquet(tmp_path / "test.parquet", draw(20, classes=3, seed=1))
    images = load(tmp_path)
    assert images.label_names == ["red", "green", "blue"]
    assert images.counts["classes_without_training_images"] == ["blue"]
    assert "1 of the data's class names have no training image (blue)" in describe_images(images.counts)


def test_splits_that_number_their_class_names_differently(tmp_path):
    """Each split's labels are read by its own names."""
    splits = {}
    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = Features({"img": ImageFeature(), "label": ClassLabel(names=names)})
        rows = {"img": [{"bytes": as_png(each), "path": None} for each in draw(20, seed=len(splits)).pixels]}
        splits[split] = Dataset.from_dict(rows | {"label": [0, 1, 1, 1] * 5}, features=features)
    DatasetDict(splits).save_to_disk(tmp_path / "d")
    images = load(tmp_path / "d")
    assert images.label_names == ["cat", "dog"]
    assert images["test"].labels.tolist() == [1, 0, 0, 0] * 5


def test_splits_with_labels_of_different_kinds_are_refused(tmp_path):
    parts = {"train": [1, 2] * 5, "test": ["1", "2"] * 5}
    splits = {}
    for split, labels in parts.items():
        kind = Value("int64" if split == "train" else "string")
        rows = {"img": [{"bytes": as_png(each), "path": None} for each in draw(10).pixels], "label": labels}
        splits[split] = Dataset.from_dict(rows, features=Features({"img": ImageFeature(), "label": kind}))
    DatasetDict(splits).save_to_disk(tmp_path / "e")
    with pytest.raises(UserError, match="--label_column label: integers in train, strings in test; needs"):
        load(tmp_path / "e")


# --- decoding ------------------------------------------------------------------------------------------------------


def test_decoding_gives_what_datasets_gives(tmp_path):
    """Phones store some photos upside down or on their side, with an EXIF tag: all eight values of it."""
    place = tmp_path / "photos"
    for number in range(40):
        picture = Image.fromarray(draw(1, seed=number, size=24).pixels[0].permute(1, 2, 0).numpy())
        tag = Image.Exif()
        tag[0x0112] = number % 9  # 0 is no orientation
        folder = place / ("even", "odd")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number:02}.{('jpg', 'png', 'webp', 'tiff')[number // 9 % 4]}", exif=tag)
    images = load(place, validation_fraction=0.1, test_fraction=0.1)
    theirs = load_dataset(str(place), split="train")
    expected = {bytes(np.asarray(row["image"].convert("RGB")).transpose(2, 0, 1).tobytes()) for row in theirs}
    assert {bytes(row.numpy()) for images in images.splits.values() for row in images.pixels} == expected
    turned = Image.open(sorted(place.rglob("*.jpg"))[1])
    assert bytes(np.asarray(ImageOps.exif_transpose(turned)).transpose(2, 0, 1).tobytes()) in expected


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every grey level once


def as_file(picture, kind="png", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_formats():
    """The same gray picture in every format that is read: name -> (bytes, tolerance in gray levels)."""
    grey = Image.fromarray(GREY)
    rgba = grey.convert("RGB")
    rgba.putalpha(Image.fromarray(GREY[::-1].copy()))
    palette = grey.convert("P")
    return {
        "L": (as_file(grey), 0),
        "LA": (as_file(grey.convert("LA")), 0),
        "RGBA": (as_file(rgba), 0),
        "P": (as_file(palette), 26),  # Pillow's palette has six levels of a channel
        "P, transparent": (as_file(palette, transparency=bytes(range(256))), 26),
        "gif": (as_file(grey, "gif"), 0),
        "bmp": (as_file(grey, "bmp"), 0),
        "CMYK": (as_file(grey.convert("RGB").convert("CMYK"), "tiff"), 1),
        "YCbCr": (as_file(grey.convert("RGB").convert("YCbCr"), "tiff"), 1),
    }


@pytest.mark.parametrize("name", list(grey_formats()))
def test_every_pixel_format_keeps_its_range(tmp_path, name):
    content, tolerance = grey_formats()[name]
    file = write_parquet(tmp_path / "a.parquet", draw(20), encode=with_row(content))
    images = load(file, convert_rgb=True)
    every = torch.cat([images[split].pixels for split in ("train", "validation", "test")]).int()
    off = (every - torch.from_numpy(GREY).int()).abs().flatten(1).max(1).values
    assert off.min() <= tolerance


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (as_file(Image.fromarray(GREY.astype(np.uint16) * 257)), "I;16"),
        (as_file(Image.fromarray(GREY.astype(np.uint16) * 257), "tiff"), "I;16"),
        (as_file(Image.fromarray(GREY.astype(np.uint16) * 257), "ppm"), "I"),
        (as_file(Image.fromarray(GREY.astype(np.float32) / 255), "tiff"), "F"),
    ],
    ids=["png", "tiff", "pgm", "float"],
)
def test_more_than_8_bits_are_refused_by_the_files_name(tmp_path, content, mode):
    place = tmp_path / "photos"
    for number, pixels in enumerate(draw(20).pixels):
        (place / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        (place / f"class {number % 2}" / f"{number:02}.png").write_bytes(as_png(pixels))
    (place / "class 0" / "scan 07.png").write_bytes(content)
    with pytest.raises(UserError, match=rf"^.*class 0/scan 07.png \(.*\): mode {mode} has more than 8 bits"):
        load(place, convert_rgb=True)
    (place / "class 0" / "scan 07.png").write_bytes(png("L"))
    with pytest.raises(UserError, match=r"^.*class 0/scan 07.png \(.*\) has mode L, not RGB: pass --convert_rgb"):
        load(place)


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
        (
            {"image_column": "picture"},
            r"--image_column picture: no such column of images \(found: img: Image, label:",
        ),
        ({"image_column": "label"}, r"--image_column label: no such column of images \(found: .*label: ClassLabel"),
        ({"label_column": "kind"}, r"--label_column kind: no such column of labels"),
        ({"label_column": "img"}, r"--label_column img: Image.* in train.*; needs class names"),
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
        with pytest.raises(UserError, match=f"--{next(iter(options))} does not apply to --dataset_name .*: omit it"):
            load(name, **options)


def test_one_class_is_refused(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", draw(20, classes=1), names=("red",))
    with pytest.raises(UserError, match=r"1 class \(red\); a classifier needs at least two"):
        load(file)


def test_no_image_column(tmp_path):
    Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"no single column of images \(found: text: Value, label: Value\)"):
        load(tmp_path / "a.parquet")


def test_torchvisions_folder_is_checked_before_it_is_read(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"\x80\x04not what was published")
    with pytest.raises(UserError, match="missing files or wrong checksums"):
        load(tmp_path)


def test_a_hub_id_without_a_network():
    with pytest.raises(UserError, match=r"cifar10: not a local path, and not available from the Hub.*'digits'"):
        load("uoft-cs/cifar10")
