"""YAML that programs wrote, such as a run's config.yaml: by libyaml, ten times as fast as PyYAML's
own parser, which stands in where PyYAML came without it. What people write is read by
cluster/recipe/yaml_text.py.
"""

from __future__ import annotations

import yaml

from avatar_rl.common.types import Json, ReadOnlyJson

_Loader: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: type[yaml.SafeDumper | yaml.CSafeDumper] = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def parse_plain(text: str) -> Json:
    """The value of one document. Raises yaml.YAMLError."""
    value: Json = yaml.load(text, _Loader)
    return value


def plain_yaml(value: ReadOnlyJson) -> str:
    """A value as one document, keys in their order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=110)
    return text
