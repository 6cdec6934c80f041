"""Recipes run in this process, as from the command line."""

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(monkeypatch, capsys):
    """Run a recipe in this process, as `python recipes/NAME ARGUMENTS` does; gives (status, stdout, stderr)."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / name), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(sys.argv[0], run_name="__main__")
        said = capsys.readouterr()
        return stop.value.code or 0, said.out, said.err

    return call


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def not_ended(folder):
    """Make a run look as if it had been killed before its end."""
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": False}))
