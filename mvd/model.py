"""MVDream: UNet, VAE, text tower and noise schedule as one object that loads, samples and saves."""
import copy
import json
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from . import cameras, diffusion, weights
from .tools import checkpoint
from .tools.device import GraphedStep, side_stream, untuned
from .tools.errors import UserError
from .tools.vocabulary import known_part
from .tools.files import write_atomic, write_safetensors
from .text import TextConfig, TextTower
from .unet import MultiViewUNet, UNetConfig, camera_mlp
from .vae import VAE, VAEConfig

TINY = Path(__file__).with_name("tiny.safetensors")                              # the model that the repository ships


@dataclass
class ModelConfig:
    """Everything but the weights. The defaults are the released model's: 4 views of 256², ", 3d asset", guidance 10."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    size: int = 256                              # pixels
    guidance: float = 10.0                       # of sampling
    negative: str = ""                           # the negative prompt of sampling
    suffix: str = ", 3d asset"                   # what sampling in 3D mode adds to a prompt
    distill: dict = field(default_factory=dict)  # settings of `distill.py` that differ from the released ones
    dreambooth: dict = field(default_factory=dict)   # and of `dreambooth.py` from the paper's

    @staticmethod
    def from_dict(values):
        parts = {"unet": UNetConfig, "vae": VAEConfig, "text": TextConfig}
        tuples = {part: {k: tuple(v) if isinstance(v, list) else v for k, v in values[part].items()} for part in parts}
        return ModelConfig(**{**values, **{part: make(**tuples[part]) for part, make in parts.items()}})


# The tiny model: the same classes, trained by train.py on the toy world, 128² pixels and 16×16 latents.
PRESETS = {
    "sd21": ModelConfig(),
    "tiny": ModelConfig(
        unet=UNetConfig(in_channels=8, out_channels=8, model_channels=96, channel_mult=(1, 2, 2), num_res_blocks=1,
                        attention_resolutions=(1, 2, 4), head_dim=32, context_dim=192, groups=8),
        vae=VAEConfig(channels=32, channel_mult=(1, 2, 2, 4), num_res_blocks=1, z_channels=8, scale_factor=1.0, groups=8),
        text=TextConfig(width=192, heads=6, layers=2, unused_layers=0, output_dim=None, context_length=24),
        size=128, guidance=4.0,
        distill=dict(steps=400, save_every=25, guidance=5.0, t_max=0.3, negative="",
                     suffix=", 3d asset",                                       # all captions of its 3D training had it
                     coarse_size=32, coarse_sets=1, fine_size=64, fine_sets=1,
                     coarse_budget=49152, fine_budget=49152, step_size=0.027,
                     random_background=1.0, grey_background=True,                # what it was trained on
                     levels=8, log2_entries=15, coarsest=8, finest=128, lr_grid=0.02, lr=0.005, occupancy_cells=32, occupancy_every=8,
                     density_threshold=10.0),
        dreambooth=dict(steps=600, batch=16, lr=2e-4, cosine=True, preservation=100.0, wordings=True,
                        class_preservation=1.0, identifier_lr=1e-2,             # the text tower has seen 65 words and hardly hears a new one
                        text_preservation=0.03)),
}


class MVDream(nn.Module):
    """`unet`, `vae` and `text`, with their `config`. Images are [B, V, 3, H, W] in [-1, 1], latents [B, V, c, h, w]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.unet, self.vae, self.text = MultiViewUNet(config.unet), VAE(config.vae), TextTower(config.text)

    @property
    def device(self):
        return self.unet.conv_out.weight.device

    @property
    def size_multiple(self):
        """The width of a picture in pixels must be a multiple of this: so often do VAE and UNet halve it."""
        return 2 ** (len(self.config.vae.channel_mult) - 1 + len(self.config.unet.channel_mult) - 1)

    @staticmethod
    def random(preset):
        """A model of a preset's size ("sd21", "tiny") with random weights, no matrix or kernel zero, for benchmarks and tests."""
        model = MVDream(copy.deepcopy(PRESETS[preset])).requires_grad_(False).eval()
        for weight in model.parameters():
            if weight.ndim > 1:                                                  # a layer keeps the size of what it is given
                weight.normal_(std=weight[0].numel() ** -0.5)
        return model

    @staticmethod
    def load(name, device="cpu", dtype=torch.float32):
        """Load a model for inference: "tiny" (shipped), "mvdream-sd21" or "sd21" (downloaded once), the path of a .safetensors, .pt
        or .ckpt file, of a diffusers folder, or of the folder of a training.

        The configuration is in the header of a file that `save` wrote, else it follows from the tensors (`weights.sizes`). Tensors
        go to the device and the dtype one by one. On a CPU, in the file's own dtype, they stay mapped: the file is their memory.
        Raises UserError if there is no such model, or a file is damaged or of another kind, or lacks a tensor.
        """
        path = TINY if name == "tiny" else checkpoint.find(name)
        if name == "tiny" and not path.is_file():
            raise UserError("this copy of mvd has no trained weights (mvd/tiny.safetensors): make some with train.py and name their "
                            "file")
        tensors, header = checkpoint.read(path)
        try:
            parts = weights.convert(tensors)
            sizes = weights.sizes(parts) if header is None else ()
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        try:
            config = ModelConfig.from_dict(header) if header else ModelConfig(*sizes)
        except (TypeError, KeyError) as error:
            raise UserError(f"{path}: its header is of another version of mvd ({error})") from error
        if not any(key.startswith("camera_mlp.") for key in parts["unet"]):
            warnings.warn(f"{path} knows no cameras (it is plain Stable Diffusion): its 2D mode draws, its 3D mode must be trained "
                          "first (train.py --init)", stacklevel=2)
            mlp = camera_mlp(config.unet)
            parts["unet"].update({f"camera_mlp.{key}": tensor for key, tensor in mlp.state_dict().items()})
            config.size = 512                                                    # what Stable Diffusion 2.1 base was trained at
        with torch.device("meta"):
            model = MVDream(config)
        for part, tensors in parts.items():
            module = getattr(model, part)
            for key, wanted in module.state_dict().items():
                if key not in tensors or tensors[key].shape != wanted.shape:
                    found = f"has shape {list(tensors[key].shape)}" if key in tensors else "is missing"
                    raise UserError(f"{path}: the tensor {part}.{key} {found}, wanted {list(wanted.shape)} (its name in MVDream's "
                                    f"file: {weights.released_name(part, key, parts)})")
                tensors[key] = tensors[key].to(device).to(dtype)                 # in this order a GPU does the rounding
            if extra := sorted(tensors.keys() - module.state_dict().keys()):
                raise UserError(f"{path}: the tensor {part}.{extra[0]} belongs to no part of the model")
            module.load_state_dict(tensors, assign=True)
        return model.requires_grad_(False).eval()

    def save(self, path, dtype=None, layout="mvd"):
        """Write one file, in `dtype` if one is given. layout "mvd": ours, safetensors with the configuration in its header.

        layout "mvdream": the names of the released file, for other tools; what the model lacks is said and left out. A name
        that ends in .pt or .ckpt makes it a PyTorch file, else it is safetensors with our header. Raises UserError.
        """
        parts = {part: {k: v.detach().to(dtype or v.dtype) for k, v in getattr(self, part).state_dict().items()}
                 for part in ("unet", "vae", "text")}
        pickled = Path(path).suffix in (".pt", ".ckpt")
        if pickled and (layout == "mvd" or self.config.text.words):
            raise UserError(f"cannot write {path}: a {Path(path).suffix} file has no room for "
                            f"{'the configuration' if layout == 'mvd' else 'the words that the model knows'}; choose .safetensors")
        if layout == "mvd":
            tensors = {f"{part}.{key}": tensor for part, tensors in parts.items() for key, tensor in tensors.items()}
        else:
            tensors = weights.to_released(parts)
            if self.config.text.output_dim is None:
                warnings.warn(f"{path}: the model was loaded without the text tower's text_projection, logit_scale and the layers "
                              "that Stable Diffusion does not run, so they are left out; a tool that insists on them will complain",
                              stacklevel=2)
        if pickled:
            write_atomic(path, lambda file: torch.save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, file))
        else:
            write_safetensors(path, tensors, {"mvd": json.dumps(asdict(self.config))})

    def compile_networks(self):
        """Let torch.compile fuse the operations of UNet and autoencoder when they run next, in place; that takes half a minute each, and
        again for every new shape, eight at most. The weights are laid out as a GPU's fast convolutions want them, channels last."""
        self.to(memory_format=torch.channels_last)
        for network in (self.unet, self.vae.encoder, self.vae.decoder):
            network.compile(dynamic=False)

    def embed(self, prompts):
        """B prompts -> context [B, L, D]."""
        return self.text(self.text.tokenize(prompts).to(self.device))

    def encode(self, images, sample=False):
        """Images [B, V, 3, H, W] in [-1, 1] -> scaled latents [B, V, c, h, w]: the posterior's mean, or a sample of it."""
        z, logvar = self.vae.encode(images.flatten(0, 1))
        if sample:                                                               # the same noise, whatever the layout in memory
            z = z + torch.exp(0.5 * logvar) * torch.randn_like(z, memory_format=torch.contiguous_format)
        return (self.config.vae.scale_factor * z).unflatten(0, images.shape[:2])

    def decode(self, latents):
        """Scaled latents [B, V, c, h, w] -> images [B, V, 3, H, W], about in [-1, 1]; one at a time, since wide feature
        maps take memory."""
        images = [self.vae.decode(z) for z in (latents / self.config.vae.scale_factor).flatten(0, 1).split(1)]
        return torch.cat(images).unflatten(0, latents.shape[:2])

    @torch.no_grad()
    def sample(self, prompt, negative=None, views=4, steps=50, guidance=None, rescale=0.0, elevation=15.0, azimuth=0.0,
               span=360.0, seed=0, sampler="ddim", eta=0.0, mode="3d", size=None, progress=iter):
        """Draw pictures: [B, V, 3, H, W] in [0, 1] for one prompt or a list of B.

        In 3D mode the views stand at azimuths azimuth + k·span/views, all at one elevation (degrees), and the model's suffix is
        added; in 2D mode ("2d") they are independent pictures. `negative`, `guidance`, `size` (pixels): None means the model's
        defaults. `rescale` in [0, 1]: guidance rescale (Lin et al. 2023). `sampler`: "ddim" with `eta`, or "ddpm". Raises
        UserError for an empty prompt, a number of steps outside 1..1000, or a size that the networks cannot halve so often.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not all(p.strip() for p in prompts):
            raise UserError("the prompt is empty: say what to draw")
        config, device = self.config, self.device
        guidance = config.guidance if guidance is None else guidance
        negative = config.negative if negative is None else negative
        size, factor = size or config.size, 2 ** (len(config.vae.channel_mult) - 1)
        if size % self.size_multiple:
            raise UserError(f"the size is {size} pixels, but must be a multiple of {self.size_multiple}")
        camera = None
        if mode == "3d":
            prompts = [known_part(p, self.config.text) + config.suffix for p in prompts]  # before the suffix, of which it knows all
            azimuths = azimuth + torch.arange(views) * span / views
            camera = cameras.camera_numbers(cameras.orbit(elevation, azimuths)).to(device)                    # [V, 16]
            camera = camera.repeat(2 * len(prompts), 1, 1)       # the unconditional half keeps it (MVDream, appendix)
        context = torch.cat([self.embed(prompts), self.embed([negative]).expand(len(prompts), -1, -1)])       # [2B, L, D]

        def eps(x, t):                                                                                        # x [B, V, c, h, w]
            conditional, unconditional = self.unet(x.repeat(2, 1, 1, 1, 1), t.repeat(2), context, camera).float().chunk(2)
            guided = diffusion.guide(conditional, unconditional, guidance)
            return diffusion.rescale(guided, conditional, rescale) if rescale else guided

        generator = torch.Generator().manual_seed(seed)                          # on the CPU: the same picture on every device
        shape = (len(prompts), views, config.unet.in_channels, size // factor, size // factor)
        with side_stream(device):
            latents = diffusion.sample(GraphedStep(eps, device), shape, steps, sampler, eta, generator, device, progress)
            with untuned():
                return (self.decode(latents).float() / 2 + 0.5).clamp(0, 1)
