"""The whole model: loading, saving, the latents' scale, sampling, and bad files in one line."""

import copy
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agree import agree, near
from mvd import MVDream, cameras
from mvd.tools.errors import UserError
from mvd.tools.files import read_safetensors, write_safetensors
from mvd.model import FUSION, PRESETS, read_config
from mvd.tools.device import GraphedStep
from mvd.tools.vocabulary import IDENTIFIERS
from mvd.unet import Attention


def small_config():
    """The nano preset, with five words."""
    config = copy.deepcopy(PRESETS["nano"].model)
    config.text.words = ("3d", "a", "asset", "bulldog", "red")
    return config


def random_model(config):
    torch.manual_seed(0)
    model = MVDream(config)
    for p in model.unet.parameters():  # no zero-initialised layer stays silent
        torch.nn.init.normal_(p, std=0.05)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model():
    return random_model(small_config())


def test_save_and_load_give_the_same_model(model, tmp_path):
    model.save(tmp_path / "m.safetensors")
    again = MVDream.load(tmp_path / "m.safetensors")
    assert again.config == model.config
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    assert torch.equal(
        model.sample("a red bulldog", steps=2), again.sample("a red bulldog", steps=2)
    )
    model.save(tmp_path / "model.safetensors")  # the folder of a run
    assert MVDream.load(tmp_path).config == model.config


@pytest.mark.parametrize(
    "attention, camera", [("pixel", "time"), ("view", "time"), ("3d", "text"), ("3d", "none")]
)
def test_a_variant_comes_back_as_it_was_and_stays_in_our_layout(attention, camera, tmp_path):
    config = small_config()
    config.unet.attention, config.unet.camera = attention, camera
    variant, path = random_model(config), tmp_path / "m.safetensors"
    variant.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as one that it knows no cameras
        again = MVDream.load(path)
    assert again.config == config and read_config(path) == config
    drawn = [m.sample("a red bulldog", steps=1, views=2) for m in (variant, again)]
    assert torch.equal(*drawn)
    for name in ("other.safetensors", "other.pt"):
        with pytest.raises(UserError, match="MVDream's layout has no UNet of this kind"):
            variant.save(tmp_path / name, layout="mvdream")
        assert not (tmp_path / name).exists()


def test_a_file_from_before_there_were_variants_is_mvdream(model, tmp_path):
    path = tmp_path / "m.safetensors"
    model.save(path)
    tensors, metadata = read_safetensors(path)
    header = json.loads(metadata["mvd"])
    assert header["unet"].pop("attention") == "3d" and header["unet"].pop("camera") == "time"
    write_safetensors(path, tensors, {"mvd": json.dumps(header)})
    assert MVDream.load(path).config == model.config


def test_a_model_learns_words_and_keeps_them(tmp_path):
    taught = random_model(small_config())
    known = taught.embed(["a red bulldog", ""])
    assert taught.text.add_words(["löwe", "red"]) == ["löwe"]
    assert torch.equal(taught.embed(["a red bulldog", ""]), known), "old prompts mean the same"
    taught.save(tmp_path / "m.safetensors")
    again = MVDream.load(tmp_path / "m.safetensors")
    assert "löwe" in again.config.text.words
    prompts = ["a red LÖWE", "a bulldog"]
    assert torch.equal(again.embed(prompts), taught.embed(prompts))


def test_latents_have_the_scale_factor(model, monkeypatch):
    model.config.vae.scale_factor = 0.5
    images = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    mean, logvar = model.vae.encode(images.flatten(0, 1))
    torch.testing.assert_close(model.encode(images), 0.5 * mean.unflatten(0, (2, 3)))
    torch.manual_seed(1)
    drawn = model.encode(images, sample=True)
    torch.manual_seed(1)
    noise = torch.randn(mean.shape)
    torch.testing.assert_close(
        drawn, (0.5 * (mean + (logvar / 2).exp() * noise)).unflatten(0, (2, 3))
    )
    sizes, decode, expected = (
        [],
        model.vae.decode,
        model.vae.decode(drawn.flatten(0, 1) / 0.5),
    )
    monkeypatch.setattr(model.vae, "decode", lambda z: sizes.append(len(z)) or decode(z))
    torch.testing.assert_close(model.decode(drawn).flatten(0, 1), expected)
    assert sizes == [1] * 6  # a wide feature map takes memory
    model.config.vae.scale_factor = 1.0


