"""Do the links of the Markdown files resolve, and would their commands be accepted? Nothing is trained or downloaded.

    python docs/check.py

Of every fenced sh or bash block, and of the commands in the recipes' docstrings and the presets' comments: `make`
targets must exist, so must scripts and accelerate's --config_file; the flags of `recipes/*.py` and `benchmarks/*.py`
are given to the script's own parser. One line a problem; exit status 1 if any.
"""

import argparse
import ast
import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"(recipes|benchmarks|docs)/\w+\.py")
OTHERS = {"runs", "build", "dist", "node_modules"}  # folders that are not the repository's


class Parsed(BaseException):
    """The command line was accepted; not an Exception, so that no recipe takes it for a failure."""


def pages(root: Path) -> list[Path]:
    """The Markdown files of the repository."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in OTHERS)
        found += [Path(folder) / name for name in sorted(files) if name.endswith(".md")]
    return found


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.add(slug if slug not in found else f"{slug}-{found[slug]}")
        found[slug] = found.get(slug, 0) + 1
    return names


def broken_links(page: Path) -> Iterator[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            yield f"link to {target}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"link to {target}: no such heading"


def shell(page: Path) -> str:
    """The lines of a page's shell blocks, of a recipe's docstring or of a preset's comments that are commands."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return "".join(block for _, language, block in FENCE.findall(text) if language in ("sh", "bash"))
    if page.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return "\n".join(re.findall(r"^(?:(?:accelerate launch|python) (?:.*\\\n)*.*)$", text, re.MULTILINE))


def commands(page: Path) -> Iterator[list[str]]:
    """The simple commands of a page, as words."""
    for line in re.sub(r" *\\\n\s*", " ", shell(page)).splitlines():
        split = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        split.whitespace_split = True
        words: list[str] = []
        for word in [*split, ";"]:
            if set(word) <= set(";&|<>"):
                yield words
                words = []
            else:
                words.append(word)


def as_recipe(words: list[str]) -> list[str]:
    """`resdpo-trl [launch [options]] NAME [flags]` as the command of its recipe; any other command as it is."""
    if words[:1] != ["resdpo-trl"]:
        return words
    from resdpo_trl.cli import recipes

    found = recipes()
    at = next((k for k, word in enumerate(words) if word in found), None)
    return words if at is None else ["python", f"recipes/{found[words[at]].name}", *words[at + 1 :]]


def refusal(words: list[str], root: Path) -> str | None:
    """Why this command would not work; None where it would, or where it is no business of the repository's."""
    if words[:1] == ["make"]:
        makefile = (root / "Makefile").read_text(encoding="utf-8")
        for target in (word for word in words[1:] if not word.startswith("-") and "=" not in word):
            if not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE):
                return f"make {target}: no such target"
    words = as_recipe(words)
    if words[:1] == ["resdpo-trl"] and not words[-1].startswith("-"):
        return f"{' '.join(words)}: no such command"
    at = next((k for k, word in enumerate(words) if SCRIPT.fullmatch(word)), None)
    if at is None:
        return None
    script = root / words[at]
    if not script.is_file():
        return f"python {words[at]}: no such file"
    for flag, value in pairwise(words[:at]):
        if flag == "--config_file" and not (root / value).is_file():
            return f"accelerate launch: {value}: no such file"
    if script.parent.name == "docs":
        return None
    flags: list[str] = []
    for word in words[at + 1 :]:
        if "$" not in word:
            flags.append(word)
        elif flags and flags[-1].startswith("--"):
            flags.pop()  # the flag of a value that only the shell knows
    said = parse_alone(script, flags)
    return f"{script.name}: {said}" if said else None


def parse_alone(script: Path, flags: list[str]) -> str | None:
    """Run a script up to where its command line has been parsed; the error's line where it was refused."""
    sys.path[:0] = [] if str(script.parent) in sys.path else [str(script.parent)]
    import command_line

    def stopping(parse: Any) -> Any:
        def stop(*args: Any, **kwargs: Any) -> None:
            parse(*args, **kwargs)
            raise Parsed

        return stop

    errors = io.StringIO()
    with (
        mock.patch.object(command_line.RecipeParser, "parse", stopping(command_line.RecipeParser.parse)),
        mock.patch.object(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args)),
        mock.patch.object(sys, "argv", [str(script), *flags]),
        contextlib.redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed:
            return None
        except SystemExit:
            return errors.getvalue().strip().rpartition("error: ")[2]
    return "it parses no command line"


def problems(root: Path) -> list[str]:
    """All that is wrong, a line each, in the order of the pages."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path[:0] = [str(root / "recipes")]
    found = []
    with contextlib.chdir(root):
        for page in pages(root):
            found += [f"{page.relative_to(root)}: {problem}" for problem in broken_links(page)]
        for page in [*pages(root), *sorted(root.glob("recipes/*.py")), *sorted(root.glob("recipes/configs/*/*.yaml"))]:
            refused = (refusal(words, root) for words in commands(page) if words)
            found += [f"{page.relative_to(root)}: {problem}" for problem in refused if problem]
    return found


def main() -> None:
    found = problems(Path(__file__).resolve().parents[1])
    print("\n".join(found) or "every link resolves, every command is accepted")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
