"""chat.py from the command line: one message, stdin, a terminal with its keys, and what is refused."""

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import CHATML, save_model
from tests.recipes.conftest import ROOT


@pytest.fixture(scope="module")
def run(tokenizer, _chat_tokenizer, tmp_path_factory):
    """The folders of runs: both models, a reference alone (sft), a policy without a chat template (plain)."""
    base = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("both/reference", "both/policy", "sft/reference", "plain/policy")):
        own = tokenizer if name.startswith("plain") else _chat_tokenizer
        save_model(base / name, own, "llama", seed=seed, max_position_embeddings=100_000)
    return base


SHORT = ["--max_new_tokens", "6", "--dtype", "float32"]


def test_a_run_answers_one_message(recipe, run):
    status, said, wrong = recipe("chat.py", run / "both", "--prompt", "What is rain?", *SHORT)
    assert status == 0, wrong
    first, second = said.removeprefix("reference:\n").split("\n\npolicy:\n")
    assert said.startswith("reference:\n") and second.endswith("\n")
    for name, answer in (("reference", first + "\n"), ("policy", second)):
        status, alone, wrong = recipe(
            "chat.py", "--models", f"x={run / 'both' / name}", "--prompt", "What is rain?", *SHORT
        )
        assert (status, alone) == (0, answer), wrong  # one model: the answer alone
    status, said, wrong = recipe("chat.py", run / "sft", "--prompt", "What is rain?", *SHORT)
    assert status == 0 and "reference:" not in said, wrong


def test_the_message_may_come_through_stdin(recipe, run, monkeypatch):
    expected = recipe("chat.py", run / "both", "--prompt", "What is rain?\nWhy?", *SHORT)[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("What is rain?\nWhy?\n"))
    assert recipe("chat.py", run / "both", "--prompt", "-", *SHORT)[:2] == (0, expected)


def test_lines_of_stdin_are_a_conversation(recipe, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is rain?\n/nothing\nWhy?\n"))
    status, said, wrong = recipe("chat.py", run / "both", *SHORT)
    assert status == 0, wrong
    assert said.count("you> ") == 4 and said.count("policy:\n") == 2
    assert "(unknown command /nothing; /help lists them)" in wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass either the folder of a run, e.g. runs/quickstart, or --models NAME=PATH"),
        (["RUN/both", "--models", "a=RUN/both/policy"], "pass either the folder of a run"),
        (["RUN/nowhere"], "nowhere: no such folder; pass a run of dpo_hh.py"),
        (["RUN"], "it has neither reference/ nor policy/; pass a run of dpo_hh.py"),
        (["RUN/empty"], "RUN RUN/empty/policy: not a model folder (no config.json in it)"),
        (["--models", "a=./nowhere"], "--models a ./nowhere: no such folder"),
        (["--models", "a"], "--models a: needs NAME=PATH"),
        (["RUN/both", "--prompt", ""], "--prompt is empty"),
        (["RUN/both", "--prompt", "-"], "--prompt -: stdin is empty"),
        (["RUN/plain", "--system", "Be brief."], "--system: policy has no chat template"),
        (["RUN/strict"], "rejects the conversation"),
        (["RUN/both", "--max_new_tokens", "99999"], "--max_new_tokens 99999: must leave"),
        (["RUN/both", "--use_peft"], "--use_peft is not supported here: a folder with a LoRA adapter is loaded"),
        (["RUN/both", "--model_name_or_path", "x"], "--model_name_or_path is not supported here: pass the models"),
        (["RUN/both", "more"], "unexpected argument 'more'"),
        (["RUN/both", "--beta", "1"], "unknown flag --beta"),
    ],
)
def test_bad_input(recipe, run, chat_tokenizer, monkeypatch, arguments, message):
    (run / "empty" / "policy").mkdir(parents=True, exist_ok=True)
    chat_tokenizer.chat_template = "{% if messages[2:] %}{{ raise_exception('no') }}{% endif %}" + CHATML
    save_model(run / "strict" / "policy", chat_tokenizer)
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    status, said, wrong = recipe("chat.py", *(word.replace("RUN", str(run)) for word in arguments))
    assert status == 2 and said == ""
    assert message.replace("RUN RUN", f"RUN {run}") in wrong.splitlines()[-1], wrong


COMMAND = [sys.executable, str(ROOT / "recipes/chat.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"}


class Terminal:
    """A process with a terminal of its own, whose keys a test presses."""

    def __init__(self, *arguments):
        self.process, self.keys = pty.fork()
        if self.process == 0:
            os.execve(sys.executable, [*COMMAND, *map(str, arguments)], ENVIRONMENT)
        self.screen, self.seen = "", 0

    def until(self, text):
        """Read on until a text is shown after what was waited for before, for two minutes at most."""
        deadline = time.monotonic() + 120
        while (found := self.screen.find(text, self.seen)) < 0:
            assert select.select([self.keys], [], [], max(0, deadline - time.monotonic()))[0], self.screen[-2000:]
            self.screen += os.read(self.keys, 4096).decode(errors="replace")
        self.seen = found + len(text)

    def press(self, keys):
        os.write(self.keys, keys)

    def status(self):
        """Of the process, once it has ended."""
        with contextlib.suppress(OSError):  # how Linux says that the process has closed its side
            while data := os.read(self.keys, 4096):
                self.screen += data.decode(errors="replace")
        os.close(self.keys)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_a_terminal_with_its_keys(run):
    """Ctrl-C stops an answer that would take minutes, an arrow brings a line back, Ctrl-D ends the chat."""
    terminal = Terminal(run / "both", "--max_new_tokens", "90000", "--dtype", "float32")
    try:
        terminal.until("you> ")
        terminal.press(b"What is rain?\n")
        terminal.until("reference:\r\n")
        time.sleep(1)  # it writes
        terminal.press(b"\x03")
        terminal.until("(stopped)")
        terminal.until("you> ")
        terminal.press(b"/help\n")
        terminal.until("/quit")
        terminal.until("you> ")
        terminal.press(b"\x1b[A")
        terminal.until("/help")
        terminal.press(b"\x15\x04")  # an empty line again, and its end
    except BaseException:
        os.kill(terminal.process, signal.SIGKILL)
        raise
    finally:
        status = terminal.status()
    assert status == 0 and "policy:" not in terminal.screen


def test_a_reader_that_has_had_enough_is_no_failure(run):
    process = subprocess.Popen(
        [*COMMAND, run / "sft", "--prompt", "What is rain?", "--max_new_tokens", "500"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    process.stdout.read(1)
    process.stdout.close()
    wrong = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 0 and "Traceback" not in wrong, wrong
