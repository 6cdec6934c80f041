"""Accuracy, accuracy by class, confusion matrix and calibration of a classifier. --reference adds rewards and KL.

# the quickstart's policy against its reference, on the test images
accelerate launch recipes/evaluate_cifar.py --model runs/digits/policy --reference runs/digits/reference \\
  --output runs/digits/evaluation.json

# any classifier that train_cifar.py or dpo_cifar.py saved, on CIFAR-10's test images
accelerate launch recipes/evaluate_cifar.py --model FOLDER_OR_ID --dataset_name uoft-cs/cifar10
"""

from command_line import RecipeParser, on_one_process, run

from resdpo_trl.image.data import ImageDataConfig
from resdpo_trl.image.evaluate import EvaluateConfig, describe, evaluate


def main() -> None:
    on_one_process()
    (config, data), _ = RecipeParser((EvaluateConfig, ImageDataConfig), description=__doc__).parse()
    print(describe(evaluate(config, data)))


if __name__ == "__main__":
    run(main)
