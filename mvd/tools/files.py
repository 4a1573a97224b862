"""Files that are whole or not there: written under a temporary name beside the target, then renamed onto it.

A rename inside one folder is atomic: whatever kills us, there is the old file or the new one, never half of one.
"""
import json
import os
from pathlib import Path

import safetensors
import torch

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


TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def write_safetensors(path, tensors, metadata=None):
    """{name: tensor} of any device and layout, and {str: str} for the header, in one stroke.

    The format is a length (8 bytes), a JSON header of that length, and the tensors' bytes. They are written one by one, so that
    a model of 5 GB on a GPU takes no 5 GB here. The header is padded, and tensors of an odd size come last, so that the others lie
    at multiples of 64 bytes: where a matrix lies in memory changes the last bit of what a CPU multiplies it to.
    """
    order = sorted(tensors, key=lambda name: (tensors[name].nbytes % 64 > 0, -tensors[name].itemsize, name))
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in order:
        tensor = tensors[name]
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)

    def content(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    write_atomic(path, content)


def read_safetensors(path):
    """-> ({name: tensor on the CPU}, {str: str} of the header). The tensors are mapped: what is not used is not read, and what is
    written into them does not reach the file. Raises UserError if missing, truncated or foreign."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, cut short or no safetensors file ({error}); use another, download or make it "
                        "again") from error
