"""The UNet against the released definition's numbers, 3D attention against a loop over views."""

import copy
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agree import agree, near
from layouts import named_tensor
from mvd.tools.errors import UserError
from mvd.unet import (
    ATTENTION,
    Attention,
    MultiViewTransformer,
    MultiViewUNet,
    UNetConfig,
    is_variant,
    time_embedding,
)
from mvd.weights import convert

DATA = Path(__file__).parent / "data"
SMALL = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    head_dim=32,
    context_dim=48,
)


@pytest.fixture(scope="module")
def unet():
    shapes = json.loads((DATA / "keys_unet_small.json").read_text())
    model = MultiViewUNet(SMALL)
    model.load_state_dict(
        convert({name: named_tensor(name, shape) for name, shape in shapes.items()})["unet"]
    )  # strict
    return model.eval()


@pytest.fixture(scope="module")
def case():
    return load_file(DATA / "unet_small.safetensors")


@pytest.mark.exercise(8)
@torch.no_grad()
def test_multiview_agrees_with_the_released_model(unet, case):
    out = unet(case["x"], case["t"], case["context"], case["camera"])
    hint = "Does self-attention run over the tokens of all views of a set?"
    near(out, case["out_multiview"], "the released model's answer in 3D mode", hint)


@torch.no_grad()
def test_what_a_compiler_sees_agrees_with_the_released_model(unet, case, monkeypatch):
    """Norms and convolutions have another form there."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    out = unet(case["x"], case["t"], case["context"], case["camera"])
    near(out, case["out_multiview"], "the released model's answer, of the form for a compiler")


@pytest.mark.exercise(8)
@torch.no_grad()
def test_2d_mode_agrees_with_the_released_model(unet, case):
    out = unet(case["x"], case["t"], case["context"])
    hint = "Without cameras each view attends to itself alone."
    near(out, case["out_2d"], "the released model's answer in 2D mode", hint)


@torch.no_grad()
def test_2d_mode_treats_every_view_alone(unet, case):
    together = unet(case["x"], case["t"], case["context"])
    alone = torch.cat(
        [unet(case["x"][:, i : i + 1], case["t"], case["context"]) for i in range(4)], 1
    )
    near(together, alone, "a view among others in 2D mode, and alone")


@torch.no_grad()
def test_views_may_be_permuted_with_their_cameras(unet, case):
    order = [2, 0, 3, 1]
    out = unet(case["x"][:, order], case["t"], case["context"], case["camera"][:, order])
    expected = unet(case["x"], case["t"], case["context"], case["camera"])[:, order]
    near(out, expected, "views in another order, with their cameras")


def brute_force_attention(attention, queries, context):
    """softmax(q kᵀ / sqrt(d)) v in float64, one head and one query at a time.

    queries [L, C], context [M, D] -> [L, C].
    """
    out = torch.zeros(queries.shape, dtype=torch.float64)
    d = queries.shape[1] // attention.heads
    q, k, v = (
        x.double() @ layer.weight.double().T
        for x, layer in (
            (queries, attention.to_q),
            (context, attention.to_k),
            (context, attention.to_v),
        )
    )
    for head in range(attention.heads):
        part = slice(head * d, (head + 1) * d)
        for i in range(len(queries)):
            score = torch.stack(
                [(q[i, part] * k[j, part]).sum() for j in range(len(context))]
            ) / math.sqrt(d)
            out[i, part] = (
                torch.exp(score - score.max()) / torch.exp(score - score.max()).sum()
            ) @ v[:, part]
    return out @ attention.to_out.weight.double().T + attention.to_out.bias.double()


@pytest.mark.exercise(8)
@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("across", [True, False])
def test_attention_against_a_loop_over_views(attention, across):
    torch.manual_seed(0)
    sets, views, width = 2, 3, 64
    block = MultiViewTransformer(width, 16, 32, groups=32, attention=attention)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, context = torch.randn(sets * views, width, 2, 2), torch.randn(sets, 5, 16)
    out = block(x, context, views, across)

    tokens = (
        block.proj_in(block.norm(x).flatten(2).transpose(1, 2))
        .unflatten(0, (sets, views))
        .double()
    )  # [B, V, L, C]
    for b in range(sets):
        normed = block.norm1.double()(tokens[b])
        joined = across and attention == "3d"
        seen = [normed.flatten(0, 1) if joined else normed[v] for v in range(views)]
        tokens[b] += torch.stack(
            [
                brute_force_attention(block.self_attention, normed[v], seen[v])
                for v in range(views)
            ]
        )
        if across and attention == "pixel":
            normed = block.pixel_norm.double()(tokens[b]).transpose(0, 1)  # [L, V, C]
            at_pixels = [brute_force_attention(block.pixel_attention, n, n) for n in normed]
            tokens[b] += torch.stack(at_pixels, 1)
        normed = block.norm2.double()(tokens[b])
        tokens[b] += torch.stack(
            [
                brute_force_attention(block.cross_attention, normed[v], context[b])
                for v in range(views)
            ]
        )
    hidden = (
        block.norm3.double()(tokens) @ block.feed_in.weight.double().T
        + block.feed_in.bias.double()
    )
    value, gate = hidden[..., : 4 * width], hidden[..., 4 * width :]
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    tokens = (
        tokens
        + (value * gelu) @ block.feed_out.weight.double().T
        + block.feed_out.bias.double()
    )
    tokens = tokens @ block.proj_out.weight.double().T + block.proj_out.bias.double()
    expected = x.double() + tokens.flatten(0, 1).transpose(1, 2).reshape(x.shape)
    hint = "In order: norm, proj_in; self-, pixel, cross-attention, feed-forward, each with its "
    hint += "norm and residual; proj_out and the residual of all. Which tokens see each other?"
    words = f"a block with attention {attention!r}, across_views {across}"
    agree(out, expected, words, hint, rtol=1e-4, atol=1e-4)


# ---- attention whose weights are joined for a compiler ------------------------------------------

WIDTHS = dict(argvalues=[64, 48], ids=["contexts as wide as x", "narrower contexts"])


@pytest.fixture
def compiling(monkeypatch):
    """Layers take the form that a compiler sees."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def joined_attention(context_width=64):
    """An Attention that does not learn, joined, and its weights before."""
    torch.manual_seed(0)
    attention = Attention(64, context_width, 32).requires_grad_(False)
    before = copy.deepcopy(attention.state_dict())
    attention.join()
    assert attention.joined is not None, "an attention that does not learn is not joined"
    return attention, before


