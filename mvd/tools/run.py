"""The folder that a run writes, its log, and its checkpoints.

    runs/<slug>/  config.json  log.jsonl  progress/*.png  the results  checkpoint.pt
                  checkpoint-before.pt

Every file is written as a whole (`files.py`), so a run can be resumed wherever it was killed.
Should the disk damage the last checkpoint, there is the one before.
"""
import contextlib
import itertools
import json
import math
import os
import re
import unicodedata
import warnings
import zipfile
from functools import partial
from pathlib import Path

import torch

from . import parallel
from .errors import UserError
from .files import write_atomic

CHECKPOINT = "checkpoint.pt"
# All that a run may hold, the newest first. The first one is there only for a moment, but for
# good after a kill in that moment.
CHECKPOINTS = ("checkpoint-new.pt", CHECKPOINT, "checkpoint-before.pt")
# What versions of mvd before checkpoint.pt wrote. They cannot be continued.
OLD_CHECKPOINT = "checkpoint.safetensors"
# What to do, in the words of several errors and of an interrupted run.
ANEW = "start anew without --resume, with another --out"
GO_ON = "go on with the same command and --resume"
# What a run ends with.
RESULTS = (
    "index.html", "model.safetensors", "views.png", "views4.png", "depth.png", "normals.png",
    "turntable.webp", "views.safetensors", "field.safetensors", "mesh.glb", "mesh.obj",
)
# A folder that holds one of these files holds a run.
RUN_FILES = ("config.json", "log.jsonl", *CHECKPOINTS, OLD_CHECKPOINT, *RESULTS)

# ---- the folder ------------------------------------------------------------------------------


def slug(text):
    """Return a folder name for a prompt: ASCII, lower case, dashes, 1 to 60 characters."""
    decomposed = unicodedata.normalize("NFKD", text)
    ascii_text = decomposed.encode("ascii", "ignore").decode().lower()
    words = re.sub("[^a-z0-9]+", "-", ascii_text).strip("-")
    return words[:60].rstrip("-") or "untitled"


def make_folder(path):
    """Make the folder that will hold the file `path`. Raises UserError, also if it is read-only."""
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_make(folder, error) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to the folder {folder}; choose another place")


def free_file(path):
    """Make an empty file `path`, or else name-2, name-3, ...: the first that is free, a Path.

    So nothing is overwritten, whatever runs at the same time. Raises UserError.
    """
    path = Path(path)
    try:
        return _first_free(path.with_suffix(""), path.suffix, partial(Path.touch, exist_ok=False))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another name") from error


def holds_run(folder):
    """Return whether a run has begun in the folder."""
    return any(Path(folder, name).exists() for name in RUN_FILES)


def open_run(out, config, resume, default="runs/untitled", may_change=()):
    """Return the folder of a run (a Path), made, with the settings in its config.json.

    No earlier run is overwritten. Call it when everything else is checked, just before the
    first step.

    out: the folder that the user named. None: `default`, or default-2, default-3, ... if those
    exist; with `resume`, the latest of them that was run with these settings.
    config: {name: JSON value}. With `resume` it must equal the earlier one, except for "out",
    "device", "resume" and the names in `may_change`.
    Raises UserError.
    """
    # As it will be read back: tuples become lists.
    config = json.loads(json.dumps(config))
    if resume:
        ignored = {"out", "device", "resume", *may_change}
        folder = _earlier_run(out, default, config, ignored)
    else:
        folder = _new_folder(out, default)
    write_atomic(folder / "config.json", json.dumps(config, indent=2).encode())
    (folder / "progress").mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def starting(out):
    """If this context fails before a step is logged or saved, the folder holds no run any more.

    So the same command, with what was wrong mended, finds no run in its way. out: a new folder of
    `open_run`. What a kill leaves stays: --resume starts anew there.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit):
        if parallel.is_first() and not _has_steps(out):
            for name in ("config.json", "log.jsonl", "index.html"):
                (out / name).unlink(missing_ok=True)
            # A folder that holds something else stays.
            with contextlib.suppress(OSError):
                (out / "progress").rmdir()
                out.rmdir()
        raise


def _has_steps(out):
    """Whether a step is logged or saved in the folder of a run."""
    saved = any((out / name).exists() for name in CHECKPOINTS)
    return saved or any("step" in row for row in read_log(out / "log.jsonl"))


def _new_folder(out, default):
    """Make the folder `out`, or else the first of the numbered folders that is free."""
    try:
        if not out:
            return _first_free(default)
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_make(out or default, error) from error
    if holds_run(folder):
        raise UserError(
            f"{folder} already holds a run; continue it with --resume or choose another --out")
    return folder


def _numbered(default, suffix=""):
    """Yield default, default-2, default-3, ... without end, with the suffix."""
    yield Path(f"{default}{suffix}")
    for number in itertools.count(2):
        yield Path(f"{default}-{number}{suffix}")


def _first_free(default, suffix="", make=Path.mkdir):
    Path(default).parent.mkdir(parents=True, exist_ok=True)
    for path in _numbered(default, suffix):
        try:
            make(path)
            return path
        except FileExistsError:
            # Taken, perhaps by another process a moment ago: try the next name.
            continue


def _earlier_run(out, default, config, ignored):
    """Return the folder of the latest run that can continue with these settings."""
    if out:
        folders = [Path(out)]
    else:
        existing = itertools.takewhile(Path.exists, _numbered(default))
        folders = list(existing) or [Path(default)]
    for folder in reversed(folders):
        if _difference(folder, config, ignored) is None:
            # Temporary files of a write that was killed.
            for leftover in folder.rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            return folder
    raise UserError(_difference(folders[-1], config, ignored))


def _difference(folder, config, ignored):
    """Return one line that says why a run cannot continue in this folder; None if it can."""
    path = folder / "config.json"
    if (folder / OLD_CHECKPOINT).exists():
        return (f"{folder / OLD_CHECKPOINT} was written by an older version of mvd and cannot be "
                f"continued; {ANEW}")
    try:
        earlier = json.loads(path.read_bytes())
    except FileNotFoundError:
        return f"there is no run to resume in {folder}; leave out --resume to start one"
    except (OSError, ValueError) as error:
        return f"cannot read {path} ({error}); {ANEW}"
    if not isinstance(earlier, dict):
        return f"{path} does not hold the settings of a run; {ANEW}"
    for name in {**earlier, **config}:
        if name in ignored:
            continue
        if name not in earlier or name not in config:
            return f"{folder} was run by another version of mvd: only one knows {name}; {ANEW}"
        before, now = json.dumps(earlier[name]), json.dumps(config[name])
        if before != now:
            return (f"{folder} was run with {name} = {before}, now it is {now}; "
                    "resume with the same settings")
    return None


def _cannot_make(folder, error):
    return UserError(f"cannot make the folder {folder}: {error.strerror}; choose another --out")

# ---- the log ---------------------------------------------------------------------------------


def log(path, **row):
    """Append one line of JSON. The numbers may be tensors or NumPy's."""
    with open(path, "a") as file:
        file.write(json.dumps(row, default=float) + "\n")


