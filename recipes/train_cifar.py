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

# the presets are dpo_cifar.py's: what they say of its reference stage is this recipe's training
OF_DPO = (
    "beta", "loss_type", "rejected_sampling", "output_dir", "learning_rate", "num_train_epochs", "warmup_steps"
)  # fmt: skip
OF_REFERENCE = {
    "reference_epochs": "num_train_epochs",
    "reference_learning_rate": "learning_rate",
    "reference_warmup_steps": "warmup_steps",
    "reference_label_smoothing": "label_smoothing_factor",
    "reference_optim": "optim",
    "reference_optim_args": "optim_args",
    "reference_weight_decay": "weight_decay",
    "reference_bias_learning_rate_scale": "bias_learning_rate_scale",
    "reference_muon_learning_rate": "muon_learning_rate",
}


def main() -> None:
    parser = RecipeParser(
        (ImageDataConfig, ImageModelConfig, AugmentConfig, ImageCrossEntropyConfig, RunConfig), description=__doc__
    )
    (data, model, augment, training, options), preset = parser.parse(
        not_from_presets=OF_DPO, renamed_in_presets=OF_REFERENCE
    )

    # heavy imports wait until the command line is known to be right
    from resdpo_trl.image.pipeline import ImageRun

    job = ImageRun(data, model, augment, options, training, preset=preset, given=parser.given)
    job.say_what_runs()
    images = job.prepare_images()
    job.train_cross_entropy(images)
    job.finish()


if __name__ == "__main__":
    run(main)
