"""Configuration: YAML files become trees of frozen dataclasses, checked once and completely.

The dataclasses live beside the code that they configure. Here they are only filled: every key must exist, every leaf is
validated by pydantic in strict mode, a union of dataclasses is chosen by its ``kind``, and all mistakes of a file are
reported at once, each with its dotted path.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
BASE = "base"  # the key that names the file to inherit from


class ConfigError(ValueError):
    """One or more mistakes in a configuration; the message has one line for each, with its dotted path.

    ``mistakes`` are these lines alone, for a caller that has more to say about the same file.
    """

    def __init__(self, message: str, mistakes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.mistakes = tuple(mistakes)


# --- YAML -------------------------------------------------------------------------------------------------------------

# YAML 1.1 reads 1e-4 as a string because the dot is missing; everybody who writes a learning rate means the number.
_FLOAT = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Safe YAML that knows 1e-4 and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The writer that belongs to :class:`_Loader`: strings that look like 1e-4 are quoted."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse(text: str, name: str = "the text") -> Any:
    """Plain values of a YAML text.

    Raises:
        ConfigError: for text that is not YAML, with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error


def parse_file(path: Path) -> Any:
    """Plain values of a YAML file.

    Raises:
        ConfigError: for text that is not YAML, and for rows of data, of which even a large file is known at once.
        OSError: for a file that cannot be read.
    """
    kind = path.suffix.lower()
    if kind in (".jsonl", ".csv", ".tsv", ".parquet"):
        raise ConfigError(rows_instead(path))
    with path.open(encoding="utf-8") as file:
        start = file.read(64).lstrip()
        if kind == ".json" and start.startswith("["):
            raise ConfigError(rows_instead(path))
        file.seek(0)
        return parse(file.read(), str(path))


def rows_instead(path: Path) -> str:
    """What to say of a file of rows that stands where a configuration belongs."""
    return (
        f"{path} holds rows of data; what belongs here is a YAML file. Rows are trained on by a line like "
        f"- {{kind: llava, path: {path.name}}} in a copy of data_configs/own_data.yaml, which data.sources names"
    )


