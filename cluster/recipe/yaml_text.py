"""YAML as people mean it. Words stay words, numbers are numbers, and no key is given twice.

YAML 1.1, which PyYAML reads, takes `no` for false, `1:30` for 90, `010` for 8 and `1e-3` for a
word; of two equal keys it keeps the last one without a sound. Here only `true` and `false` are
truth values, as in YAML 1.2. A key of the type true or false still accepts the word `yes`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path

import yaml

from avatar_rl.common.errors import ConfigError
from avatar_rl.common.types import Json

_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_DIGITS = "-+0123456789"


class _Loader(yaml.SafeLoader):
    """A safe loader with the rules above."""


#: Of its own: those of the parent stay as they are.
_Loader.yaml_implicit_resolvers = {}


def _resolve(tag: str, pattern: re.Pattern[str], first: str) -> None:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern.pattern})$"), list(first)
    )


_resolve("bool", _BOOL, "tTfF")
_resolve("int", _INT, _DIGITS)
_resolve("float", _FLOAT, f"{_DIGITS}.")
_resolve("null", re.compile("~|null|Null|NULL|"), "~nN\0")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("$"), [""])
_resolve("merge", re.compile("<<"), "<")


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 0 if text.startswith("0") and len(text) > 1 else 10)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | str:
    text = loader.construct_scalar(node)
    if _LEADING_ZERO.fullmatch(text):  # `007` is a name; as a number it is read where one is due
        return text
    return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").lower())


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Hashable, Json]:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"the key {key.value!r} is there twice, in lines {seen[key.value]} and "
                f"{key.start_mark.line + 1}: keep one",
                key.start_mark,
            )
        seen[key.value] = key.start_mark.line + 1
    loader.flatten_mapping(node)
    found: dict[Hashable, Json] = loader.construct_mapping(node, deep=True)
    return found


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(path: Path, what: str) -> Json:
    """The document of a file in UTF-8. Raises ConfigError naming ``what``, file, line and fault."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{what} {path} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from error
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} {path} is not valid YAML: {_said(error)}") from error


def parse_yaml(text: str) -> Json:
    """The value of one document. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        value: Json = loader.get_single_data()
    except (ValueError, RecursionError) as error:  # e.g. a date that a tag asks for
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()
    return value


def _said(error: yaml.YAMLError) -> str:
    """The fault and its line, without the whole context."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark = error.problem_mark
    return f"{error.problem or error.context} (line {mark.line + 1}, column {mark.column + 1})"
