"""YAML of a recipe: mappings, lists and plain values, of a size that a person writes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

LARGEST = 128 * 1024  # bytes; the recipes of this repository have 2,000
MOST_VALUES = 10_000  # with every alias written out; a hostile file of a few lines stands for billions
DEEPEST = 50  # sections in sections
TOO_MANY = f"it stands for more than {MOST_VALUES:,} values; a recipe needs no such aliases or lists"


class YamlError(ValueError):
    """The text is no YAML of a recipe. The message is one line."""


def parse(text: str) -> Any:
    """The value that a text stands for: dict with text keys, list, str, int, float, bool or None.

    Raises:
        YamlError: it is not YAML, too large, has a key twice or one that is no text, or a value of another kind.
    """
    if len(text) > LARGEST:
        raise YamlError(f"it has {len(text):,} characters, but a recipe has at most {LARGEST:,}")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        value = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(f"{place}{error.problem or error.context}") from error
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # of characters; of a number that Python does not take
        raise YamlError(" ".join(str(error).split())) from error
    except LookupError as error:  # PyYAML's own of "!!int" and "!!bool" before something else
        raise YamlError("a value is not of the kind that its tag (!!int, !!float or !!bool) says") from error
    finally:
        if loader is not None:
            loader.dispose()
    _check_texts(value)
    return value


class _Loader(yaml.SafeLoader):
    """SafeLoader without what JSON has not (dates, sets, bytes), for which a key must be text and there once.

    What is too much is found while it is read.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._values += 1
        self._depth += 1
        if self._values > MOST_VALUES:
            raise YamlError(TOO_MANY)
        if self._depth > DEEPEST:
            raise YamlError(f"it is nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # `!!map 3` is one of no mapping
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shown} is no text; quote it", problem_mark=key.start_mark
                )
            if key.value in seen:
                problem = f"the key '{key.value}' is there twice; leave one out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _PLAIN
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node with its aliases written out.

    Raises:
        YamlError: too many, or an alias of what it is in.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise YamlError(f"line {node.start_mark.line + 1}: an alias stands for what it is in")
        return known[id(node)]
    known[id(node)] = 0  # until its end is reached
    parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    size = 1 + sum(_size(part, known) for part in parts)
    if size > MOST_VALUES:
        raise YamlError(TOO_MANY)
    known[id(node)] = size
    return size


def _check_texts(value: Any) -> None:
    """Raises YamlError for a text that no path, command line or terminal takes."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_texts(key)
            _check_texts(item)
    elif isinstance(value, list):
        for item in value:
            _check_texts(item)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise YamlError(f"{value!r} holds half a character (a surrogate)") from error
        if "\0" in value:
            raise YamlError(f"{value!r} holds a null character")
