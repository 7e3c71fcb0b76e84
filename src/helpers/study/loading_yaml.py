"""Plain YAML, bounded: what a study file needs and nothing that runs, repeats or explodes.

Only plain values are made (safe loading: no tag makes an object). A repeated key is an
error, not the last one's win. Aliases are counted as often as they are used, so that a
few lines cannot stand for a billion values.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import yaml

from helpers.core.plain_text import valid_unicode

MOST_BYTES = 256 * 1024
MOST_VALUES = 50_000  # aliases written out
MOST_LEVELS = 24  # mappings and lists inside one another
MOST_CHARACTERS = 2_000  # characters; its number then has fewer digits than Python refuses


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        if isinstance(node, yaml.MappingNode):
            keys = Counter(str(key.value) for key, _ in node.value)
            for name, count in keys.items():
                if count > 1:
                    line = node.start_mark.line + 1
                    raise yaml.YAMLError(f"{name} is repeated, from line {line} on")
        return super().construct_mapping(node, deep)


def read_yaml(content: bytes) -> Any:
    """The plain data of one YAML document.

    PyYAML alone bounds neither aliases nor nesting and lets the last of repeated keys win.

    Raises:
        ValueError: it is no YAML, or exceeds a limit; the message is one line.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes; no study needs so many")
    try:
        loader = _Loader(content.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        # PyYAML's constructors raise these if a tag does not fit its value.
        raise ValueError(f"a tag and its value do not fit ({type(error).__name__})") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


_TOO_DEEP = f"mappings and lists are nested more than {MOST_LEVELS} deep; no study needs that"


def _check_size(root: yaml.Node) -> None:
    """Check the number, nesting and length of values; refuse a value inside itself."""
    sizes: dict[int, tuple[int, int]] = {}
    open_nodes: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        """(values, depth) of a node with its aliases expanded."""
        if id(node) in open_nodes:
            raise ValueError("an alias stands inside its own anchor; write the value out")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            part_sizes = [measure(part) for part in _parts(node)]
            sizes[id(node)] = (
                1 + sum(size for size, _ in part_sizes),
                1 + max((depth for _, depth in part_sizes), default=0),
            )
            open_nodes.discard(id(node))
        return sizes[id(node)]

    values, depth = measure(root)
    if values > MOST_VALUES:
        raise ValueError(f"with its aliases expanded it has more than {MOST_VALUES:,} values")
    if depth > MOST_LEVELS:
        raise ValueError(_TOO_DEEP)


def _parts(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    if isinstance(node, yaml.SequenceNode):
        return node.value
    line = node.start_mark.line + 1
    if len(node.value) > MOST_CHARACTERS:
        raise ValueError(f"line {line}: a value has more than {MOST_CHARACTERS:,} characters")
    if node.value != valid_unicode(node.value):
        raise ValueError(
            f"line {line}: a value holds half a character (an unpaired surrogate); correct it"
        )
    return []
