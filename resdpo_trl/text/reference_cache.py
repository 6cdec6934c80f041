"""The reference's log-probabilities on disk: computed once, read by later runs, sweep points and resumed runs.

One Arrow file per key in the cache folder, with columns ref_chosen_logps and ref_rejected_logps (nats, float32) in the
order of the pairs. The key is a digest of the reference's weights and configuration, the tokenized pairs (their cap
shows in them), how the forward pass was computed, and the code: whatever changes one of these reads another file.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from transformers.utils import logging

from resdpo_trl.text.model import base_model
from resdpo_trl.text.tokens import code_version, fingerprint

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
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
        if not isinstance(tensor, torch.Tensor) or (left_out is not None and left_out in name):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten()
        digest.update(raw.view(torch.uint8).numpy().data if raw.numel() else b"")
    return digest.hexdigest()


def forward_config(model: Any) -> str:
    """What a reference's configuration says of its forward pass (RoPE, norms; an adapter's scale), as JSON."""
    parts = [base_model(model).config]
    if "ref" in getattr(model, "peft_config", {}):  # a continued adapter; a new one is no part of the reference
        parts.append(model.peft_config["ref"])
    of_the_place = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version")
    kept = [{name: value for name, value in part.to_dict().items() if name not in of_the_place} for part in parts]
    return json.dumps(kept, sort_keys=True, default=lambda each: sorted(each) if isinstance(each, set) else str(each))


def reference_key(weights: str, pairs: Dataset, forward: str, max_length: int | None) -> str:
    """The name under which the log-probabilities of `pairs` are kept; `forward` says all that its rounding hangs on."""
    parts = f"{code_version()} {weights} {fingerprint(pairs)} {forward} {max_length}"
    return hashlib.sha256(parts.encode()).hexdigest()


def read_reference(folder: Path, key: str, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(N,) chosen and rejected log-probabilities, or None where there are none or the file is damaged."""
    path = folder / f"{key}.arrow"
    if not path.exists():
        return None
    try:
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        columns = [table[name].to_numpy() for name in COLUMNS]
        written = (table.schema.metadata or {}).get(b"sha256", b"").decode()
        whole = written == _content_digest(*(column.tobytes() for column in columns)) and len(columns[0]) == count
    except (pa.ArrowException, OSError, KeyError) as error:
        whole, reason = False, str(error).splitlines()[0]
    else:
        reason = "its content does not have its checksum"
    if not whole:
        logger.warning(f"{path} is damaged ({reason}): the reference's log-probabilities are computed anew")
        return None
    return torch.from_numpy(columns[0].copy()), torch.from_numpy(columns[1].copy())


def write_reference(folder: Path, key: str, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
    """Keep (N,) log-probabilities: the file appears whole or not at all. A full or read-only disk is a warning."""
    arrays = [column.to(torch.float32).cpu().contiguous().numpy() for column in (chosen, rejected)]
    digest = _content_digest(*(column.tobytes() for column in arrays))
    schema = pa.schema([(name, pa.float32()) for name in COLUMNS], metadata={"sha256": digest})
    path = folder / f"{key}.arrow"
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_table(pa.table(arrays, schema=schema))
        os.replace(aside, path)
    except OSError as error:
        if aside.exists():
            aside.unlink()
        logger.warning(f"{path} can't be written ({error}): the next run computes the reference again")


def _content_digest(*columns: bytes) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(column)
    return digest.hexdigest()
