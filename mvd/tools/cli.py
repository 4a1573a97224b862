"""The command line: flags from a dataclass, mistakes in one line, signals between steps.

A script's settings are the fields of one dataclass. Where a model changes a script's defaults
(`presets.py`), the flags that name the model are read first, so that `--help` shows, and a run
prints, what will run.
"""
import argparse
import contextlib
import dataclasses
import errno
import io
import math
import os
import shlex
import signal
import sys
import threading
import typing
import warnings

import torch

from . import parallel
from .device import LARGEST_SEED, keep_memory, without_memory
from .errors import UserError

# What stands in the usage for a value.
METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "PATH"}
# How a complaint calls a value.
KINDS = {int: "whole number", float: "number", str: "text"}


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, and which prints in one of several processes."""

    def error(self, message):
        """End with the complaint in one line, and exit status 2."""
        hint = "see --help"
        if "unrecognized" in message:
            hint = "put a text of several words in quotes, or see --help"
        line = f"error: {' '.join(message.split())}; {hint}\n"
        self.exit(2, line if parallel.is_first() else None)

    def print_help(self, file=None):
        if parallel.is_first():
            super().print_help(file)


# ---- flags from a dataclass ------------------------------------------------------------------

def setting(default=dataclasses.MISSING, help="", **rules):
    """A field of a script's settings: its default (none: it must be given), one line of help.

    rules: positional=True; choices=(...); min=, max= (bounds, included). A whole number is at
    most LARGEST_SEED, if nothing is said.
    """
    return dataclasses.field(default=default, metadata={"help": help, **rules})


def parse(cls, argv=None, description=None, defaults=None):
    """An instance of the dataclass `cls`, filled from the command line.

    A field `learning_rate: float` becomes --learning-rate. Types: str, int, float, bool (--flag,
    --no-flag), tuple (several texts), or one of them or None. defaults(flags) -> (where they stand,
    {field: value}): what replaces the dataclass's own defaults, given the texts of the flags so
    far. A mistake ends in one line on stderr and exit status 2.
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
    given = vars(parser.parse_args(argv))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return cls(**{**values, **given})


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
    if default not in (None, "", ()):
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
    if kind is tuple:
        options.update(type=str, nargs="+")
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
    if kind is int:
        high = min(high, LARGEST_SEED)

    def convert(text):
        value = kind(text)
        if kind is not str and not (low <= value <= high and abs(value) < math.inf):
            bounds = [] if abs(value) < math.inf else ["finite"]
            if low > -math.inf:
                bounds.append(f"at least {low}")
            if "max" in rules or value > high:
                bounds.append(f"at most {high}")
            wanted = " and ".join(bounds) or "finite"
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    convert.__name__ = KINDS.get(kind, "text")
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
    if isinstance(value, (tuple, list)):
        return f"{flag_of(name)} {shlex.join(value)}"
    return f"{flag_of(name)} {shlex.quote(str(value))}"


# ---- consoles --------------------------------------------------------------------------------

# No reader is left: of a pipe (Windows calls it EINVAL), or at the terminal.
NO_READER = (errno.EPIPE, errno.EINVAL, errno.EIO)


class Console(io.FileIO):
    """What lies below stdout or stderr. What cannot be written is lost, and the work goes on."""
    problem = None  # the last OSError

    def write(self, content):
        try:
            return super().write(content)
        except OSError as error:
            self.problem = error
            return len(content)


def printing(stream):
    """stdout or stderr, or in its place one that can always be printed to.

    A letter that the console does not have is printed as its number, \\u03bb, as Python does in
    its own errors. A stream that the caller has put there, a notebook's for example, stays.
    """
    if stream is None:
        return open(os.devnull, "w")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if type(raw) is not io.FileIO:
        return stream
    file = io.BufferedWriter(Console(raw.fileno(), "w", closefd=False))
    at_once = stream.line_buffering or stream.write_through
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=at_once)


