"""dreambooth.py: its losses against autograd, killed runs, what "[v]" does, and bad input."""
import copy
import io
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.func import functional_call

import distill
import dreambooth
import sample
from agree import agree
from mvd import MVDream, diffusion
from mvd.presets import PRESETS
from mvd.tools import run
from mvd.tools.errors import UserError
from mvd.tools.files import write_safetensors
from mvd.tools.optimizer import learning_rate
from mvd.tools.vocabulary import IDENTIFIERS
from scripts import Killed, killed_after, saved_model, status
from test_model import small_config
from test_train import blank, moved

PROMPT = "a photo of [v] bulldog"
LEARNED = "--class-preservation 1 --identifier-lr 0.01 --text-preservation 1".split()
SAMPLE = MVDream.sample
BLUE = (20, 90, 200, 255)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model and three photos: wide, tall, and a cut-out.

    Beside them lie an empty folder and a file of another kind.
    """
    folder = tmp_path_factory.mktemp("dreambooth")
    config = small_config()
    config.text.words = tuple(sorted({*config.text.words, *IDENTIFIERS, "of", "photo"}))
    saved_model(folder, config)
    (folder / "photos").mkdir()
    for i, size in enumerate(((80, 64), (64, 90), (70, 70))):
        image = Image.new("RGBA", size, (200, 60, 40 * i, 255))
        image.paste(BLUE, (24, 16, 40, 50))
        if i == 2:
            image.putalpha(Image.new("L", size, 0))
            image.paste(BLUE, (10, 10, 60, 60))
        image.save(folder / "photos" / f"{i}.png")
    (folder / "empty").mkdir()
    write_safetensors(folder / "foreign.safetensors", {"x": torch.zeros(1)})
    return folder


@pytest.fixture
def model(folder):
    return MVDream.load(folder / "small.safetensors")


@pytest.fixture
def start(folder, tmp_path, monkeypatch):
    """start(out, *flags) fine-tunes in this process and returns the file of the result.

    photos and model are paths in `folder`.
    """
    monkeypatch.setattr(dreambooth, "GREYS", 2)
    monkeypatch.setattr(dreambooth, "LOG_EVERY", 1)
    monkeypatch.setattr(MVDream, "sample", blank)
    monkeypatch.setattr(PRESETS["nano"], "dreambooth", {"steps": 6, "batch": 2, "lr": 1e-3})

    def start(out, *flags, photos="photos", prompt=PROMPT, model="small.safetensors"):
        places = [str(folder / photos), "--prompt", prompt, "--model", str(folder / model)]
        places += ["--out", str(tmp_path / out), "--device", "cpu"]
        dreambooth.main([*places, "--sample-every", "3", "--save-every", "2", *flags])
        return (tmp_path / out / "model.safetensors").read_bytes()

    return start


def settings(**changes):
    """The paper's, without files."""
    return dreambooth.DreamBoothSettings("", PROMPT, batch=2, **changes)


def subject_of(model, posteriors, names, plain):
    """names: what the photos are called; plain: the same without the identifier."""
    return dreambooth.Subject(
        posteriors=posteriors,
        tokens=model.text.tokenize(names),
        contexts=model.embed(names),
        plain=model.embed(plain),
    )


def test_a_start_that_fails_is_not_in_the_way_of_the_next(start, tmp_path, monkeypatch):
    def fails(*_):
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(dreambooth, "on_greys", fails)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            start("run")
    assert not run.holds_run(tmp_path / "run"), "a start that failed is taken for a run"
    start("run", "--batch", "1")


# ---- the losses ------------------------------------------------------------------------------

