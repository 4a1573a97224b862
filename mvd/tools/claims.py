"""What a checkpoint says of itself beside its tensors, whose names and shapes do not tell all.

Stable Diffusion 2 exists in two sizes, with the same tensors: one predicts noise, the other v.
Other models have other noise schedules, activations or heads. `checkpoint.read` collects what is
said: {place: {key: value}}. The places are

- the config files of a diffusers folder, by their paths inside it;
- "metadata": of a safetensors file (https://github.com/Stability-AI/ModelSpec, and ComfyUI's);
- "yaml": the LDM configuration that lies beside a file, with its suffix changed to .yaml;
- "its name": of a file that was published without any of these;
- "its tensor v_pred": an empty one, with which ComfyUI marks a file;
- "mvd": our header, which `presets.from_header` reads.
"""
import re

from .errors import UserError

# Who says what the network predicts, and how: {key: {value: our word}}.
PREDICTIONS = dict.fromkeys(
    ("prediction_type", "parameterization", "modelspec.prediction_type", "modelspec.predict_key"),
    {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v"},
)
# {place: {key: the values that a model of ours can have}}. Other keys say nothing that matters.
ALLOWED = {
    "model_index.json": {
        "_class_name": [
            "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "MVDreamPipeline"],
    },
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": [1000],
        "beta_schedule": ["scaled_linear"],
        "beta_start": [0.00085],
        "beta_end": [0.012],
        "trained_betas": [None],
        "rescale_betas_zero_snr": [False],
    },
    "unet/config.json": {
        "_class_name": ["UNet2DConditionModel", "MultiViewUNetModel"],
        # What it is told beside the text.
        "class_embed_type": [None],
        "num_class_embeds": [None],
        "addition_embed_type": [None],
        "encoder_hid_dim": [None],
        "time_cond_proj_dim": [None],
        "act_fn": ["silu"],
        "resnet_time_scale_shift": ["default"],
        "flip_sin_to_cos": [True],
        "freq_shift": [0],
        "center_input_sample": [False],
    },
    "vae/config.json": {
        "_class_name": ["AutoencoderKL"],
        "act_fn": ["silu"],
        "shift_factor": [None],
        "latents_mean": [None],
    },
    "text_encoder/config.json": {"hidden_act": ["gelu"]},
    "yaml": {"linear_start": [0.00085], "linear_end": [0.012]},
}
# What the whole text must be like.
PATTERNS = {
    "modelspec.architecture": r"stable-diffusion-v2(-1)?(-base|-512|-768|-768-v)?|mvdream.*",
    # The class of an LDM model: others inpaint, or take depths or classes.
    "target": r".*\.(LatentDiffusion|LatentDiffusionInterface)",
}
# What settles a field of ours that the tensors do not tell: {place: {key: field}}.
FIELDS = {
    "unet/config.json": {"norm_num_groups": "unet.groups", "num_head_channels": "unet.head_dim"},
    "vae/config.json": {"norm_num_groups": "vae.groups", "scaling_factor": "vae.scale_factor"},
    "text_encoder/config.json": {
        "hidden_size": "text.width", "num_attention_heads": "text.heads"},
    "yaml": {"scale_factor": "vae.scale_factor"},
}
# Files that were published without a word on what they predict.
PUBLISHED_V = re.compile("768-v-ema|v2-1_768-(non)?ema")


def check(path, said):
    """Raise UserError if the checkpoint at `path` says that it is a model of another kind."""
    for place, claims in said.items():
        allowed = ALLOWED.get(place, {})
        for key, value in claims.items():
            if key in PREDICTIONS:
                known = str(value) in PREDICTIONS[key]
            elif key in PATTERNS:
                known = re.fullmatch(PATTERNS[key], str(value))
            else:
                known = value in allowed.get(key, [value])
            if not known:
                raise UserError(f"{path}: {place} says {key}: {value!r:.60}, so this is another "
                                "kind of model; mvd reads MVDream and Stable Diffusion 2")


def from_yaml(text):
    """What an LDM configuration says: {key: value} of the keys that are known here.

    A key may be there for each part of the model; the first one is of the whole. (No YAML library
    is needed for that.) Nothing, if it is a configuration of something else.
    """
    known = {*PREDICTIONS, *PATTERNS, *ALLOWED["yaml"], *FIELDS["yaml"]}
    found = {}
    text = re.sub("#.*", "", text)
    for key, value in re.findall(r"""(\w+)["']?[ \t]*:[ \t]*["']?([\w.+-]+)""", text):
        if key not in known:
            continue
        try:
            found.setdefault(key, float(value))
        except ValueError:
            found.setdefault(key, value)
    return found if "parameterization" in found or "linear_start" in found else {}


def settings(said):
    """What follows from it: {field of ModelConfig: value}, for `presets.override`.

    said: what `check` has accepted. Raises UserError if two numbers do not fit together.
    """
    found = {}
    for place, claims in said.items():
        for key, value in claims.items():
            field = FIELDS.get(place, {}).get(key)
            if key in PREDICTIONS:
                found["unet.prediction"] = PREDICTIONS[key][str(value)]
            elif field and value is not None:
                found[field] = value
    metadata = said.get("metadata", {})
    if metadata.get("modelspec.architecture", "").endswith("-v"):
        found.setdefault("unet.prediction", "v")
    square = re.fullmatch(r"(\d+)x\1", metadata.get("modelspec.resolution", ""))
    if square:
        found["size"] = int(square[1])
    try:
        unet, vae = said.get("unet/config.json", {}), said.get("vae/config.json", {})
        found.update(folder_settings(unet, vae))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"unet/config.json has numbers that do not fit ({error})") from error
    return found


def folder_settings(unet, vae):
    """The size of a picture and the width of a head, from two config files of diffusers."""
    found = {}
    if isinstance(unet.get("sample_size"), int):
        levels = len(vae["block_out_channels"]) if "block_out_channels" in vae else 4
        found["size"] = unet["sample_size"] * 2 ** (levels - 1)
    # Despite its name, attention_head_dim is the number of heads.
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim")
    widths = unet.get("block_out_channels")
    if heads and widths:
        heads = [heads] * len(widths) if isinstance(heads, int) else heads
        head_dims = {width / head for width, head in zip(widths, heads, strict=True)}
        if len(head_dims) > 1:
            raise ValueError("heads of one width are read, as Stable Diffusion 2 has them")
        found["unet.head_dim"] = int(head_dims.pop())
    return found
