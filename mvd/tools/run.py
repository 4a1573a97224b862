"""The folder that a run writes, its log, and its checkpoint.

    runs/<slug>/  config.json  log.jsonl  progress/*.png  the results  checkpoint.safetensors

Whatever is written is written whole (`files.py`), so a run that was killed at any moment can be resumed.
"""
import itertools
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import torch

from .errors import UserError
from .files import read_safetensors, write_atomic, write_safetensors

# ---------------------------------------------------------------------------------------------------- the run's folder


def slug(text):
    """A folder's name for a prompt: ascii, lower case, dashes, 1 to 60 characters."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", ascii_text).strip("-")[:60].rstrip("-") or "untitled"


def make_folder(path):
    """Makes the folder that the file `path` shall lie in. Raises UserError."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        place = Path(path).parent
        raise UserError(f"cannot make the folder {place}: {error.strerror}; choose another --out") from error


def open_run(out, config, resume, default="runs/untitled", may_change=()):
    """The folder of a run, made and holding config.json: -> Path. No earlier run is ever overwritten.

    out: the folder the user named, or None: then `default`, or default-2, default-3, ... if those exist. With resume,
    the run in `out`, or the latest of `default`, default-2, ... with these settings. config: {name: JSON value}; on
    resume it must equal the earlier one, but for "out", "device", "resume" and may_change. Call it when all else is
    checked, just before the first step. Raises UserError.
    """
    config = json.loads(json.dumps(config))                             # as it will be read back: tuples are lists
    numbered = (Path(default) if n == 1 else Path(f"{default}-{n}") for n in itertools.count(1))
    if resume:
        folders = [Path(out)] if out else list(itertools.takewhile(Path.exists, numbered)) or [Path(default)]
        differences = [_difference(folder, config, {"out", "device", "resume", *may_change}) for folder in folders]
        if None not in differences:
            raise UserError(differences[-1])
        folder = [folder for folder, difference in zip(folders, differences) if difference is None][-1]
        for leftover in folder.rglob(".*.tmp"):                                 # of a write that was killed
            leftover.unlink(missing_ok=True)
    else:
        try:
            if out:
                folder = Path(out)
                folder.mkdir(parents=True, exist_ok=True)
                if any((folder / name).exists() for name in ("config.json", "log.jsonl", "checkpoint.safetensors")):
                    raise UserError(f"{folder} already holds a run; continue it with --resume or choose another --out")
            else:
                make_folder(default)
                folder = next(folder for folder in numbered if _claim(folder))
        except OSError as error:
            place = out or default
            raise UserError(f"cannot make the folder {place}: {error.strerror}; choose another --out") from error
    write_atomic(folder / "config.json", json.dumps(config, indent=2).encode())
    (folder / "progress").mkdir(exist_ok=True)
    return folder


def _claim(folder):
    """Makes a folder; False if the name is taken, also when another process took it a moment ago."""
    try:
        folder.mkdir()
        return True
    except FileExistsError:
        return False


def _difference(folder, config, ignored):
    """Why a run cannot continue in this folder, in one line, or None if it can."""
    try:
        earlier = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return f"there is no run to resume in {folder}; leave out --resume to start one"
    except (OSError, ValueError) as error:
        return f"cannot read {folder / 'config.json'} ({error}); start anew without --resume, with another --out"
    if not isinstance(earlier, dict):
        return f"{folder / 'config.json'} is not of a run; start anew without --resume, with another --out"
    for name in [*earlier, *config]:
        before, now = (json.dumps(c[name]) if name in c else "nothing" for c in (earlier, config))
        if name not in ignored and before != now:
            return f"{folder} was run with {name} = {before}, now it is {now}; resume with the same settings"
    return None


def log(path, **row):
    """Appends one line of JSON; numbers may be tensors or numpy's."""
    with open(path, "a") as file:
        file.write(json.dumps(row, default=float) + "\n")


def read_log(path):
    """-> [row, ...]; none if there is no file. A last line that a kill cut short is left out; others: UserError."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number} is no JSON; remove that line") from error
    return rows


def truncate_log(path, step):
    """Before a run resumes at `step`: drops the rows of that step and later ones, and a last line cut short."""
    rows = [row for row in read_log(path) if row.get("step", -1) < step]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())

# ---------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, state):
    """One safetensors file, in one stroke; no pickle, so that loading a stranger's checkpoint runs none of his code.

    state: dicts (keys: str, int), lists and tuples, nested, of tensors, numbers, str, bool, None, such as a
    state_dict() of an optimizer. The tensors are named by their path ("optimizer/state/0/exp_avg"); the rest is JSON in
    the header. All comes back exactly; numpy's numbers come back as Python's.
    """
    tensors = {}

    def skeleton(value, name):                                          # the same nesting, names in place of tensors
        if isinstance(value, torch.Tensor):
            while name in tensors:                                      # {"a/b": x, "a": {"b": y}}
                name += "'"
            tensors[name] = value.detach().to("cpu", copy=True)         # a copy: no two may share memory
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": [[k, skeleton(v, f"{name}/{k}" if name else f"{k}")] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [skeleton(v, f"{name}/{i}") for i, v in enumerate(value)]}
        return value.item() if isinstance(value, np.generic) else value

    header = {"checkpoint": json.dumps(skeleton(state, ""))}            # which names the tensors, so before they are written
    write_safetensors(path, tensors, header)


def load_checkpoint(path):
    """-> the state that save_checkpoint was given, tensors on the CPU. Raises UserError if the file is missing, damaged or
    not a checkpoint of a run."""
    tensors, header = read_safetensors(path)

    def fill(value):
        if not isinstance(value, dict):
            return value
        (kind, content), = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {k: fill(v) for k, v in content}
        return {"list": list, "tuple": tuple}[kind](fill(v) for v in content)

    if "checkpoint" not in header:
        raise UserError(f"{path} is not a checkpoint of a run; --resume continues only what these scripts wrote")
    return fill(json.loads(header["checkpoint"]))


def last_checkpoint(out):
    """What the run in the folder `out` saved last, or None if it was killed before that and starts anew; as `load_checkpoint`."""
    path = out / "checkpoint.safetensors"
    return load_checkpoint(path) if path.exists() else None
