"""The command line: flags from a dataclass, mistakes of the user in one line with exit status 2, Ctrl-C between two steps."""
import argparse
import contextlib
import dataclasses
import errno
import math
import signal
import sys
import threading
import typing
import warnings

import torch

from .device import keep_memory
from .errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message):
        hint = "put a text of several words in quotes, or see --help" if "unrecognized" in message else "see --help"
        self.exit(2, f"error: {' '.join(message.split())}; {hint}\n")


def parse(cls, argv=None, description=None, defaults=None):
    """An instance of the dataclass `cls`, filled from the command line: `learning_rate: float` becomes --learning-rate.

    Types: str, int, float, bool (--flag, --no-flag), or Optional of one. field(metadata=...): "help": one line;
    "positional": True; "choices": [...]; "min", "max": bounds, included. defaults: {field: value} instead of the
    dataclass's own; one of another name is left out with a warning. A mistake ends in one line on stderr and exit status 2.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    for name in sorted(set(defaults or {}) - known):
        warnings.warn(f"the model's header asks for {name} = {defaults[name]!r}, which this version does not know: left out", stacklevel=2)
    defaults = {**{f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING},
                **{name: value for name, value in (defaults or {}).items() if name in known}}
    parser = Parser(description=description, allow_abbrev=False)
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = next(t for t in typing.get_args(types[field.name]) or [types[field.name]] if t is not type(None))
        flag = "--" + field.name.replace("_", "-")
        required, default = field.name not in defaults, defaults.get(field.name)
        text = field.metadata["help"]
        if default is not None and default != "":
            text += f" (default: {('off', 'on')[default] if kind is bool else default})"
        text = text.replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, required=required,
                                default=argparse.SUPPRESS, help=text)
            continue
        choices = field.metadata.get("choices")
        options = dict(type=_value(kind, field.metadata), choices=choices, help=text)
        if not choices:
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        if field.metadata.get("positional"):
            options["metavar"] = field.name.replace("_", "-")
            if not required:
                options.update(nargs="?", default=default)
            parser.add_argument(field.name, **options)
        else:
            parser.add_argument(flag, required=required, default=argparse.SUPPRESS, **options)
    return cls(**{**defaults, **vars(parser.parse_args(argv))})


def _value(kind, metadata):
    """str -> a finite `kind` within the bounds; argparse turns what it raises into a line that names the flag."""
    low, high = metadata.get("min", -math.inf), metadata.get("max", math.inf)

    def convert(text):
        value = kind(text)
        if kind is not str and not (low <= value <= high and math.isfinite(value)):
            bounds = [f"at least {low}"] * (low > -math.inf) + [f"at most {high}"] * (high < math.inf)
            raise argparse.ArgumentTypeError(f"must be {' and '.join(bounds) or 'finite'}, not {text}")
        return value
    convert.__name__ = {int: "whole number", float: "number", str: "text"}[kind]
    return convert


def main(function):
    """Calls function(); what the user can mend ends in one line on stderr and exit status 2, a bug in its traceback.
    A warning is one line, too, without the place in our source."""
    def fail(line):
        print("error:", " ".join(line.split()), file=sys.stderr)
        sys.exit(2)
    warnings.showwarning = lambda message, *_, **__: print("warning:", " ".join(str(message).split()), file=sys.stderr)
    keep_memory()
    try:
        function()
    except UserError as error:
        fail(str(error))
    except torch.cuda.OutOfMemoryError:
        fail("the GPU has no memory left; close other programs that use it, or use --device cpu or smaller settings")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail("no space left on the disk; free some, then run again (with --resume if there is a checkpoint)")
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def interrupt_flag():
    """Within this context Ctrl-C sets the event that it gives, so that a loop can end between two steps; a second Ctrl-C is the
    usual one. Afterwards Ctrl-C does what it did before."""
    event, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def on_interrupt(*_):
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
