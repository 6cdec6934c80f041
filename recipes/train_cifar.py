"""Cross-entropy: one epoch makes the reference that DPO starts from, more make the baseline it is measured against.

# the fast network on CIFAR-10 for one epoch: the reference stage of its preset
accelerate launch recipes/train_cifar.py --config recipes/configs/cifar/fast.yaml

# ResNet-18 with a CIFAR stem, ten epochs
accelerate launch recipes/train_cifar.py --config recipes/configs/cifar/resnet18.yaml --num_train_epochs 10

# a network of your own choice on images of your own, every setting a flag
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

    # heavy imports wait until the command line is known to be right
    from resdpo_trl.image.pipeline import ImageRun

    job = ImageRun(data, model, augment, options, training, preset=preset, given=parser.given)
    job.say_what_runs()
    images = job.prepare_images()
    job.train_cross_entropy(images)
    job.finish()


if __name__ == "__main__":
    run(main)
