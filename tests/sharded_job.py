"""Whole recipes under accelerate's FSDP2 and DeepSpeed code on two gloo CPU processes, each held against one process.

accelerate shards on GPUs only. `run_as_on_gpus` answers its question whether there is one. All else is the code that
runs on GPUs: the recipes, accelerate's reading of accelerate_configs/*.yaml, `fully_shard`, DeepSpeed's engine, their
checkpoints.

python -m tests.sharded_job prints the differences (docs/distributed.md).
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"
GLOBAL_BATCH = 4
SPLITS = {"train": 21, "validation": 9, "test": 5}  # rows: the last batch of every split is a smaller one
COMMON = [
    "--max_length", "96", "--max_train_samples", "21", "--max_eval_samples", "9", "--max_test_samples", "5",
    "--logging_steps", "1", "--per_device_eval_batch_size", "2", "--disable_tqdm", "true", "--report_to", "none",
]  # fmt: skip
DPO = ["--num_samples", "0", "--learning_rate", "1e-3"]
ADAPTER = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "1e-2"]


@dataclass
class Case:
    """A recipe's flags, and what is known of the run that they give."""

    recipe: str
    stage: str
    model: str
    flags: list[str]
    sft_batch: int | None = None
    accumulated: int = 1
    kill_before: str | None = None  # the main process's file operation before which it is killed; then it is resumed

    @property
    def bfloat16(self) -> bool:
        return self.flags[self.flags.index("--bf16") + 1] == "true"


CASES = {
    # SFT and DPO, the best epoch not the last, killed between two checkpoints of DPO
    "dpo, float32": Case(
        "dpo_hh.py", "dpo", "gpt2",
        [*DPO, "--bf16", "false", "--sft.learning_rate", "1e-3", "--num_train_epochs", "2",
         "--metric_for_best_model", "logps/chosen", "--greater_is_better", "false"],
        sft_batch=8, kill_before="os.rename checkpoints/dpo/unfinished/checkpoint-12",
    ),
    "dpo, bfloat16": Case(
        "dpo_hh.py", "dpo", "gpt2",
        [*DPO, "--bf16", "true", "--sft.num_train_epochs", "0", "--gradient_checkpointing", "true",
         "--num_train_epochs", "2"],
        accumulated=2,
    ),
    "dpo, float32, LoRA": Case(
        "dpo_hh.py", "dpo", "llama", [*DPO, *ADAPTER, "--bf16", "false", "--sft.num_train_epochs", "0"], accumulated=2
    ),
    "sft, bfloat16, LoRA": Case(
        "sft_hh.py", "sft", "llama",
        ["--num_samples", "0", *ADAPTER, "--bf16", "true", "--gradient_checkpointing", "true"],
    ),
    "reward, float32": Case(
        "reward_hh.py", "reward", "llama", ["--learning_rate", "1e-3", "--bf16", "false", "--sft.num_train_epochs", "0"]
    ),
    "reward, bfloat16, LoRA": Case(
        "reward_hh.py", "reward", "llama", [*ADAPTER, "--bf16", "true", "--sft.num_train_epochs", "0"]
    ),
}  # fmt: skip
FULL = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
WRAPPERS = {
    "FSDP2": ("fsdp2.yaml", {}, "FSDP2"),
    "FSDP2, full checkpoints": ("fsdp2.yaml", FULL, "FSDP2"),
    "ZeRO-2": ("deepspeed_zero2.yaml", {}, "DEEPSPEED_ZERO_2"),
    "ZeRO-3": ("deepspeed_zero3.yaml", {}, "DEEPSPEED_ZERO_3"),
}
SAMPLED = {"FSDP2, full checkpoints": ["dpo, float32", "sft, bfloat16, LoRA"]}
MATRIX = [(wrapper, case) for wrapper in WRAPPERS for case in SAMPLED.get(wrapper, CASES)]


