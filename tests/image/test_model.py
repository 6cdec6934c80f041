import json

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from resdpo_trl.errors import UserError
from resdpo_trl.image.data import Images, LabelledImages
from resdpo_trl.image.model import (
    ImageClassifier,
    ImageClassifierConfig,
    Whitening,
    architectures,
    as_numbered_by,
    build_classifier,
    check_architecture,
    image_processor,
    load_classifier,
)
from tests.image.conftest import draw

NAMES = {0: "red", 1: "green", 2: "blue", 3: "yellow"}
IMAGES = torch.randn(50, 3, 16, 16)


def config(**options):
    names = {"id2label": NAMES, "label2id": {name: k for k, name in NAMES.items()}}
    return ImageClassifierConfig(**{"arch": "fast", "widths": [24, 24], "image_size": 16} | names | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "dropout", "dropout": 0.3},
        {"arch": "resnet18"},
        {"arch": "resnet18", "stem": "imagenet"},
        {"arch": "resnet50", "head": "dropout"},
    ],
    ids=str,
)
def test_a_saved_folder_gives_the_same_model(tmp_path, options):
    model = build_classifier(config(**options), seed=0, images=IMAGES).train()
    model(IMAGES)  # moves the batch norms' statistics, which must travel too
    model.eval().save_pretrained(tmp_path)
    image_processor(16, [0.5] * 3, [0.25] * 3).save_pretrained(tmp_path)
    for loaded in (
        AutoModelForImageClassification.from_pretrained(tmp_path),
        load_classifier(str(tmp_path), "--model"),
    ):
        assert isinstance(loaded, ImageClassifier)
        assert not loaded.training
        torch.testing.assert_close(loaded(IMAGES).logits, model(IMAGES).logits)
        assert loaded.config.id2label == NAMES
        names = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))


