"""The plain class behind one of the host's Ray actors, to subclass it."""

from __future__ import annotations

from typing import Any


def plain_class(ray_actor: Any) -> type:
    """Ray hands out the decorated class; its plain one is the base of the thin subclass that Ray puts around it."""
    return ray_actor.__ray_metadata__.modified_class.__bases__[0]