def test_noise_does_not_depend_on_the_layout_in_memory(model, monkeypatch):
    """Random numbers come in the order of memory; a compiled encoder returns channels last."""
    mean, drawn = torch.randn(4, 8, 8, 8), []
    for layout in (torch.contiguous_format, torch.channels_last):
        monkeypatch.setattr(
            model.vae,
            "encode",
            lambda *_: (mean.to(memory_format=layout), torch.zeros_like(mean)),
        )
        torch.manual_seed(1)
        drawn.append(model.encode(torch.zeros(1, 4, 3, 64, 64), sample=True))
    torch.testing.assert_close(*drawn)


def test_the_pictures_of_a_sample_are_decoded_without_trying_algorithms(model, monkeypatch):
    """What `tune_cuda` switched on is off while they are decoded, and on again afterwards.

    Also after a failure.
    """
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen, decode = [], model.vae.decode
    monkeypatch.setattr(
        model.vae,
        "decode",
        lambda z: seen.append(torch.backends.cudnn.benchmark) or decode(z),
    )
    model.sample("a bulldog", steps=1)
    assert seen == [False] * 4 and torch.backends.cudnn.benchmark
    monkeypatch.setattr(model.vae, "decode", lambda z: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.sample("a bulldog", steps=1)
    assert torch.backends.cudnn.benchmark


def test_sample_is_guided_ddim_written_out(model):
    """Two steps of DDIM by hand.

    Guidance keeps the camera in both halves, the suffix is added, the picture is in [0, 1].
    """
    from mvd import diffusion

    camera = cameras.extrinsics(cameras.orbit(20.0, 30.0 + torch.arange(4) * 90.0))[None]
    text, none = model.embed(["a red bulldog, 3d asset"]), model.embed([""])
    x = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    abar = diffusion.alphas_cumprod()
    for t, previous in ((501, 1), (1, 0)):
        when = torch.tensor([t])
        eps = model.unet(x, when, none, camera)
        eps = eps + 3.0 * (model.unet(x, when, text, camera) - eps)
        x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        x = abar[previous].sqrt() * x0 + (1 - abar[previous]).sqrt() * eps
    expected = (model.decode(x) / 2 + 0.5).clamp(0, 1)
    drawn = model.sample(
        "a red bulldog", steps=2, guidance=3.0, elevation=20, azimuth=30, seed=3, sampler="ddim"
    )
    assert drawn.shape == (1, 4, 3, 64, 64)
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-4)


def test_pictures_of_a_model_that_learns_keep_no_graph(model):
    learning = copy.deepcopy(model).requires_grad_()
    assert not learning.sample("a red bulldog", steps=1, views=1).requires_grad


def test_sample_of_several_prompts_and_modes(model):
    both = model.sample(["a red bulldog", "a bulldog"], steps=1, views=2)
    assert both.shape == (2, 2, 3, 64, 64) and not torch.equal(both[0], both[1])
    flat = model.sample("a red bulldog", steps=1, views=2, mode="2d")
    assert not torch.equal(flat, model.sample("a red bulldog", steps=1, views=2))
    assert not torch.equal(
        flat,
        model.sample(
            "a red bulldog", steps=1, views=2, mode="2d", negative="red", guidance=5.0
        ),
    )
    larger = model.sample("a red bulldog", steps=1, views=2, size=96)
    assert larger.shape == (1, 2, 3, 96, 96)
    with pytest.raises(UserError, match="empty"):
        model.sample(" ")
    with pytest.raises(UserError, match="size is 72 pixels, but must be a multiple of 16"):
        model.sample("a red bulldog", size=72)


@pytest.mark.parametrize("seed", [-1, 2**63 - 1, 2**64, True, 1.0, 1.5, "1", None, np.float64(2)])
def test_what_is_no_seed_is_told(model, seed):
    with pytest.raises(UserError, match="a seed is a whole number"):
        model.sample("a red bulldog", steps=1, seed=seed)


def test_whole_numbers_of_other_libraries_are_seeds(model):
    plain = model.sample("a red bulldog", steps=1, views=1, seed=3)
    for seed in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert torch.equal(model.sample("a red bulldog", steps=1, views=1, seed=seed), plain)
    model.sample("a red bulldog", steps=1, views=1, seed=2**63 - 2)


