"""Files that are complete or not there at all.

A file is written under a temporary name beside its target, then renamed onto it. A rename
inside one folder is atomic: even if the process is killed, the file is either old or new.
"""
import json
import os
from pathlib import Path

import safetensors
import torch

from .errors import UserError


def write_atomic(path, content):
    """Write a file, or leave the earlier one untouched.

    content: bytes, or a function that is given the open binary file and writes into it. If
    writing fails, nothing is left beside the file; only a killed process leaves its
    ".<name>.<pid>.tmp". Raises UserError if no file can be made there. A disk that fills up
    while writing raises OSError as usual.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; choose another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file = open(temporary, "wb")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; "
                        "choose a place that can be written") from error
    try:
        with file:
            if callable(content):
                call_writer(content, file)
            else:
                file.write(content)
            # The bytes must be on the disk before the name points at them.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def call_writer(content, file):
    """Call content(file). torch.save hides the OSError of a full disk; it is raised instead."""
    try:
        content(file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__
        raise


DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}
ALIGNMENT = 64


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor}, of any device and layout, and metadata {str: str} for the header.

    To the metadata "format": "pt" is added, without which transformers, for one, takes no file.

    The format is the header's length (8 bytes), the header (JSON), and the tensors' bytes. It is
    not left to the library's save_file, which aligns to 8 bytes only (a CPU then multiplies a
    mapped matrix to other last bits), copies all tensors to the CPU first, and hides a full disk.
    Here the header is padded, and tensors of an odd size come last: all others lie at multiples
    of 64 bytes.
    """
    def place(name):
        tensor = tensors[name]
        return tensor.nbytes % ALIGNMENT > 0, -tensor.itemsize, name

    order = sorted(tensors, key=place)
    header = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)

    def content(file):
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy())

    write_atomic(path, content)


def read_safetensors(path):
    """Return ({name: tensor on the CPU}, {str: str} of the header).

    The tensors are mapped: what is not used is not read, and what is written into them does not
    reach the file. Raises UserError if the file is missing, damaged or of another format, and
    PermissionError.
    """
    try:
        # The library says of a file that may not be read that it is not there.
        with open(path, "rb"), safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            # The library gives the header's entries in an order that changes.
            return tensors, dict(sorted((file.metadata() or {}).items()))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except PermissionError:
        raise
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, cut short or no safetensors file ({error}); "
                        "use another, download or make it again") from error
