"""The converted model against diffusers and transformers, which are no requirement: without them these tests skip.

    pip install diffusers transformers
"""
import pytest
import torch

from layouts import SMALL, released_tensors, to_diffusers
from mvd import MVDream, weights
from mvd.model import ModelConfig

diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")


def build_theirs(config, folder):
    """diffusers' UNet and VAE and transformers' text model, filled strictly from the tensors of a diffusers folder."""
    u, v, t = config.unet, config.vae, config.text
    attend = [2 ** level in u.attention_resolutions for level in range(len(u.channel_mult))]
    unet = diffusers.UNet2DConditionModel(
        sample_size=32, in_channels=u.in_channels, out_channels=u.out_channels, layers_per_block=u.num_res_blocks,
        block_out_channels=[m * u.model_channels for m in u.channel_mult], cross_attention_dim=u.context_dim,
        attention_head_dim=[m * u.model_channels // u.head_dim for m in u.channel_mult], use_linear_projection=True,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attend],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attend)])
    levels = len(v.channel_mult)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, layers_per_block=v.num_res_blocks,
        block_out_channels=[m * v.channels for m in v.channel_mult], latent_channels=v.z_channels)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=t.width, intermediate_size=4 * t.width, num_attention_heads=t.heads, hidden_act="gelu",
        num_hidden_layers=t.layers - t.unused_layers, max_position_embeddings=t.context_length, bos_token_id=49406, eos_token_id=49407))
    unet.load_state_dict(folder["unet"])
    vae.load_state_dict(folder["vae"])
    bare = not any(name.startswith("text_model.") for name in text.state_dict())                 # as lately
    text.load_state_dict({name.removeprefix("text_model.") if bare else name: t for name, t in folder["text_encoder"].items()})
    return unet.eval(), vae.eval(), text.eval()


def attend_over_views(unet, views, camera_mlp, camera):
    """MVDream's two changes (§3.1), made from outside: all views' tokens in self-attention, the camera added to the time."""
    def gather(module, args, kwargs):
        return (args[0].unflatten(0, (-1, views)).flatten(1, 2), *args[1:]), kwargs              # [B·V, L, C] -> [B, V·L, C]

    def scatter(module, args, kwargs, out):
        return out.unflatten(1, (views, -1)).flatten(0, 1)
    hooks = [unet.time_embedding.register_forward_hook(lambda module, args, out: out + camera_mlp(camera.flatten(0, 1)))]
    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            hooks += [module.register_forward_pre_hook(gather, with_kwargs=True), module.register_forward_hook(scatter, with_kwargs=True)]
    return hooks


@torch.no_grad()
def differences(model, theirs, size=16, sets=2, views=4):
    """Relative errors {part: |ours - theirs| / |theirs|} on random inputs; size: of the latents."""
    unet, vae, text = theirs
    g = torch.Generator().manual_seed(1)
    x = torch.randn(sets, views, model.config.unet.in_channels, size, size, generator=g)
    t, camera = torch.tensor([981, 301])[:sets], torch.randn(sets, views, 16, generator=g)
    tokens = model.text.tokenize(["a bulldog wearing a crown, 3d asset", ""])[:sets]
    context, their_context = model.text(tokens), text(input_ids=tokens).last_hidden_state
    flat = dict(timestep=t.repeat_interleave(views), encoder_hidden_states=context.repeat_interleave(views, 0))
    their_2d = unet(x.flatten(0, 1), **flat).sample
    hooks = attend_over_views(unet, views, model.unet.camera_mlp, camera)
    their_3d = unet(x.flatten(0, 1), **flat).sample
    for hook in hooks:
        hook.remove()
    assert (their_3d - their_2d).norm() > 0.1 * their_2d.norm()                  # the two modes are not one
    images = torch.rand(1, 3, 8 * size, 8 * size, generator=g) * 2 - 1
    mean, logvar = model.vae.encode(images)
    posterior = vae.encode(images).latent_dist
    pairs = {"2d": (model.unet(x, t, context).flatten(0, 1), their_2d), "3d": (model.unet(x, t, context, camera).flatten(0, 1), their_3d),
             "text": (context, their_context), "mean": (mean, posterior.mean), "logvar": (logvar, posterior.logvar),
             "decode": (model.vae.decode(mean), vae.decode(posterior.mean).sample)}
    return {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}


def test_small_models_agree():
    released = released_tensors()
    parts = weights.convert(released)
    model = MVDream(ModelConfig(*weights.sizes(parts))).eval()
    for part, tensors in parts.items():
        getattr(model, part).load_state_dict(tensors)                            # strict
    found = differences(model, build_theirs(SMALL, to_diffusers(released)))
    assert max(found.values()) < 1e-4, found
