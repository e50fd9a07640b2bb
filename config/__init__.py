"""Settings: the defaults of dataclasses, changed by a preset, changed by flags.

A dataclass field, a key in a preset's TOML file and a flag are one and the same word. A field
is declared as `n_layer: Annotated[int, "number of transformer blocks"] = 4`; the text is its help.
"""

import argparse
import difflib
import math
import sys
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

# In order of size.
PRESETS = ("tiny", "mini", "small", "medium", "base")

# Settings by section: {"model": GPTConfig, ...}, and values by section: {"model": {"n_layer": 4}}.
Sections = Mapping[str, type]
Values = Mapping[str, Mapping[str, Any]]

TOO_LARGE = 2**31
KIND_NAMES = {int: "a whole number below 2^31", float: "a finite number", str: "text in quotes"}


class SettingsParser(argparse.ArgumentParser):
    """A command line whose flags are the fields of settings dataclasses."""

    def __init__(self, prog: str, positional: str, description: str, sections: Sections):
        super().__init__(
            prog=prog,
            usage=f"{prog} [{positional}] [--SETTING VALUE ...]",
            description=description,
            allow_abbrev=False,
        )
        self.sections = sections
        for section in sections.values():
            group = self.add_argument_group((section.__doc__ or "").rstrip("."))
            for field in fields(section):
                kind, _, text = _declaration(section, field.name)
                default = "none" if field.default is None else field.default
                group.add_argument(
                    f"--{field.name}",
                    default=argparse.SUPPRESS,
                    metavar="|".join(_choices(kind)) or kind.__name__.upper(),
                    help=f"{text} (default: {default})",
                )

    def parse(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Values]:
        """Read a command line: its own arguments, and the settings that were given as flags.

        Raises ValueError with one sentence about the first thing that is wrong.
        """
        words = sys.argv[1:] if argv is None else argv
        words = [self._with_underscores(word) for word in words]
        arguments, unknown = self.parse_known_intermixed_args(words)
        if unknown:
            word = unknown[0].partition("=")[0]
            known = {flag.lstrip("-"): flag for flag in self._option_string_actions}
            guess = _suggest(word.lstrip("-"), known, "--") if word.startswith("-") else ""
            raise ValueError(f"there is no use for {word!r}{guess or '; see --help'}")
        given = vars(arguments)
        flags = {
            name: {
                field.name: _from_word(section, field.name, given.pop(field.name))
                for field in fields(section)
                if field.name in given
            }
            for name, section in self.sections.items()
        }
        return arguments, flags

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += " (one that begins with a dash is written --flag=VALUE)"
        raise ValueError(f"{message}; see --help")

    def _with_underscores(self, word: str) -> str:
        """Accept --n-layer for --n_layer."""
        if not word.startswith("--"):
            return word
        flag, equals, value = word.partition("=")
        written = "--" + flag.removeprefix("--").replace("-", "_")
        return written + equals + value if written in self._option_string_actions else word


def load_preset(preset: str, sections: Sections) -> Values:
    """Read a preset by its name or by the path of its .toml file."""
    if preset in PRESETS:
        path = Path(__file__).with_name(f"{preset}.toml")
    elif preset.endswith(".toml"):
        path = Path(preset)
    else:
        raise ValueError(
            f"there is no preset {preset!r}{_suggest(preset, PRESETS)}; "
            f"choose from {', '.join(PRESETS)}, or give the path of a .toml file"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no preset file {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from None
    try:
        build(sections, values)
    except ValueError as error:
        raise ValueError(f"in {path}, {error}") from None
    return values


def build(sections: Sections, *layers: Values) -> list[Any]:
    """Make the dataclass of each section from its defaults and the layers, the last one winning.

    Raises ValueError for a section or key that does not exist and for a value of a wrong type;
    what values are allowed, each dataclass says itself.
    """
    merged: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for layer in layers:
        for name, values in layer.items():
            if name not in sections:
                for section, settings in sections.items():
                    if name in (field.name for field in fields(settings)):
                        raise ValueError(f"the key {name!r} belongs below [{section}]")
                raise ValueError(
                    f"there is no section [{name}]{_suggest(name, sections)}; "
                    f"there are {', '.join(f'[{known}]' for known in sections)}"
                )
            if not isinstance(values, Mapping):
                raise ValueError(f"[{name}] must be a section of keys, not {values!r}")
            for key, value in values.items():
                merged[name][key] = _checked(sections[name], key, value, f"[{name}] ")
    return [section(**merged[name]) for name, section in sections.items()]


def _declaration(section: type, name: str) -> tuple[Any, bool, str]:
    """Return the type of a field, whether None may stand for it, and its help."""
    kind, text = typing.get_type_hints(section, include_extras=True)[name], ""
    if typing.get_origin(kind) is Annotated:
        kind, text = kind.__origin__, kind.__metadata__[0]
    if isinstance(kind, types.UnionType):  # it is written X | None
        return typing.get_args(kind)[0], True, text
    return kind, False, text


def _choices(kind: Any) -> tuple[str, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _checked(section: type, key: str, value: Any, where: str = "") -> Any:
    """Return a value in the type of its field, or say what it should be."""
    if key not in (names := [field.name for field in fields(section)]):
        raise ValueError(f"{where}has no key {key!r}{_suggest(key, names)}")
    kind, may_be_none, _ = _declaration(section, key)
    if value is None and may_be_none:
        return None
    if choices := _choices(kind):
        if value in choices:
            return value
        raise ValueError(f"{where}{key} is {value!r}; it must be {' or '.join(choices)}")
    if kind is float and type(value) is int and abs(value) < TOO_LARGE:
        value = float(value)
    if (
        type(value) is not kind
        or (kind is float and not math.isfinite(value))
        or (kind is int and abs(value) >= TOO_LARGE)
    ):
        raise ValueError(f"{where}{key} is {value!r}; it must be {KIND_NAMES[kind]}")
    return value


def _from_word(section: type, key: str, word: str) -> Any:
    """Return the value that a word on the command line stands for."""
    kind, _, _ = _declaration(section, key)
    try:
        value = kind(word) if kind in (int, float) else word
    except ValueError:
        value = word
    return _checked(section, key, value)


def _suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    nearest = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f" (did you mean {prefix}{nearest[0]}?)" if nearest else ""
