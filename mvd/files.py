"""Files that are whole or not there: written under a temporary name beside the target, then renamed onto it.

A rename inside one folder is atomic: whatever kills us, there is the old file or the new one, never half of one.
"""
import os
from pathlib import Path

import safetensors.torch

from .errors import UserError


def write_atomic(path, content):
    """Writes a file in one stroke.

    content: bytes, or a function that is given the open binary file and writes into it. If it fails, the earlier file
    is untouched and nothing is left beside it (only a killed process leaves its ".<name>.<pid>.tmp"). Raises UserError
    when no file can be made there; a disk that fills up while writing raises OSError as usual.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; choose another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file = open(temporary, "wb")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a place that can be written") from error
    try:
        with file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())                   # the bytes must be on the disk before the name points at them
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path, tensors, metadata=None):
    """{name: tensor} of any device and layout, no two sharing memory, and {str: str} for the header, in one stroke."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(tensors, metadata))


def read_safetensors(path):
    """-> ({name: tensor on the CPU}, {str: str} of the header). Raises UserError if missing, truncated or foreign."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}); use another or make it again") from error
