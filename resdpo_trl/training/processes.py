"""Several processes that follow one process on the same global batch, and what says which ones really run."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from resdpo_trl.errors import UserError

# what shards a model, and the variable by which `accelerate launch` asks for it
SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}


def own_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, or its shard under FSDP2 or ZeRO-3."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    shard: Tensor = getattr(parameter, "ds_tensor", parameter)  # under ZeRO-3 the parameter is empty between steps
    return shard


def own_rows(inputs: dict[str, Any], values: Tensor) -> Tensor:
    """`values` (B, …) without the rows that only fill up an epoch's last batch."""
    return values[: inputs["own_rows"]] if "own_rows" in inputs else values


def mean_over_processes(inputs: dict[str, Any], losses: Tensor) -> Tensor:
    """What a process takes the gradient of, so that the average over processes is the mean over all their rows.

    Args:
        inputs: a training batch, with the note of `RunTrainer.keep_rows` where it is an epoch's last.
        losses: (B,) or (B, T), the losses of `own_rows`.
    """
    if "own_rows" not in inputs:
        return losses.mean()
    each = losses.mean(1) if losses.ndim > 1 else losses
    return each.sum() * PartialState().num_processes / inputs["all_rows"]


@torch.no_grad()
def share_buffers(model: torch.nn.Module) -> None:
    """Give every process the main one's buffers: batch norms' running statistics follow each process's own images."""
    if PartialState().num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def parallelism(model: Any = None) -> dict[str, Any]:
    """The processes and the kind of parallelism that really run, whatever was asked of the launcher.

    Args:
        model: the model as the trainer wrapped it. Without it, which is before training, sharding does not show yet.

    Returns:
        {"num_processes", "parallelism"}: NO, MULTI_CPU or MULTI_GPU (data parallel), FSDP2, DEEPSPEED_ZERO_n.
    """
    state = PartialState()
    kind = str(state.distributed_type.value)
    if isinstance(model, FSDPModule):
        kind = "FSDP2"
    elif hasattr(model, "zero_optimization_stage"):
        kind = f"DEEPSPEED_ZERO_{model.zero_optimization_stage()}"
    elif isinstance(model, DistributedDataParallel):
        kind = f"MULTI_{state.device.type.upper().replace('CUDA', 'GPU')}"
    elif model is not None:
        kind = "NO"
    return {"num_processes": state.num_processes, "parallelism": kind}


def fewer_than_asked() -> str | None:
    """One line where fewer processes run, or less is sharded, than the launcher was asked for; None where all is well.

    Where `accelerate launch` was asked for more than one process it sets MASTER_ADDR, and where it really starts
    several (through torchrun) it sets WORLD_SIZE too.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        return (
            "accelerate was asked for several processes and started one, as it does with --cpu and with MULTI_CPU: "
            "pass --config_file accelerate_configs/multi_cpu.yaml --num_processes N"
        )
    state = PartialState()
    if state.num_processes > 1 and not is_sharded():
        for name, variable in SHARDING.items():
            if _is_on(variable):
                return f"{name} was asked for, and accelerate runs it on GPUs only: this run is plain data parallel"
    if state.num_processes == 1 and state.device.type == "cuda" and torch.cuda.device_count() > 1:
        return (
            f"one process uses one of the {torch.cuda.device_count()} GPUs: accelerate launch --config_file "
            "accelerate_configs/multi_gpu.yaml uses them all"
        )
    return None


def is_sharded() -> bool:
    """Whether training will shard the model over processes: until then it lies whole on the CPU."""
    on_gpus = PartialState().distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)
    return on_gpus and any(map(_is_on, SHARDING.values()))


def check_sharding(args: Any) -> None:
    """Raise a UserError for what does not work where the model is sharded over processes (FSDP, DeepSpeed).

    Args:
        args: the training arguments of the stage that ends the run.
    """
    update, zero = getattr(args, "reference_update", "frozen"), args.deepspeed_plugin
    sharded = is_sharded()
    refused = {
        "parallelism_config (tensor, context and sequence parallelism)": _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"),
        "Megatron-LM": _is_on("ACCELERATE_USE_MEGATRON_LM"),
        # whole weights are checked and hashed before training
        "fsdp_cpu_ram_efficient_loading: true": sharded and _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"),
        "zero3_init_flag: true": sharded and zero is not None and zero.is_zero3_init_enabled(),
        # no model that can be loaded would be left
        "zero3_save_16bit_model: false": sharded
        and zero is not None
        and zero.zero_stage == 3
        and not zero.zero3_save_16bit_model,
        "fsdp_version: 1": sharded and _is_on(SHARDING["FSDP"]) and os.environ.get("FSDP_VERSION") != "2",
    }
    for name, is_asked in refused.items():
        if is_asked:
            raise UserError(f"{name} is not supported: use accelerate_configs/fsdp2.yaml or deepspeed_zero3.yaml")
    for name in ("save_only_model", "auto_find_batch_size"):
        if sharded and getattr(args, name):
            raise UserError(f"--{name} is not supported with FSDP and DeepSpeed: drop it")
    if sharded and update != "frozen":
        raise UserError(
            f"--reference_update {update} moves whole models, and FSDP and DeepSpeed shard them: use "
            "accelerate_configs/multi_gpu.yaml, or drop either"
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"
