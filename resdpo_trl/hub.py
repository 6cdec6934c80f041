"""A run's way to the Hub: the model with its card at the end, and checkpoints while it trains.

A push is tried again where that makes sense. One that fails says so in a line with the command that publishes the run
later, and harms nothing: whatever happens here, the run goes on and is complete on disk.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from resdpo_trl.errors import UserError
from resdpo_trl.files import MANIFEST
from resdpo_trl.run import RunFolder, redacted

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt, where the client makes none of its own
LONGEST_WAIT = 300.0  # seconds that a Retry-After may ask for
TEMPORARY = (408, 409, 425, 429, 500, 502, 503, 504)
PERMANENT = (OfflineModeIsEnabled, HFValidationError, ValueError, FileNotFoundError, PermissionError)
MENDS = {
    401: "the Hub does not accept the token: run `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: take one with write permission, or another --hub_model_id",
    404: "the Hub has no such place, or the token may not see it: check --hub_model_id and the token",
    409: "another change of the repository got in the way",
    429: "too many requests",
}
MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")  # of a checkpoint; the rest is the optimizer's
# files with such endings that training goes on from, and that are no part of the model
NOT_THE_MODELS = ("trainer_state.json", "log_state_*.json", MANIFEST, "reference.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".pkl")  # nobody should load these: they are not pushed with a model
ID = "FOLDER_OR_ID"  # stands in a card for the place it is loaded from

Result = TypeVar("Result")


class NotPushed(Exception):
    """A push failed for good; the message is one line that says why, without secrets."""


class Hub:
    """The repository that a run is pushed to; it is created with the first push.

    Args:
        run: the run's folder.
        model_id: `name` or `owner/name`; the folder's name by default.
        private: of a new repository; None leaves it to the account's or organization's setting.
        token: None for HF_TOKEN or the one that `hf auth login` kept.
        revision: branch to push to.
        strategy: transformers' `hub_strategy`: `end`, or `every_save`; with `checkpoint` the repository's folder run/
            holds what a run needs to be resumed from its newest checkpoint, with `all_checkpoints` from each one.
        always: push a checkpoint although the one before it is still on its way; otherwise it is left out.
    """

    def __init__(
        self,
        run: Path,
        model_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        strategy: str = "end",
        always: bool = False,
    ):
        self.run, self.private, self.revision, self.strategy, self.always = run, private, revision, strategy, always
        self.name = model_id or run.resolve().name
        try:
            validate_repo_id(self.name)
        except HFValidationError:
            raise UserError(
                f"--hub_model_id {self.name}: not a name on the Hub: letters, digits, '-', '_' and '.', as name or "
                "owner/name" + ("" if model_id else "; it is the folder's where none is given")
            ) from None
        self.api = HfApi(token=token)
        self.repo_id: str | None = None
        self._background: threading.Thread | None = None
        self._said = ""

    # --- the end -------------------------------------------------------------------------------------------------

    def push_model(self, folder: Path) -> None:
        """Push the finished model and its card, after the checkpoint that may be on its way; say how it went."""
        if self._background is not None:
            self._background.join()
        try:
            url = self.upload(folder)
        except (NotPushed, OSError) as error:
            print(f"\nnot pushed: {error}; the run is complete in {self.run}; later: {self.later()}", file=sys.stderr)
        else:
            print(f"pushed to {url}")

    def upload(self, folder: Path) -> str:
        """Push a model folder in one commit; its address. Raises NotPushed."""
        files: dict[str, Any] = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink() and path.suffix not in PICKLED
        }
        repo_id = self._create()
        if "README.md" in files:
            files["README.md"] = files["README.md"].read_text(encoding="utf-8").replace(ID, repo_id).encode()
        # an earlier push of an adapter: transformers would load it on top of the full model
        held = _retried(lambda: self.api.list_repo_files(repo_id, revision=self.revision))
        stale = [name for name in held if name.startswith("adapter_") and name not in files]
        self._commit(files, f"{folder.name} of {self.run.resolve().name}", stale)
        return f"{self.api.endpoint}/{repo_id}"

    def later(self) -> str:
        """The command that publishes the run when the Hub can be reached."""
        words = ["resdpo-trl", "publish", str(self.run), "--hub_model_id", self.repo_id or self.name]
        words += ["--hub_private_repo"] if self.private else []
        words += ["--hub_revision", self.revision] if self.revision else []
        return shlex.join(words)

    # --- while it trains -----------------------------------------------------------------------------------------

    def push_save(self, checkpoint: Path, card: str) -> None:
        """Push a checkpoint in the background. Later saves may delete it meanwhile: hard links keep the files."""
        earlier = self._background
        if earlier is not None and earlier.is_alive() and not self.always:
            return
        disable_progress_bars()  # the run has its own
        try:
            if not any(path.suffix == ".safetensors" for path in _model_files(checkpoint)):
                raise NotPushed("it holds no whole weights (sharded state); the model is pushed at the end")
            staged = self._stage(checkpoint, card)
        except (OSError, NotPushed) as error:
            self._warn(f"{checkpoint.name} not pushed: {error}")
            return

        def push() -> None:
            if earlier is not None:
                earlier.join()
            try:
                files = {path.relative_to(staged).as_posix(): path for path in staged.rglob("*") if path.is_file()}
                self._create()
                self._commit(files, f"Training in progress, {checkpoint.name}", self._stale(files))
            except (NotPushed, OSError) as error:
                self._warn(f"{checkpoint.name} not pushed: {error}; training goes on")
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        # a daemon: a push on its way never keeps a run that was stopped from ending
        self._background = threading.Thread(target=push, name="push", daemon=True)
        self._background.start()

    def _stage(self, checkpoint: Path, card: str) -> Path:
        """The files to push, beside the checkpoints: the model at the root, what resuming needs in run/."""
        if self._background is None:
            for left in (self.run / "checkpoints").glob(".push-*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=".push-", dir=self.run / "checkpoints"))
        wanted = {path.name: path for path in _model_files(checkpoint)}
        if self.strategy in ("checkpoint", "all_checkpoints"):
            kept = [self.run / name for name in ("run.json", "summary.json", "metrics.jsonl")]
            for folder in (self.run / "reference", checkpoint):
                kept += folder.rglob("*") if folder.is_dir() else []
            wanted |= {
                f"run/{path.relative_to(self.run)}": path
                for path in kept
                if path.is_file() and path.name != "training_args.bin"
            }
        for name, path in wanted.items():
            target = staged / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".json", ".jsonl"):
                shutil.copyfile(path, target)  # metrics.jsonl grows where it lies
            else:
                _link(path, target)
        (staged / "README.md").write_text(card, encoding="utf-8")
        return staged

    def _stale(self, files: Iterable[str]) -> list[str]:
        """Files of older checkpoints in the repository's run/, which `checkpoint` replaces by the newest."""
        if self.strategy != "checkpoint":
            return []
        held = _retried(lambda: self.api.list_repo_files(str(self.repo_id), revision=self.revision))
        return [name for name in held if name.startswith("run/checkpoints/") and name not in set(files)]

    def _warn(self, line: str) -> None:
        if line.partition(" ")[2] != self._said:  # the same trouble is told once
            print(f"\n{redacted(line)}", file=sys.stderr)
        self._said = line.partition(" ")[2]

    # --- requests ------------------------------------------------------------------------------------------------

    def _create(self) -> str:
        if self.repo_id is None:
            created = _retried(lambda: self.api.create_repo(self.name, private=self.private, exist_ok=True)).repo_id
            if self.revision is not None:
                _retried(lambda: self.api.create_branch(created, branch=str(self.revision), exist_ok=True))
            self.repo_id = created
        return self.repo_id

    def _commit(self, files: dict[str, Any], message: str, delete: Iterable[str] = ()) -> None:
        repo_id, revision = str(self.repo_id), self.revision
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        deletions = [CommitOperationDelete(path_in_repo=name) for name in delete]
        _retried(
            lambda: self.api.preupload_lfs_files(repo_id, additions, revision=revision, free_memory=False), waits=()
        )
        _retried(
            lambda: self.api.create_commit(repo_id, [*additions, *deletions], commit_message=message, revision=revision)
        )


