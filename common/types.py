"""Types of JSON documents, for what is read from a file or an endpoint and not checked yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

#: What ``json.loads`` and ``yaml.safe_load`` give: yours to change.
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = dict[str, Json]

#: What can be written as JSON: a parameter of this type also takes ``dict[str, int]`` or a tuple.
ReadOnlyJson: TypeAlias = (
    "bool | int | float | str | Sequence[ReadOnlyJson] | Mapping[str, ReadOnlyJson] | None"
)
ReadOnlyObject: TypeAlias = Mapping[str, ReadOnlyJson]
