"""A trained model with the names of other tools: what is written is what they read, and the same.

The oracle of a safetensors file is its specification and the library of its authors; of a
diffusers folder, diffusers itself (test_diffusers.py) and the walk of layouts.py.
"""
import copy
import json
import warnings

import pytest
import safetensors
import safetensors.torch
import torch

import layouts
from mvd import MVDream, weights
from mvd.tools import checkpoint, convert
from mvd.tools.errors import UserError
from mvd.tools.files import read_safetensors, write_safetensors
from test_checkpoint import assert_same
from test_model import random_model, small_config


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a training leaves: float16, words, a camera, other groups and heads than MVDream."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    random_model(small_config()).save(folder / "model.safetensors", torch.float16)
    return folder


def run(*words):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*text_projection")
        convert.main([str(word) for word in words])


# ---- safetensors as others read it -----------------------------------------------------------


def assert_strict(path):
    """The specification of the format, and what transformers asks for: a "format"."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length]
    assert length % 8 == 0 and text.startswith(b"{")

    def without_duplicates(pairs):
        assert len(dict(pairs)) == len(pairs), "a name is there twice"
        return dict(pairs)

    header = json.loads(text, object_pairs_hook=without_duplicates)
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "pt"
    assert all(isinstance(value, str) for value in metadata.values())
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        assert entry.keys() == {"dtype", "shape", "data_offsets"}
        assert entry["data_offsets"][0] == end, f"a hole, or an overlap, before {name}"
        end = entry["data_offsets"][1]
    assert end == len(content) - 8 - length, "bytes that belong to no tensor"
    assert len(safetensors.deserialize(content)) == len(header)
    loaded = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata and set(file.keys()) == loaded.keys()
    return loaded


@pytest.mark.parametrize("metadata", [None, {}, {"k": 'ü "\n\0'}, {"format": "pt"}])
def test_what_is_written_is_read_by_others(metadata, tmp_path):
    wide = torch.arange(24.0).view(4, 6)
    tensors = {
        "transposed": wide.T,
        "every other": wide[:, ::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "shared": wide,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "ü \U0001F600": torch.tensor([True]),
        "half": torch.ones(3).half(),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "learns": torch.nn.Parameter(torch.ones(2)),
    }
    write_safetensors(tmp_path / "m.safetensors", tensors, metadata)
    found = assert_strict(tmp_path / "m.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", ["mvd", "mvdream"])
def test_a_model_that_is_saved_is_read_by_others(layout, run_folder, tmp_path):
    run(run_folder, tmp_path / "m.safetensors", "--layout", layout)
    found = assert_strict(tmp_path / "m.safetensors")
    source, _ = read_safetensors(run_folder / "model.safetensors")
    if layout == "mvd":
        assert found.keys() == source.keys()
    else:
        assert "model.diffusion_model.input_blocks.0.0.weight" in found
        source = weights.to_released(weights.convert(source))
    for name, tensor in source.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# ---- the command -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["mvd", "mvdream", "diffusers"])
def test_mvd_reads_what_it_wrote(layout, run_folder, tmp_path):
    run(run_folder, tmp_path / "a" / "out", "--layout", layout)
    first, again = MVDream.load(run_folder), MVDream.load(tmp_path / "a" / "out")
    assert again.config == first.config
    assert_same(again, first)
    # And back.
    run(tmp_path / "a" / "out", tmp_path / "b.safetensors", "--layout", "mvd")
    tensors, metadata = read_safetensors(run_folder / "model.safetensors")
    returned, same_metadata = read_safetensors(tmp_path / "b.safetensors")
    assert returned.keys() == tensors.keys() and same_metadata == metadata
    for name, tensor in tensors.items():
        assert returned[name].dtype == tensor.dtype and torch.equal(returned[name], tensor), name


def test_the_folder_has_the_names_of_diffusers(tmp_path):
    """And the text tower that is run, of a model as it was released."""
    released = layouts.released_tensors()
    torch.save(released, tmp_path / "m.pt")
    run(tmp_path / "m.pt", tmp_path / "folder", "--layout", "diffusers")
    parts = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    for part, expected in zip(parts, layouts.to_diffusers(released).values()):
        found = assert_strict(tmp_path / "folder" / f"{part}.safetensors")
        camera = {name for name in found if name.startswith("camera_embed.")}
        assert len(camera) == (4 if part.startswith("unet") else 0)
        assert found.keys() - camera == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    first, again = MVDream.load(tmp_path / "m.pt"), MVDream.load(tmp_path / "folder")
    assert_same(again.unet, first.unet)
    assert torch.equal(again.embed(["a bulldog"]), first.embed(["a bulldog"]))
    assert again.config.text.unused_layers == 0 and len(again.text.blocks) == 2


def test_a_folder_knows_every_token(run_folder, tmp_path):
    """Their tokenizer has all of CLIP's; ours reads a prompt as before."""
    run(run_folder, tmp_path / "m", "--layout", "diffusers")
    tensors, _ = read_safetensors(tmp_path / "m" / "text_encoder" / "model.safetensors")
    table = tensors["text_model.embeddings.token_embedding.weight"]
    text = MVDream.load(run_folder).text
    assert table.shape == (49408, 32)
    for token, row in text.row_of.items():
        assert torch.equal(table[token].float(), text.token_embedding.weight[row])
    vocabulary = json.loads((tmp_path / "m" / "tokenizer" / "vocab.json").read_bytes())
    assert sorted(vocabulary.values()) == list(range(49408))
    assert vocabulary["!"] == 0 and vocabulary["bulldog</w>"] == text.tokens_of("bulldog")[0]
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49406, 49407)


def test_the_number_format_is_kept_or_chosen(run_folder, tmp_path):
    for dtype in ("float32", "bfloat16"):
        run(run_folder, tmp_path / dtype, "--layout", "diffusers", "--dtype", dtype)
        tensors, _ = checkpoint.read(tmp_path / dtype)
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


def test_what_cannot_be_written_is_one_line_and_nothing_is_left(run_folder, tmp_path, monkeypatch):
    variant = copy.deepcopy(small_config())
    variant.unet.camera = "text"
    random_model(variant).save(tmp_path / "variant.safetensors")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    for words, complaint in (
        ((run_folder, tmp_path / "there"), "is there already"),
        ((run_folder, tmp_path / "variant.safetensors"), "is there already"),
        ((run_folder, tmp_path / "m.pt"), "no room for the words"),
        ((tmp_path / "variant.safetensors", tmp_path / "m"), "diffusers' layout has no UNet"),
        ((tmp_path / "none", tmp_path / "m"), "there is no model"),
        ((run_folder, "/proc/none/m"), "cannot make the folder"),
    ):
        layout = "mvdream" if "m.pt" in str(words[1]) else "diffusers"
        with pytest.raises(UserError, match=complaint):
            run(*words, "--layout", layout)
        assert sorted(tmp_path.iterdir()) == before, complaint

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mvd.tools.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        run(run_folder, tmp_path / "m", "--layout", "diffusers")
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(UserError, match="there is no layout 'x'"):
        MVDream.load(run_folder).save(tmp_path / "m", layout="x")
