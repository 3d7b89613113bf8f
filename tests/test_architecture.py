"""The modules of sage_ext: no import circle, no import of a higher layer, kernels reached through the public API alone.

Read from the source by `ast`, without running it. Imports inside functions count like those at the head of a module;
those under `if TYPE_CHECKING:` do not: they never run. An import goes to the module that is named: that Python runs the
`__init__` of the packages above it as well is not counted, or no package could offer what its own modules define.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "sage_ext"
ROOT = Path(__file__).parents[1] / PACKAGE

Layers = tuple[tuple[str, ...], ...]
Graph = Mapping[str, frozenset[str]]  # module without "sage_ext." ("" for the package) -> what it imports of sage_ext

# Lowest first. A module imports from its own layer and from those before it. A name stands for the module and, if it is
# a package, for all in it. "" is the package's own __init__.
LAYERS: Layers = (
    ("_C", "_typing", "allocator", "files", "extras"),
    ("_arguments", "_distributed", "reference"),
    ("jobs",),
    ("_ops",),
    ("functional",),
    ("",),
    ("nn",),
    ("metrics", "stream"),
    ("models",),
    ("calibration", "export"),
    ("data",),
    ("report",),
    ("training",),
    ("video",),
    ("live",),
    ("study",),
    ("demo", "info", "inspection", "selftest"),
    ("cli",),
    ("__main__",),
)
# The same within the packages whose parts have an order.
INNER: dict[str, Layers] = {
    "models": (("layers", "fusions", "pretrained"), ("peers", "sage"), ("",)),
    "training": (
        ("checkpoint", "distributed", "evaluate", "prefetch", "rehearsal", "progress"),
        ("trainer",),
        ("runs",),
        ("",),
    ),
    "study": (
        ("",),
        ("controls", "corruptions", "methods", "slurm", "statistics"),
        ("plan",),
        ("results",),
        ("score",),
        ("report",),
        ("run",),
        ("streams",),
    ),
}
KERNELS = ("_C", "_ops")
# What may import them: the ops and the public functions on them; the streaming session, which is an engine of its own; the
# constants and limits that Python and C++ share; the report on the build, and the test of it.
NEAR_KERNELS = (*KERNELS, "functional", "stream", "reference", "_arguments", "info", "selftest")


# ---------------------------------------------------------------------------------------------------------- the checker
def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports below `tree` but those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from statements(ast.Module(node.orelse, []))
        else:
            yield from statements(node)


def read(sources: Mapping[str, str]) -> Graph:
    """`sources`: path below sage_ext -> text. A compiled module is there as its .pyi, and imports nothing."""

    def name_of(path: str) -> str:
        parts = path.rpartition(".")[0].split("/")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    modules = {name_of(path) for path in sources}
    graph = {}
    for path, text in sources.items():
        found: set[str] = set()
        package = path.split("/")[:-1]
        for node in statements(ast.parse(text)) if path.endswith(".py") else ():
            for alias in node.names:
                if isinstance(node, ast.Import):
                    top, *whole = alias.name.split(".")
                    base = whole
                else:
                    inside = (node.module or "").split(".") if node.module else []
                    if node.level:
                        top, base = PACKAGE, package[: len(package) - node.level + 1] + inside
                    else:
                        top, *base = inside
                    whole = [*base, alias.name]
                if top == PACKAGE:
                    found.add(".".join(whole) if ".".join(whole) in modules else ".".join(base))
        graph[name_of(path)] = frozenset(found - {name_of(path)})
    return graph


def reachable(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        new = graph[todo.pop()] - found
        found |= new
        todo += new
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Each set of modules that all reach each other."""
    beyond = {name: reachable(graph, name) for name in graph}
    groups = {frozenset({name, *(other for other in beyond[name] if name in beyond[other])}) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def upward(graph: Graph, layers: Layers, package: str = "") -> list[str]:
    """The imports of a higher layer, "importer -> imported", among the modules of `package`.

    ValueError for a module that no layer names: a new one needs its place.
    """
    heights = {name: height for height, names in enumerate(layers) for name in names}
    members = {}  # module -> its name in the table
    for name in graph:
        if name == package or not package or name.startswith(f"{package}."):
            short = name.removeprefix(package).removeprefix(".").partition(".")[0]
            if short not in heights:
                raise ValueError(f"{name}: expected a module that the table of layers names")
            members[name] = short
    return sorted(
        f"{name} -> {other}"
        for name in members
        for other in graph[name] & members.keys()
        if heights[members[other]] > heights[members[name]]
    )


def into_kernels(graph: Graph) -> list[str]:
    """The imports of kernels by modules that should go through the public API."""

    def part(name: str) -> str:
        return name.partition(".")[0]

    return sorted(
        f"{name} -> {other}"
        for name, others in graph.items()
        for other in others
        if part(other) in KERNELS and part(name) not in NEAR_KERNELS
    )


# ---------------------------------------------------------------------------------------------------------- the package
@pytest.fixture(scope="module")
def graph() -> Graph:
    paths = [path for path in ROOT.rglob("*") if path.suffix in (".py", ".pyi")]
    return read({path.relative_to(ROOT).as_posix(): path.read_text() for path in paths})


def with_import(graph: Graph, importer: str, imported: str) -> Graph:
    assert imported in graph
    return {**graph, importer: graph[importer] | {imported}}


def test_the_imports_are_those_of_the_package(graph):
    """What the other tests rest on: modules are found, and imports of every form in them."""
    assert {"", "_C", "functional", "nn", "models.sage", "study.run", "cli", "__main__"} <= set(graph)
    assert graph["__main__"] == {"cli"}
    assert {"models.sage", "nn"} <= graph["calibration"]
    assert {"study.run", "training.trainer", "data.synthetic", "live.command", "demo", "info"} <= graph["cli"]
    assert graph["_C"] == set()
    assert not any(name not in graph for names in graph.values() for name in names)


def test_no_import_circle(graph):
    assert circles(graph) == []


def test_no_upward_import(graph):
    assert upward(graph, LAYERS) == []


@pytest.mark.parametrize("package", INNER)
def test_no_upward_import_within(graph, package):
    assert upward(graph, INNER[package], package) == []


def test_sage_knows_no_rival(graph):
    assert "models.peers" not in reachable(graph, "models.sage")


def test_kernels_are_reached_through_the_public_api(graph):
    assert into_kernels(graph) == []


# ----------------------------------------------------------------------------------------------------- it is able to fail
def test_imports_of_every_form_are_found():
    sources = {
        "__init__.py": "from . import a",
        "_C.pyi": "from .a import nothing",
        "a.py": "import numpy\nimport sage_ext.b.c\nfrom sage_ext.b import d, name\nfrom sage_ext import constant",
        "b/__init__.py": "from .c import x",
        "b/c.py": "def f():\n    if g():\n        from .. import a\n    from ..b import d",
        "b/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import a\nelse:\n    from . import c",
    }
    assert read(sources) == {
        "": {"a"}, "_C": set(), "a": {"", "b", "b.c", "b.d"}, "b": {"b.c"}, "b.c": {"a", "b.d"}, "b.d": {"b.c"},
    }  # fmt: skip


def test_a_planted_circle_is_found(graph):
    assert circles({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a"), "d": frozenset("a")}) == [
        ["a", "b", "c"]
    ]
    assert any({"files", "cli"} <= set(group) for group in circles(with_import(graph, "files", "cli")))


def test_a_planted_upward_import_is_found(graph):
    planted = with_import(graph, "training.runs", "live.estimator")
    assert upward(planted, LAYERS) == ["training.runs -> live.estimator"]
    planted = with_import(graph, "study.plan", "study.score")
    assert upward(planted, LAYERS) == []
    assert upward(planted, INNER["study"], "study") == ["study.plan -> study.score"]
    with pytest.raises(ValueError, match="novelty: expected a module that the table"):
        upward({**graph, "novelty": frozenset()}, LAYERS)


def test_a_planted_rival_and_a_planted_short_cut_are_found(graph):
    assert "models.peers" in reachable(with_import(graph, "models.layers", "models.peers"), "models.sage")
    planted = with_import(graph, "study.score", "_ops.ccc")
    assert into_kernels(planted) == ["study.score -> _ops.ccc"]