@pytest.mark.exercise(15)
@pytest.mark.parametrize("block", [1, 32])
def test_gradient_of_the_preservation_loss(block, monkeypatch):
    """Against autograd of λ‖θ - θ0‖₁/N, and by hand: ±λ/N, and 0 where a weight has not moved.

    A weight that no other loss has touched gets no gradient.
    """
    monkeypatch.setattr(dreambooth, "BLOCK", block)
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(5), torch.randn(2)]
    weights = [w + 1e-6 * torch.randn_like(w).sign() for w in start]
    weights[1][2] = start[1][2]
    gradients = [torch.randn(3, 4), torch.randn(5)]
    for w, g in zip(weights, gradients):
        w.grad = g.clone()
        w.requires_grad_()
    before = [w.detach().clone() for w in weights]
    measured = dreambooth.preserve(weights, start, 300.0)
    graph = measured.requires_grad or weights[0].grad.requires_grad
    assert not graph, "a graph is kept: is torch.no_grad() missing?"

    leaves = [w.detach().double().requires_grad_() for w in weights[:2]]
    distance = sum((w - w0).abs().sum() for w, w0 in zip(leaves, start))
    loss = 300.0 / 19 * distance
    loss.backward()
    assert weights[2].grad is None, "a weight is pulled that nothing else touches"
    hint = "It is λ sign(θ - θ0) / N, added to the gradient; N counts all weights, moved or not."
    for w, g, leaf in zip(weights, gradients, leaves):
        agree(w.grad - g, leaf.grad, "what is added to a gradient (MVDream §3.3)", hint)
    added = (weights[0].grad - gradients[0]).abs()
    agree(added, 300.0 / 19, "the size of the pull on a weight, λ/N", hint, rtol=1e-5)
    unmoved = weights[1].grad[2] - gradients[1][2]
    agree(unmoved, 0, "the pull on a weight that has not moved", "sign(0) is 0.", atol=0)
    for w, w0 in zip(weights, before):
        agree(w, w0, "a weight afterwards, which only the optimizer may change", atol=0)

    def norm(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()

    agree(len(measured), 4, "how many numbers are returned", atol=0)
    l1, l2, own, pull = measured
    agree(l1 * 300, loss, "‖θ - θ0‖₁ / N, times λ", rtol=1e-5)
    changes = [w - w0 for w, w0 in zip(weights[:2], start)]
    agree(l2, norm(changes), "‖θ - θ0‖₂", rtol=1e-5)
    hint = "Is it taken before this loss's gradient is added?"
    agree(own, norm(gradients), "the norm of the other losses' gradient", hint, rtol=1e-5)
    # 16 of 17 have moved.
    agree(pull, 300 / 19 * 16**0.5, "the norm of this loss's gradient", rtol=1e-5)


class ByHand:
    """`finetune` with the losses of the module's docstring, autograd, and torch's AdamW."""

    def __init__(self, model, subject, s):
        self.unet = copy.deepcopy(model.unet).requires_grad_(True)
        self.frozen = copy.deepcopy(model.unet)
        self.text = copy.deepcopy(model.text)
        self.scale = model.config.vae.scale_factor
        self.subject, self.s = subject, s
        self.weights = []
        for name, weight in self.unet.named_parameters():
            if not name.startswith("camera_mlp"):
                self.weights.append(weight)
        self.start = [w.detach().clone() for w in self.weights]
        self.table = self.text.token_embedding.weight
        (self.row,) = self.text.word_rows("phol")
        self.word = self.table[self.row].clone().requires_grad_(True)

    def photos(self):
        """A batch of two of the three photos: scaled latents, and which name each has."""
        which = torch.randint(3, (2,))
        copy_ = torch.randint(2, (2,))
        wording = torch.randint(2, (2,))
        mean, std = self.subject.posteriors[copy_, which].chunk(2, dim=-3)
        return self.scale * (mean + std * torch.randn_like(mean)), wording

    def preservation(self):
        count = sum(w.numel() for w in self.unet.parameters())
        moves = [(w - w0).abs().sum() for w, w0 in zip(self.weights, self.start)]
        return self.s.preservation / count * sum(moves)

    def class_loss(self):
        z, wording = self.photos()
        t = torch.randint(1000, (2,))
        noise = torch.randn_like(z)
        abar = diffusion.alphas_cumprod()[t].view(-1, 1, 1, 1, 1)
        x_t = abar.sqrt() * z + (1 - abar).sqrt() * noise
        context = self.subject.plain[wording]
        change = self.unet(x_t, t, context) - self.frozen(x_t, t, context)
        return self.s.class_preservation * change.square().mean()

    def loss_of_photos(self, step):
        """The diffusion loss, and the growing text loss of all tokens but "phol"."""
        z, wording = self.photos()
        tokens = self.subject.tokens[wording]
        rows = torch.arange(len(self.table))[:, None]
        spelled = torch.where(rows == self.row, self.word, self.table)
        context = functional_call(self.text, {"token_embedding.weight": spelled}, (tokens,))
        change = (context - self.subject.contexts[wording]).square().sum(2)
        beside = change[tokens != self.row].sum() / context.numel()
        loss = diffusion.denoising_loss(self.unet, z, context)
        return loss + step / self.s.steps * self.s.text_preservation * beside

    def run(self):
        s = self.s
        unet = {"params": self.weights, "lr": s.lr, "weight_decay": 0.01}
        word = {"params": [self.word], "lr": s.identifier_lr, "weight_decay": 0.0}
        adam = torch.optim.AdamW([unet, word])
        for step in range(s.steps):
            loss = self.preservation()
            if s.class_preservation:
                loss = loss + self.class_loss()
            loss = loss + self.loss_of_photos(step)
            adam.zero_grad()
            loss.backward()
            adam.step()


@pytest.mark.parametrize("of_class, identifier_lr, of_text", [
    (0.0, 0.0, 0.0),
    (100.0, 0.0, 0.0),
    (100.0, 1e-2, 0.0),
    (0.0, 1e-2, 0.02),
    (100.0, 1e-2, 0.006),
])
def test_a_step_is_adamw_on_every_loss(model, tmp_path, of_class, identifier_lr, of_text):
    """Two steps: at θ0 no preservation loss has a gradient, one step later all have."""
    model.config.vae.scale_factor = 0.5
    s = settings(
        steps=2, lr=1e-3, preservation=1e4, class_preservation=of_class,
        identifier_lr=identifier_lr, text_preservation=of_text,
    )
    # The identifier stands at two places.
    names = ["a photo of phol bulldog", "phol bulldog"]
    torch.manual_seed(4)
    posteriors = torch.rand(2, 3, 1, 16, 8, 8)
    subject = subject_of(model, posteriors, names, ["a photo of bulldog", ""])
    by_hand = ByHand(model, subject, s)
    torch.manual_seed(5)
    dreambooth.finetune(model, subject, s, tmp_path)
    torch.manual_seed(5)
    by_hand.run()

    off = []
    for p, q in zip(model.unet.parameters(), by_hand.unet.parameters()):
        off.append((p - q).detach().abs().flatten())
    # But for a sign that rounding turned.
    share = (torch.cat(off) < 1e-5).float().mean()
    assert share > 0.9999, f"{1 - share:.2%} of the UNet's weights differ"
    table, row = by_hand.table, by_hand.row
    learned = model.text.token_embedding.weight
    agree(learned[row], by_hand.word, "the row of [v] after two steps")
    changed = (learned != table).any(1)
    assert changed.sum() == (identifier_lr > 0), "the row of [v] should have changed, or stayed"
    others = torch.arange(len(table)) != row
    assert not changed[others].any(), "another word has changed its meaning"


# ---- the loop --------------------------------------------------------------------------------

def test_it_learns_the_photos_and_a_strong_preservation_holds_it_back(folder, tmp_path):
    def first_and_last_row(strength, out):
        model = MVDream.load(folder / "small.safetensors")
        torch.manual_seed(0)
        s = settings(steps=20, lr=5e-3, preservation=strength)
        (tmp_path / out).mkdir()
        photos = torch.ones(1, 3, 1, 16, 8, 8)
        subject = subject_of(model, photos, ["a bulldog"], ["a bulldog"])
        dreambooth.finetune(model, subject, s, tmp_path / out)
        rows = run.read_log(tmp_path / out / "log.jsonl")
        return rows[0], rows[-1]

    first, last = first_and_last_row(0.0, "free")
    _, held = first_and_last_row(1e8, "held")
    assert last["loss"] < 0.95 * first["loss"], "it has not learned the photos"
    agree((last["preservation"], last["share"]), 0, "what is logged of a loss that is off", atol=0)
    assert held["distance"] < 0.5 * last["distance"], "it is not held back"
    assert held["share"] > 0.9, "a strong preservation is not most of the gradient"
    assert held["loss"] > last["loss"], "held back, it learns the photos as well"


def test_the_rates_fall_along_the_cosine(folder, tmp_path):
    """Adam moves a weight whose gradient stays the same by the rate, so by their sum in all."""
    def moves(cosine):
        model = MVDream.load(folder / "small.safetensors")
        s = settings(steps=4, lr=1e-3, weight_decay=0.0, cosine=cosine, identifier_lr=1e-2)
        weights = model.unet.conv_out.weight, model.text.token_embedding.weight
        before = [w.detach().clone() for w in weights]
        torch.manual_seed(0)
        photos = torch.rand(1, 3, 1, 16, 8, 8)
        subject = subject_of(model, photos, ["a phol bulldog"], ["a bulldog"])
        dreambooth.finetune(model, subject, s, tmp_path)
        return [(w - w0).abs().max().item() for w, w0 in zip(weights, before)]

    rates = sum(learning_rate(step, 4, 1e-3) for step in range(4))
    for constant, falling, factor in zip(moves(False), moves(True), (1, 10)):
        assert constant > 3e-3 * factor, "a constant rate moves the weights less than it says"
        most = 1.05 * rates * factor
        assert 0.5 * rates * factor < falling <= most < 2.7e-3 * factor, (
            f"a falling rate moves the weights by {falling:.3g}; its sum is {rates * factor:.3g}")


def test_the_text_loss_grows_in_a_straight_line_from_zero(model, tmp_path, monkeypatch):
    """A row of [v] that has moved, and moves no more: the text loss changes by its weight alone."""
    names = ["a phol bulldog"]
    subject = subject_of(model, torch.rand(1, 3, 1, 16, 8, 8), names, ["a bulldog"])
    (row,) = model.text.word_rows("phol")
    model.text.token_embedding.weight[row].neg_()
    apart = model.text(subject.tokens) - subject.contexts
    whole = 0.5 * apart[subject.tokens != row].square().sum().item() / apart.numel()
    assert whole > 0.01, "the case has no text loss"
    logged = []
    monkeypatch.setattr(dreambooth, "LOG_EVERY", 1)
    monkeypatch.setattr(run, "log", lambda path, **numbers: logged.append(numbers["text_loss"]))
    s = settings(steps=5, lr=0.0, identifier_lr=1e-12, text_preservation=0.5)
    dreambooth.finetune(model, subject, s, tmp_path)
    expected = [step / 5 * whole for step in range(5)]
    agree(logged, expected, "0, 1/5, 2/5, ... of the text loss", rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("killed_at, flags", [(1, []), (3, []), (4, LEARNED)])
def test_a_killed_run_resumes_bit_for_bit(start, monkeypatch, killed_at, flags, tmp_path):
    """Killed before any checkpoint, and after."""
    whole = start("whole", *flags)
    with killed_after(monkeypatch, lambda row: row["step"] == killed_at):
        start("killed", *flags)
    if killed_at == 4:
        page = (tmp_path / "killed" / "index.html").read_text()
        assert "3 of 6 steps" in page, "the page is not of the last pictures"
        assert "refresh" in page, "the page does not wait for more"
    assert start("killed", "--resume", *flags) == whole, "the resumed run made something else"
    logs = [(tmp_path / out / "log.jsonl").read_bytes() for out in ("whole", "killed")]
    assert logs[0] == logs[1], "the resumed run logged something else"


def test_a_loss_that_is_not_a_number_ends_the_run_and_spares_the_checkpoint(
    start, tmp_path, monkeypatch
):
    losses, calls = dreambooth.FineTuning.losses, []

    def spoilt(tuning):
        calls.append(tuning)
        loss, *others = losses(tuning)
        return (loss * math.nan if len(calls) == 3 else loss), *others

    monkeypatch.setattr(dreambooth.FineTuning, "losses", spoilt)
    with pytest.raises(UserError, match="loss is nan; the last good state is in .*checkpoint.pt"):
        start("run")
    folder = tmp_path / "run"
    assert run.load_checkpoint(folder / run.CHECKPOINT)["step"] == 2, (
        "the checkpoint is not the last good one")
    assert not (folder / "model.safetensors").exists(), "a model of NaN was written"


def test_a_run_shorter_than_sample_every_draws_nothing(start, tmp_path):
    """A longer one draws at its end, too."""
    start("short", "--steps", "2")
    assert not list((tmp_path / "short" / "progress").iterdir()), "a short run draws samples"
    start("longer", "--steps", "4")
    pictures = sorted(path.name for path in (tmp_path / "longer" / "progress").iterdir())
    assert pictures == ["samples_000003.png", "samples_000004.png"]


# ---- the command -----------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, first", [
    ("a photo of [v] bulldog", "a photo of phol bulldog"),
    ("[V] bulldog", "phol bulldog"),
    # In lower case the first letter is two.
    ("\u0130\u0130\u0130 photo of [v] bulldog", "photo of phol bulldog"),
    ("a photo of ［Ｖ］ bulldog", "a photo of phol bulldog"),
])
@pytest.mark.filterwarnings("ignore:the model does not know")
def test_wordings_are_what_later_prompts_will_say(start, monkeypatch, prompt, first):
    """With [v] they name the photos, and without it they shall stay what they are.

    So shall the prompt of guidance, which says nothing.
    """
    given = SimpleNamespace()
    finetune = dreambooth.finetune

    def spy(model, subject, *rest, **more):
        given.model, given.subject = model, subject
        return finetune(model, subject, *rest, **more)

    monkeypatch.setattr(dreambooth, "finetune", spy)
    start("run", "--wordings", "--steps", "1", prompt=prompt)
    model, subject = given.model, given.subject
    expected = [first, "phol bulldog", "phol bulldog , 3d asset"]
    agree(subject.tokens, model.text.tokenize(expected), "the tokens of the wordings", atol=0)
    agree(subject.contexts, model.embed(expected), "the contexts of the wordings", atol=0)
    plain = [name.replace("phol ", "") for name in expected]
    without_v = model.embed([*plain, ""])
    agree(subject.plain, without_v, "the contexts without [v]", atol=1e-6)


