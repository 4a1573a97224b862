"""The command line: flags from a dataclass, a user's mistake in one line, Ctrl-C between two steps.

A script's settings are the fields of one dataclass. Where a model changes a script's defaults
(`presets.py`), the flags that name the model are read first, so that `--help` shows, and a run
prints, what will run.
"""
import argparse
import contextlib
import dataclasses
import errno
import math
import shlex
import signal
import sys
import threading
import typing
import warnings

import torch

from .device import keep_memory
from .errors import UserError

# What stands in the usage for a value.
METAVARS = {int: "N", float: "X", str: "TEXT"}
# How a complaint calls a value.
KINDS = {int: "whole number", float: "number", str: "text"}


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message):
        hint = "see --help"
        if "unrecognized" in message:
            hint = "put a text of several words in quotes, or see --help"
        self.exit(2, f"error: {' '.join(message.split())}; {hint}\n")


# ---- flags from a dataclass ------------------------------------------------------------------

def setting(default=dataclasses.MISSING, help="", **rules):
    """A field of a script's settings: its default (none: it must be given), one line of help.

    rules: positional=True; choices=(...); min=, max= (bounds, included).
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def parse(cls, argv=None, description=None, defaults=None):
    """An instance of the dataclass `cls`, filled from the command line.

    A field `learning_rate: float` becomes --learning-rate. Types: str, int, float, bool (--flag,
    --no-flag), or one of them or None. defaults(flags) -> (where they stand, {field: value}): what
    replaces the dataclass's own defaults, given the texts of the flags so far. A mistake ends in
    one line on stderr and exit status 2.
    """
    values = own_defaults(cls)
    if defaults:
        values.update(known_settings(cls, *defaults(peek(cls, argv))))
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        add_flag(parser, field, plain_type(types[field.name]), values)
    return cls(**{**values, **vars(parser.parse_args(argv))})


def own_defaults(cls):
    """{field: default} of a dataclass, without the fields that must be given."""
    fields = dataclasses.fields(cls)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


def known_settings(cls, place, changes):
    """The changes of a preset, checked against the fields. Raises UserError for another name."""
    names = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(changes.keys() - names)
    if unknown:
        raise UserError(f"{place} sets {unknown[0]}, which this script does not have")
    return changes


def peek(cls, argv):
    """The texts that the command line gives for text flags such as --model, or their defaults."""
    parser = Parser(add_help=False, allow_abbrev=False)
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.metadata.get("positional") or plain_type(types[field.name]) is not str:
            continue
        missing = field.default is dataclasses.MISSING
        parser.add_argument(flag_of(field.name), default=None if missing else field.default)
    return parser.parse_known_args(argv)[0]


def plain_type(hint):
    """float | None -> float; a plain type is itself."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return options[0] if options else hint


def flag_of(name):
    """learning_rate -> --learning-rate."""
    return "--" + name.replace("_", "-")


def add_flag(parser, field, kind, values):
    """Add one field to the parser. values: {field: default} of all that need not be given."""
    required, default = field.name not in values, values.get(field.name)
    text = field.metadata["help"]
    if default is not None and default != "":
        text += f" (default: {show(default)})"
    text = text.replace("%", "%%")
    if kind is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(
            flag_of(field.name), action=action, required=required, default=argparse.SUPPRESS,
            help=text
        )
        return
    choices = field.metadata.get("choices")
    options = dict(type=converter(kind, field.metadata), choices=choices, help=text)
    if not choices:
        options["metavar"] = METAVARS[kind]
    if field.metadata.get("positional"):
        options["metavar"] = field.name.replace("_", "-")
        if not required:
            options.update(nargs="?", default=default)
        parser.add_argument(field.name, **options)
    else:
        parser.add_argument(
            flag_of(field.name), required=required, default=argparse.SUPPRESS, **options
        )


def converter(kind, rules):
    """text -> a finite `kind` within the bounds; argparse names the flag in what it raises."""
    low, high = rules.get("min", -math.inf), rules.get("max", math.inf)

    def convert(text):
        value = kind(text)
        if kind is not str and not (low <= value <= high and math.isfinite(value)):
            bounds = []
            if low > -math.inf:
                bounds.append(f"at least {low}")
            if high < math.inf:
                bounds.append(f"at most {high}")
            wanted = " and ".join(bounds) or "finite"
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    convert.__name__ = KINDS[kind]
    return convert


def show(value):
    """A setting as --help prints it: numbers with four digits, on and off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_changes(settings, place="", changes=None):
    """Print each setting that is not the script's own default, and where it comes from.

    settings: what `parse` returned. place, changes: what its `defaults` gave.
    """
    own = own_defaults(type(settings))
    usual = {**own, **(changes or {})}
    from_preset, from_flags = [], []
    for name in own:
        value = getattr(settings, name)
        if value != usual[name]:
            from_flags.append(as_flag(name, value))
        elif value != own[name]:
            from_preset.append(as_flag(name, value))
    for source, flags in ((place, from_preset), ("the command line", from_flags)):
        if flags:
            print(f"settings from {source}: {' '.join(flags)}")


def as_flag(name, value):
    """A setting as one would type it: --steps 40, --no-shading, --suffix ', 3d asset'."""
    if isinstance(value, bool):
        return flag_of(name) if value else flag_of(f"no_{name}")
    return f"{flag_of(name)} {shlex.quote(str(value))}"


# ---- how a script ends -----------------------------------------------------------------------

def main(function):
    """Call function(). User errors are printed in one line, with exit status 2.

    A bug of ours keeps its traceback. A warning is one line, too, without the place in our source.
    """
    def fail(line):
        print("error:", " ".join(line.split()), file=sys.stderr)
        sys.exit(2)

    def show_warning(message, *_, **__):
        print("warning:", " ".join(str(message).split()), file=sys.stderr)

    warnings.showwarning = show_warning
    keep_memory()
    try:
        function()
    except UserError as error:
        fail(str(error))
    except torch.cuda.OutOfMemoryError:
        fail(
            "the GPU has no memory left; close other programs that use it, "
            "or use --device cpu or smaller settings"
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(
            "no space left on the disk; free some, "
            "then run again (with --resume if there is a checkpoint)"
        )
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def interrupt_flag():
    """Within this context Ctrl-C sets the event that it gives, so a loop can end between two steps.

    A second Ctrl-C interrupts as usual. Afterwards Ctrl-C does what it did before.
    """
    event, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def on_interrupt(*_):
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