def read_log(path):
    """Return [row, ...], empty if there is no file.

    A last line that a kill cut short is left out. Raises UserError if any other line is not JSON.
    """
    path = Path(path)
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(
                    f"{path}, line {number} is not JSON; remove that line") from error
    return rows


def truncate_log(path, step):
    """Drop the rows of `step` and later, and a last line cut short, before a run resumes."""
    rows = [row for row in read_log(path) if row.get("step", -1) < step]
    lines = [json.dumps(row) + "\n" for row in rows]
    write_atomic(path, "".join(lines).encode())

# ---- the checkpoints -------------------------------------------------------------------------


def save_checkpoint(path, state):
    """Write everything that a run needs to continue bit for bit. Keep the checkpoint before.

    The earlier ones stay as they are until the new one is complete, so the disk needs room for
    three. Whenever the process is killed, those that are there are complete.

    path: such as out / CHECKPOINT; <name>-before.pt beside it is the one before.
    state: a dict of tensors, numbers, str, bool, None, and of dicts, lists and tuples of these,
    such as the state_dict() of an optimizer. Nothing else (NumPy's numbers neither):
    `load_checkpoint` would refuse the file.
    """
    path = Path(path)
    new, before = (path.with_stem(f"{path.stem}-{word}") for word in ("new", "before"))
    write_atomic(new, lambda file: torch.save(state, file))
    if path.exists():
        os.replace(path, before)
    os.replace(new, path)


def check_finite(out, step, advice, **numbers):
    """Raise UserError if a number of this step, such as its loss, is not finite.

    To be called before a checkpoint is written: what the run in the folder `out` saved before is
    then its last good state. advice: what the user may try.
    """
    for name, number in numbers.items():
        if not math.isfinite(number):
            good = "there is no checkpoint yet"
            if (out / CHECKPOINT).exists():
                good = f"the last good state is in {out / CHECKPOINT}"
            raise UserError(
                f"the run stops at step {step}, whose {name} is {number:g}; {good}; {advice}")


def load_checkpoint(path):
    """Return the state that `save_checkpoint` was given, with its tensors on the CPU.

    Loading an untrusted file cannot run code (weights_only). Raises UserError if the file is
    missing, damaged or not a checkpoint.
    """
    state = None
    try:
        # torch.save writes a zip file. The old format, which is not one, is not tried.
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is None:
            state = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes can lead torch.load to any error. It is not kept: gigabytes may hang on it.
    except Exception:
        pass
    if not isinstance(state, dict):
        raise UserError(
            f"{path} is missing, damaged, cut short or not a checkpoint of a run, or holds more "
            f"than tensors, numbers and text, so it is not loaded; {ANEW}")
    return state


def last_checkpoint(out):
    """Return the state that the run in the folder `out` saved last.

    If that file is damaged, a warning says so, and it is the state that was saved before. None:
    the run was killed before its first checkpoint and starts anew. Raises UserError if no
    checkpoint of several can be loaded.
    """
    complaints = []
    for name in CHECKPOINTS:
        path = out / name
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path)
        except UserError as error:
            complaints.append((name, str(error)))
            continue
        if complaints:
            damaged = " and ".join(name for name, _ in complaints)
            warnings.warn(f"in {out} {damaged} cannot be loaded; going on from {name}")
        return state
    if complaints:
        raise UserError(complaints[0][1])
    return None
