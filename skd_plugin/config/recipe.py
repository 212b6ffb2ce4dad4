"""A recipe file and the overrides of a command line, as one nested dictionary."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from skd_plugin.config import yaml_text
from skd_plugin.errors import RecipeError, unknown_key

SECTIONS = ("openrlhf", "skd")
MOST_BASES = 20  # one the base of the other

# Options that had another name -> their name, in the same section. The old one still works, and says so.
RENAMED = {"skd.loss.top_k": "skd.loss.teacher_top_k"}


class RenamedOption(FutureWarning):
    """An option is given by its old name. The command line shows it as one line."""


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The recipe with its bases merged in (the file wins over its base) and `key=value` overrides applied.

    `base` is relative to the file that names it, and so is any string value that begins with "./" or "../".

    Warns:
        RenamedOption: an option has its old name.

    Raises:
        RecipeError: missing file, bad YAML, unknown section, a base that names itself, an override without "=", an
            option by both of its names in one place.
    """
    return override(_load_with_bases(Path(path), seen=()), overrides, path)


def override(recipe: dict[str, Any], overrides: Iterable[str], path: str | Path) -> dict[str, Any]:
    """`recipe`, which was read at `path`, with `key=value` overrides written into it."""
    names: dict[str, str] = {}  # of an option -> the one by which it was given
    for given in overrides:
        name, separator, value = given.partition("=")
        if not separator:
            raise RecipeError(f"'{given}' is no override; write key=value, e.g. skd.rollout.top_k=10")
        key = RENAMED.get(name, name)
        if names.setdefault(key, name) != name:
            raise RecipeError(_both_names(next(old for old, new in RENAMED.items() if new == key), key))
        if key != name:
            _tell(name)
        try:
            parsed = yaml_text.parse(value)
        except yaml_text.YamlError as error:
            raise RecipeError(f"'{_shortened(given)}': the value is not valid YAML: {error}") from error
        set_dotted(recipe, key, parsed)
        for old in use_new_names(recipe):  # in a whole section, such as skd.loss={top_k: 8}
            _tell(old)
    unknown = [name for name in recipe if name not in SECTIONS]
    if unknown:
        raise RecipeError(f"{path}: {unknown_key(unknown[0], SECTIONS)}")
    for name in SECTIONS:
        if not isinstance(recipe.get(name) or {}, dict):
            raise RecipeError(f"{path}: '{name}' is {recipe[name]!r}, but must be a section with options")
    return recipe


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"'{key}': '{parent}' is a value, not a section")
    tree[last] = value


def use_new_names(tree: dict[str, Any]) -> list[str]:
    """Gives the options of a recipe their present names, in place. Returns the old names that were there.

    Raises:
        RecipeError: an option is there by both of its names.
    """
    found = []
    for old, new in RENAMED.items():
        *parents, last = old.split(".")
        section: Any = tree
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and last in section:
            present = new.rpartition(".")[2]
            if present in section:
                raise RecipeError(_both_names(old, new))
            section[present] = section.pop(last)
            found.append(old)
    return found


def _both_names(old: str, new: str) -> str:
    return f"{old} is the old name of {new}, and both are given; leave {old} out"


def _tell(old: str) -> None:
    # Of this very line, so that Python shows it once, wherever the old name was read.
    warnings.warn(f"{old} is now called {RENAMED[old]}; the old name still works", RenamedOption, stacklevel=1)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        flat |= flatten(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value}
    return flat


def _load_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    try:
        path = path.resolve()
        if path in seen:
            raise RecipeError(f"{path}: the recipe is its own base")
        if len(seen) > MOST_BASES:
            raise RecipeError(f"{path}: more than {MOST_BASES} recipes are each the base of another")
        content = _read(path) or {}
    except (OSError, RuntimeError) as error:  # not ours to read, a name that is too long, links in a circle
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise RecipeError(f"{path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the sections {', '.join(SECTIONS)}")
    try:
        for old in use_new_names(content):
            _tell(old)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    content = _resolve_paths(content, path.parent)
    base = content.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise RecipeError(f"{path}: 'base' is {base!r}, but must name one recipe file")
    return _merge(_load_with_bases(path.parent / base, (*seen, path)), content) if base else content


def _read(path: Path) -> Any:
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name the recipe, a YAML file")
    if not path.is_file():
        raise RecipeError(f"there is no recipe at {path}")
    with path.open("rb") as file:
        content = file.read(yaml_text.LARGEST + 1)
    if len(content) > yaml_text.LARGEST:
        size = path.stat().st_size
        raise RecipeError(f"{path} has {size:,} bytes, but a recipe has at most {yaml_text.LARGEST:,}; is it one?")
    try:
        return yaml_text.parse(content.decode())
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text in UTF-8 (byte {error.start + 1}); a recipe is a YAML file") from error
    except yaml_text.YamlError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error


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
