"""Does CLIP see what was asked for? A judge for pictures of any prompt (DreamFusion §4).

The CLIP score is 100 times the mean cosine between a view and its prompt. R-precision is the share
of views that are nearer to their own prompt than to all others that are judged with it. CLIP is
downloaded once.
"""
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..text import tokenizer
from ..tools import checkpoint

# open_clip's name for the size of the network, and the place of its weights on the hub.
ARCHITECTURE = "ViT-B-32"
REPOSITORY = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
WEIGHTS = "open_clip_model.safetensors"


def load_clip(device):
    """CLIP as open_clip's model, from the hub's cache or from the hub.

    Raises UserError if it is not in the cache and the hub cannot be reached.
    """
    # Importing open_clip takes seconds.
    import open_clip
    path = checkpoint.download(REPOSITORY, [WEIGHTS])
    return open_clip.create_model(ARCHITECTURE, str(path), device=device).eval()


@torch.no_grad()
def similarity(network, views, prompts):
    """Cosines of CLIP's vectors, [V, M] on the CPU, for views [V, 3, H, W] in [0, 1], M prompts."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    device = network.logit_scale.device
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=device)[:, None, None]
    std = torch.tensor(OPENAI_DATASET_STD, device=device)[:, None, None]
    pictures = F.interpolate(
        views.to(device).float(), network.visual.image_size, mode="bicubic", antialias=True)
    pictures = (pictures.clamp(0, 1) - mean) / std
    tokens = tokenizer()(prompts, context_length=network.context_length).to(device)
    # [V, D] and [M, D]
    images = network.encode_image(pictures, normalize=True)
    texts = network.encode_text(tokens, normalize=True)
    return (images @ texts.T).float().cpu()


def clip_reports(sets, network):
    """One report per kind of pictures: kind, n, prompts, clip_score, r_precision.

    sets: a list of (kind, prompt, views [V, 3, H, W] in [0, 1]). n is the number of sets of a
    kind, `prompts` the number of different prompts of all kinds. With one prompt r_precision is
    None, since there is nothing to confuse it with.
    """
    prompts = sorted({prompt for kind, prompt, views in sets})
    scores = {}
    for kind, prompt, views in tqdm(sets, desc="CLIP", unit="set", disable=None):
        # [V, M]
        cosines = similarity(network, views, prompts)
        own = prompts.index(prompt)
        cosine = cosines[:, own].mean().item()
        right = (cosines.argmax(1) == own).float().mean().item()
        scores.setdefault(kind, []).append((cosine, right))

    reports = []
    for kind, pairs in scores.items():
        cosine, right = torch.tensor(pairs).mean(0).tolist()
        reports.append({
            "kind": kind,
            "n": len(pairs),
            "prompts": len(prompts),
            "clip_score": 100 * cosine,
            "r_precision": right if len(prompts) > 1 else None,
        })
    return reports