def test_the_result_knows_its_subject(start, folder, tmp_path):
    """The models before and after differ in the UNet alone, but for its camera."""
    start("dog", "--identifier", "ucd")
    dog = tmp_path / "dog"
    names = {path.relative_to(dog).as_posix() for path in dog.rglob("*") if path.is_file()}
    assert names == {
        "config.json", "log.jsonl", *run.CHECKPOINTS[1:], "photos.png", "model.safetensors",
        "index.html", "progress/samples_000003.png", "progress/samples_000006.png",
    }
    page = (dog / "index.html").read_text()
    assert "6 of 6 steps" in page, "the page is not of the end"
    assert page.count("<img") == 2, "the page wants the photos and the newest samples"
    assert page.count("<polyline") == len(dreambooth.CURVES), "the page wants its curves"
    assert "refresh" not in page, "the page waits for more, though the run has ended"

    before, after = MVDream.load(folder / "small.safetensors"), MVDream.load(dog)
    assert after.config.text.identifier == "ucd", "the model does not know its identifier"
    with_v = after.text.tokenize(["a [v] bulldog, [V]"])
    expected = after.text.tokenize(["a ucd bulldog, ucd"])
    agree(with_v, expected, "the tokens of [v], and of the identifier", atol=0)
    assert moved(before.vae, after.vae) == [], "the autoencoder has changed"
    assert moved(before.text, after.text) == [], "the text tower has changed"
    learned = moved(before.unet, after.unet)
    assert learned, "the UNet has learned nothing"
    assert not [name for name in learned if name.startswith("camera")], (
        "the camera has changed, though no camera was shown")


