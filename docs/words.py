"""The language of the documentation: proselint's checks, and a vocabulary of our own.

One line per finding; exit status 1 if there is any.

    python docs/words.py [PAGE.md ...]     # without names: every page of docs/ and CONTRIBUTING.md

Code, links' targets, formulas and HTML comments are not read.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$|`[^`\n]+`|\]\([^)\n]*\)|\$[^$\n]+\$|<!--.*?-->", re.MULTILINE | re.DOTALL)
# checks of proselint that are wrong for Markdown (curly quotes, ellipses) and for this field ("résumé", "probably")
NOT_OURS = {"typography": False, "hedging": False}
INSTEAD = {  # what not to write -> what to write
    r"mend(s|ed|ing)?": "fix",
    r"beside": "next to, compared with",
    r"\w+ that (it )?stands|stands (in|for|beside|at)|as (it|they) stands?": "is, are",
    r"one (folder|line|checkpoint|row) a \w+|(checkpoint|step|line)s? an? (step|epoch|pair|save|row|run)": "per",
    r"pairs? an? second|images? an? second|rows? an? batch|loss an? pair": "per",
    r"[\d,.]+[%×]? for [\d,.]+[%×]?": "instead of",
    r"goes on (with|from|to)|went on to": "continues",
    r"by the clock": "omit it",
    r"in (the|its) place of": "instead of",
    r"anew": "again",
    r"of like length": "of similar length",
    r"what you can \w+": "name it",
    r"people's": "name whose",
    r"(is|are) (said|told) to be": "say it",
    r"learned by heart|by heart": "memorized",
    r"not run here": "not run, not tested",
    r"a rehearsal of": "a test of",
    r"home-made": "custom",
    r"lies in": "is in",
    r"parted": "split",
    r"grey(scale)?|modell(ed|ing)|labell(ed|ing)|behaviour|colour|licence|afterwards|towards": "the American spelling",
    r"can ?not be told from": "do not differ significantly from",
    r"too sure|surer": "overconfident, more certain",
}


def blank(found: re.Match[str]) -> str:
    """Code as nothing a check knows, with its lines and its length kept."""
    return re.sub(r"[^\n]", "~", found[0])


def ours(text: str) -> Iterator[tuple[int, str]]:
    """The line and the words of what `INSTEAD` names."""
    for words, better in INSTEAD.items():
        for found in re.finditer(rf"\b(?:{words})(?!\w)", text, re.IGNORECASE):
            yield text.count("\n", 0, found.start()) + 1, f"{' '.join(found[0].split())!r}: write {better}"


def proselints(text: str) -> Iterator[tuple[int, str]]:
    """The line and the words of what proselint finds."""
    from proselint.config import DEFAULT
    from proselint.tools import LintFile

    for found in LintFile("page", text).lint({"max_errors": 1000, "checks": DEFAULT["checks"] | NOT_OURS}):
        yield found.pos[0], f"{found.check_result.message} ({found.check_result.check_path})"


def main() -> None:
    from proselint.checks import __register__
    from proselint.registry import CheckRegistry

    CheckRegistry().register_many(__register__)
    pages = [Path(name).resolve() for name in sys.argv[1:]]
    pages = pages or [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]
    found = []
    for page in pages:
        text = CODE.sub(blank, page.read_text(encoding="utf-8"))
        found += [f"{os.path.relpath(page)}:{line}: {said}" for line, said in sorted([*ours(text), *proselints(text)])]
    print("\n".join(found) or f"{len(pages)} pages: no word to change")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
