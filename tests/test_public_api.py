"""Every exported name and signature, as tests/public_api.txt lists them: what users call does not change unnoticed.

python tests/test_public_api.py     renews the list; the change of the file then shows what changed for them
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import sage_ext

LIST = Path(__file__).with_name("public_api.txt")
WITHOUT_ALL = ("sage_ext.reference", "sage_ext.study.corruptions")  # public, though nobody imports * from them
BESIDES_ALL = {"sage_ext.metrics": ["TorchMetricsCCC"]}  # made on first use, as it needs torchmetrics
SPECIAL = ("__call__", "__len__", "__getitem__", "__iter__", "__enter__", "__exit__")
WIDTH = 120


def public_modules() -> Iterator[ModuleType]:
    """sage_ext and what is below it, where `__all__` says what is for users, and WITHOUT_ALL."""
    yield sage_ext
    for found in pkgutil.walk_packages(sage_ext.__path__, "sage_ext."):
        if any(part.startswith("_") for part in found.name.split(".")):
            continue
        module = importlib.import_module(found.name)
        if hasattr(module, "__all__") or found.name in WITHOUT_ALL:
            yield module


def exported(module: ModuleType) -> list[str]:
    """`__all__`; without it, the names that the module itself defines."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            n for n, x in vars(module).items() if n[0] != "_" and getattr(x, "__module__", None) == module.__name__
        ]
    return sorted([*names, *BESIDES_ALL.get(module.__name__, [])])


def annotation(value) -> str:
    if value is inspect.Signature.empty:
        return ""
    text = value if isinstance(value, str) else getattr(value, "__forward_arg__", None)
    return text if text is not None else inspect.formatannotation(value)


def default(value) -> str:
    if inspect.isfunction(value) or inspect.isclass(value):
        return value.__qualname__
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def lines_of(head: str, function, indent: str, drop_self: bool = False) -> list[str]:
    """`head(parameters) -> what it returns`, in one line, or a parameter a line."""
    signature = inspect.signature(function)
    parameters, kind = [], None
    for parameter in list(signature.parameters.values())[drop_self:]:
        if kind == parameter.POSITIONAL_ONLY != parameter.kind:
            parameters.append("/")
        if parameter.kind == parameter.KEYWORD_ONLY and kind not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            parameters.append("*")
        kind = parameter.kind
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(kind, "")
        text = stars + parameter.name
        if wanted := annotation(parameter.annotation):
            text += f": {wanted}"
        if parameter.default is not parameter.empty:
            text += f" = {default(parameter.default)}"
        parameters.append(text)
    if kind == inspect.Parameter.POSITIONAL_ONLY:
        parameters.append("/")
    returned = annotation(signature.return_annotation)
    tail = f") -> {returned}" if returned else ")"
    whole = f"{indent}{head}({', '.join(parameters)}{tail}"
    if len(whole) <= WIDTH:
        return [whole]
    return [f"{indent}{head}(", *[f"{indent}    {p}," for p in parameters], f"{indent}{tail}"]


def lines_of_class(name: str, found: type) -> list[str]:
    """How it is made, its fields if that does not show them, methods and properties, those of its own bases (not torch's,
    say) among them."""
    own = [c for c in found.__mro__ if c.__module__.startswith("sage_ext")]
    bases = ", ".join(base.__name__ for base in found.__bases__ if base is not object)
    if issubclass(found, BaseException):
        return [f"    class {name}, a kind of {bases}"]
    fields = list(getattr(found, "_fields", ()))
    if dataclasses.is_dataclass(found):
        fields = [field.name for field in dataclasses.fields(found)]
    out = lines_of(f"class {name}", found, "    ") + ([f"        a kind of {bases}"] if bases else [])
    if fields and fields != list(inspect.signature(found).parameters):
        out += [f"        fields: {', '.join(fields)}"]
    members = {member: c for c in reversed(own) for member in vars(c)}
    for member in sorted(members):
        if (member[0] == "_" and member not in SPECIAL) or member in fields:
            continue
        value = inspect.getattr_static(found, member)
        if isinstance(value, property):
            out.append(f"        {member}, a property: {annotation(inspect.signature(value.fget).return_annotation)}")
        elif isinstance(value, (staticmethod, classmethod)):
            kind = type(value).__name__
            out += lines_of(f"{kind} {member}", value.__func__, " " * 8, drop_self=kind == "classmethod")
        elif inspect.isfunction(value):
            out += lines_of(member, value, " " * 8, drop_self=True)
        elif not inspect.isdatadescriptor(value):
            out.append(f"        {member} = {default(value)}")
    return out


def lines_of_name(module: ModuleType, name: str, seen: dict[int, str]) -> list[str]:
    value = getattr(module, name)
    if isinstance(value, ModuleType):
        return [f"    {name}, a module"]
    if not callable(value) and not isinstance(value, dict):
        return [f"    {name} = {default(value)}"]
    if id(value) in seen:
        return [f"    {name}, of {seen[id(value)]}"]
    seen[id(value)] = module.__name__
    if isinstance(value, dict):
        return [f"    {name}, by name:", *[f"        {key}" for key in sorted(value)]]
    return lines_of_class(name, value) if inspect.isclass(value) else lines_of(name, value, "    ")


def listing() -> str:
    out: list[str] = []
    seen: dict[int, str] = {}
    for module in public_modules():
        out.append(module.__name__)
        for name in exported(module):
            out += lines_of_name(module, name, seen)
        out.append("")
    return "\n".join(out)


def test_the_public_names_and_signatures_are_those_of_the_list():
    difference = difflib.unified_diff(
        LIST.read_text().split("\n"), listing().split("\n"), "tests/public_api.txt", "sage_ext", lineterm=""
    )
    text = "\n".join(difference)
    assert not text, (
        f"{text}\nIf this is meant: python tests/test_public_api.py renews the list (and CHANGELOG.md says it)."
    )


def test_modules_without_all_are_there():
    assert set(WITHOUT_ALL) | set(BESIDES_ALL) <= {module.__name__ for module in public_modules()}


def test_every_kind_of_change_shows():
    """A parameter, its default and order, a keyword's star, a return type, a member and a field: each has its place."""

    def function(a: int, /, b: str = "x", *rest: float, c, d: list[int] | None = None, **more) -> bool: ...

    def keywords(a, *, b=1): ...

    @dataclasses.dataclass
    class Fields:
        a: int
        b: str = "y"

        @property
        def size(self) -> int: ...

        @classmethod
        def make(cls, b): ...

        @staticmethod
        def twice(b): ...

        def _hidden(self): ...

        def long(
            self,
            the_first_parameter_of_a_long_name,
            another_parameter_of_a_long_name,
            a_third_parameter_of_a_long_name=1.5,
        ): ...

    Fields.__module__ = "sage_ext.made_up"
    assert lines_of("f", function, "") == [
        "f(a: int, /, b: str = 'x', *rest: float, c, d: list[int] | None = None, **more) -> bool"
    ]
    assert lines_of("f", keywords, "") == ["f(a, *, b = 1)"]
    assert lines_of_class("Fields", Fields) == [
        "    class Fields(a: int, b: str = 'y') -> None",
        "        long(",
        "            the_first_parameter_of_a_long_name,",
        "            another_parameter_of_a_long_name,",
        "            a_third_parameter_of_a_long_name = 1.5,",
        "        )",
        "        classmethod make(b)",
        "        size, a property: int",
        "        staticmethod twice(b)",
    ]


if __name__ == "__main__":
    LIST.write_text(listing())
