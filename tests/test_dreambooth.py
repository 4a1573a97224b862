"""dreambooth.py: the preservation loss against autograd, a killed run, what "[v]" does, and bad input in one line."""
import copy
import json
import time

import pytest
import torch
from PIL import Image

import distill
import dreambooth
import sample
from mvd import MVDream, diffusion
from mvd.tools import cli, run
from mvd.tools.errors import UserError
from mvd.tools.files import write_safetensors
from mvd.tools.masters import learning_rate
from mvd.tools.vocabulary import IDENTIFIERS
from scripts import Killed, killed_after, saved_model
from test_model import small_config

PROMPT = "a photo of [v] bulldog"
LEARNED = ["--class-preservation", "1", "--identifier-lr", "0.01", "--text-preservation", "1"]
SAMPLE = MVDream.sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, and three photos: wide, tall, and a cut-out."""
    folder = tmp_path_factory.mktemp("dreambooth")
    config = small_config()
    config.text.words = tuple(sorted({*config.text.words, *IDENTIFIERS, "of", "photo"}))
    config.dreambooth = {"steps": 6, "batch": 2, "lr": 1e-3}
    saved_model(folder, config)
    (folder / "photos").mkdir()
    for i, size in enumerate(((80, 64), (64, 90), (70, 70))):
        image = Image.new("RGBA", size, (200, 60, 40 * i, 255))
        image.paste((20, 90, 200, 255), (24, 16, 40, 50))
        if i == 2:
            image.putalpha(Image.new("L", size, 0))
            image.paste((20, 90, 200, 255), (10, 10, 60, 60))
        image.save(folder / "photos" / f"{i}.png")
    return folder


@pytest.fixture
def start(folder, tmp_path, monkeypatch):
    """start(out, *flags) fine-tunes in this process and returns the bytes of the result."""
    monkeypatch.setattr(dreambooth, "GREYS", 2)
    monkeypatch.setattr(dreambooth, "LOG_EVERY", 1)
    draw = lambda self, prompts, views=4, **_: torch.zeros(1 if isinstance(prompts, str) else len(prompts), views, 3, 64, 64)
    monkeypatch.setattr(MVDream, "sample", draw)

    def start(out, *flags, photos=folder / "photos", prompt=PROMPT, model=folder / "small.safetensors"):
        dreambooth.main([str(photos), "--prompt", prompt, "--model", str(model), "--out", str(tmp_path / out), "--device", "cpu",
                         "--sample-every", "3", "--save-every", "2", *flags])
        return (tmp_path / out / "model.safetensors").read_bytes()
    return start


@pytest.mark.parametrize("block", [1, 32])
def test_gradient_of_the_preservation_loss(block, monkeypatch):
    """Against autograd of λ‖θ − θ0‖₁/N, and by hand: ±λ/N, 0 where a weight has not moved, nothing where none was touched."""
    monkeypatch.setattr(dreambooth, "BLOCK", block)
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(5), torch.randn(2)]
    weights = [w + 1e-6 * torch.randn_like(w).sign() for w in start]
    weights[1][2] = start[1][2]
    gradients = [torch.randn(3, 4), torch.randn(5)]
    for w, g in zip(weights, gradients):
        w.grad = g.clone()
    l1, l2, own, pull = dreambooth.preserve(weights, start, 300.0)
    leaves = [w.detach().double().requires_grad_() for w in weights[:2]]
    loss = 300.0 / 19 * sum((w - w0).abs().sum() for w, w0 in zip(leaves, start))
    loss.backward()
    for w, g, leaf in zip(weights, gradients, leaves):
        torch.testing.assert_close(w.grad - g, leaf.grad.float(), rtol=0, atol=1e-5)
    moved = (weights[0].grad - gradients[0]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 300.0 / 19), rtol=1e-5, atol=0)
    assert weights[1].grad[2] == gradients[1][2] and weights[2].grad is None
    assert l1.item() * 300 == pytest.approx(loss.item(), rel=1e-5)
    all_moves = torch.cat([(w - w0).flatten() for w, w0 in zip(weights, start)][:2])
    assert l2.item() == pytest.approx(all_moves.norm().item(), rel=1e-5)
    assert own.item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)
    assert pull.item() == pytest.approx(300 / 19 * 16 ** 0.5, rel=1e-5)          # 16 of 17 have moved


@pytest.mark.parametrize("of_class, identifier_lr, of_text", [(0.0, 0.0, 0.0), (100.0, 0.0, 0.0), (100.0, 1e-2, 0.0), (0.0, 1e-2, 0.01),
                                                              (100.0, 1e-2, 0.003)])
def test_a_step_is_adamw_on_every_loss(folder, tmp_path, of_class, identifier_lr, of_text):
    """Two steps of `finetune` by hand: at θ0 no preservation loss has a gradient, one step later all have."""
    model = MVDream.load(folder / "small.safetensors")
    tokens = model.text.tokenize(["a photo of phol bulldog", "phol bulldog"])    # the identifier at two places
    plain_context = model.embed(["a photo of bulldog", ""])
    moments, before = torch.rand(2, 3, 1, 16, 8, 8), model.text(tokens)
    s = dreambooth.Settings("", PROMPT, steps=2, batch=2, lr=1e-3, preservation=1e4, class_preservation=of_class,
                            identifier_lr=identifier_lr, text_preservation=of_text)
    plain, frozen, text = copy.deepcopy(model.unet).requires_grad_(True), copy.deepcopy(model.unet), copy.deepcopy(model.text)
    torch.manual_seed(5)
    assert dreambooth.finetune(model, moments, tokens, before, plain_context, s, tmp_path) == 2
    parameters = [p for name, p in plain.named_parameters() if not name.startswith("camera_mlp")]
    theta0, count = [p.detach().clone() for p in parameters], sum(p.numel() for p in plain.parameters())
    table, (row,) = text.token_embedding.weight, text.word_rows("phol")
    word = table[row].clone().requires_grad_(True)
    adam = torch.optim.AdamW([{"params": parameters, "lr": 1e-3, "weight_decay": 0.01},
                              {"params": [word], "lr": identifier_lr, "weight_decay": 0.0}])

    def photos(wordings):
        which, copy_, wording = torch.randint(3, (2,)), torch.randint(2, (2,)), torch.randint(wordings, (2,))
        mean, std = moments[copy_, which].chunk(2, dim=-3)
        return model.config.vae.scale_factor * (mean + std * torch.randn_like(mean)), wording

    torch.manual_seed(5)
    for _ in range(2):
        loss = 1e4 / count * sum((p - p0).abs().sum() for p, p0 in zip(parameters, theta0))
        if of_class:
            z, wording = photos(2)
            t, noise = torch.randint(1000, (2,)), torch.randn_like(z)
            abar = diffusion.alphas_cumprod()[t].view(-1, 1, 1, 1, 1)
            x_t = abar.sqrt() * z + (1 - abar).sqrt() * noise
            loss = loss + of_class * (plain(x_t, t, plain_context[wording]) - frozen(x_t, t, plain_context[wording])).square().mean()
        z, wording = photos(2)
        spelled = torch.where(torch.arange(len(table))[:, None] == row, word, table)
        context = torch.func.functional_call(text, {"token_embedding.weight": spelled}, (tokens[wording],))
        loss = loss + diffusion.loss(plain, z, context)
        changed = (context - before[wording]).square().sum(2)[tokens[wording] != row]                          # all but "phol"
        loss = loss + of_text * changed.sum() / context.numel()
        adam.zero_grad()
        loss.backward()
        adam.step()
    pairs = zip(model.unet.parameters(), plain.parameters())
    off = torch.cat([(p - q).detach().abs().flatten() for p, q in pairs])
    assert (off < 1e-5).float().mean() > 0.9999                                  # but for a sign that rounding turned
    learned = model.text.token_embedding.weight
    torch.testing.assert_close(learned[row], word.detach(), rtol=0, atol=1e-5)
    moved = (learned != table).any(1)
    assert moved.sum() == (identifier_lr > 0) and not moved[torch.arange(len(table)) != row].any()


def test_it_learns_the_photos_and_a_strong_preservation_holds_it_back(folder, tmp_path):
    def distance_and_loss(strength, out):
        model = MVDream.load(folder / "small.safetensors")
        torch.manual_seed(0)
        s = dreambooth.Settings("", PROMPT, steps=20, batch=2, lr=5e-3, preservation=strength)
        (tmp_path / out).mkdir()
        tokens, context = model.text.tokenize(["a bulldog"]), model.embed(["a bulldog"])
        dreambooth.finetune(model, torch.ones(1, 3, 1, 16, 8, 8), tokens, context, context, s, tmp_path / out)
        rows = run.read_log(tmp_path / out / "log.jsonl")
        return rows[0], rows[-1]
    first, last = distance_and_loss(0.0, "free")
    _, held = distance_and_loss(1e8, "held")
    assert last["loss"] < 0.95 * first["loss"] and last["preservation"] == 0 and last["share"] == 0
    assert held["distance"] < 0.5 * last["distance"] and held["share"] > 0.9 and held["loss"] > last["loss"]


@pytest.mark.parametrize("prompt, expected", [
    ("a photo of [v] bulldog", ["a photo of phol bulldog", "phol bulldog", "phol bulldog , 3d asset"]),
    ("[V] bulldog", ["phol bulldog", "phol bulldog", "phol bulldog , 3d asset"])])
def test_wordings_are_what_later_prompts_will_say(start, monkeypatch, prompt, expected):
    """With [v] as the photos' names, without it as what shall stay, and then also the prompt of guidance, which says nothing."""
    given, learn = [], dreambooth.finetune
    monkeypatch.setattr(dreambooth, "finetune", lambda model, *rest: given.append((model, *rest[1:4])) or learn(model, *rest))
    start("run", "--wordings", "--steps", "1", prompt=prompt)
    (model, tokens, contexts, plain), = given
    assert torch.equal(tokens, model.text.tokenize(expected)) and torch.equal(contexts, model.embed(expected))
    without_v = model.embed([name.replace("phol ", "") for name in expected] + [""])
    torch.testing.assert_close(plain, without_v, rtol=0, atol=1e-6)


