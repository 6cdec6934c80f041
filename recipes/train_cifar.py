"""Train a classifier with cross-entropy: one epoch for a reference of DPO, more epochs for its baseline.

# the fast network on CIFAR-10 for one epoch: the reference stage of its preset
accelerate launch recipes/train_cifar.py --config recipes/configs/cifar/fast.yaml

# ResNet-18 with a CIFAR stem, ten epochs
accelerate launch recipes/train_cifar.py --config recipes/configs/cifar/resnet18.yaml --num_train_epochs 10

# another network on your own images, with every setting as a flag
accelerate launch recipes/train_cifar.py --arch resnet34 --dataset_name FOLDER --num_train_epochs 10 --optim sgd \\
  --optim_args momentum=0.9,nesterov=true --learning_rate 0.1 --warmup_steps 0.2 --weight_decay 5e-4
"""

from command_line import RecipeParser, run

from resdpo_trl.image.config import ImageCrossEntropyConfig, ImageModelConfig
from resdpo_trl.image.data import AugmentConfig, ImageDataConfig
from resdpo_trl.training.arguments import RunConfig


def main() -> None:
    parser = RecipeParser(
        (ImageDataConfig, ImageModelConfig, AugmentConfig, ImageCrossEntropyConfig, RunConfig),
        description=__doc__,
        section="reference",
    )
    (data, model, augment, training, options), preset = parser.parse()

    # import heavy modules only after the command line is checked
    from resdpo_trl.image.pipeline import ImageRun

    job = ImageRun(data, model, augment, options, training, preset=preset, given=parser.given)
    job.say_what_runs()
    images = job.prepare_images()
    job.train_cross_entropy(images)
    job.finish()


if __name__ == "__main__":
    run(main)