def check_attention(attention, context, words):
    """Compare what a compiler sees with the brute force; context [M, D], or None."""
    torch.manual_seed(1)
    x = torch.randn(5, 64)
    expected = brute_force_attention(attention, x, x if context is None else context)
    hint = "Which slices of the joined tensor are the weights of q, k and v?"
    agree(attention(x, context), expected, words, hint, rtol=1e-5, atol=1e-6)


def products(attention, *given):
    """The shapes of the weights that a call multiplies with, but for the last: to_out's."""
    shapes, linear = [], torch.nn.functional.linear

    def note(x, weight, bias=None):
        shapes.append(tuple(weight.shape))
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", note)
        attention(*given)
    return shapes[:-1]


@pytest.mark.parametrize("width", **WIDTHS)
def test_joined_attention_is_attention(compiling, width):
    attention, _ = joined_attention(width)
    check_attention(attention, torch.randn(7, width), "joined attention to another text")
    if width == 64:
        check_attention(attention, None, "joined attention of tokens to each other")


def test_joined_attention_takes_fewer_products(compiling):
    x = torch.randn(5, 64)
    attention, _ = joined_attention()
    assert products(attention, x) == [(192, 64)], "q, k and v are not one product"
    wide = products(attention, x, torch.randn(7, 64))
    assert wide == [(64, 64), (128, 64)], "k and v of a context are not one product"
    attention, _ = joined_attention(48)
    narrow = products(attention, x, torch.randn(7, 48))
    assert narrow == [(64, 64), (128, 48)], "k and v of a narrow context are not one product"