def test_every_script_takes_the_result_and_v(start, tmp_path, monkeypatch):
    """The folder is the --model, and "[v]" in a prompt becomes the identifier."""
    start("dog", "--identifier", "ucd")
    asked = []

    def draw(self, prompt, *_, **__):
        asked.extend(prompt)
        return torch.zeros(1, 4, 3, 8, 8)

    def embedded(self, prompts):
        asked.append(prompts[0])
        return torch.zeros(len(prompts), 1, 1)

    def distilled(*_):
        raise Killed

    monkeypatch.setattr(MVDream, "sample", draw)
    monkeypatch.setattr(MVDream, "embed", embedded)
    monkeypatch.setattr(distill, "distill", distilled)
    flags = ["a [v] bulldog", "--model", str(tmp_path / "dog")]
    sample.main([*flags, "--out", str(tmp_path / "x.png")])
    with pytest.raises(Killed):
        distill.main([*flags, "--negative", "", "--out", str(tmp_path / "3d"), "--suffix", ""])
    assert asked == ["a ucd bulldog"] * 2
    config = json.loads((tmp_path / "3d" / "config.json").read_text())
    assert config["prompt"] == "a [v] bulldog"


def test_settings_come_from_the_preset_and_flags_count_more(start, tmp_path, monkeypatch):
    shown = []
    on_greys = dreambooth.on_greys

    def spy(vae, rgba):
        shown.append(rgba)
        return on_greys(vae, rgba)

    monkeypatch.setattr(dreambooth, "on_greys", spy)
    start("a")
    start("b", "--batch", "1", "--steps", "2", "--flips")
    a, b = [json.loads((tmp_path / out / "config.json").read_text()) for out in "ab"]
    assert (a["steps"], a["batch"], a["lr"], a["flips"]) == (6, 2, 1e-3, False)
    assert (b["steps"], b["batch"], b["lr"], b["flips"]) == (2, 1, 1e-3, True)
    assert a["files"] == ["0.png", "1.png", "2.png"]
    assert a["preservation"] == 1.0
    assert a["identifier"] == "phol"
    plain, flipped = shown
    assert len(plain) == 3, "there are not three photos"
    agree(flipped, torch.cat([plain, plain.flip(-1)]), "photos, then photos mirrored", atol=0)


