"""Cross-entropy: one epoch makes the reference that DPO starts from, more make the baseline it is measured against.

# ResNet-18 with a CIFAR stem on CIFAR-10, one epoch with a triangular schedule, its convolutions by Muon
accelerate launch recipes/train_cifar.py --arch resnet18 --dataset_name uoft-cs/cifar10 --optim sgd \\
  --optim_args momentum=0.9,nesterov=true --learning_rate 0.1 --muon_learning_rate 0.1 --warmup_steps 0.2 \\
  --weight_decay 5e-4 --label_smoothing_factor 0.1 --num_train_epochs 1

# the fast network with the settings of its preset's reference stage
accelerate launch recipes/train_cifar.py --arch fast --dataset_name uoft-cs/cifar10 --optim sgd \\
  --optim_args momentum=0.85,nesterov=true --learning_rate 0.05 --muon_learning_rate 0.1 --warmup_steps 0.2 \\
  --weight_decay 1.3e-3 --bias_learning_rate_scale 16 --label_smoothing_factor 0.2 --per_device_train_batch_size 64 \\
  --num_train_epochs 1
"""

from command_line import RecipeParser, run

from resdpo_trl.arguments import RunConfig
from resdpo_trl.image.augment import AugmentConfig
from resdpo_trl.image.config import CrossEntropyConfig, ImageModelConfig
from resdpo_trl.image.data import ImageDataConfig


def main() -> None:
    parser = RecipeParser(
        (ImageDataConfig, ImageModelConfig, AugmentConfig, CrossEntropyConfig, RunConfig), description=__doc__
    )
    (data, model, augment, training, options), preset = parser.parse()

    # heavy imports wait until the command line is known to be right
    from resdpo_trl.image.pipeline import ImageRun

    job = ImageRun(data, model, augment, options, training, preset=preset)
    job.say_what_runs()
    images = job.prepare_images()
    job.train_cross_entropy(images)
    job.finish()


if __name__ == "__main__":
    run(main)
