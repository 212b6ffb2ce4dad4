"""Where this plugin takes the place of something in OpenRLHF or vLLM."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def rebind(owner: ModuleType | type, name: str, replacement: object, *, needed_by: str = "SKD") -> None:
    """Puts `replacement` where `owner`, a module or class of a library, has `name`.

    Args:
        needed_by: the part of this plugin that needs it, for the error.

    Raises:
        RuntimeError: `owner` has no such name, so that nobody would look for the replacement there.
    """
    if not hasattr(owner, name):
        where = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        raise RuntimeError(
            f"{where} has no '{name}' any more, so {needed_by} cannot take its place; another version of "
            f"{where.split('.')[0]} is installed than this plugin is made for. Run pytest tests/contract"
        )
    setattr(owner, name, replacement)


def plain_class(ray_actor: Any) -> Any:
    """The class behind one of OpenRLHF's Ray actors, to subclass it.

    Ray hands out the decorated class; its plain one is the base of the thin subclass that Ray puts around it.
    """
    return ray_actor.__ray_metadata__.modified_class.__bases__[0]
