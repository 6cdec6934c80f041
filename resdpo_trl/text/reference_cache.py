"""Disk cache of the reference's log-probabilities, for later runs, sweep points and resumed runs.

The cache folder has one safetensors file per key. It contains the tensors `chosen` and `rejected` (nats, float32) in
the order of the pairs. The key is a digest of the reference's weights and configuration, the tokenized (and truncated)
pairs, the settings of the forward pass, and the code. If one of these changes, another file is used.

TRL 1.16 has a similar cache. Its key has the data set's fingerprint and the model's weights, and a custom fingerprint
could add precision, attention, prefix sharing and code. But TRL writes the file to the data set's cache folder. For a
data set in memory, this is a temporary folder that is deleted with the process. TRL's pass also does not sort by length
and pads more. For these reasons this cache does not use TRL's.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from resdpo_trl.text.model import base_model
from resdpo_trl.text.tokens import code_version, fingerprint

logger = logging.get_logger(__name__)


def cache_folder(asked: str) -> Path | None:
    """The folder of --reference_cache_dir. `auto` is a folder in HF_HOME, and `none` disables the cache."""
    if asked == "none":
        return None
    return Path(HF_HOME) / "resdpo_trl" / "reference_logps" if asked == "auto" else Path(asked)


def weights_digest(model: torch.nn.Module, left_out: str | None = None) -> str:
    """A digest of the names, types, shapes and contents of a model's parameters and buffers.

    Names that contain `left_out` are skipped, for the trained adapter that is not part of the reference.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor) or (left_out is not None and left_out in name):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten()
        digest.update(raw.view(torch.uint8).numpy().data if raw.numel() else b"")
    return digest.hexdigest()


def forward_config(model: Any) -> list[dict[str, Any]]:
    """The configuration of a reference's forward pass, such as RoPE, norms, and an adapter's scale."""
    parts = [base_model(model).config]
    if "ref" in getattr(model, "peft_config", {}):  # a continued adapter; a new one is not part of the reference
        parts.append(model.peft_config["ref"])
    of_the_place = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version")
    return [{name: value for name, value in part.to_dict().items() if name not in of_the_place} for part in parts]


def reference_key(weights: str, pairs: Dataset, forward: dict[str, Any]) -> str:
    """The cache key of the log-probabilities of `pairs`. `forward` has the settings that affect their rounding."""
    parts = {"code": code_version(), "weights": weights, "pairs": fingerprint(pairs), "forward": forward}
    text = json.dumps(parts, sort_keys=True, default=lambda each: sorted(each) if isinstance(each, set) else str(each))
    return hashlib.sha256(text.encode()).hexdigest()


def read_reference(folder: Path, key: str) -> tuple[Tensor, Tensor] | None:
    """Read (N,) chosen and rejected log-probabilities. Return None if the file is missing or damaged."""
    path = folder / f"{key}.safetensors"
    try:
        found = load_file(path)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        logger.warning(f"{path} is damaged ({error}): computing the reference's log-probabilities again")
        return None
    return found["chosen"], found["rejected"]


def write_reference(folder: Path, key: str, chosen: Tensor, rejected: Tensor) -> None:
    """Write (N,) log-probabilities atomically. Only warn if the disk is full or read-only."""
    path, aside = folder / f"{key}.safetensors", folder / f"{key}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"chosen": chosen.float().contiguous(), "rejected": rejected.float().contiguous()}, aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        if aside.exists():
            aside.unlink()
        logger.warning(f"{path} can't be written ({error}): the next run will compute it again")
