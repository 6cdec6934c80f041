"""The reference's log-probabilities on disk: computed once, read by later runs, sweep points and resumed runs.

One safetensors file per key in the cache folder, with tensors `chosen` and `rejected` (nats, float32) in the order of
the pairs. The key is a digest of the reference's weights and configuration, the tokenized pairs (their cap shows in
them), how the forward pass was computed, and the code: whatever changes one of these reads another file.

TRL 1.16 has such a cache, with a key of the data set's fingerprint and the model's weights. A fingerprint of our own
would add precision, attention, prefix sharing and code to it. But TRL writes the file where the data set is cached: for
a data set in memory, that is a folder which goes with the process. Its pass is not sorted by length either, and pads
more. Thus this cache is not built on TRL's.
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
    """The folder of --reference_cache_dir: `auto` is below HF_HOME, `none` is no cache."""
    if asked == "none":
        return None
    return Path(HF_HOME) / "resdpo_trl" / "reference_logps" if asked == "auto" else Path(asked)


def weights_digest(model: torch.nn.Module, left_out: str | None = None) -> str:
    """A digest of a model's parameters and buffers, by name, type, shape and content.

    `left_out` is a part of the names that are not looked at: the adapter that is trained, which the reference lacks.
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
    """What a reference's configuration says of its forward pass: RoPE, norms, an adapter's scale."""
    parts = [base_model(model).config]
    if "ref" in getattr(model, "peft_config", {}):  # a continued adapter; a new one is no part of the reference
        parts.append(model.peft_config["ref"])
    of_the_place = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version")
    return [{name: value for name, value in part.to_dict().items() if name not in of_the_place} for part in parts]


def reference_key(weights: str, pairs: Dataset, forward: dict[str, Any]) -> str:
    """The name under which the log-probabilities of `pairs` are kept. Their rounding depends on `forward` alone."""
    parts = {"code": code_version(), "weights": weights, "pairs": fingerprint(pairs), "forward": forward}
    text = json.dumps(parts, sort_keys=True, default=lambda each: sorted(each) if isinstance(each, set) else str(each))
    return hashlib.sha256(text.encode()).hexdigest()


def read_reference(folder: Path, key: str) -> tuple[Tensor, Tensor] | None:
    """(N,) chosen and rejected log-probabilities, or None where there are none or the file is damaged."""
    path = folder / f"{key}.safetensors"
    try:
        found = load_file(path)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        logger.warning(f"{path} is damaged ({error}): the reference's log-probabilities are computed again")
        return None
    return found["chosen"], found["rejected"]


def write_reference(folder: Path, key: str, chosen: Tensor, rejected: Tensor) -> None:
    """Keep (N,) log-probabilities: the file appears whole or not at all. A full or read-only disk is a warning."""
    path, aside = folder / f"{key}.safetensors", folder / f"{key}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"chosen": chosen.float().contiguous(), "rejected": rejected.float().contiguous()}, aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        if aside.exists():
            aside.unlink()
        logger.warning(f"{path} can't be written ({error}): the next run computes the reference again")
