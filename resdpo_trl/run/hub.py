"""Push a run to the Hub: the finished model with its card, and checkpoints during training.

A push calls `upload_folder` of huggingface_hub. transformers' own pushes of checkpoints are not used: they include
the pickle `training_args.bin`, read a checkpoint while it is renamed, and do not report a failure.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from resdpo_trl.errors import UserError
from resdpo_trl.run.files import MANIFEST
from resdpo_trl.run.folder import RunFolder, read_object, redacted

FIXES = {
    401: "the Hub rejects the token: run `hf auth login`, or set HF_TOKEN",
    403: "the token has no write permission: use one that has it, or another --hub_model_id",
    404: "the repository does not exist, or the token cannot read it: check --hub_model_id and the token",
}
PICKLES = ["*.bin", "*.pt", "*.pth", "*.pkl"]  # unsafe to load, so not pushed with a model
# files of a checkpoint that are not part of the model
STATE = ["trainer_state.json", "log_state_*.json", MANIFEST, "reference.safetensors", "global_step*"]
ID = "FOLDER_OR_ID"  # placeholder in a card for the model's id


@dataclass
class Hub:
    """The repository that a run is pushed to; the first push creates it.

    The strategies are those of transformers. With `checkpoint`, the repository's folder run/ also has the files to
    resume from the newest checkpoint; with `all_checkpoints`, from every checkpoint.
    """

    run: Path
    model_id: str | None = None  # `name` or `owner/name`; the folder's name by default
    private: bool | None = None  # of a new repository; None uses the setting of the account or organization
    token: InitVar[str | None] = None  # None uses HF_TOKEN or the token that `hf auth login` saved
    revision: str | None = None  # branch to push to
    strategy: str = "end"
    always: bool = False  # push a checkpoint even if the push before it has not ended; otherwise it is skipped

    def __post_init__(self, token: str | None) -> None:
        self.name = self.model_id or self.run.resolve().name
        try:
            validate_repo_id(self.name)
        except HFValidationError:
            raise UserError(
                f"--hub_model_id {self.name}: not a valid id: use letters, digits, '-', '_' and '.', as name or "
                "owner/name" + ("" if self.model_id else "; the default is the folder's name")
            ) from None
        self.api = HfApi(token=token)
        self._push: Future[None] | None = None

    def push_model(self, folder: Path) -> None:
        """Push the finished model and its card after the pending push of a checkpoint, and print the result.

        On a failure, print one line with the command to publish the run later.
        """
        if self._push is not None:
            self._push.result()
        try:
            print(f"pushed to {self.upload(folder)}")
        except Exception as error:  # any error of the client: the run must finish
            later = ["resdpo-trl", "publish", str(self.run), "--hub_model_id", self.name]
            later += ["--hub_private_repo"] if self.private else []
            later += ["--hub_revision", self.revision] if self.revision else []
            print(
                f"\nnot pushed: {reason(error)}; the run is complete in {self.run}; push it later: {shlex.join(later)}",
                file=sys.stderr,
            )

    def upload(self, folder: Path) -> str:
        """Push a model's folder and return its URL."""
        # an adapter from an earlier push would be loaded on top of a full model
        repo_id = self._upload(folder, f"{folder.name} of {self.run.resolve().name}", delete_patterns="adapter_*")
        if (card := folder / "README.md").is_file():
            text = card.read_text(encoding="utf-8").replace(ID, repo_id)
            self.api.upload_file(
                repo_id=repo_id, path_or_fileobj=text.encode(), path_in_repo=card.name, revision=self.revision,
                commit_message=f"Card of {self.run.resolve().name}",
            )  # fmt: skip
        return f"{self.api.endpoint}/{repo_id}"

    def push_save(self, checkpoint: Path) -> None:
        """Push a checkpoint in the background. It is not pushed if --save_total_limit deletes it first."""
        if self._push is None or self._push.done() or self.always:
            disable_progress_bars()  # the run has its own bars
            self._push = self.api.run_as_future(self._push_save, checkpoint)

    def _push_save(self, checkpoint: Path) -> None:
        message = f"Training in progress, {checkpoint.name}"
        try:
            if not any(file.name not in STATE for file in checkpoint.glob("*.safetensors")):
                raise FileNotFoundError("it has no full weights (the state is sharded); the model is pushed at the end")
            self._upload(checkpoint, message, ignore_patterns=STATE)
            if self.strategy in ("checkpoint", "all_checkpoints"):
                place = checkpoint.relative_to(self.run).as_posix()
                self._upload(
                    self.run, f"{message}, to resume from", path_in_repo="run", ignore_patterns=["*training_args.bin"],
                    allow_patterns=["run.json", "summary.json", "metrics.jsonl", "reference/*", f"{place}/*"],
                    delete_patterns="checkpoints/*" if self.strategy == "checkpoint" else None,
                )  # fmt: skip
        except Exception as error:  # as above
            print(f"\n{checkpoint.name} not pushed: {reason(error)}; training continues", file=sys.stderr)

    def _upload(self, folder: Path, message: str, path_in_repo: str | None = None, **patterns: Any) -> str:
        """Push the files of a folder and return the repository's full id."""
        repo_id = self.api.create_repo(self.name, private=self.private, exist_ok=True).repo_id
        if self.revision is not None:
            self.api.create_branch(repo_id, branch=self.revision, exist_ok=True)
        if path_in_repo is None:
            patterns["ignore_patterns"] = [*patterns.get("ignore_patterns", []), *PICKLES, "README.md"]
        self.api.upload_folder(
            repo_id=repo_id, folder_path=folder, path_in_repo=path_in_repo, commit_message=message,
            revision=self.revision, **patterns,
        )  # fmt: skip
        return repo_id


def check_public_base(base: str) -> None:
    """Raise a UserError if an adapter's base is a local path, which nobody else can load."""
    if os.path.isdir(base) or os.path.isabs(base) or base.count("/") > 1:
        raise UserError(
            f"the adapter's base {base} is a local folder, which nobody else can load: push the full model with "
            "--merge_adapter, or push the base to the Hub and name its id (--model_name_or_path for a new run, "
            "base_model_name_or_path in adapter_config.json for a finished one)"
        )


def publish(hub: Hub, merge: Callable[[Path], None] | None = None) -> str:
    """Push a finished run's model (policy/, reward_model/, or else reference/) and return its URL.

    Args:
        hub: the run and its repository.
        merge: called first with the run's folder, to merge its adapter (`text.pipeline.merge_run`).
    """
    from resdpo_trl.run.report import load_run

    run, folder = hub.run, RunFolder(hub.run).trained
    if load_run(run).run.get("ended") is None:
        raise UserError(f"{run}: the run has not ended: finish it with --resume_from_checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{run}: no finished model (no weights in {folder.name}/): name another run")
    if merge is not None:
        merge(run)
    elif (adapter := folder / "adapter_config.json").is_file():
        check_public_base(read_object(adapter)["base_model_name_or_path"])
    try:
        return hub.upload(folder)
    except Exception as error:
        raise UserError(f"--hub_model_id {hub.name}: not pushed: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """Why a push failed, in one line without secrets."""
    while error.__cause__ is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"{FIXES.get(status, 'the Hub refuses the request')} (HTTP {status})"
    return redacted(" ".join(f"{type(error).__name__}: {error}".split())[:200])
