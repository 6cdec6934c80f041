"""Several processes that follow one process on the same global batch, and what says which ones really run.

What accelerate and transformers do: a global batch is the same rows however many processes share it; gradients are
averaged; gathered figures count every row once. What this module adds:

- An epoch's last batch. accelerate fills it with rows of the epoch's beginning, so that no process runs dry, and a
  plain mean would count those rows twice.
- The precision of FSDP2 and DeepSpeed. Under both, the gradients are summed in the precision of the computation by
  default. accelerate's policy of FSDP2 casts the outputs of the model to it too, and leaves autocast out of training.
- Whole models until training. Where ZeRO-3 is on, transformers shards a model as soon as it loads it, and the checks,
  the reference cache's key and a copied reference need whole weights. `unset_hf_deepspeed_config` turns that off.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from resdpo_trl.errors import UserError

# what shards a model, and the variable by which `accelerate launch` asks for it
SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
NOT_SUPPORTED = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config (tensor, context and sequence parallelism)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


class EveryRowOnce(Trainer):
    """A Trainer whose steps see each row of an epoch once, on any number of processes."""

    args: Any
    train_dataset: Any

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """transformers' batches of one optimizer step; an epoch's last one through `_keep`.

        Args:
            epoch_iterator: the epoch's batches, on this process.
            num_batches: batches of one step (gradient accumulation).
            device: where token counts are summed.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        processes, rows = self.args.world_size, self.args.train_batch_size
        last = len(self.train_dataset) % (rows * processes)  # rows of the last global batch, if it is a smaller one
        filled = processes > 1 and last and not self.args.dataloader_drop_last
        if filled and batches and self.accelerator.gradient_state.end_of_dataloader:
            # the processes take their rows in turn, and what fills up stands at the end
            own = min(max(last - rows * self.args.process_index, 0), rows)
            batches[-1] = self._keep(batches[-1], own, last)
            items = self._get_num_items_in_batch(batches, device)
        return batches, items

    def _keep(self, batch: dict[str, Any], own: int, everywhere: int) -> dict[str, Any]:
        """The batch with a note for `mean_over_processes`: its first `own` rows count, of `everywhere` in all."""
        return {**batch, "own_rows": own, "all_rows": everywhere}

    def create_accelerator_and_postprocess(self) -> None:
        """transformers' accelerator, with float32 sums of gradients where they are sharded, and outputs under FSDP2."""
        super().create_accelerator_and_postprocess()
        unset_hf_deepspeed_config()  # an accelerator sets it again
        state = self.accelerator.state
        if self.is_fsdp_enabled and state.mixed_precision != "no":  # before a reference is wrapped
            computed = {"bf16": torch.bfloat16, "fp16": torch.float16}[state.mixed_precision]
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(computed, torch.float32, torch.float32)
        if self.is_deepspeed_enabled and state.mixed_precision == "bf16":
            config = state.deepspeed_plugin.deepspeed_config
            config["communication_data_type"] = "fp32"
            config["data_types"] = {"grad_accum_dtype": "fp32"}

    def _prepare_input(self, data: Any) -> Any:
        """On the device, in its own type: transformers casts what is no integer to the precision of DeepSpeed's
        computation, and a reference's log-probabilities are among a batch's columns."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        """Autocast around a training step's loss under FSDP2, as around evaluation and the reference: accelerate puts
        the forward of other models in it."""
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a whole model. Under FSDP the checkpoints of training may be sharded; what is published is not."""
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)


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
        inputs: a training batch, with the note of `EveryRowOnce` where it is an epoch's last.
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

    `accelerate launch` tells its children nothing of the number it was asked for. But where it was more than one it
    sets MASTER_ADDR, and where it really starts several (through torchrun) it sets WORLD_SIZE too.
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
    for variable, name in NOT_SUPPORTED.items():
        if _is_on(variable):
            raise UserError(f"{name} is not supported: use accelerate_configs/fsdp2.yaml or deepspeed_zero3.yaml")
    if not is_sharded():
        return
    update = getattr(args, "reference_update", "frozen")
    if update != "frozen":
        raise UserError(
            f"--reference_update {update} moves whole models, and FSDP and DeepSpeed shard them: use "
            "accelerate_configs/multi_gpu.yaml, or drop either"
        )
    for name in ("save_only_model", "auto_find_batch_size"):
        if getattr(args, name):
            raise UserError(f"--{name} is not supported with FSDP and DeepSpeed: drop it")
    if _is_on(SHARDING["FSDP"]) and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("fsdp_version: 1 is not supported: set it to 2 in accelerate's config file")
    zero = args.deepspeed_plugin
    if _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING") or (zero is not None and zero.is_zero3_init_enabled()):
        name = "fsdp_cpu_ram_efficient_loading" if zero is None else "zero3_init_flag"
        raise UserError(
            f"{name}: true leaves every process but one without weights until training, and they are checked "
            "before: set it to false in accelerate's config file"
        )
    if zero is not None and zero.zero_stage == 3 and not zero.zero3_save_16bit_model:
        raise UserError(
            "zero3_save_16bit_model: false leaves no model that can be loaded: set it to true in accelerate's config "
            "file"
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"