def test_only_a_compiler_sees_joined_attention():
    """All others compute as before, bit for bit."""
    attention, before = joined_attention()
    x = torch.randn(5, 64)
    assert products(attention, x) == [(64, 64)] * 3, "uncompiled attention uses joined weights"
    plain = Attention(64, 64, 32)
    plain.load_state_dict(before)
    assert torch.equal(attention(x), plain(x)), "joined weights change uncompiled attention"


@pytest.mark.parametrize("width", **WIDTHS)
def test_joined_attention_has_the_same_parameters(width):
    attention, before = joined_attention(width)
    after = attention.state_dict()
    assert list(after) == list(before), "the state has other names"
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), f"{name} has other numbers"
    assert not list(attention.buffers()), "the joined tensor is a buffer"
    addresses = [attention.to_k.weight.data_ptr(), attention.to_v.weight.data_ptr()]
    start, size = attention.joined.data_ptr(), attention.joined.nbytes
    inside = [start <= address < start + size for address in addresses]
    assert all(inside), "the weights are in memory twice"


def test_joined_attention_sees_what_is_written_into_its_parameters(compiling):
    """At once: a CUDA graph reads the joined tensor, and joins nothing."""
    attention, _ = joined_attention()
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.weight.copy_(layer.weight.flip(0))
    check_attention(attention, None, "joined attention after its weights were written")


def new_linear(attention):
    attention.to_k = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
    return attention


def new_parameter(attention):
    attention.to_v.weight = torch.nn.Parameter(0.1 * torch.randn(64, 64), requires_grad=False)
    return attention


def loaded(attention, **options):
    state = attention.state_dict()
    state = {name: 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}
    attention.load_state_dict(state, **options)
    return attention


def copied(attention, copy_of):
    """The copy, with other numbers: only it must change."""
    other = copy_of(attention)
    other.to_k.weight.mul_(2)
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda attention: attention.double().float(),
        lambda attention: attention.to_empty(device="cpu") and loaded(attention),
        lambda attention: attention.to("meta").to_empty(device="cpu") and loaded(attention),
        loaded,
        lambda attention: loaded(attention, assign=True),
        lambda attention: copied(attention, copy.deepcopy),
        lambda attention: copied(attention, lambda a: pickle.loads(pickle.dumps(a))),
        new_linear,
        new_parameter,
    ],
    ids=["dtype", "empty", "meta", "load", "assign", "deepcopy", "pickle", "layer", "parameter"],
)
def test_joined_attention_follows_its_parameters(compiling, change):
    """`join` stands before each call of a compiled network."""
    attention, before = joined_attention()
    changed = change(attention)
    changed.join()
    check_attention(changed, None, "joined attention after a change of its parameters")
    if changed is not attention:
        for name, tensor in before.items():
            assert torch.equal(attention.state_dict()[name], tensor), f"a copy shares {name}"
        check_attention(attention, None, "joined attention that was copied")


