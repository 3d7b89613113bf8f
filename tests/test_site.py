"""The documentation site: nothing of docs/ or of the public API is left out, and it builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_public_api import public_modules

ROOT = Path(__file__).parents[1]


def test_every_page_has_its_place():
    nav = (ROOT / ".mkdocs.yml").read_text().partition("\nnav:\n")[2]
    places = re.findall(r"^ +- .+: (\S+\.md)$", nav, re.MULTILINE)
    guests = ["CONTRIBUTING.md", "CHANGELOG.md"]
    assert sorted(places) == sorted([*guests, *(path.name for path in (ROOT / "docs").glob("*.md"))])


def test_the_reference_has_every_public_module():
    """But sage_ext itself, which has no names of its own; and allocator, which docs/performance.md hands to users."""
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    public = {module.__name__ for module in public_modules()}
    assert sorted(listed) == sorted(public - {"sage_ext"} | {"sage_ext.allocator"})


def test_links_out_of_docs_lead_somewhere():
    """As files of the repository; the site shows a file that it has no copy of by its name."""
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """What the site is made of, to change."""
    missing = [
        name for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml") if not importlib.util.find_spec(name)
    ]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install '.[docs]')")
    root = tmp_path_factory.mktemp("site") / "repository"
    left = shutil.ignore_patterns(".*", "build", "site", "__pycache__", "*.so", "csrc", "tests")
    shutil.copytree(ROOT, root, ignore=left)
    for name in (".mkdocs.yml", ".mkdocs_hooks.py"):
        shutil.copy(ROOT / name, root)
    return root


def build(root: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean", "-f", ".mkdocs.yml"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_it_builds(copy):
    done = build(copy)
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text() for path in (copy / "site").glob("*.html")}
    assert {"index.html", "api.html", "faq.html", "CHANGELOG.html", "CONTRIBUTING.html"} <= set(pages)
    for name in ("functional.reliability_fusion", "nn.ReliabilityFusion", "calibration.calibrate", "models.SAGE"):
        assert f'id="sage_ext.{name}"' in pages["api.html"]
    assert pages["math.html"].count("<math") > 100
    assert "arithmatex" not in pages["math.html"]
    assert 'href="CHANGELOG.html"' in pages["SECURITY.html"]
    assert "<code>sage_ext/study/methods.py</code>" in pages["study.html"]
    for name, page in pages.items():
        assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=.?https?:", page), f"{name} loads from elsewhere"


@pytest.mark.slow
@pytest.mark.parametrize("link", ["nowhere.md", "math.md#nothing", "../benchmarks/nothing.py"])
def test_a_link_that_leads_nowhere_is_refused(copy, link):
    page = copy / "docs/performance.md"
    before = page.read_text()
    page.write_text(f"{before}\n[there]({link})\n")
    done = build(copy)
    page.write_text(before)
    assert done.returncode != 0
    assert re.search(rf"^WARNING .*{re.escape(link.removeprefix('../'))}", done.stderr, re.MULTILINE), done.stderr
