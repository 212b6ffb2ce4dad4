"""A recipe file and the overrides of a command line, as one nested dictionary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from skd_plugin.errors import RecipeError, unknown_key

SECTIONS = ("openrlhf", "skd")


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The recipe with its bases merged in (the file wins over its base) and `key=value` overrides applied.

    `base` is relative to the file that names it, and so is any string value that begins with "./" or "../".

    Raises:
        RecipeError: missing file, bad YAML, unknown section, a base that names itself, an override without "=".
    """
    return override(_load_with_bases(Path(path), seen=()), overrides, path)


def override(recipe: dict[str, Any], overrides: Iterable[str], path: str | Path) -> dict[str, Any]:
    """`recipe`, which was read at `path`, with `key=value` overrides written into it."""
    for given in overrides:
        key, separator, value = given.partition("=")
        if not separator:
            raise RecipeError(f"'{given}' is no override; write key=value, e.g. skd.rollout.top_k=10")
        try:
            set_dotted(recipe, key, yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise RecipeError(f"'{given}': the value is not valid YAML") from error
    unknown = [name for name in recipe if name not in SECTIONS]
    if unknown:
        raise RecipeError(f"{path}: {unknown_key(unknown[0], SECTIONS)}")
    for name in SECTIONS:
        if not isinstance(recipe.get(name) or {}, dict):
            raise RecipeError(f"{path}: '{name}' is {recipe[name]!r}, but must be a section with options")
    return recipe


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"'{key}': '{parent}' is a value, not a section")
    tree[last] = value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        flat |= flatten(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value}
    return flat


def _load_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"{path}: the recipe is its own base")
    if not path.is_file():
        raise RecipeError(f"there is no recipe at {path}")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the sections {', '.join(SECTIONS)}")
    content = _resolve_paths(content, path.parent)
    base = content.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise RecipeError(f"{path}: 'base' is {base!r}, but must name one recipe file")
    return _merge(_load_with_bases(path.parent / base, (*seen, path)), content) if base else content


def _resolve_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _resolve_paths(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve_paths(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((folder / value).resolve())
    return value


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
