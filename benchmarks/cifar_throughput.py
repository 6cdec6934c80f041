"""Images per second of a DPO run on images, against the bare step on random tensors and a hand-written loop.

    python benchmarks/cifar_throughput.py [--network resnet50|resnet18|fast] [--batch_size 256] [--rounds 3]
        [--torch_compile] [--peer SCRIPT]

One JSON line a row. `run` is `ImageDPOTrainer` as dpo_cifar.py uses it, on 10,000 random images: order, gather,
augmentation, normalization, rejected classes, metrics and logging included. `bare` is what cannot be avoided: both
networks, the loss, the backward pass and the optimizer on one random batch that is ready; `fast` has its preset's Muon
in both. They take turns, `--rounds` times, so that a machine that slows down slows both. `ratio` is run over bare, of
the medians; `share_of_peak` counts the multiply-adds of the networks (policy forward and backward, reference forward)
against a matrix product's speed, measured in the same process. A --peer is a script that prints one JSON line with
images_per_second.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from resdpo_trl.image.config import ImageDPOConfig
from resdpo_trl.image.data import AugmentConfig, Images
from resdpo_trl.image.model import ImageClassifierConfig, build_classifier, image_processor
from resdpo_trl.image.muon import with_muon
from resdpo_trl.image.trainer import ImageDPOTrainer
from resdpo_trl.run.folder import RunFolder, hardware, use_the_cores
from resdpo_trl.training.arguments import has_bfloat16, has_cuda
from resdpo_trl.training.callbacks import use_run_callbacks

CLASSES, SIZE, WARM_UP = 10, 32, 3


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def network(name: str) -> torch.nn.Module:
    config = ImageClassifierConfig(
        arch=name, stem="imagenet" if name == "resnet50" else "cifar", num_labels=CLASSES, image_size=SIZE
    )
    return build_classifier(config, seed=0, images=torch.randn(500, 3, SIZE, SIZE))


def matrix_product_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a 2048×2048 matrix product, the best of ten."""
    a = torch.randn(2048, 2048, dtype=dtype, device=device)
    times = []
    for _ in range(10):
        synchronize()
        started = time.perf_counter()
        a @ a
        synchronize()
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def forward_flops(model: torch.nn.Module) -> int:
    """Operations of one image's forward pass."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        copy.deepcopy(model).eval()(torch.randn(1, 3, SIZE, SIZE))
    return counter.get_total_flops()


class Clock(TrainerCallback):
    """When the steps after the warm-up began and ended."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARM_UP, state.max_steps):
            synchronize()
            self.started, self.ended = getattr(self, "ended", 0.0), time.perf_counter()


def run(model: torch.nn.Module, options: argparse.Namespace) -> float:
    """Images per second of the trainer."""
    generator = torch.Generator().manual_seed(0)
    count = max(10_000, 2 * options.batch_size)
    images = Images(
        torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator),
        torch.randint(0, CLASSES, (count,), generator=generator),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = ImageDPOTrainer(
            model=copy.deepcopy(model),
            ref_model=copy.deepcopy(model),
            args=ImageDPOConfig(
                output_dir=folder,
                max_steps=options.steps + WARM_UP,
                per_device_train_batch_size=options.batch_size,
                optim="sgd",
                optim_args="momentum=0.9,nesterov=true",
                learning_rate=1e-3,
                muon_learning_rate=1e-3 if options.network == "fast" else 0.0,
                eval_strategy="no",
                save_strategy="no",
                select="last",
                logging_steps=5,
                disable_tqdm=True,
                torch_compile=options.torch_compile,
            ),
            train=images,
            validation=None,
            processor=image_processor(SIZE, [0.5] * 3, [0.25] * 3),
            augment=AugmentConfig(),
        )
        run = RunFolder(folder)
        run.open()
        run.start({}, seed=0)
        use_run_callbacks(trainer, run, "dpo", "DPO")
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    return options.batch_size * options.steps / (clock.ended - clock.started)


def bare(model: torch.nn.Module, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> float:
    """Images per second of the step alone."""
    policy = copy.deepcopy(model).to(device, memory_format=torch.channels_last).train()
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    if options.torch_compile:
        policy, reference = torch.compile(policy), torch.compile(reference)
    filters = [weight for weight in policy.parameters() if weight.ndim == 4 and options.network == "fast"]
    others = [weight for weight in policy.parameters() if weight.ndim != 4 or options.network != "fast"]
    groups = [{"params": others}, *([{"params": filters, "muon": True}] if filters else [])]
    optimizer = with_muon(torch.optim.SGD)(groups, lr=1e-3, momentum=0.9, nesterov=True)
    images = torch.randn(options.batch_size, 3, SIZE, SIZE, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (options.batch_size, 1), device=device)
    wrong = (labels + 1) % CLASSES
    for step in range(options.steps + WARM_UP):
        if step == WARM_UP:
            synchronize()
            started = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                ref_logps = reference(images).logits.float().log_softmax(1)
            ratios = policy(images).logits.float().log_softmax(1) - ref_logps
        F.softplus(-0.1 * (ratios.gather(1, labels) - ratios.gather(1, wrong))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    synchronize()
    return options.batch_size * options.steps / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", choices=["resnet50", "resnet18", "fast"])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torch_compile", action="store_true")
    parser.add_argument("--peer", help="a script that prints one JSON line with images_per_second")
    options = parser.parse_args()
    use_the_cores()
    device = torch.device("cuda" if has_cuda() else "cpu")
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    model = network(options.network)
    rounds: dict[str, list[float]] = {"run": [], "bare": []}
    for _ in range(options.rounds):
        rounds["bare"].append(bare(model, options, device, dtype))
        rounds["run"].append(run(model, options))
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    useful = 4 * forward_flops(model) * medians["run"]  # policy: 1 forward, 2 backward; reference: 1 forward
    machine = hardware()
    for name, values in rounds.items():
        row = {
            "what": name, "network": options.network, "batch_size": options.batch_size, "dtype": str(dtype),
            "torch_compile": options.torch_compile, "images_per_second": [round(value, 1) for value in values],
            "device": machine["gpus"][0] if machine["gpus"] else machine["cpu"], "threads": machine["cpu_threads"],
        }  # fmt: skip
        if name == "run":
            row["ratio"] = round(medians["run"] / medians["bare"], 3)
            row["share_of_peak"] = round(useful / matrix_product_flops(dtype, device), 3)
        print(json.dumps(row))
    if options.peer:
        done = subprocess.run([sys.executable, options.peer], capture_output=True, text=True, check=True)
        peer = json.loads(done.stdout.strip().splitlines()[-1])["images_per_second"]
        print(json.dumps({"what": options.peer, "images_per_second": peer, "times": round(medians["run"] / peer, 2)}))


if __name__ == "__main__":
    main()