def run_as_on_gpus() -> None:
    """In this process: distributed training is of accelerate's kind for GPUs, over gloo and in the CPU's memory. The LM
    head is TRL's function, as on CUDA, with more than one tile of the vocabulary."""
    import accelerate.state
    import transformers.training_args
    from accelerate.utils import DistributedType, is_deepspeed_available

    import resdpo_trl.text.scoring
    import resdpo_trl.training.arguments

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    accelerate.state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    resdpo_trl.training.arguments.has_accelerator = lambda: True
    resdpo_trl.text.scoring.FUSED_ON = ("cpu",)
    resdpo_trl.text.scoring.VOCABULARY_TILE = 128
    if is_deepspeed_available():
        # collectives of the CPU alone, which would be compiled first; `deepspeed.comm.torch` by name is torch itself
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def launch_environment(config: Path) -> list[dict[str, str]]:
    """What `accelerate launch --config_file config --num_processes 2` sets for each process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["--config_file", str(config), "--num_processes", "2", "--main_process_port", port, "recipe"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.deepspeed_fields_from_accelerate_config = ""  # for a message about configurations that conflict
    prepared = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    own = {name: value for name, value in prepared.items() if os.environ.get(name) != value}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    own["OMP_NUM_THREADS"] = "1"
    return [own | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


class Runs:
    """The runs of `CASES`, each made once."""

    def __init__(self, folder: Path):
        from tests.conftest import ANSWERS, TURNS, save_model, train_tokenizer, write_pairs
        from tests.recipes.killing import Server

        self.folder = folder
        self.servers = [Server(folder), Server(folder)]
        pairs = folder / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in write_pairs(120)))
        tokenizer = train_tokenizer([*TURNS, *ANSWERS], 400)
        save_model(folder / "gpt2", tokenizer, resid_pdrop=0.0, embd_pdrop=0.0, n_layer=2)
        save_model(folder / "llama", tokenizer, "llama")

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def one(self, name: str, bfloat16: bool | None = None) -> Path:
        """The folder of a case's run on one process, with another precision than its own if asked."""
        case = CASES[name]
        bfloat16 = case.bfloat16 if bfloat16 is None else bfloat16
        folder = self.folder / f"{name} on one, {bfloat16}"
        if not folder.exists():
            arguments = [*self._arguments(case, 1, folder), "--bf16", str(bfloat16).lower(), "--use_cpu"]
            answer = self.servers[0].run(case.recipe, arguments, folder.with_suffix(".log"))
            assert answer["status"] == 0, folder.with_suffix(".log").read_text()[-3000:]
        return folder

    def two(self, wrapper: str, name: str) -> Path:
        """The folder of a case's run on two processes; killed and resumed where the case says so."""
        case = CASES[name]
        folder = self.folder / f"{name} under {wrapper}"
        arguments = self._arguments(case, 2, folder)
        if case.kill_before:
            statuses = self._launch(wrapper, case, arguments, folder, kill_before=case.kill_before)
            assert statuses[0] == -9 and statuses[1] not in (0, 2), self._said(folder)
            arguments.append("--resume_from_checkpoint")
        statuses = self._launch(wrapper, case, arguments, folder)
        assert statuses == [0, 0], self._said(folder)
        return folder

    def _said(self, folder: Path) -> str:
        return "\n".join(folder.with_suffix(f".{rank}.log").read_text()[-3000:] for rank in (0, 1))

    def _launch(self, wrapper: str, case: Case, arguments: list, folder: Path, **how) -> list[int]:
        config, changes, _ = WRAPPERS[wrapper]
        for rank, environment in enumerate(launch_environment(CONFIGS / config)):
            log = folder.with_suffix(f".{rank}.log")
            self.servers[rank].start(case.recipe, arguments, log, environment=environment | changes, **how)
            how = {}  # the main process alone is killed: the other one sees it
        return [server.answer()["status"] for server in self.servers]

    def _arguments(self, case: Case, processes: int, folder: Path) -> list:
        batch = GLOBAL_BATCH // processes // case.accumulated
        arguments = [*COMMON, *case.flags, "--output_dir", folder, "--dataset_name", self.folder / "pairs.jsonl"]
        arguments += ["--model_name_or_path", self.folder / case.model, "--per_device_train_batch_size", batch]
        arguments += ["--gradient_accumulation_steps", case.accumulated]
        if case.sft_batch:
            arguments += ["--sft.per_device_train_batch_size", case.sft_batch // processes]
        if case.stage == "dpo":
            arguments += ["--reference_cache_dir", folder / "cache"]
        return arguments


def differences(one: Path, two: Path) -> dict[str, float]:
    """How far two runs of a case are apart: the largest absolute difference of a loss in metrics.jsonl, the largest
    relative one of a mean log-probability there, the largest relative one of a response's log-probability under the
    reference, and the mean absolute one of a weight that was published."""
    first, second = (read_rows(each / "metrics.jsonl") for each in (one, two))
    places = [[(row["stage"], row["split"], row["step"]) for row in rows] for rows in (first, second)]
    assert places[0] == places[1]
    found = {"loss": max(abs(own["loss"] - other["loss"]) for own, other in zip(first, second, strict=True))}
    figures = [
        abs(other[name] / own[name] - 1)
        for own, other in zip(first, second, strict=True)
        for name in ("logps/chosen", "logps/rejected")
        if name in own
    ]
    if figures:
        found["log-probability, mean of a batch"] = max(figures)
    responses = per_response(one / "cache"), per_response(two / "cache")
    if all(responses):
        assert [len(each) for each in responses] == [2 * sum(SPLITS.values())] * 2
        found["log-probability, response"] = max(abs(other / own - 1) for own, other in zip(*responses, strict=True))
    own, other = published(one), published(two)  # the other's may hold tied weights by both of their names
    apart = [(own[name].double() - other[name].double()).abs().flatten() for name in own]
    return found | {"weight": torch.cat(apart).mean().item()}


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def published(run: Path) -> dict[str, torch.Tensor]:
    """The weights in the folder that a run ends with."""
    folder = next(run / name for name in ("policy", "reward_model", "reference") if (run / name).is_dir())
    return load_file(next(folder.glob("*.safetensors")))


def per_response(cache: Path) -> list[float]:
    """The log-probability of every response under the reference, from the cache; of the largest split first."""
    tables = sorted(map(load_file, cache.glob("*.safetensors")), key=lambda table: -len(table["chosen"]))
    return [value for table in tables for name in ("chosen", "rejected") for value in table[name].tolist()]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    asked = sys.argv[2] if len(sys.argv) > 2 else ""
    runs = Runs(folder)
    for wrapper, name in MATRIX:
        if asked not in f"{name} under {wrapper}":
            continue
        try:
            found = differences(runs.one(name), runs.two(wrapper, name))
            if CASES[name].bfloat16 and CASES[name].stage == "dpo":
                exact = differences(runs.one(name, bfloat16=False), folder / f"{name} under {wrapper}")
                found |= {f"{what}, from float32": value for what, value in exact.items()}
        except AssertionError as error:
            print(f"{wrapper} | {name} | {str(error)[-1500:]}", flush=True)
            continue
        print(f"{wrapper} | {name} | " + ", ".join(f"{what} {value:.1e}" for what, value in found.items()), flush=True)
    runs.close()


if __name__ == "__main__":
    main()