# ---- bad input -------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, flags, words", [
    (dict(prompt="a photo of a bulldog"), [], "the prompt has no [v]"),
    (dict(prompt="[v]."), [], "nothing but [v]"),
    (dict(prompt="[v], "), [], "nothing but [v]"),
    (dict(prompt="a photo of [v] \udce9lion"), [], "not UTF-8 text"),
    (dict(photos="empty"), [], "holds no photos"),
    (dict(photos="nowhere"), [], "there is no folder"),
    (
        dict(model="foreign.safetensors"),
        [],
        "not a tensor of an MVDream or Stable Diffusion 2 model",
    ),
    (dict(model="nowhere"), [], "there is no model"),
    ({}, ["--identifier", "zebra"], "no word 'zebra'"),
    ({}, ["--identifier", "two words"], "no word 'two words'"),
    ({}, ["--steps", "0"], "--steps"),
    ({}, ["--resume"], "no run to resume"),
])
def test_bad_input_is_one_line(start, changes, flags, words, tmp_path, capsys):
    assert status(lambda: start("out", *flags, **changes)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, f"not one line: {lines}"
    assert lines[0].startswith("error:"), f"not an error: {lines[0]}"
    assert words in lines[0], f"it does not say {words!r}: {lines[0]}"
    assert not (tmp_path / "out").exists(), "something was written before the mistake was found"


def test_another_runs_checkpoint_is_refused(start, tmp_path):
    start("out")
    run.save_checkpoint(tmp_path / "out" / run.CHECKPOINT, {"step": 1, "nerf": {}})
    with pytest.raises(UserError, match="not of dreambooth.py"):
        start("out", "--resume")


def test_a_photo_too_few_is_named_and_the_rest_is_used(start, folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in (folder / "photos").iterdir():
        (photos / path.name).write_bytes(path.read_bytes())
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.warns(UserWarning, match="broken.jpg.*left out"):
        start("out", photos=photos)


# ---- float16 ---------------------------------------------------------------------------------

class Tuned(dreambooth.FineTuning):
    """All losses, in a number format; the diffusion loss is times `fault`, when it is set."""
    fault = 1.0

    def __init__(self, folder, dtype):
        model = MVDream.load(folder / "small.safetensors")
        s = settings(
            lr=1e-4, dtype=dtype, preservation=0.1, class_preservation=1.0, identifier_lr=1e-2,
            text_preservation=0.1,
        )
        torch.manual_seed(0)
        latents = torch.rand(1, 3, 1, 16, 4, 4)
        names, plain = ["a phol bulldog", "phol bulldog"], ["a bulldog", ""]
        super().__init__(model, subject_of(model, latents, names, plain), s)
        self.table0 = self.table.weight.detach().clone()

    def losses(self):
        loss, *others = super().losses()
        return loss * self.fault, *others

    def take(self, steps):
        """These steps, each with random numbers of its own: what they measured, [steps, 7]."""
        measured = []
        for step in steps:
            torch.manual_seed(step)
            self.anneal(300 + step)
            measured.append(self.step())
        return torch.stack(measured)

    def state(self):
        """Copies of all that a step may change but the loss scale."""
        held = io.BytesIO()
        state = self.state_dict()
        state.pop("rounding")
        torch.save(state, held)
        return held.getvalue()


def moves_of(tuning):
    """How far the UNet and the identifier's row have moved, [n]."""
    moves = [tuning.table.weight - tuning.table0]
    for name, weight in tuning.theta.items():
        moves.append(weight - tuning.theta0[name])
    return torch.cat([move.detach().flatten() for move in moves])


def test_float16_learns_what_float32_does(folder):
    """The preservation is weak: its gradient is a sign, which the least difference may turn."""
    exact, half = Tuned(folder, "float32"), Tuned(folder, "float16")
    expected, found = exact.take(range(3)), half.take(range(3))
    assert (expected[-1] > 0).all(), "a loss or a gradient is not in the figures"
    losses, norms = slice(0, 4), slice(4, None)
    words = "in float16, and in float32"
    agree(found[:, losses], expected[:, losses], f"losses {words}", rtol=5e-3, atol=1e-6)
    agree(found[:, norms], expected[:, norms], f"norms {words}", rtol=2e-2, atol=0)
    moves = moves_of(exact)
    off = (moves_of(half) - moves).norm() / moves.norm()
    assert off < 0.05, f"the weights move elsewhere by {off:.1%}"


def test_a_gradient_too_large_for_float16_changes_the_scale_alone(folder, tmp_path):
    """And it does not end the run; a loss that is not a number does, and spoils nothing."""
    tuning = Tuned(folder, "float16")
    tuning.take([0])
    before = tuning.state()
    tuning.fault = 1e7
    (measured,) = tuning.take([1])
    assert tuning.state() == before, "the step has changed something"
    assert tuning.rounded.scale == 2**13 and measured.isfinite().all()
    dreambooth.check_step(tmp_path, 2, measured)
    for tuning.fault, scale in ((1e14, 1.0), (math.nan, 2.0**14)):
        tuning.rounded.scale.fill_(scale)
        (measured,) = tuning.take([1])
        assert tuning.state() == before, "the step has changed something"
        with pytest.raises(UserError, match="try a lower --lr"):
            dreambooth.check_step(tmp_path, 3, measured)
    tuning.fault = 1.0
    tuning.take([1])
    assert tuning.state() != before, "no step is made any more"


def test_a_resumed_run_in_float16_has_its_scale(folder):
    tuning = Tuned(folder, "float16")
    tuning.fault = 1e7
    tuning.take([0])
    tuning.fault = 1.0
    tuning.take([1])
    file = io.BytesIO()
    torch.save(tuning.state_dict(), file)
    file.seek(0)
    again = Tuned(folder, "float16")
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.rounded.state_dict() == {"scale": 2.0**13, "good_steps": 1.0}
    assert torch.equal(again.take([2]), tuning.take([2]))
    assert again.state() == tuning.state(), "the resumed run made something else"


# ---- on a GPU --------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("flags", [[], LEARNED, [*LEARNED, "--dtype", "float16"]])
def test_pictures_are_drawn_between_captured_steps(start, folder, tmp_path, monkeypatch, flags):
    """Before the capture and after it, what does not learn comes back for them and goes again."""
    monkeypatch.setattr(MVDream, "sample", SAMPLE)
    start("out", "--device", "cuda", "--sample-every", "2", *flags)
    rows = run.read_log(tmp_path / "out" / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[-1]["distance"] > rows[1]["distance"] > 0
    assert len(list((tmp_path / "out" / "progress").iterdir())) == 3
    before = MVDream.load(folder / "small.safetensors")
    after = MVDream.load(tmp_path / "out")
    others = [name for name in moved(before, after) if not name.startswith("unet.")]
    assert others == (["text.token_embedding.weight"] if flags else [])


@pytest.mark.gpu
def test_full_size_fits_and_is_quick(folder, tmp_path, monkeypatch, capsys):
    """The command at SD 2.1's size, with random weights and the paper's losses.

    It takes at most 24 GiB, of which CUDA itself takes almost one, pictures included, and does at
    least 8 steps per second.
    """
    with torch.device("cuda"):
        model = MVDream.random("sd21")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = {}
    log = run.log

    def log_time(path, **row):
        times[row["step"]] = time.time()
        log(path, **row)

    monkeypatch.setattr(MVDream, "load", lambda *_: model)
    monkeypatch.setattr(run, "log", log_time)
    # The settings of sd21 are dreambooth.py's own; nothing is downloaded to know that.
    flags = ["--prompt", PROMPT, "--model", "mvdream-sd21", "--out", str(tmp_path / "out")]
    flags += ["--steps", "60", "--sample-every", "60", "--device", "cuda"]
    dreambooth.main([str(folder / "photos"), *flags])
    pictures = list((tmp_path / "out" / "progress").iterdir())
    assert len(pictures) == 1, "the pictures are not in the figures"
    allocated = torch.cuda.max_memory_allocated() / 2**30
    reserved = torch.cuda.max_memory_reserved() / 2**30
    speed = 40 / (times[60] - times[20])
    memory = f"{allocated:.1f} GiB allocated, {reserved:.1f} reserved"
    with capsys.disabled():
        print(f"{memory}, {speed:.1f} steps per second")
    assert reserved <= 23
    assert speed > 8