def read(path: str | Path) -> dict[str, Any]:
    """The tree of a file with everything that it inherits through ``base:`` (a path relative to the file).

    Raises:
        ConfigError: for a missing file, a file that inherits from itself, or one that is not a mapping.
    """
    return _read(Path(path), ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    here = path.resolve()
    if here in above:
        chain = " -> ".join(str(p) for p in (*above[above.index(here) :], here))
        raise ConfigError(f"base: the files inherit in a circle: {chain}")
    try:
        tree = parse_file(path)
    except OSError as error:
        wanted = f" (the base of {above[-1]})" if above else ""
        raise ConfigError(f"cannot read the configuration {path}{wanted}: {error.strerror or error}") from error
    tree = {} if tree is None else tree
    if isinstance(tree, list) and tree and all(isinstance(row, dict) for row in tree):
        raise ConfigError(rows_instead(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of names to values, not {type(tree).__name__}")
    base = tree.pop(BASE, None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the path of one file, not {base!r}")
    return merge(_read(path.parent / base, (*above, here)), tree)


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``: mappings merge, anything else replaces. A mapping of another ``kind`` replaces too."""
    out = dict(low)
    for key, value in high.items():
        old = out.get(key)
        out[key] = value
        if isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            out[key] = merge(old, value)
    return out


def override(tree: dict[str, Any], assignment: str) -> None:
    """Apply one ``a.b=value`` (the value is YAML, a list is indexed by number) to ``tree``, in place.

    Raises:
        ConfigError: for text without ``=``, an index outside its list, or a path through something with no parts.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {assignment!r} is not of the form a.b=value")
    node: Any = tree
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        at: Any = key
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                where = ".".join(keys[:i])
                raise ConfigError(f"override {path}: {where} is a list of {len(node)}, it has no entry {key!r}")
            at = int(key)
        elif not isinstance(node, dict):
            raise ConfigError(f"override {path}: {'.'.join(keys[:i])} is {node!r}, which has no parts")
        if last:
            node[at] = parse(text, f"the value of {path}")
        else:
            if isinstance(node, dict) and node.get(at) is None:
                node[at] = {}
            node = node[at]


# --- trees of dataclasses ---------------------------------------------------------------------------------------------


def load(path: str | Path, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a file (with its bases), apply overrides ``a.b=value`` and return a checked ``cls``.

    Raises:
        ConfigError: every mistake at once, one line each, with its dotted path and, for an unknown name, close ones.
    """
    tree = read(path)
    for assignment in overrides:
        override(tree, assignment)
    return build(tree, cls, str(path))


def build(tree: Mapping[str, Any], cls: type[T], name: str = "the configuration", at: str = "") -> T:
    """A checked ``cls`` from plain values; ``name`` is what the error message calls them.

    ``at`` is their own dotted path, where they are a part of the file.
    """
    errors: list[str] = []
    value = _fill(tree, cls, at, errors, dataclasses.MISSING)
    if errors:
        count = "1 mistake" if len(errors) == 1 else f"{len(errors)} mistakes"
        raise ConfigError(f"{count} in {name}:\n" + "\n".join(f"  {line}" for line in errors), errors)
    return value


_BAD: Any = object()  # stands for a value whose mistake is already in the list


def _note(errors: list[str], path: str, message: str) -> Any:
    errors.append(f"{path or 'the file'}: {message}")
    return _BAD


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _fill(value: Any, hint: Any, path: str, errors: list[str], default: Any) -> Any:
    """``value`` as the annotation ``hint`` wants it; dataclasses are filled here, leaves by pydantic."""
    while get_origin(hint) is Annotated and _mentions_dataclass(hint):
        hint = get_args(hint)[0]
    if not _mentions_dataclass(hint):
        return _leaf(value, hint, path, errors)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(value, hint, path, errors, default)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(value, args, path, errors, default)
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, dict):
            return _note(errors, path, f"wants a mapping, not {value!r}")
        return {k: _fill(v, args[1], _join(path, k), errors, dataclasses.MISSING) for k, v in value.items()}
    if not isinstance(value, list | tuple):
        return _note(errors, path, f"wants a list{_example(value, args[0])}, not {value!r}")
    items = [_fill(v, args[0], _join(path, i), errors, dataclasses.MISSING) for i, v in enumerate(value)]
    return items if origin is list else tuple(items)


def _mentions_dataclass(hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return False
    return (isinstance(hint, type) and dataclasses.is_dataclass(hint)) or any(map(_mentions_dataclass, get_args(hint)))


def _leaf(value: Any, hint: Any, path: str, errors: list[str]) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        # Through JSON, because its strict mode means what YAML means: a list may be a tuple, "3" is no number.
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            where = ".".join([path, *(str(p) for p in found["loc"] if isinstance(p, int))])
            _note(errors, where, f"{found['msg']}, not {found['input']!r}")
    except TypeError:
        _note(errors, path, f"cannot be a {type(value).__name__} ({value!r})")
    return _BAD


def _union(value: Any, members: tuple[Any, ...], path: str, errors: list[str], default: Any) -> Any:
    """None, one of several dataclasses told apart by ``kind``, or a plain value."""
    if value is None and types.NoneType in members:
        return None
    classes = [m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m)]
    others = tuple(m for m in members if m not in classes and m is not types.NoneType)
    if not isinstance(value, dict):
        if not others and len(classes) > 1:
            kinds = ", ".join(kind for c in classes for kind in _kinds(c))
            return _note(errors, path, f"wants a mapping with a kind ({kinds}), not {value!r}")
        if not others:
            return _note(errors, path, f"wants the fields of {classes[0].__name__}, not {value!r}")
        return _fill(value, Union[others], path, errors, dataclasses.MISSING)  # noqa: UP007
    if not classes:
        return _fill(value, Union[others], path, errors, dataclasses.MISSING)  # noqa: UP007
    if len(classes) == 1:
        return _dataclass(value, classes[0], path, errors, default)
    by_kind = {kind: c for c in classes for kind in _kinds(c)}
    chosen = value.get("kind", getattr(default, "kind", None))
    if chosen not in by_kind:
        said = "is missing" if chosen is None else f"{chosen!r} is unknown{_close(str(chosen), by_kind)}"
        return _note(errors, _join(path, "kind"), f"{said}; it is one of {', '.join(by_kind)}")
    return _dataclass(value, by_kind[chosen], path, errors, default)


def _kinds(cls: type) -> tuple[str, ...]:
    hint = get_type_hints(cls).get("kind")
    if get_origin(hint) is not Literal:
        raise TypeError(f"{cls.__name__} is in a union, so it needs a field `kind: Literal[...]`")
    return get_args(hint)


def _example(value: Any, member: Any) -> str:
    """How a list of dataclasses told apart by ``kind`` is written, with the kind that ``value`` may have meant."""
    classes = [m for m in get_args(member) if dataclasses.is_dataclass(m) and isinstance(m, type)]
    kinds = [kind for c in classes for kind in _kinds(c)] if len(classes) > 1 else []
    return f", e.g. [{{kind: {value if value in kinds else kinds[0]}}}]" if kinds else ""


def _close(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _dataclass(value: Any, cls: type, path: str, errors: list[str], default: Any) -> Any:
    """An instance of ``cls``. Fields that are not given come from ``default`` when that is a ``cls`` too."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        return _note(errors, path, f"wants the fields of {cls.__name__}, not {value!r}")
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in value:
        if key not in fields:
            known = f"; known are {', '.join(fields)}" if not _close(str(key), fields) else _close(str(key), fields)
            _note(errors, _join(path, key), f"unknown name{known}")
    given: dict[str, Any] = {}
    for name, field in fields.items():
        preset = getattr(default, name) if isinstance(default, cls) else _default(field)
        if name in value:
            given[name] = _fill(value[name], hints[name], _join(path, name), errors, preset)
        elif preset is dataclasses.MISSING:
            given[name] = _note(errors, _join(path, name), "is missing")
        else:
            given[name] = preset
    if any(v is _BAD or _holds_bad(v) for v in given.values()):
        return _BAD
    try:
        return cls(**given)
    except ValueError as error:
        return _note(errors, path, str(error))


def _holds_bad(value: Any) -> bool:
    items: Iterator[Any] = iter(value.values() if isinstance(value, dict) else value if _is_list(value) else ())
    return any(v is _BAD for v in items)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return dataclasses.MISSING if field.default_factory is dataclasses.MISSING else field.default_factory()


# --- and back ---------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Dataclasses, tuples, paths and enums as the mappings, lists and strings that YAML and JSON know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if _is_list(value):
        return [plain(v) for v in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    return str(value) if isinstance(value, Path) else value


def dump(config: Any) -> str:
    """The resolved configuration as YAML; :func:`load` gives back an equal one."""
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None)


def versions() -> dict[str, str]:
    """Versions of what computes: python, its libraries, accessory and, in a checkout, the git revision.

    The revision ends in ``+dirty`` when tracked files differ from it. A library that is not installed is left out.
    """
    out = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "transformers", "diffusers", "safetensors"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    from accessory import __version__

    out["accessory"] = __version__
    here = Path(__file__)
    # Asked about this very file, so that an installed package inside somebody else's checkout does not borrow its hash.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name):
        revision = _git(here.parent, "rev-parse", "HEAD")
        dirty = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
        out["git"] = revision + ("+dirty" if dirty else "")
    return out


def _git(folder: Path, *command: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