def test_bad_files_end_in_one_line(model, tmp_path):
    with pytest.raises(UserError, match="no model 'tinny'"):
        MVDream.load("tinny")
    path = tmp_path / "m.safetensors"
    model.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        MVDream.load(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="web page"):
        MVDream.load(path)
    write_safetensors(path, {"weight": torch.zeros(2)})
    with pytest.raises(
        UserError,
        match="'weight' is not a tensor of an MVDream or Stable Diffusion 2 model",
    ):
        MVDream.load(path)
    path.write_bytes(whole)
    tensors, metadata = read_safetensors(path)
    lost = tensors.pop(
        "unet.conv_in.weight"
        if "unet.conv_in.weight" in tensors
        else "unet.conv_out.weight"
    )
    write_safetensors(path, tensors, metadata)
    with pytest.raises(UserError, match="conv_out.weight is missing"):
        MVDream.load(path)
    write_safetensors(path, {**tensors, "unet.conv_out.weight": lost[:1]}, metadata)
    with pytest.raises(UserError, match="conv_out.weight has shape"):
        MVDream.load(path)


def test_without_shipped_weights_load_says_how_to_make_them(monkeypatch, tmp_path):
    monkeypatch.setattr("mvd.model.TINY", tmp_path / "tiny.safetensors")
    with pytest.raises(UserError, match="train.py"):
        MVDream.load("tiny")


def test_the_shipped_model_is_small_complete_and_up_to_date():
    from mvd.model import TINY

    assert TINY.stat().st_size <= 40 * 2**20
    shipped = MVDream.load("tiny")
    assert {"bulldog", "crown", "3d", "asset", *IDENTIFIERS} <= set(
        shipped.config.text.words
    )
    shipped_but_words = copy.deepcopy(shipped.config)
    shipped_but_words.text.words = ()
    shipped_but_words.vae.scale_factor = 1.0  # measured while it was trained
    assert shipped_but_words == PRESETS["tiny"].model
    red, blue = shipped.sample(["a red car", "a blue car"], steps=8, seed=0)[
        :, 0
    ]  # [3, 128, 128]
    colour = [view[:, 48:80, 48:80].mean((1, 2)) for view in (red, blue)]
    assert (
        colour[0][0] > colour[0][2] + 0.2 and colour[1][2] > colour[1][0] + 0.1
    )  # it has learned something


def test_torch_knows_the_options_of_the_compiler():
    """A version that renames one would end a run when it begins to compile."""
    try:
        torch.compile(torch.sin, dynamic=False, options=FUSION)
    except RuntimeError as error:
        pytest.fail(f"this version of PyTorch does not take an option of model.FUSION: {error}")


# ---- compiled networks -------------------------------------------------------------------------

@pytest.fixture
def compiler(monkeypatch):
    """Stands for torch.compile: nothing is compiled, but layers take the form that it sees."""
    inside = []

    def compile_(function, **options):
        def program(*arguments):
            inside.append(function)
            try:
                return function(*arguments)
            finally:
                inside.pop()

        return program

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: bool(inside))


def attentions(model):
    return [module for module in model.modules() if isinstance(module, Attention)]


