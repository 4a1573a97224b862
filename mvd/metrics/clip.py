"""Does CLIP see what was asked? For pictures of any prompt, as in the papers (DreamFusion §4).

The score is the mean cosine of a view and its prompt, times 100; R-precision is the share of views that are nearer to their own
prompt than to the others that are judged with it. CLIP is downloaded once.
"""
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..tools import checkpoint
from ..text import tokenizer

CLIP = "ViT-B-32", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "open_clip_model.safetensors"       # its shape, and where it is


def load(device):
    """open_clip's model, from the hub's cache or the hub. Raises UserError if it is in neither."""
    import open_clip                                                             # takes seconds
    shape, *place = CLIP
    return open_clip.create_model(shape, str(checkpoint.download(place[0], place[1:])), device=device).eval()


@torch.no_grad()
def similarity(clip, views, prompts):
    """Cosines of CLIP's vectors: views [V, 3, H, W] in [0, 1], M prompts -> [V, M] on the CPU."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    device = clip.logit_scale.device
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    pictures = F.interpolate(views.to(device).float(), clip.visual.image_size, mode="bicubic", antialias=True).clamp(0, 1)
    images = clip.encode_image((pictures - mean) / std, normalize=True)                                 # [V, D]
    texts = clip.encode_text(tokenizer()(prompts, context_length=clip.context_length).to(device), normalize=True)      # [M, D]
    return (images @ texts.T).float().cpu()


def judge(sets, clip):
    """sets: list of (kind, prompt, views [V, 3, H, W]). -> a report a kind: n, clip_score, r_precision (None for one prompt)."""
    prompts, rows = sorted({prompt for _, prompt, _ in sets}), {}
    for kind, prompt, views in tqdm(sets, desc="CLIP", unit="set", disable=None):
        cosines, own = similarity(clip, views, prompts), prompts.index(prompt)                          # [V, M]
        rows.setdefault(kind, []).append((cosines[:, own].mean().item(), (cosines.argmax(1) == own).float().mean().item()))
    means = {kind: torch.tensor(pairs).mean(0).tolist() for kind, pairs in rows.items()}
    return [{"kind": kind, "n": len(rows[kind]), "prompts": len(prompts), "clip_score": 100 * cosine,
             "r_precision": right if len(prompts) > 1 else None} for kind, (cosine, right) in means.items()]
