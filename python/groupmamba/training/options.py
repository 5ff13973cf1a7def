# SPDX-License-Identifier: Apache-2.0
"""Options of the commands that train: from the command line, from files, and from the run that goes on.

argparse keeps what was given and nothing else, so that a default, a configuration file and a run that goes on can each
fill in the rest, in this order of weight: the command line, ``--config``, the run's own args.yaml, the recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from groupmamba.training.option_table import FREE, TRAIN, Command, Option, check_model_kwargs, keyword, path_text
from groupmamba_ext._command import UsageError, one_line


class _Show(argparse.Action):
    """Prints a text, or all options, and leaves."""

    def __init__(self, option_strings: list[str], dest: str, text: str | None = None, **options: Any):
        super().__init__(option_strings, argparse.SUPPRESS, 0, help=options["help"])
        self.text = text

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> NoReturn:
        print((self.text or parser.format_help()).rstrip())
        parser.exit()


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{v:.4g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _spelled(name: str, value: object) -> str:
    """An option as it is written on the command line."""
    option = name.replace("_", "-")
    if isinstance(value, bool) and (value or not option.startswith("no-")):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {_shown(value)}"


def add_arguments(parser: argparse.ArgumentParser, command: Command = TRAIN) -> None:
    """Adds the arguments of ``command``; the parser must have been made with ``add_help=False``."""
    parser.usage = f"groupmamba {command.name} DATA [options]"
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("-h", "--help", action=_Show, text=command.short_help, help="the options that people use")
    parser.add_argument("--help-all", action=_Show, help="every option")
    parser.add_argument("data", nargs="?", type=path_text, metavar="DATA", default=argparse.SUPPRESS, help=command.data)
    for title, options in command.groups.items():
        group = parser.add_argument_group(title)
        for option in options:
            names = [f"--{option.name}", *([f"-{option.short}"] if option.short else [])]
            known = option.default is not None and option.kind is not bool and option.default != ""
            text = f"{option.help} [{_shown(option.default)}]" if known else option.help
            text = text.replace("%", "%%")
            if option.kind is bool:
                plain = option.name.startswith("no-")
                action: Any = "store_true" if plain else argparse.BooleanOptionalAction
                group.add_argument(*names, action=action, default=argparse.SUPPRESS, help=text)
            elif isinstance(option.kind, tuple):
                group.add_argument(*names, choices=option.kind, help=text)
            else:
                metavar = {keyword: "NAME=VALUE", path_text: "PATH", str: "TEXT"}.get(option.kind, "X")
                group.add_argument(*names, type=option.kind, nargs=option.nargs, metavar=metavar, help=text)


def given(args: argparse.Namespace, command: Command = TRAIN) -> dict[str, Any]:
    """What the command line says, and beside it what ``--config`` says.

    Raises:
        UsageError: the file can't be read, or names an option or a value that isn't one.
    """
    values = {name: value for name, value in vars(args).items() if name in command.options or name == "data"}
    for name, value in values.items():
        if name in command.options and command.options[name].kind is keyword:
            values[name] = dict(value)
    file = values.pop("config", None)
    return values if file is None else {**read_yaml(file, command), **values}


def read_yaml(file: str | Path, command: Command = TRAIN) -> dict[str, Any]:
    """Options of a YAML file, checked as if they stood on the command line.

    Raises:
        UsageError: the file can't be read, or names an option or a value that isn't one.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text())
    except FileNotFoundError as error:
        raise UsageError(f"--config {file} is no file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {file} can't be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config: {str(file)!r} must map options to values, got {type(values).__name__}")
    return {name: _checked(str(file), name, value, command) for name, value in values.items() if value is not None}


def _checked(file: str, name: object, value: Any, command: Command) -> Any:
    option = command.options.get(str(name).replace("-", "_"))
    if name == "data":
        if not isinstance(value, str) or not value:
            raise UsageError(f"--config: {file!r} has a wrong value for data: {value!r}")
        return value
    if option is None:
        raise UsageError(f"--config: {file!r} has an unknown option {name!r}")
    fits: bool
    if option.kind is bool:
        fits = isinstance(value, bool)
    elif isinstance(option.kind, tuple):
        fits = value in option.kind
    elif option.kind is keyword:
        fits = isinstance(value, dict)
        value = _tuples(value)
    elif option.nargs is not None:
        fits = isinstance(value, (list, tuple)) and len(value) == (option.nargs if option.nargs != "+" else len(value))
        if fits:
            value = tuple(_checked_one(file, option, v) for v in value)
    else:
        fits, value = True, _checked_one(file, option, value)
    if not fits:
        raise UsageError(f"--config: {file!r} has a wrong value for {option.dest}: {value!r}")
    return value


def _checked_one(file: str, option: Option, value: object) -> Any:
    assert not isinstance(option.kind, tuple)
    if isinstance(value, (bool, list, dict)) or (option.kind in (str, path_text) and not isinstance(value, str)):
        raise UsageError(f"--config: {file!r} has a wrong value for {option.dest}: {value!r}")
    try:
        return option.kind(str(value))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--config: {file!r}, {option.dest} {error}") from error


def _tuples(value: Any) -> Any:
    """YAML has lists where Python literals have tuples."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """The other way round, for files."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def complete(
    values: Mapping[str, Any], earlier: Mapping[str, Any] | None = None, command: Command = TRAIN
) -> argparse.Namespace:
    """All options: those given, those of the run that goes on, and defaults.

    Raises:
        UsageError: options that exclude each other, or one that the run that goes on has another value for.
    """
    earlier = {} if earlier is None else dict(earlier)
    for name, value in values.items() if earlier else ():
        if name in FREE:
            continue
        before = earlier.get(name)  # a run keeps the options that have a value
        if _tuples(before) != _tuples(value if not isinstance(value, tuple) else list(value)):
            of_it = f"the {_shown(before)} of the run that goes on"
            if before is None:
                of_it = "the run that goes on, which was begun without it"
            raise UsageError(
                f"{_spelled(name, value)} differs from {of_it}: leave it out, or choose another --output, or "
                f"--resume none to begin anew"
            )
    defaults = {option.dest: option.default for option in command.options.values()}
    stated = {**earlier, **values}
    preset = command.presets.get(stated.get("schedule", defaults.get("schedule")), {})
    args = argparse.Namespace(**{"data": None, **defaults, **preset, **stated})
    if args.data is None:
        raise UsageError(f"DATA is missing: {command.data}")
    if args.weights is not None and args.pretrained:
        raise UsageError("--weights and --pretrained exclude each other")
    check_model_kwargs(args.model_kwargs)
    command.check(args, stated)
    if args.output is None:
        args.output = str(Path("output") / f"{command.prefix}{args.model}")
    return args