def test_the_rates_fall_along_the_cosine(folder, tmp_path):
    """Adam moves a weight that always has the same gradient by the rate, step by step: so by the sum of the rates in all."""
    moved = {}
    for cosine in (False, True):
        model = MVDream.load(folder / "small.safetensors")
        s = dreambooth.Settings("", PROMPT, steps=4, batch=2, lr=1e-3, weight_decay=0.0, cosine=cosine, identifier_lr=1e-2)
        weights = model.unet.conv_out.weight, model.text.token_embedding.weight
        before = [w.detach().clone() for w in weights]
        tokens, contexts, plain = model.text.tokenize(["a phol bulldog"]), model.embed(["a phol bulldog"]), model.embed(["a bulldog"])
        torch.manual_seed(0)
        dreambooth.finetune(model, torch.rand(1, 3, 1, 16, 8, 8), tokens, contexts, plain, s, tmp_path)
        moved[cosine] = [(w - w0).abs().max().item() for w, w0 in zip(weights, before)]
    rates = sum(learning_rate(step, 4, 1e-3) for step in range(4))
    for free, falling, factor in zip(moved[False], moved[True], (1, 10)):
        assert free > 3e-3 * factor and 0.5 * rates * factor < falling <= 1.05 * rates * factor < 2.7e-3 * factor


