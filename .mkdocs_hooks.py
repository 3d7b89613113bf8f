"""What the site does with the pages besides: files from outside docs/, and formulas.

CONTRIBUTING.md and CHANGELOG.md become pages. A link to any other file of the repository becomes the file's name, as the site
has no copy of it; one to a file that is not there is a warning, which `mkdocs build --strict` refuses. Formulas become MathML
when the site is built, so that a reader's browser loads no script for them.
"""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
GUESTS = ("CONTRIBUTING.md", "CHANGELOG.md")
log = logging.getLogger("mkdocs.sage_ext")


def on_files(files: Files, config: Any) -> Files:
    for name in GUESTS:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    def outside(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        if not (ROOT / target).exists():
            log.warning("%s: a link to %s, which is not in the repository", page.file.src_uri, target)
        return f"[{text}]({target})" if target in GUESTS else f"{text} (`{target}`)"

    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)", outside, markdown)


def on_page_content(content: str, **_: Any) -> str:
    def formula(found: re.Match[str]) -> str:
        mathml = convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")
        return f'<div class="formula">{mathml}</div>' if found[1] == "div" else mathml

    pattern = r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>'
    return re.sub(pattern, formula, content, flags=re.DOTALL)
