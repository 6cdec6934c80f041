"""What docs/architecture.md says of imports, those inside of functions included."""

import ast
import graphlib
from pathlib import Path

import resdpo_trl

ROOT = Path(resdpo_trl.__file__).parent


def imports() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, as paths without the package's name (text.data)."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    found = {name: set[str]() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resdpo_trl"):
                package = (node.module or "").removeprefix("resdpo_trl").lstrip(".")
                for alias in node.names:
                    inner = f"{package}.{alias.name}".lstrip(".")
                    found[name].add(inner if inner in files else package)
    return found


def room(module: str) -> str:
    """The folder; the empty name is what all share, to which run/files.py belongs: it imports errors alone."""
    return module.partition(".")[0] if "." in module and module != "run.files" else ""


def test_no_circle():
    graphlib.TopologicalSorter(imports()).prepare()


def test_the_rooms_know_what_is_below_them():
    below = {"": {""}, "run": {"", "training"}, "training": {"", "run"}}
    below |= {"text": {"", "run", "training"}, "image": {"", "run", "training"}}
    below["study"] = {"", "run", "training", "text", "image"}
    wrong = [
        (module, other)
        for module, others in imports().items()
        for other in others
        if module not in ("job", "cli") and room(other) not in below[room(module)] | {room(module)}
    ]
    assert not wrong
