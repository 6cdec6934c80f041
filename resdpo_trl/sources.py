"""Where rows and models come from: a file, a folder, a data set saved by `datasets`, or a Hub id."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resdpo_trl.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet"}


def check_model_folder(name: str, flag: str) -> None:
    """Raise a UserError where `name` is a path, and not that of a folder with a model whose weights are safetensors.

    A Hub id passes: nothing but safetensors is then asked for. Pickled weights run code as they are read.
    """
    path = Path(name)
    if path.is_file():
        raise UserError(f"{flag} {name}: a file; name the folder that holds the model")
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"{flag} {name}: no such folder")
        return
    adapter = (path / "adapter_config.json").is_file()
    if not adapter and not (path / "config.json").is_file():
        raise UserError(f"{flag} {name}: not a model folder (no config.json in it)")
    # of an adapter this very file: without it PEFT reads a pickle
    weights = ("adapter_model.safetensors",) if adapter else ("*.safetensors", "*.safetensors.index.json")
    if not any(any(path.glob(pattern)) for pattern in weights):
        raise UserError(
            f"{flag} {name}: no safetensors weights in the folder; pickled ones are not loaded: save it anew with "
            "save_pretrained"
        )


def check_held_out(config: Any) -> None:
    """Raise a UserError where a data configuration's limits or held-out shares make no sense."""
    for name in ("max_train_samples", "max_eval_samples", "max_test_samples"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    for name in ("validation_fraction", "test_fraction"):
        if not 0 < getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: must lie between 0 and 1")
    if config.validation_fraction + config.test_fraction >= 1:
        raise UserError("--validation_fraction and --test_fraction leave nothing to train on: lower them")


def load_rows(name: str, data_dir: str | None, revision: str | None, quickstart: str) -> dict[str, Dataset]:
    """The rows, by the data's own split names.

    Args:
        name: the value of --dataset_name.
        data_dir: folder inside a Hub data set.
        revision: of a Hub data set.
        quickstart: the name that needs no network, for the message.

    Raises:
        UserError: nothing there, or it can't be read; for JSON with the first bad line.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    flag = f"--dataset_name {name}"
    path = Path(name)
    if path.is_file():
        suffix = next((ending for ending in SUFFIXES if path.name.endswith(ending)), None)
        if suffix is None:
            raise UserError(f"{flag}: {path.name} is not .jsonl, .jsonl.gz or .parquet; convert it to one of these")
        try:
            return {"train": load_dataset(SUFFIXES[suffix], data_files=str(path), split="train")}
        except (DatasetGenerationError, ValueError, OSError, EOFError) as error:
            if SUFFIXES[suffix] == "json":
                _find_bad_line(path)
            raise UserError(f"{flag} can't be read ({first_line(error)}): write it anew") from None
    try:
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            loaded = load_from_disk(str(path))
        else:
            if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or path.suffix):
                raise UserError(f"{flag}: no such file or folder")
            loaded = load_dataset(name, data_dir=data_dir, revision=revision)
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, DatasetNotFoundError) as error:
        raise UserError(
            f"{flag}: not a local path, and the Hub does not give it ({first_line(error)}); pass a folder, .jsonl, "
            f".jsonl.gz or .parquet file, or '{quickstart}'"
        ) from None
    except (DatasetGenerationError, ValueError, OSError, EOFError) as error:
        for file in sorted(path.rglob("*.json*")):
            _find_bad_line(file)
        raise UserError(f"{flag} can't be loaded ({first_line(error)})") from None
    return dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}


def _find_bad_line(path: Path) -> None:
    """Raise a UserError that names the first line which is not a JSON object; return if there is none."""
    opened = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error.msg}); mend or delete the line") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: not a JSON object; each line is one pair")
    except UnicodeDecodeError:
        raise UserError(f"{path}, after line {number}: not UTF-8; convert the file") from None
    except (EOFError, gzip.BadGzipFile):
        raise UserError(f"{path}, after line {number}: the gzip stream is damaged; compress it anew") from None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
