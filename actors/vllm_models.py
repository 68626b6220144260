"""What the installed vLLM says of a model class, read from its source: to import it takes 13 s."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

#: The base class of vLLM's models that take adapters.
_ADAPTED = "SupportsLoRA"
_PACKAGE = "vllm.model_executor.models."


def takes_adapters(architecture: str) -> bool:
    """Whether vLLM adapts the language model of an ``architecture``, as a config.json names it.
    True where its source does not tell: then the engine's start has the last word."""
    place = architectures().get(architecture)
    return place is None or _inherits(*place)


def _folder() -> Path | None:
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "model_executor" / "models"


@cache
def architectures() -> dict[str, tuple[str, str]]:
    """(Module, class) by architecture; empty where vLLM or its list is not to be found."""
    folder = _folder()
    if folder is None or not (folder / "registry.py").is_file():
        return {}
    places: dict[str, tuple[str, str]] = {}
    for node in ast.parse((folder / "registry.py").read_text()).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            for key, place in zip(value.keys, value.values, strict=True):
                names = [getattr(part, "value", None) for part in getattr(place, "elts", ())]
                if isinstance(key, ast.Constant) and [type(name) for name in names] == [str, str]:
                    places[str(key.value)] = (str(names[0]), str(names[1]))
    return places


@cache
def _classes(module: str) -> tuple[dict[str, list[str]], dict[str, tuple[str, str]]]:
    """Of a module of models: the bases of its classes, and where its imports come from."""
    folder = _folder()
    assert folder is not None  # it has a registry
    bases: dict[str, list[str]] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.walk(ast.parse((folder / f"{module}.py").read_text())):
        if isinstance(node, ast.ClassDef):
            bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
        elif isinstance(node, ast.ImportFrom) and node.module:
            origin = node.module if node.level else node.module.removeprefix(_PACKAGE)
            if node.level == 1 or origin != node.module:
                imports |= {name.asname or name.name: (origin, name.name) for name in node.names}
    return bases, imports


def _inherits(module: str, name: str) -> bool:
    """Whether a class of ``module`` takes adapters, by itself or through what it inherits. True for
    one that is not found: vLLM has some models outside this folder."""
    folder = _folder()
    if folder is None or not (folder / f"{module}.py").is_file():
        return True
    bases, imports = _classes(module)
    if name in bases:
        return any(_base_adapted(module, base) for base in bases[name])
    return name in imports and _inherits(*imports[name])


def _base_adapted(module: str, base: str) -> bool:
    """Of a base class as ``module`` names it."""
    bases, imports = _classes(module)
    if base in bases:
        return _inherits(module, base)
    origin = imports.get(base, ("interfaces", base))
    return base == _ADAPTED if origin[0] == "interfaces" else _inherits(*origin)
