"""Training with several processes that matches one process with the same global batch, and checks of the launch."""

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

# sharding methods, and the environment variables that `accelerate launch` sets to request them
SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}


def own_part(parameter: Tensor) -> Tensor:
    """This process's part of a parameter: the shard under FSDP2 or ZeRO-3, otherwise the whole parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    shard: Tensor = getattr(parameter, "ds_tensor", parameter)  # under ZeRO-3 the parameter is empty between steps
    return shard


def own_rows(inputs: dict[str, Any], values: Tensor) -> Tensor:
    """`values` (B, …) without the rows that pad an epoch's last batch."""
    return values[: inputs["own_rows"]] if "own_rows" in inputs else values


def mean_over_processes(inputs: dict[str, Any], losses: Tensor) -> Tensor:
    """The loss of this process, scaled so that the average over processes is the mean over all their rows.

    Args:
        inputs: a training batch. An epoch's last batch has the row counts of `RunTrainer.keep_rows`.
        losses: (B,) or (B, T), the losses of `own_rows`.
    """
    if "own_rows" not in inputs:
        return losses.mean()
    each = losses.mean(1) if losses.ndim > 1 else losses
    return each.sum() * PartialState().num_processes / inputs["all_rows"]


@torch.no_grad()
def share_buffers(model: torch.nn.Module) -> None:
    """Broadcast the main process's buffers. Running statistics of batch norms differ per process."""
    if PartialState().num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def parallelism(model: Any = None) -> dict[str, Any]:
    """The actual number of processes and kind of parallelism, regardless of the launcher's options.

    Args:
        model: the model as the trainer wrapped it. Before training there is none, and sharding is not reported.

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
    """A warning if the launcher was asked for more processes or sharding than it provides, or if GPUs are unused.

    `accelerate launch` sets MASTER_ADDR if more than one process is requested. It also sets WORLD_SIZE if it starts
    several processes (through torchrun).
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        return (
            "accelerate was asked for several processes but started one, as with --cpu and MULTI_CPU: pass "
            "--config_file accelerate_configs/multi_cpu.yaml --num_processes N"
        )
    state = PartialState()
    if state.num_processes > 1 and not is_sharded():
        for name, variable in SHARDING.items():
            if _is_on(variable):
                return f"{name} was requested, but accelerate supports it only on GPUs: this run is data parallel"
    if state.num_processes == 1 and state.device.type == "cuda" and torch.cuda.device_count() > 1:
        return (
            f"one process uses one of the {torch.cuda.device_count()} GPUs: to use all, run accelerate launch "
            "--config_file accelerate_configs/multi_gpu.yaml"
        )
    return None


def is_sharded() -> bool:
    """Whether training will shard the model over processes. Until then, each process has the whole model on the CPU."""
    on_gpus = PartialState().distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU)
    return on_gpus and any(map(_is_on, SHARDING.values()))


def check_sharding(args: Any) -> None:
    """Raise a UserError for unsupported parallelism, and for options that do not work with FSDP or DeepSpeed.

    Args:
        args: the training arguments of the last stage.
    """
    update, zero = getattr(args, "reference_update", "frozen"), args.deepspeed_plugin
    sharded = is_sharded()
    refused = {
        "parallelism_config (tensor, context and sequence parallelism)": _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"),
        "Megatron-LM": _is_on("ACCELERATE_USE_MEGATRON_LM"),
        # full weights are checked and hashed before training
        "fsdp_cpu_ram_efficient_loading: true": sharded and _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"),
        "zero3_init_flag: true": sharded and zero is not None and zero.is_zero3_init_enabled(),
        # the run would end without a loadable model
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
            raise UserError(f"--{name} is not supported with FSDP or DeepSpeed: remove it")
    if sharded and update != "frozen":
        raise UserError(
            f"--reference_update {update} needs whole models, but FSDP and DeepSpeed shard them: use "
            "accelerate_configs/multi_gpu.yaml, or omit --reference_update"
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"