def test_joined_attention_is_converted(compiling):
    attention, _ = joined_attention()
    expected = attention(torch.ones(1, 64))
    attention.bfloat16().join()
    out = attention(torch.ones(1, 64, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16, f"bfloat16 attention answers in {out.dtype}"
    agree(out, expected, "joined attention in bfloat16", atol=0.02)


def test_joining_again_moves_nothing():
    attention, _ = joined_attention()
    joined = attention.joined
    attention.join()
    assert attention.joined is joined, "a tensor that is up to date is made anew"


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v"])
def test_attention_that_learns_is_not_joined(compiling, name):
    """Also if it begins to learn later."""
    attention, _ = joined_attention()
    weight = getattr(attention, name).weight.requires_grad_()
    attention.join()
    assert attention.joined is None, f"the gradient of {name} goes to the joined tensor"
    attention(torch.randn(5, 64)).sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0, f"{name} learns nothing"


def test_time_embedding_against_the_released_numbers():
    reference = load_file(DATA / "schedule.safetensors")
    found = time_embedding(reference["time_embedding_t"], 320)
    hint = "All cosines come first; k / half counts the frequencies."
    agree(found, reference["time_embedding_320"], "the time embedding", hint, atol=1e-4)


def test_the_camera_changes_only_the_3d_mode(unet, case):
    with torch.no_grad():
        a = unet(case["x"], case["t"], case["context"], case["camera"])
        b = unet(case["x"], case["t"], case["context"], case["camera"].flip(1))
    assert (a - b).norm() / a.norm() > 1e-2, "other cameras give the same answer"


def test_full_size_has_the_released_number_of_parameters():
    with torch.device("meta"):
        unet = MultiViewUNet(UNetConfig())
    agree(len(unet.state_dict()), 690, "the number of tensors", atol=0)
    count = sum(p.numel() for p in unet.parameters())
    agree(count, 867_572_164, "the number of parameters", atol=0)


@torch.no_grad()
def test_in_bfloat16_the_residual_stream_is_float32(unet, case):
    """What blocks hand on is float32, what they compute is not."""
    rounded = copy.deepcopy(unet).bfloat16()
    for block in (*rounded.encoder, *rounded.middle, *rounded.decoder):
        block.register_forward_hook(lambda module, given, out: streams.append(out.dtype))
    streams = []
    exact, out = (
        model(case["x"], case["t"], case["context"], case["camera"])
        for model in (unet, rounded)
    )
    assert out.dtype == torch.bfloat16, f"a bfloat16 UNet answers in {out.dtype}"
    assert set(streams) == {torch.float32}, f"blocks hand on {set(streams)}, not float32 alone"
    share = (out.float() - exact).norm() / exact.norm()
    assert share < 0.02, f"bfloat16 weights change the answer by {share:.1%}; 2% is much"


# ---- the paper's ablations -------------------------------------------------------------------


def variant(**changes):
    """A UNet in which no layer is silent."""
    torch.manual_seed(0)
    unet = MultiViewUNet(replace(SMALL, **changes)).eval()
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.2)
    return unet.requires_grad_(False)


def changed(unet, case, x=None, camera=None):
    """[V] bool: which views of the output change if `x` or `camera` stand for the case's."""
    given = case["x"], case["t"], case["context"], case["camera"]
    other = case["x"] if x is None else x, *given[1:3], given[3] if camera is None else camera
    return (unet(*given) - unet(*other)).abs().amax((0, 2, 3, 4)) > 1e-6


def with_view_0(tensor):
    """The same with other numbers in view 0 of each set."""
    other = tensor.clone()
    other[:, 0] = other[:, 0].flip(-1)
    return other


FIRST, ALL, NONE = [True, False, False, False], [True] * 4, [False] * 4


@pytest.mark.parametrize(
    "attention, camera, by_x, by_camera",
    [
        ("3d", "time", ALL, ALL),
        ("3d", "text", ALL, ALL),
        ("3d", "none", ALL, NONE),
        ("pixel", "time", ALL, ALL),
        ("pixel", "none", ALL, NONE),
        ("view", "time", FIRST, FIRST),
        ("view", "text", FIRST, FIRST),
        ("view", "none", FIRST, NONE),
    ],
)
def test_what_a_view_depends_on(case, attention, camera, by_x, by_camera):
    unet = variant(attention=attention, camera=camera)
    x, cameras = with_view_0(case["x"]), with_view_0(case["camera"])
    assert changed(unet, case, x=x).tolist() == by_x, "by the latents of view 0"
    assert changed(unet, case, camera=cameras).tolist() == by_camera, "by the camera of view 0"


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("camera", ["time", "text", "none"])
def test_the_2d_mode_of_every_variant_is_that_of_the_released_model(unet, case, attention, camera):
    """The layers that a variant adds are silent in 2D mode."""
    other = MultiViewUNet(replace(SMALL, attention=attention, camera=camera))
    known = other.state_dict().keys()
    added = {name for name in known if "pixel" in name or name.startswith("camera_mlp.")}
    shared = {name: w for name, w in unet.state_dict().items() if name in known - added}
    assert other.load_state_dict(shared, strict=False).missing_keys == sorted(
        added, key=list(known).index
    )
    with torch.no_grad():
        out = other(case["x"], case["t"], case["context"])
    near(out, case["out_2d"], f"the 2D mode with attention {attention!r}, camera {camera!r}")


@torch.no_grad()
def test_pixels_attend_across_views_at_their_own_place_only():
    torch.manual_seed(0)
    sets, views, tokens, width = 2, 3, 4, 64
    block = MultiViewTransformer(width, 16, 32, groups=32, attention="pixel")
    torch.nn.init.normal_(block.pixel_attention.to_out.weight)
    y = torch.randn(sets * views, tokens, width)
    other = y.clone()
    other[4, 2] += torch.randn(width)  # the second view of the second set, at the third pixel
    moved = block.attend_at_pixels(other, views) - block.attend_at_pixels(y, views)
    moved = moved.abs().amax(-1) > 1e-6
    expected = torch.zeros(sets * views, tokens, dtype=torch.bool)
    expected[3:6, 2] = True
    assert torch.equal(moved, expected), "the views of this set, at this pixel"


@torch.no_grad()
def test_attention_at_pixels_is_silent_at_first(case):
    torch.manual_seed(0)
    pixel = MultiViewUNet(replace(SMALL, attention="pixel"))
    view = MultiViewUNet(replace(SMALL, attention="view"))
    for name, p in pixel.named_parameters():
        if p.abs().max() == 0 and "pixel" not in name:
            torch.nn.init.normal_(p, std=0.1)  # all else that starts at nothing
    shared = {name: w for name, w in pixel.state_dict().items() if "pixel" not in name}
    view.load_state_dict(shared)
    given = case["x"], case["t"], case["context"], case["camera"]
    out = pixel(*given)
    assert out.abs().max() > 0, "the case is empty"
    agree(out, view(*given), "a new UNet with attention at pixels, and without", atol=0)


@torch.no_grad()
def test_the_camera_token_stands_behind_the_text_of_its_own_view(case):
    """One view at a time, whose text is made by hand, gives the same as all at once."""
    unet = variant(attention="view", camera="text")
    plain = MultiViewUNet(replace(SMALL, attention="view", camera="none"))
    shared = {k: w for k, w in unet.state_dict().items() if not k.startswith("camera_mlp.")}
    plain.load_state_dict(shared)
    x, t, context, camera = (case[name] for name in ("x", "t", "context", "camera"))
    out = unet(x, t, context, camera)
    first, _, last = unet.camera_mlp
    for v in range(x.shape[1]):
        token = last(torch.nn.functional.silu(first(camera[:, v : v + 1])))  # [B, 1, D]
        alone = plain(x[:, v : v + 1], t, torch.cat([context, token], 1))
        near(out[:, v : v + 1], alone, f"view {v}, and it alone with its camera token")


def test_unknown_variants_are_refused_in_one_line():
    known = ", ".join(ATTENTION)
    with pytest.raises(UserError, match=f"no attention 'temporal': choose {known}"):
        MultiViewUNet(replace(SMALL, attention="temporal"))
    with pytest.raises(UserError, match="no camera 'image': choose time, text, none"):
        MultiViewUNet(replace(SMALL, camera="image"))


def test_what_differs_from_mvdream_is_a_variant():
    assert not is_variant(UNetConfig()) and not is_variant(UNetConfig(model_channels=32))
    assert is_variant(UNetConfig(attention="view")) and is_variant(UNetConfig(camera="text"))
