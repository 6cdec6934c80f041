import pytest
import torch
from torchvision.transforms.v2 import functional

from resdpo_trl.image.data import Images
from resdpo_trl.image.evaluate import classification_figures, image_logps
from resdpo_trl.image.model import ImageClassifierConfig, build_classifier, image_processor

IMAGES = Images(torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8), torch.arange(7) % 4)
PROCESSOR = image_processor(16, [0.5] * 3, [0.25] * 3)


@pytest.fixture(scope="module")
def model():
    config = ImageClassifierConfig(arch="fast", widths=[24, 24], image_size=16, num_labels=4)
    return build_classifier(config, seed=0, images=torch.randn(50, 3, 16, 16)).eval()


def logits(model, pixels):
    return model(functional.normalize(pixels / 255, [0.5] * 3, [0.25] * 3)).logits


@torch.no_grad()
def test_log_probabilities_are_in_the_order_of_the_images(model):
    found = image_logps(model, IMAGES, PROCESSOR, batch_size=3)
    torch.testing.assert_close(found, logits(model, IMAGES.pixels).log_softmax(1))


@torch.no_grad()
def test_views_are_averaged(model):
    two = image_logps(model, IMAGES, PROCESSOR, batch_size=3, test_time_views=2)
    mean = (logits(model, IMAGES.pixels) + logits(model, IMAGES.pixels.flip(3))) / 2
    torch.testing.assert_close(two, mean.log_softmax(1))
    six = image_logps(model, IMAGES, PROCESSOR, batch_size=3, test_time_views=6)
    # half the weight on the two views above, half on these four: moved down and right, and up and left
    wide = torch.nn.functional.pad(IMAGES.pixels.float(), [1] * 4, mode="reflect")
    moved = [wide[:, :, :-2, :-2], wide[:, :, 2:, 2:]]
    of_moved = sum(logits(model, view) + logits(model, view.flip(3)) for view in moved) / 4
    torch.testing.assert_close(six, ((mean + of_moved) / 2).log_softmax(1))


def test_figures_of_known_probabilities():
    logps = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]).log()
    labels = torch.tensor([0, 1, 1, 1])
    figures = classification_figures(logps, labels, ["a", "b", "c"])
    assert figures["accuracy"] == 0.5 and figures["n"] == 4
    assert figures["accuracy_by_class"] == {"a": 1.0, "b": pytest.approx(1 / 3), "c": None}
    assert figures["confusion_matrix"] == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    # confidence less accuracy of each bin of 1/15: |0.7 − 1|, |0.8 − 1|, and 0.6 twice with nothing right
    assert figures["calibration_error"] == pytest.approx((0.3 + 0.2 + 2 * 0.6) / 4, abs=1e-6)