@pytest.mark.parametrize("killed_at, flags", [
    (1, []), (3, []), (4, LEARNED)])                                             # before any checkpoint, and after
def test_a_killed_run_resumes_bit_for_bit(start, monkeypatch, killed_at, flags, tmp_path):
    whole = start("whole", *flags)
    with killed_after(monkeypatch, lambda row: row["step"] == killed_at):
        start("killed", *flags)
    if killed_at == 4:                                                           # the page is of the last pictures, and waits for more
        page = (tmp_path / "killed" / "index.html").read_text()
        assert "3 of 6 steps" in page and "refresh" in page
    assert start("killed", "--resume", *flags) == whole
    assert (tmp_path / "killed" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_the_result_knows_its_subject(start, folder, tmp_path, monkeypatch):
    """Every script takes the folder as --model and "[v]" in the prompt; the model before and after differ in the UNet alone."""
    start("dog", "--identifier", "ucd")
    names = {path.relative_to(tmp_path / "dog").as_posix() for path in (tmp_path / "dog").rglob("*") if path.is_file()}
    assert names == {"config.json", "log.jsonl", "checkpoint.safetensors", "curves.png", "photos.png", "model.safetensors", "index.html",
                     "progress/samples_000003.png", "progress/samples_000006.png"}
    page = (tmp_path / "dog" / "index.html").read_text()
    assert "6 of 6 steps" in page and page.count("<img") == 3 and "refresh" not in page
    before, after = MVDream.load(folder / "small.safetensors"), MVDream.load(tmp_path / "dog")
    assert after.config.text.identifier == "ucd"
    assert torch.equal(after.text.tokenize(["a [v] bulldog, [V]"]), after.text.tokenize(["a ucd bulldog, ucd"]))
    for part, same in (("vae", True), ("text", True), ("unet", False)):
        pairs = zip(getattr(before, part).state_dict().items(), getattr(after, part).state_dict().values())
        assert all(torch.equal(a.half(), b) for (name, a), b in pairs if not name.startswith("camera")) == same
    assert torch.equal(before.unet.camera_mlp[0].weight.half(), after.unet.camera_mlp[0].weight)

    asked = []
    monkeypatch.setattr(MVDream, "sample", lambda self, prompt, *_, **__: asked.extend(prompt) or torch.zeros(1, 4, 3, 8, 8))
    monkeypatch.setattr("sys.argv", ["sample.py", "a [v] bulldog", "--model", str(tmp_path / "dog"), "--out", str(tmp_path / "x.png")])
    sample.main()
    monkeypatch.setattr(distill, "distill", lambda s, prompts, *_: asked.append(prompts[0]) or (_ for _ in ()).throw(Killed))
    monkeypatch.setattr("sys.argv", ["distill.py", "a [v] bulldog", "--model", str(tmp_path / "dog"), "--negative", "",
                                     "--out", str(tmp_path / "3d")])
    with pytest.raises(Killed):
        distill.main()
    assert asked == ["a ucd bulldog"] * 2
    assert json.loads((tmp_path / "3d" / "config.json").read_text())["prompt"] == "a [v] bulldog"


def test_settings_come_from_the_header_and_flags_count_more(start, tmp_path, monkeypatch):
    seen = []
    moments = dreambooth.data.moments
    monkeypatch.setattr(dreambooth.data, "moments", lambda vae, rgba, *rest: seen.append(rgba) or moments(vae, rgba, *rest))
    start("a")
    start("b", "--batch", "1", "--steps", "2", "--flips")
    a, b = (json.loads((tmp_path / out / "config.json").read_text()) for out in "ab")
    assert (a["steps"], a["batch"], a["lr"], a["flips"]) == (6, 2, 1e-3, False)
    assert (b["steps"], b["batch"], b["lr"], b["flips"]) == (2, 1, 1e-3, True)
    assert a["files"] == ["0.png", "1.png", "2.png"] and a["preservation"] == 1.0 and a["identifier"] == "phol"
    assert len(seen[0]) == 3 and torch.equal(seen[1], torch.cat([seen[0], seen[0].flip(-1)]))


@pytest.mark.parametrize("changes, flags, words", [
    (dict(prompt="a photo of a bulldog"), [], 'the prompt has no [v]'),
    (dict(prompt="[v]."), [], "nothing but [v]"),
    (dict(photos="empty"), [], "holds no photos"),
    (dict(photos="nowhere"), [], "there is no folder"),
    (dict(model="foreign.safetensors"), [], "no tensor of an MVDream or Stable Diffusion 2 model"),
    (dict(model="nowhere"), [], "there is no model"),
    ({}, ["--identifier", "zebra"], "no word 'zebra'"),
    ({}, ["--identifier", "two words"], "no word 'two words'"),
    ({}, ["--steps", "0"], "--steps"),
    ({}, ["--resume"], "no run to resume"),
])
def test_bad_input_is_one_line(start, changes, flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_safetensors(tmp_path / "foreign.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(SystemExit) as end:
        cli.main(lambda: start("out", *flags, **changes))
    err = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(err) == 1 and err[0].startswith("error:") and words in err[0]
    assert not (tmp_path / "out").exists()


def test_another_runs_checkpoint_is_refused(start, tmp_path):
    start("out")
    run.save_checkpoint(tmp_path / "out" / "checkpoint.safetensors", {"step": 1, "nerf": {}})
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


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [[], LEARNED])
def test_pictures_are_drawn_between_captured_steps(start, folder, tmp_path, monkeypatch, flags):
    """What does not learn comes back for the pictures and goes again, before the capture and after it, and is the same afterwards."""
    monkeypatch.setattr(MVDream, "sample", SAMPLE)
    start("out", "--device", "cuda", "--sample-every", "2", *flags)
    rows = run.read_log(tmp_path / "out" / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7)) and rows[-1]["distance"] > rows[1]["distance"] > 0
    assert len(list((tmp_path / "out" / "progress").iterdir())) == 3
    before, after = (MVDream.load(path).state_dict() for path in (folder / "small.safetensors", tmp_path / "out"))
    changed = [name for name in before if not name.startswith("unet.") and not torch.equal(before[name].half(), after[name].half())]
    assert changed == (["text.token_embedding.weight"] if flags else [])


@pytest.mark.gpu
def test_full_size_fits_and_is_quick(folder, tmp_path, monkeypatch, capsys):
    """The command at SD 2.1's size, random weights, the paper's losses, pictures included: within 24 GiB, and at least 8 steps a second."""
    with torch.device("cuda"):
        model = MVDream.random("sd21")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times, log = {}, run.log
    monkeypatch.setattr(MVDream, "load", lambda *_: model)
    monkeypatch.setattr(run, "log", lambda path, **row: times.update({row["step"]: time.time()}) or log(path, **row))
    dreambooth.main([str(folder / "photos"), "--prompt", PROMPT, "--out", str(tmp_path / "out"), "--steps", "60", "--device", "cuda"])
    allocated, reserved = torch.cuda.max_memory_allocated() / 2 ** 30, torch.cuda.max_memory_reserved() / 2 ** 30
    speed = 40 / (times[60] - times[20])
    with capsys.disabled():
        print(f"{allocated:.1f} GiB allocated, {reserved:.1f} reserved, {speed:.1f} steps a second")
    assert reserved <= 23 and speed > 8                                          # CUDA itself takes almost another one
