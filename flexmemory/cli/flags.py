"""Command lines: plain ones (Parser), and those with a config, --config=FILE[:ARG] with
--config.section.field=value (parse). Neither imports jax.
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from flexmemory.config import Config, default_config, from_dict
from flexmemory.errors import UserError, nearest

COMMAND_OPTIONS: set[str] = set()  # of the command line that this process runs, without dashes
ASSIGNMENT = re.compile(r"(?<![\w.=/,-])(\w+)=([^\s),;]*)")


def with_dashes(message: str, options: set[str], aliases: dict[str, str]) -> str:
    """A library's error in the words of the command line.

    The library names its arguments: ``steps: ...``, ``rank, rank_error: ...``, ``give
    overwrite=True``. Where these are options of the command they get their dashes: ``--steps:
    ...``, ``give --overwrite``. ``name=`` without a value becomes ``--name``. aliases: {argument:
    option} where the two differ; a key ``name=value`` stands for that value alone.
    """

    def assignment(match: re.Match) -> str:
        name, value = match.groups()
        option = aliases.get(match[0], aliases.get(name, name))
        if option.partition("=")[0] not in options:
            return match[0]
        plain = match[0] in aliases or value in ("", "True")
        return f"--{option}" if plain else f"--{option}={value}"

    leading = re.match(r"\w+(?:, \w+)*(?=:)", message)
    if leading:
        names = [aliases.get(name, name) for name in leading[0].split(", ")]
        if options.issuperset(names):
            message = ", ".join(f"--{name}" for name in names) + message[leading.end() :]
    return ASSIGNMENT.sub(assignment, message)


def for_user(error: UserError, aliases: dict[str, str] | None = None) -> str:
    """The line that a command prints for ``error``."""
    return f"error: {with_dashes(str(error), COMMAND_OPTIONS, aliases or {})}"


def set_options(names: Iterable[str]) -> None:
    COMMAND_OPTIONS.clear()
    COMMAND_OPTIONS.update(names)


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, and which takes no abbreviations."""

    def __init__(self, prog: str, description: str | None, **more: Any):
        super().__init__(prog=prog, description=description, allow_abbrev=False, **more)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        set_options(word.lstrip("-") for word in self._option_string_actions)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse(argv: list[str], usage: str, **options: tuple[Any, str]) -> flags.FlagValues:
    """Parses a command line with a config, into flag values of its own (nothing global).

    usage: the text of --help. options: name=(default, help); in place of a default, a type leaves
    it None. Returns the values; ``values.config`` is the ConfigDict, see :func:`config_of`. Raises
    UserError on any mistake.
    """
    values, words = flags.FlagValues(), ["flexmemory", *argv]
    config_flags.DEFINE_config_file(
        "config", None, "config file, FILE or FILE:ARG", flag_values=values, sys_argv=words
    )
    for name, (default, text) in options.items():
        kind, default = (default, None) if isinstance(default, type) else (type(default), default)
        defines: dict[type, Any] = {
            bool: flags.DEFINE_boolean,
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            str: flags.DEFINE_string,
        }
        defines[kind](name, default, text, flag_values=values)
    set_options(values)
    if {"-h", "--help", "-help"} & set(argv):
        helps = [f"  --{name}: {values[name].help}" for name in sorted(values) if values[name].help]
        print("\n".join([usage, "", *helps, ""]))
        print("config fields and defaults, set with --config.SECTION.FIELD=VALUE;", end=" ")
        print(f"flexmemory/config.py says what they mean:\n\n{default_config()}")
        raise SystemExit(0)
    given = next((word.partition("=")[2] for word in argv if word.startswith("--config=")), "")
    if given and not Path(given.partition(":")[0]).is_file():
        raise UserError(f"--config: no file {given.partition(':')[0]!r}")
    for word in argv:
        if word.startswith("--config."):
            check_override(word.removeprefix("--config."))
    try:
        rest = values(words)
    except flags.UnrecognizedFlagError as error:
        hint = nearest(error.flagname, list(values))
        raise UserError(f"--{error.flagname}: no such flag; {hint}") from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections repeats a config file's error with its traceback; the last line is the
        # message
        message = str(error).strip().splitlines()[-1].removeprefix("flexmemory.errors.UserError: ")
        raise UserError(message.removeprefix("flag ")) from error
    if values.config is None:
        raise UserError(f"--config: missing; {usage.splitlines()[0]}")
    if len(rest) > 1:
        raise UserError(f"argument {rest[1]!r}: not understood; flags are given as --name=value")
    return values


def check_override(word: str) -> None:
    """--config.x.y=z is checked before any config file runs, so that the message names the nearest
    field and the type it wants.
    """
    name, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"--config.{name}: give a value, --config.{name}=VALUE")
    at = default_config().to_dict()
    for part in name.split("."):
        if not isinstance(at, dict) or part not in at:
            known = at if isinstance(at, dict) else ["a plain value, no fields"]
            raise UserError(f"config {name}: no such field {part!r}; {nearest(part, known)}")
        at = at[part]
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}
    wanted[dict] = "a field inside it"
    if not accepts(type(at), value):
        raise UserError(f"config {name}: {value!r}, give {wanted[type(at)]}")


def accepts(kind: type, text: str) -> bool:
    """Is ``text`` a value of that kind?"""
    if kind is bool:
        return text.lower() in ("true", "false", "1", "0")
    if kind not in (int, float):
        return kind is str
    try:
        kind(text)
    except ValueError:
        return False
    return True


def config_of(values: flags.FlagValues) -> Config:
    """The checked, frozen config."""
    return from_dict(values.config)