def check_public_base(base: str) -> None:
    """Raise a UserError where an adapter's base is a local path, which nobody else can load."""
    if os.path.isdir(base) or os.path.isabs(base) or base.count("/") > 1:
        raise UserError(
            f"the adapter's base {base} is a local folder, which nobody else can load: push the full model with "
            "--merge_adapter, or push the base to the Hub and name its id (--model_name_or_path of a training, "
            "base_model_name_or_path in the adapter_config.json of a finished one)"
        )


def publish(
    run: Path,
    model_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    merge_adapter: bool = False,
) -> str:
    """Push a finished run's model: policy/, reward_model/, or reference/ of a run that made nothing more.

    Args:
        run: the run's folder.
        model_id, private, token, revision: as `Hub`'s.
        merge_adapter: first make the run's adapter a full model, in the run's folder.

    Returns:
        The model's address.

    Raises:
        UserError: no finished run there, an adapter over a local base, or the Hub refuses it.
    """
    from resdpo_trl.report import load_run

    found = load_run(run)
    if found.run.get("ended") is None:
        raise UserError(f"{run}: the run has not ended: finish it with --resume_from_checkpoint")
    folder = RunFolder(run).trained
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{run}: no finished model (no weights in {folder.name}/): name another run")
    hub = Hub(run, model_id, private, token, revision)
    adapter = folder / "adapter_config.json"
    if merge_adapter and adapter.is_file():
        from resdpo_trl.text.pipeline import merge_run

        merge_run(run)
    elif adapter.is_file():
        check_public_base(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    try:
        return hub.upload(folder)
    except NotPushed as error:
        raise UserError(f"--hub_model_id {model_id}: not pushed: {error}") from None


def _retried(request: Callable[[], Result], waits: tuple[float, ...] = WAITS) -> Result:
    """A request's answer, after further attempts where the trouble may pass. Raises NotPushed.

    Every exception of the client ends here, whatever it is: a bug in it must not end a training.
    """
    for wait in (*waits, None):
        try:
            return request()
        except Exception as error:
            status, asked = _status_of(error)
            temporary = status in TEMPORARY if status else not isinstance(_root(error), PERMANENT)
            if wait is None or not temporary or asked > LONGEST_WAIT:
                raise NotPushed(_reason(error, status, asked)) from None
            time.sleep(max(wait, asked))
    raise AssertionError("unreachable")


def _status_of(error: BaseException | None) -> tuple[int | None, float]:
    """The HTTP status behind an error, and the seconds that a Retry-After asks for."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            asked = str(response.headers.get("Retry-After", ""))
            return int(response.status_code), float(asked) if asked.isdecimal() else 0.0
        error = error.__cause__
    return None, 0.0


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException, status: int | None, asked: float) -> str:
    if status is not None:
        wait = f", it asks to wait {asked:.0f} s" if asked > LONGEST_WAIT else ""
        trouble = "the Hub is in trouble" if status >= 500 else "the Hub refuses"
        return f"{MENDS.get(status, trouble)} (HTTP {status}{wait})"
    root = _root(error)
    lines = " ".join(str(root).split())[:200]
    said = f"{type(root).__name__}: {lines}" if lines else type(root).__name__
    return redacted(said if isinstance(root, PERMANENT) else f"no connection to the Hub that lasts ({said})")


def _model_files(checkpoint: Path) -> list[Path]:
    return [
        path
        for path in checkpoint.iterdir()
        if path.is_file() and path.suffix in MODEL_FILES and not any(map(path.match, NOT_THE_MODELS))
    ]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
