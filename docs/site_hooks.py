"""What `make docs` changes between GitHub's Markdown and the site: links into the repository, and formulas.

GitHub shows the pages of docs/ as they are. On the site a link to a file outside docs/ goes to the repository
(`repo_url` of mkdocs.yml, or the variable GITHUB_REPOSITORY of a workflow; without both it is plain text), and formulas
become MathML, so that a reader's browser loads no script from elsewhere. Commands get a class, for site.css.
"""

import os
import re
from typing import Any

from latex2mathml.converter import convert

FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
INLINE = re.compile(r"(?<![\\$\w`])\$(?! )([^$`]+?)(?<! )\$(?!\w)")
COMMAND = re.compile(r"<code>(?=[^<\s]+(?:\s[^<\s]+){3})")  # four words or more
OUTSIDE = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+)([^)\s]+)\)")


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    depth = page.file.src_uri.count("/") + 1
    source = config.repo_url or os.environ.get("GITHUB_REPOSITORY", "")
    if source and "://" not in source:
        source = f"https://github.com/{source}"

    def link(found: re.Match[str]) -> str:
        label, up, path = found.groups()
        if up.count("../") < depth:  # it stays in docs/
            return found[0]
        return f"[{label}]({source.rstrip('/')}/blob/main/{path})" if source else label

    parts, at = [], 0
    for block in FENCED.finditer(text):
        parts += [_inline(OUTSIDE.sub(link, text[at : block.start()])), _display(block[0])]
        at = block.end()
    return "".join([*parts, _inline(OUTSIDE.sub(link, text[at:]))])


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return COMMAND.sub('<code class="command">', html)


def _display(block: str) -> str:
    if not block.startswith("```math\n"):
        return block
    return convert(block.removeprefix("```math\n").removesuffix("```").strip(), display="block")


def _inline(text: str) -> str:
    text = CODE.sub(lambda found: found[0].replace("\\|", "|"), text)  # GitHub's tables escape it in code too
    return INLINE.sub(lambda found: f'<span class="formula">{convert(found[1])}</span>', text)
