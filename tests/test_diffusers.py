"""The converted model against diffusers and transformers, without which this test skips.

They are not required otherwise:  pip install diffusers transformers
"""
import pytest
import torch

from layouts import SMALL, released_tensors, to_diffusers
from mvd import MVDream, weights
from test_model import random_model, small_config

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def their_unet(config):
    widths = [multiple * config.model_channels for multiple in config.channel_mult]
    down, up = [], []
    for level in range(len(widths)):
        attend = 2**level in config.attention_resolutions
        down.append("CrossAttnDownBlock2D" if attend else "DownBlock2D")
        up.insert(0, "CrossAttnUpBlock2D" if attend else "UpBlock2D")
    return diffusers.UNet2DConditionModel(
        sample_size=32,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        layers_per_block=config.num_res_blocks,
        block_out_channels=widths,
        cross_attention_dim=config.context_dim,
        # Despite its name, this is the number of heads.
        attention_head_dim=[width // config.head_dim for width in widths],
        use_linear_projection=True,
        down_block_types=down,
        up_block_types=up,
    )


def their_vae(config):
    levels = len(config.channel_mult)
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=config.num_res_blocks,
        block_out_channels=[multiple * config.channels for multiple in config.channel_mult],
        latent_channels=config.z_channels,
    )


def their_text(config):
    settings = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_attention_heads=config.heads,
        hidden_act="gelu",
        num_hidden_layers=config.layers - config.unused_layers,
        max_position_embeddings=config.context_length,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return transformers.CLIPTextModel(settings)


def build_theirs(config, folder):
    """Their UNet, VAE and text model, filled strictly from the tensors of a diffusers folder."""
    unet = their_unet(config.unet)
    unet.load_state_dict(folder["unet"])
    vae = their_vae(config.vae)
    vae.load_state_dict(folder["vae"])
    text = their_text(config.text)
    tensors = folder["text_encoder"]
    if not any(name.startswith("text_model.") for name in text.state_dict()):
        # Lately transformers has dropped the prefix.
        tensors = {name.removeprefix("text_model."): t for name, t in tensors.items()}
    text.load_state_dict(tensors)
    return unet.eval(), vae.eval(), text.eval()


def attend_over_views(unet, views, camera_mlp, camera):
    """Make their UNet a multi-view one from outside, with MVDream's two changes (§3.1).

    The tokens of all views meet in self-attention, and the camera is added to the time. Returns
    the hooks that do it.
    """
    def gather(module, args, kwargs):
        """Tokens [B·V, L, C] -> [B, V·L, C]."""
        tokens = args[0].unflatten(0, (-1, views)).flatten(1, 2)
        return (tokens, *args[1:]), kwargs

    def scatter(module, args, kwargs, out):
        return out.unflatten(1, (views, -1)).flatten(0, 1)

    def add_camera(module, args, out):
        return out + camera_mlp(camera.flatten(0, 1))

    hooks = [unet.time_embedding.register_forward_hook(add_camera)]
    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            hooks.append(module.register_forward_pre_hook(gather, with_kwargs=True))
            hooks.append(module.register_forward_hook(scatter, with_kwargs=True))
    return hooks


def unet_pairs(model, unet, context, g, *, size=16, sets=2, views=4):
    """{mode: (our prediction, theirs)} for random latents of size x size."""
    x = torch.randn(sets, views, model.config.unet.in_channels, size, size, generator=g)
    t = torch.tensor([981, 301])
    camera = torch.randn(sets, views, 16, generator=g)
    flat = {
        "timestep": t.repeat_interleave(views),
        "encoder_hidden_states": context.repeat_interleave(views, 0),
    }
    their_2d = unet(x.flatten(0, 1), **flat).sample
    hooks = attend_over_views(unet, views, model.unet.camera_mlp, camera)
    their_3d = unet(x.flatten(0, 1), **flat).sample
    for hook in hooks:
        hook.remove()
    difference = (their_3d - their_2d).norm() / their_2d.norm()
    assert difference > 0.1, "the hooks do nothing"
    return {
        "2d": (model.unet(x, t, context).flatten(0, 1), their_2d),
        "3d": (model.unet(x, t, context, camera).flatten(0, 1), their_3d),
    }


@torch.no_grad()
def differences(model, theirs):
    """Relative errors {part: |ours - theirs| / |theirs|} on random inputs."""
    unet, vae, text = theirs
    g = torch.Generator().manual_seed(1)
    tokens = model.text.tokenize(["a bulldog wearing a crown, 3d asset", ""])
    context = model.text(tokens)
    pairs = unet_pairs(model, unet, context, g)
    pairs["text"] = (context, text(input_ids=tokens).last_hidden_state)

    images = torch.rand(1, 3, 128, 128, generator=g) * 2 - 1
    mean, logvar = model.vae.encode(images)
    posterior = vae.encode(images).latent_dist
    pairs["mean"] = (mean, posterior.mean)
    pairs["logvar"] = (logvar, posterior.logvar)
    pairs["decode"] = (model.vae.decode(mean), vae.decode(posterior.mean).sample)

    errors = {}
    for name, (ours, their) in pairs.items():
        errors[name] = ((ours - their).norm() / their.norm()).item()
    return errors


def test_small_models_agree():
    released = released_tensors()
    parts = weights.convert(released)
    model = MVDream(SMALL).eval()
    assert weights.sizes(parts) == (SMALL.unet, SMALL.vae, SMALL.text)
    for part, tensors in parts.items():
        # Strict: no name may be left over.
        getattr(model, part).load_state_dict(tensors)
    found = differences(model, build_theirs(SMALL, to_diffusers(released)))
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_their_pipeline_draws_what_our_2d_mode_draws(prediction, tmp_path):
    """From the folder that we write: names, config files, tokenizer, sampler, guidance."""
    config = small_config()
    config.unet.prediction = prediction
    config.vae.scale_factor = 0.7
    model = random_model(config)
    model.save(tmp_path / "m", layout="diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "m")
    noise = torch.randn(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(5))
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "pt"}
    theirs = pipeline(["a red bulldog"] * 2, latents=noise[0].clone(), **settings).images
    flags = dict(mode="2d", views=2, steps=4, sampler="ddim", guidance=4.0, seed=5)
    ours = model.sample("a red bulldog", **flags)
    assert ours.std() > 0.01, "an even picture would say nothing"
    torch.testing.assert_close(ours[0], theirs, rtol=1e-3, atol=1e-3)