def test_a_pipeline_takes_a_picture(tmp_path):
    """What the pipeline computes from a PIL image is what training computed from the pixels."""
    from PIL import Image

    model = build_classifier(config(), seed=0, images=IMAGES).eval()
    model.save_pretrained(tmp_path)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    image_processor(16, mean, std).save_pretrained(tmp_path)
    assert list(AutoImageProcessor.from_pretrained(tmp_path).image_mean) == mean
    classify = pipeline("image-classification", model=str(tmp_path))
    pixels = draw(3).pixels
    normalized = (pixels.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = model(normalized).logits.softmax(1)
    for row in range(3):
        answer = classify(Image.fromarray(pixels[row].permute(1, 2, 0).numpy()), top_k=4)
        for entry in answer:
            assert entry["score"] == pytest.approx(
                expected[row, model.config.label2id[entry["label"]]].item(), abs=1e-5
            )


def test_whitening_makes_patches_white():
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.avg_pool2d(torch.randn(400, 3, 18, 18, generator=generator), 3, 1) * 3
    whitening = Whitening()
    whitening.fit(images, epsilon=0.0)
    out = whitening(images).permute(1, 0, 2, 3).reshape(24, -1)
    torch.testing.assert_close(torch.cov(out[:12]), torch.eye(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[12:], -out[:12])
    assert "weight" not in dict(whitening.named_parameters())


def test_the_fast_network_starts_at_the_identity():
    model = build_classifier(config(widths=[24, 32]), seed=0, images=IMAGES)
    kernel = model.network.stages[0].conv2.weight
    torch.testing.assert_close(kernel, torch.nn.init.dirac_(torch.empty_like(kernel)))


def test_the_cifar_stem_keeps_the_resolution():
    model = ImageClassifier(config(arch="resnet18"))
    assert model.network.conv1.weight.shape == (64, 3, 3, 3)
    assert isinstance(model.network.maxpool, torch.nn.Identity)
    plain = ImageClassifier(config(arch="resnet18", stem="imagenet"))
    theirs = models.resnet18(num_classes=4)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_the_seed_draws_the_weights_and_leaves_the_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (build_classifier(config(), seed, IMAGES).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_pretrained_weights_by_name_and_from_a_file(tmp_path, monkeypatch, stem):
    state = models.resnet18().state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **options: state)
    for name in ("DEFAULT", str(tmp_path / "weights.safetensors")):
        model = build_classifier(config(arch="resnet18", stem=stem), seed=0, pretrained_weights=name)
        own = model.network.state_dict()
        assert torch.equal(own["layer3.0.conv1.weight"], state["layer3.0.conv1.weight"])
        assert (own["conv1.weight"].shape == state["conv1.weight"].shape) == (stem == "imagenet")


# --- what is refused -----------------------------------------------------------------------------------------------


def test_an_unknown_architecture_names_the_nearest():
    assert {"fast", "resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2"} <= set(architectures())
    with pytest.raises(UserError, match="--arch resnet19: unknown; did you mean resnet18"):
        check_architecture("resnet19")


@pytest.mark.parametrize(("widths", "least"), [([24, 24, 24], 9), ([24, 24], 5)])
def test_the_fast_network_says_what_images_are_too_small(widths, least):
    with pytest.raises(
        UserError, match=rf"--arch fast: .* {least}×{least} pixels or more, and these have {least - 1}×"
    ):
        build_classifier(config(widths=widths, image_size=least - 1), 0, IMAGES[:, :, : least - 1, : least - 1])
    smallest = build_classifier(config(widths=widths, image_size=least), 0, IMAGES[:, :, :least, :least])
    assert smallest(IMAGES[:, :, :least, :least]).logits.shape == (50, 4)


@pytest.mark.parametrize(
    ("arch", "weights", "message"),
    [
        ("resnet18", "IMAGENET9", "resnet18 has IMAGENET1K_V1, DEFAULT"),
        ("fast", "DEFAULT", "torchvision has none for --arch fast"),
        ("resnet18", "weights.pth", "or name a .safetensors file"),
        ("resnet18", "missing.safetensors", "can't be loaded .*No such file"),
    ],
)
def test_weights_that_are_not_there(arch, weights, message):
    with pytest.raises(UserError, match=message):
        build_classifier(config(arch=arch), seed=0, images=IMAGES, pretrained_weights=weights)


def test_the_weights_of_another_architecture(tmp_path):
    save_file(models.resnet34().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="not the weights of resnet50"):
        build_classifier(config(arch="resnet50"), seed=0, pretrained_weights=str(tmp_path / "w.safetensors"))


def test_folders_that_are_not_classifiers(tmp_path):
    with pytest.raises(UserError, match=r"not a model folder \(no config.json in it\)"):
        load_classifier(str(tmp_path), "--reference")
    with pytest.raises(UserError, match="no such folder"):
        load_classifier(str(tmp_path / "nothing"), "--reference")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"--reference .*can't be loaded"):
        load_classifier(str(tmp_path), "--reference")


@pytest.mark.parametrize("first", ["import resdpo_trl.image", "import transformers.models.auto, resdpo_trl.image.data"])
def test_transformers_knows_the_folders_whatever_is_imported_first(tmp_path, first):
    import subprocess
    import sys

    build_classifier(config(), seed=0, images=IMAGES).save_pretrained(tmp_path)
    code = f"{first}\nfrom transformers import AutoConfig\nprint(type(AutoConfig.from_pretrained({str(tmp_path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ImageClassifierConfig" in done.stdout


def test_the_package_alone_imports_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, resdpo_trl; print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_whitening_of_grey_images_leaves_no_channel_that_never_varies():
    """Such a channel's batch norm multiplies gradients by 1/√ε: bfloat16 runs on digits ended in infinities."""
    grey = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    whitening = Whitening()
    whitening.fit(grey)
    spread = whitening(grey).std(dim=(0, 2, 3))
    torch.testing.assert_close(spread, torch.ones(24), rtol=0.05, atol=0.0)


def test_the_datas_classes_are_numbered_as_the_classifier_numbers_them():
    """One data set lacks a class, one has another order, one has a class that the classifier does not know."""
    model = ImageClassifier(config(id2label=dict(enumerate(["cat", "dog", "fish"])), label2id=None))
    pixels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    for names, labels, expected in (
        (["cat", "fish"], [0, 1, 1, 0], [0, 2, 2, 0]),
        (["fish", "dog", "cat"], [0, 1, 2, 2], [2, 1, 0, 0]),
    ):
        splits = {split: Images(pixels, torch.tensor(labels)) for split in ("train", "validation", "test")}
        found = as_numbered_by(model, LabelledImages(splits, names, {}), "--model", "m")
        assert found.label_names == ["cat", "dog", "fish"]
        assert all(found[split].labels.tolist() == expected for split in splits)
    with pytest.raises(UserError, match=r"--model m: the data has a class bird, .* its 3 classes \(cat, dog, fish\)"):
        as_numbered_by(model, LabelledImages(splits, ["cat", "bird"], {}), "--model", "m")
