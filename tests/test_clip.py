"""CLIP's score and R-precision against the cosines written out, with a CLIP of random weights."""
import itertools
import json
import types

import pytest
import torch

from mvd.metrics import clip, command
from mvd.tools.errors import UserError
from small_judge import THINGS, run_main, save_run


@pytest.fixture
def network(monkeypatch):
    """A CLIP of random weights, in place of the one that would be downloaded."""
    from open_clip.model import CLIP
    torch.manual_seed(0)
    vision = dict(image_size=16, layers=1, width=32, patch_size=8, head_width=16)
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
    small = CLIP(16, vision, text).eval()
    monkeypatch.setattr(clip, "load_clip", lambda device: small)
    return small


def vectors(network, views, prompts):
    """CLIP's vectors of pictures and prompts, float64, not normalised.

    Pictures of CLIP's own size need no resizing, so its preprocessing is (x - mean) / std.
    """
    from open_clip import get_tokenizer
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    tokens = get_tokenizer("ViT-B-32")(prompts)
    with torch.no_grad():
        images = network.encode_image((views - mean) / std)
        texts = network.encode_text(tokens)
    return images.double(), texts.double()


def test_clip_similarity_is_the_cosine(network):
    views = torch.rand(3, 3, 16, 16)
    prompts = ["a corgi", "a red car, 3d asset"]
    images, texts = vectors(network, views, prompts)
    cosines = clip.similarity(network, views, prompts)
    assert cosines.shape == (3, 2)
    for v, m in itertools.product(range(3), range(2)):
        expected = (images[v] @ texts[m]) / (images[v].norm() * texts[m].norm())
        assert cosines[v, m].item() == pytest.approx(expected.item(), abs=1e-5)


def test_pictures_are_resized(network):
    prompts = ["a corgi", "a red car, 3d asset"]
    # Of one colour each, so that their size does not show.
    plain = torch.rand(3, 3, 1, 1)
    small = clip.similarity(network, plain.expand(3, 3, 16, 16), prompts)
    large = clip.similarity(network, plain.expand(3, 3, 40, 40), prompts)
    torch.testing.assert_close(small, large, rtol=0, atol=1e-5)


def test_clip_judges_runs_of_any_prompt(network, monkeypatch, capsys, tmp_path):
    prompts = ["a corgi astronaut", "a teapot"]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, prompt in zip(folders, prompts):
        save_run(folder, THINGS[3], size=16)
        (folder / "config.json").write_text(json.dumps({"prompt": prompt}))
    names = [str(folder) for folder in folders]
    output = run_main(monkeypatch, capsys, *names, "--clip", "--json")

    scores = []
    right = []
    for own, folder in enumerate(folders):
        # [V, 2]
        cosines = clip.similarity(network, command.read_run(folder).views, prompts)
        scores.append(100 * cosines[:, own].mean().item())
        nearer = cosines[:, own] > cosines[:, 1 - own]
        right.append(nearer.float().mean().item())
    assert json.loads(output.splitlines()[0]) == {
        "kind": "3d",
        "n": 2,
        "prompts": 2,
        "clip_score": pytest.approx(sum(scores) / 2, rel=1e-4),
        "r_precision": pytest.approx(sum(right) / 2),
    }
    table = run_main(monkeypatch, capsys, names[0], "--clip")
    assert "-" in table.splitlines()[1], "with one prompt there is nothing to confuse it with"


def test_clip_judges_samples(network, monkeypatch, capsys):
    def sample(prompts, elevation, seed, views):
        return torch.rand(len(prompts), views, 3, 16, 16)

    def load(name, device, dtype):
        return types.SimpleNamespace(sample=sample)

    monkeypatch.setattr(command.MVDream, "load", load)
    output = run_main(monkeypatch, capsys, "--samples", "1", "--clip", "--json")
    lines = [json.loads(line) for line in output.splitlines()]
    found = [(line["kind"], line["n"], line["prompts"]) for line in lines]
    assert found == [("3d", 1, 3), ("image", 1, 3), ("never", 1, 3)]


def test_without_clip_and_a_network(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = "open_clip_model.safetensors is not in the cache, and the hub cannot be reached"
    with pytest.raises(UserError, match=message):
        clip.load_clip("cpu")
