"""What type checkers are told where PyTorch tells them nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def called_as(forward: Function) -> Callable[[Callable[..., Any]], Function]:
    """Gives `__call__`, declared under TYPE_CHECKING, the arguments and result of `forward`; nn.Module declares Any."""

    def declared(call: Callable[..., Any]) -> Function:
        return forward

    return declared
