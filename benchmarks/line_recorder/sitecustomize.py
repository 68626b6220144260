"""Records when the product's statements run, in whatever process has this folder on PYTHONPATH.

Python imports a module of this name at its start. It compiles every file below
``STEP_FILES_ROOTS`` with a call before each statement, so threads that are started in C++ are seen
too (``sys.settrace`` sees only its own thread) and other people's code keeps its speed. Each
process appends to ``STEP_FILES_OUT``/<pid>.jsonl, four times a second, as it may be killed at any
time: {file: [hundredth of a second since 1970, line, hundredth, line, ...]}."""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, ModuleType

BUCKET_S = 0.01
WRITE_EVERY_S = 0.25
NAME = "__ran__"  # of the mark among the globals of a recorded module

Statements = list[ast.stmt]


class Mark:
    """Called before each statement of one file; remembers when, to a hundredth of a second."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.seen: set[tuple[int, int]] = set()

    def __call__(self, line: int) -> None:
        self.seen.add((int(time.time() / BUCKET_S), line))

    def __reduce__(self) -> tuple[Callable[[str], Mark], tuple[str]]:
        # Ray pickles local functions with their globals: another process has a mark of its own.
        return mark, (self.file,)


MARKS: dict[str, Mark] = {}


def mark(file: str) -> Mark:
    """The mark of a file in this process."""
    if not MARKS:
        start_writing()
        os.register_at_fork(after_in_child=start_writing)
    return MARKS.setdefault(file, Mark(file))


def start_writing() -> None:
    threading.Thread(target=keep_writing, name="line-recorder", daemon=True).start()


def keep_writing() -> None:
    path = Path(os.environ["STEP_FILES_OUT"]) / f"{os.getpid()}.jsonl"
    with path.open("a") as out:
        while True:
            time.sleep(WRITE_EVERY_S)
            row = {}
            for found in list(MARKS.values()):
                seen, found.seen = found.seen, set()
                if seen:
                    row[found.file] = [number for pair in list(seen) for number in pair]
            out.write(json.dumps(row) + "\n")
            out.flush()


class Marking(ast.NodeTransformer):
    """Puts a call of the mark before each statement of a function, and into lambdas."""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        self.generic_visit(node)
        pair = ast.Tuple([_call(node.body), node.body], ast.Load())
        last = ast.Subscript(pair, ast.Constant(1), ast.Load())
        node.body = ast.copy_location(last, node.body)
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            found = getattr(node, name, None)
            if isinstance(found, list) and found and isinstance(found[0], ast.stmt):
                setattr(node, name, _marked(found, isinstance(node, FUNCTIONS)))
        return node


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _marked(statements: Statements, is_function: bool) -> Statements:
    head = 1 if is_function and _is_docstring(statements[0]) else 0
    found = statements[:head]
    for statement in statements[head:]:
        found += [ast.copy_location(ast.Expr(_call(statement)), statement), statement]
    return found


def _call(place: ast.AST) -> ast.Call:
    line = ast.Constant(getattr(place, "lineno", 0))
    return ast.copy_location(ast.Call(ast.Name(NAME, ast.Load()), [line], []), place)


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def recorded(source: bytes, file: str) -> CodeType:
    """The code of a file with its marks; line numbers stay."""
    tree = Marking().visit(ast.parse(source, file))
    head = 0
    for statement in tree.body:
        future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        if not future and not _is_docstring(statement):
            break
        head += 1
    begin = ast.parse(f"{NAME} = __import__('sitecustomize').mark({file!r})\n{NAME}(1)").body
    tree.body[head:head] = begin
    code: CodeType = compile(ast.fix_missing_locations(tree), file, "exec", dont_inherit=True)
    return code


class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return recorded(self.get_data(path), os.path.realpath(path))


class Finder(importlib.abc.MetaPathFinder):
    """Finds what the others find, and records what lies below the roots."""

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = tuple(os.path.realpath(root) + os.sep for root in roots)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        for other in sys.meta_path:
            if other is self or (spec := other.find_spec(name, path, target)) is None:
                continue
            if type(spec.loader) is importlib.machinery.SourceFileLoader:
                file = spec.loader.path
                if os.path.realpath(file).startswith(self.roots):
                    spec.loader = Loader(name, file)
            return spec
        return None


if "STEP_FILES_ROOTS" in os.environ:
    sys.meta_path.insert(0, Finder(os.environ["STEP_FILES_ROOTS"].split(os.pathsep)))
