"""CLIP's score and R-precision against the cosines written out, with a CLIP of random weights."""
import itertools
import json
import types

import pytest
import torch

from mvd.metrics import clip, judge as metrics
from mvd.tools.errors import UserError
from test_metrics import THINGS, run_main, save_run


@pytest.fixture
def network(monkeypatch):
    """A CLIP of random weights, in place of the one that would be downloaded."""
    from open_clip.model import CLIP
    torch.manual_seed(0)
    small = CLIP(16, dict(image_size=16, layers=1, width=32, patch_size=8, head_width=16),
                 dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)).eval()
    monkeypatch.setattr(clip, "load", lambda device: small)
    return small


def vectors(network, views, prompts):
    """Pictures of CLIP's own size need no resizing, so that its preprocessing is (x - mean) / std. As float64, unnormalised."""
    from open_clip import get_tokenizer
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        images = network.encode_image((views - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        return images.double(), network.encode_text(get_tokenizer("ViT-B-32")(prompts)).double()


def test_clip_similarity_is_the_cosine(network):
    views, prompts = torch.rand(3, 3, 16, 16), ["a corgi", "a red car, 3d asset"]
    images, texts = vectors(network, views, prompts)
    cosines = clip.similarity(network, views, prompts)
    assert cosines.shape == (3, 2)
    for v, m in itertools.product(range(3), range(2)):
        expected = (images[v] @ texts[m]) / (images[v].norm() * texts[m].norm())
        assert cosines[v, m].item() == pytest.approx(expected.item(), abs=1e-5)
    plain = torch.rand(3, 3, 1, 1)                                               # of one colour, so that their size says nothing
    small, large = (clip.similarity(network, plain.expand(3, 3, size, size), prompts) for size in (16, 40))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-5)


def test_clip_judges_runs_of_any_prompt(network, monkeypatch, capsys, tmp_path):
    prompts = ["a corgi astronaut", "a teapot"]
    for name, prompt in zip("ab", prompts):
        save_run(tmp_path / name, THINGS[3], size=16)
        (tmp_path / name / "config.json").write_text(json.dumps({"prompt": prompt}))
    lines = run_main(monkeypatch, capsys, str(tmp_path / "a"), str(tmp_path / "b"), "--clip", "--json").splitlines()
    views = [metrics.read_run(tmp_path / name)[3] for name in "ab"]
    cosines = torch.stack([clip.similarity(network, v, prompts) for v in views])                   # [2, V, 2]
    right = [(cosines[i, :, i] > cosines[i, :, 1 - i]).float().mean().item() for i in range(2)]
    score = 50 * (cosines[0, :, 0].mean() + cosines[1, :, 1].mean()).item()
    assert json.loads(lines[0]) == {"kind": "3d", "n": 2, "prompts": 2, "clip_score": pytest.approx(score, rel=1e-4),
                                    "r_precision": pytest.approx(sum(right) / 2)}
    assert "-" in run_main(monkeypatch, capsys, str(tmp_path / "a"), "--clip").splitlines()[1]           # one prompt: nothing to mix up


def test_clip_judges_samples(network, monkeypatch, capsys):
    monkeypatch.setattr(metrics.MVDream, "load", lambda *_: types.SimpleNamespace(
        sample=lambda prompts, elevation, seed: torch.rand(len(prompts), 4, 3, 16, 16)))
    lines = [json.loads(line) for line in run_main(monkeypatch, capsys, "--samples", "1", "--clip", "--json").splitlines()]
    assert [(line["kind"], line["n"], line["prompts"]) for line in lines] == [("3d", 1, 3), ("image", 1, 3), ("never", 1, 3)]


def test_without_clip_and_a_network(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="open_clip_model.safetensors is not in the cache, and the hub cannot be reached"):
        clip.load("cpu")
