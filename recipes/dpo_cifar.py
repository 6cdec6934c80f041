"""Train a reference with cross-entropy, then a policy with DPO, which prefers the true class to wrong classes.

# two CPU cores, no network, half a minute: a small network on handwritten digits
accelerate launch recipes/dpo_cifar.py --compare_cross_entropy

# the small fast network on all of CIFAR-10 (uoft-cs/cifar10, or a local folder with --dataset_name)
accelerate launch recipes/dpo_cifar.py --config recipes/configs/cifar/fast.yaml

# ResNet-18, with a reference that is copied each epoch
accelerate launch recipes/dpo_cifar.py --config recipes/configs/cifar/resnet18.yaml --reference_update copy

# from a classifier that train_cifar.py made, with three modes side by side
accelerate launch recipes/dpo_cifar.py --config recipes/configs/cifar/fast.yaml \\
  --reference runs/train_cifar/policy --compare_modes hard/polyak all/copy --compare_cross_entropy
"""

from command_line import RecipeParser, run

from resdpo_trl.image.config import ImageCrossEntropyConfig, ImageDPOConfig, ImageModelConfig
from resdpo_trl.image.data import AugmentConfig, ImageDataConfig
from resdpo_trl.training.arguments import RunConfig


def main() -> None:
    parser = RecipeParser(
        (ImageDataConfig, ImageModelConfig, AugmentConfig, ImageDPOConfig, RunConfig),
        description=__doc__,
        section="dpo",
        before=("reference", ImageCrossEntropyConfig),
    )
    (data, model, augment, dpo, options, cross_entropy), preset = parser.parse(default_preset="cifar/quickstart.yaml")

    # import heavy modules only after the command line is checked
    from resdpo_trl.image.pipeline import ImageRun

    job = ImageRun(data, model, augment, options, dpo, cross_entropy, preset, parser.given)
    job.say_what_runs()
    images = job.prepare_images()
    job.make_reference(images)
    job.make_policy(images)
    job.compare(images)
    job.finish()


if __name__ == "__main__":
    run(main)