def full(stream):
    """Whether a stream of `printing` goes to a full disk: it lost something, but has its reader."""
    stream.flush()
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    problem = getattr(raw, "problem", None)
    return problem is not None and problem.errno not in NO_READER


# ---- how a script ends -----------------------------------------------------------------------

# A file may not be read, or none be made there; or a name is too long.
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


class Terminated(KeyboardInterrupt):
    """SIGTERM ends the script: the exit status is 143."""


def interruption(code):
    """The exception with which a loop ends after a signal, SIGINT or SIGTERM."""
    return Terminated() if code == signal.SIGTERM else KeyboardInterrupt()


def main(function, smaller="smaller settings"):
    """Call function(). User errors are printed in one line, with exit status 2.

    smaller: what to try where memory does not suffice, the flags of this script.

    A bug of ours keeps its traceback. A warning is one line, too, without the place in our source,
    and is printed whatever PYTHONWARNINGS says. Ctrl-C ends with exit status 130, SIGTERM with 143.
    """
    keep_memory()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(printing, before)
    try:
        status = status_of(function, smaller)
        if not status and full(sys.stdout):
            status = fail("the disk is full to which the output goes")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
    parallel.end(status)


def fail(line):
    """Print an error in one line; returns the exit status, 2."""
    print("error:", " ".join(line.split()), file=sys.stderr)
    return 2


def show_warning(message, *_, **__):
    if parallel.is_first():
        print("warning:", " ".join(str(message).split()), file=sys.stderr)


def on_terminate(number, frame):
    signal.signal(number, signal.SIG_IGN)
    raise Terminated


def status_of(function, smaller):
    """Call function(), print what users can mend in one line, return the exit status."""
    try:
        with warnings.catch_warnings(), handlers({signal.SIGTERM: on_terminate}):
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = show_warning
            function()
    except UserError as error:
        return fail(str(error))
    except OSError as error:
        if error.errno in DENIED and error.filename is not None:
            return fail(f"cannot use {error.filename}: {error.strerror}")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return fail(
            "no space left on the disk; free some, "
            "then run again (with --resume if there is a checkpoint)"
        )
    except (RuntimeError, MemoryError) as error:
        exhausted = without_memory(error)
        if exhausted:
            instead = ", or --device cpu" if exhausted == "the GPU" else ""
            return fail(
                f"{exhausted} has no memory left; close other programs that use it, or try "
                f"{smaller}{instead}"
            )
        # PyTorch raises it wherever the main program is, when a process that reads has died.
        if not str(error).startswith("DataLoader worker"):
            raise
        return fail(f"{error}; if memory ran out use fewer --workers; go on with --resume")
    except Terminated:
        return 143
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        return end.code
    return 0


@contextlib.contextmanager
def handlers(functions):
    """Within this context the signals {number: function} call these, in the main thread.

    Afterwards they do what they did before, but a signal that is ignored by then stays so: a
    script that SIGTERM has told to end may be told again, by torchrun for example. One that is
    ignored already (SIGINT, for what a script starts with &) or belongs to a program round Python
    is left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for number, function in functions.items():
        if signal.getsignal(number) not in (None, signal.SIG_IGN):
            before[number] = signal.signal(number, function)
    try:
        yield
    finally:
        for number, function in before.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, function)


@contextlib.contextmanager
def interrupt_flag():
    """Within this context Ctrl-C and SIGTERM set the event that it gives, its `code`, too.

    So a loop can end between two steps, with `interruption(event.code)`. code is 0 until a signal
    comes, then its number; SIGTERM's is the larger one. A second Ctrl-C interrupts as usual, a
    second SIGTERM is ignored. In other threads than the main one the event is never set.
    """
    event = threading.Event()
    event.code = 0

    def on_signal(number, frame):
        event.code = max(event.code, number)
        event.set()
        interrupt = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if interrupt else signal.SIG_IGN)

    with handlers({signal.SIGINT: on_signal, signal.SIGTERM: on_signal}):
        yield event