def ask(model):
    """What the UNet answers to some latents."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, 8, generator=generator).to(model.unet.conv_out.weight.dtype)
    camera = cameras.extrinsics(cameras.orbit(15.0, torch.arange(4) * 90.0))[None]
    return model.unet(x, torch.tensor([500]), model.embed(["a red bulldog"]), camera)


def other_state():
    torch.manual_seed(1)
    model = MVDream(small_config())
    for p in model.unet.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model.state_dict()


def loaded(model, **options):
    model.load_state_dict(other_state(), **options)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        lambda model: model.double(),
        lambda model: model.requires_grad_(),
        loaded,
        lambda model: loaded(model, assign=True).requires_grad_(False),
        copy.deepcopy,
        lambda model: loaded(copy.deepcopy(model)),
        lambda model: [model.compile_networks(), model][1],
    ],
    ids=["none", "dtype", "learning", "load", "assign", "deepcopy", "load copy", "compile again"],
)
@torch.no_grad()
def test_a_compiled_network_joins_attention_wherever_its_weights_are(model, compiler, change):
    compiled = copy.deepcopy(model)
    compiled.compile_networks()
    assert all(a.joined is not None for a in attentions(compiled)), "compiling joins nothing"
    assert compiled.state_dict().keys() == model.state_dict().keys(), "the state has other names"
    changed = change(compiled)
    found = ask(changed)
    learns = next(changed.parameters()).requires_grad
    assert all((a.joined is None) == learns for a in attentions(changed)), "joined if it learns"
    fresh = random_model(small_config()).to(found.dtype)
    fresh.load_state_dict(changed.state_dict())
    near(found, ask(fresh), "a compiled network after a change, and one that is not compiled")


def test_a_compiled_network_that_learns_is_not_joined(model, compiler):
    learning = copy.deepcopy(model).requires_grad_()
    learning.compile_networks()
    ask(learning).square().sum().backward()
    for layer in attentions(learning):
        for name in ("to_q", "to_k", "to_v"):
            gradient = getattr(layer, name).weight.grad
            assert gradient is not None and gradient.abs().max() > 0, f"{name} learns nothing"


@pytest.fixture
def graphs(monkeypatch, compiler):
    """Stands for CUDA graphs: lists of all GraphedSteps, which replay what they captured."""
    made = SimpleNamespace(text=[], unet=[], vae=[])

    class Graph(GraphedStep):
        def __init__(self, step, *arguments, **options):
            super().__init__(step, *arguments, **options)
            self.cuda = True
            self.replays = 0
            names = {"TextTower": "text", "function": "unet", "method": "vae"}
            vars(made)[names[type(step).__name__]].append(self)

        def capture(self, arguments):
            self.inputs = [argument.clone() for argument in arguments]
            self.graph = self
            self.result = self.step(*self.inputs).clone()

        def replay(self):
            self.replays += 1
            self.result.copy_(self.step(*self.inputs))

    monkeypatch.setattr("mvd.model.GraphedStep", Graph)
    return made


def compiled_copy(model):
    compiled = copy.deepcopy(model)
    compiled.compile_networks()
    return compiled


FIRST = dict(prompt="a red bulldog", views=2, steps=3, size=32)


def check_sample(model, **settings):
    """Compare a sample with that of a model that has drawn nothing before."""
    settings = {**FIRST, **settings}
    fresh = compiled_copy(model).sample(**settings)
    words = f"a sample with {settings} of a model that has drawn before"
    agree(model.sample(**settings), fresh, words, atol=2e-6)


@pytest.mark.parametrize("mode", ["3d", "2d"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(prompt="a bulldog"),
        dict(negative="red"),
        dict(seed=1),
        dict(elevation=60.0, azimuth=20.0),
        dict(sampler="ddim", eta=0.5),
        dict(sampler="ddpm", steps=4),
        dict(steps=1),
    ],
    ids=lambda changes: "-".join(changes) or "same",
)
def test_the_next_sample_of_a_compiled_model_replays_the_graph(model, graphs, mode, changes):
    compiled = compiled_copy(model)
    compiled.sample(**FIRST, mode=mode)
    (first,) = graphs.unet
    assert first.replays == 2, "all steps but the first are replayed"
    check_sample(compiled, mode=mode, **changes)
    steps = changes.get("steps", 3)
    assert first.replays == 2 + steps, "the second sample does not replay the graph of the first"


@pytest.mark.parametrize(
    "changes",
    [
        dict(guidance=2.0),
        dict(rescale=0.5),
        dict(views=3),
        dict(size=48),
        dict(mode="2d"),
        dict(prompt=["a bulldog", "a red bulldog"]),
    ],
    ids="-".join,
)
def test_a_graph_is_replayed_for_no_other_sample(model, graphs, changes):
    compiled = compiled_copy(model)
    compiled.sample(**FIRST)
    (first,) = graphs.unet
    check_sample(compiled, **changes)
    assert first.replays == 2, f"the graph of another sample is replayed for {changes}"
    _, kept = compiled.kept["unet"]
    assert kept is graphs.unet[-1], "another graph than the last one is kept"
    check_sample(compiled)


@pytest.mark.parametrize("prompt", ["a bulldog", ["a bulldog", "a red bulldog"]])
def test_the_next_sample_replays_text_tower_and_decoder(model, graphs, prompt):
    compiled = compiled_copy(model)
    compiled.sample(**FIRST)
    compiled.sample(**FIRST)
    (text,), (vae,) = graphs.text, graphs.vae
    assert text.replays == 1 and vae.replays == 3, "all calls but the first are replayed"
    check_sample(compiled, prompt=prompt)
    assert text.replays == (2 if prompt == "a bulldog" else 1), "the text's shape is another"
    assert vae.replays == 5 + (2 if len(prompt) == 2 else 0), "a picture is always decoded alone"


def test_the_decoder_is_replayed_only_where_its_weights_lie(model, graphs):
    compiled = compiled_copy(model)
    compiled.sample(**FIRST)
    layer = copy.deepcopy(compiled.vae.decoder.conv_out)
    compiled.vae.decoder.conv_out = layer
    check_sample(compiled)
    assert graphs.vae[0].replays == 1, "the graph reads a layer that is no more the model's"
    assert graphs.unet[0].replays == 5, "of the UNet nothing has changed"


def with_other_layer(model):
    layer = model.unet.middle[0].res.embed
    other = torch.nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
    model.unet.middle[0].res.embed = other
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double().float(),
        lambda model: [model.unet.double(), model.unet.float(), model][-1],
        lambda model: model.double(),
        lambda model: [model.text.double(), model][-1],
        lambda model: loaded(model, assign=True).requires_grad_(False),
        lambda model: loaded(copy.deepcopy(model)),
        with_other_layer,
        lambda model: [model.compile_networks(), model][-1],
    ],
    ids=["moved", "unet moved", "dtype", "text", "assign", "deepcopy", "layer", "compile again"],
)
def test_a_graph_is_not_replayed_where_the_weights_lie_elsewhere(model, graphs, change):
    compiled = compiled_copy(model)
    compiled.sample(**FIRST)
    (first,) = graphs.unet
    changed = change(compiled)
    check_sample(changed)
    assert first.replays == 2, "the graph reads weights that are no more the model's"
    last = graphs.unet[-1].replays
    check_sample(changed)
    assert graphs.unet[-2].replays == last + 3, "the graph of the changed model is not kept"


def test_a_graph_sees_new_numbers_in_the_weights(model, graphs):
    compiled = compiled_copy(model)
    compiled.sample(**FIRST)
    check_sample(loaded(compiled))
    assert graphs.unet[0].replays == 5, "weights that are where they were need no new graph"


def test_a_graph_is_freed_where_the_model_is_moved_or_copied(model, graphs):
    compiled = compiled_copy(model)
    compiled.sample(**FIRST)
    assert compiled.kept, "a compiled model keeps no graph"
    for words, other in (("copied", copy.deepcopy(compiled)), ("copied", copy.copy(compiled))):
        assert not other.kept and compiled.kept, f"a model that is {words} shares its graph"
    compiled.to("cpu")
    assert not compiled.kept, "a model that is moved keeps the memory of its graph"


def test_a_graph_is_not_kept_after_an_error(model, graphs):
    """Its capture may have failed."""
    def interrupted(times):
        yield from times[:2]
        raise KeyboardInterrupt

    compiled = compiled_copy(model)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compiled.sample(**FIRST, progress=interrupted)
        assert "unet" not in compiled.kept, "the graph of a sample that failed is kept"
        check_sample(compiled)


def test_a_graph_is_freed_before_another_is_captured(model, graphs):
    def look(times):
        assert "unet" not in compiled.kept, "two graphs take memory at once"
        return times

    compiled = compiled_copy(model)
    compiled.sample(**FIRST)
    compiled.sample(**FIRST, guidance=2.0, progress=look)


def test_a_graph_of_inference_mode_is_used_there_only(model, graphs):
    compiled = compiled_copy(model)
    with torch.inference_mode():
        compiled.sample(**FIRST)
    check_sample(compiled)
    assert graphs.unet[0].replays == 2, "elsewhere its memory may not be written"


def test_a_model_that_is_not_compiled_keeps_no_graph(model, graphs):
    plain = copy.deepcopy(model)
    for _ in range(2):
        plain.sample(**FIRST)
    assert [graph.replays for graph in graphs.unet] == [2, 2] and not plain.kept, "a graph is kept"
    assert not graphs.text and not graphs.vae, "they take memory, and save no time"


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_on_a_gpu_kept_graphs_draw_what_new_ones_do(model, device, monkeypatch):
    # Float32 shall be float32; another test's training may have changed the second.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    compiled = copy.deepcopy(model)
    for weight in compiled.unet.parameters():
        if weight.ndim > 1:  # texts and cameras shall change the pictures
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    compiled = compiled_copy(compiled.to(device))
    fresh = copy.copy(compiled)  # the same networks
    compiled.sample(**FIRST)
    for changes, replayed in (
        (dict(prompt="a bulldog", negative="red", seed=1), True),
        (dict(elevation=60.0, sampler="ddim", steps=5), True),
        (dict(guidance=2.0), False),
        (dict(guidance=2.0, rescale=0.7), False),
        (dict(views=3), False),
        (dict(views=3, mode="2d"), False),
        (dict(views=3, mode="2d", prompt="a bulldog"), True),
        ({}, False),
    ):
        _, before = compiled.kept["unet"]
        assert before.graph is not None, "the step is never captured"
        drawn = compiled.sample(**{**FIRST, **changes})
        assert (compiled.kept["unet"][1] is before) == replayed, f"replayed or not: {changes}"
        fresh.kept.clear()
        expected = fresh.sample(**{**FIRST, **changes})
        near(drawn, expected, f"a sample with {changes}, of a kept graph and of a new one")
