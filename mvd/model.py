"""MVDream: UNet, VAE and text tower as one object that loads, samples and saves."""
import contextlib
import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import MethodType

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import cameras, diffusion, presets, weights
from .presets import PRESETS, ModelConfig
from .text import TextTower
from .tools import checkpoint, claims, diffusers
from .tools.device import GraphedStep, check_seed, side_stream, without_cudnn_search
from .tools.errors import UserError
from .tools.files import write_atomic, write_safetensors
from .tools.vocabulary import known_part
from .unet import Attention, MultiViewUNet, check_variant, is_variant, zero_camera_mlp
from .vae import VAE

# The model that the repository ships.
TINY = Path(__file__).with_name("tiny.safetensors")
# How `MVDream.save` can name the tensors, and whose names those are.
LAYOUTS = {"mvd": "our", "mvdream": "MVDream's", "diffusers": "diffusers'"}
# What Stable Diffusion 2.1 was trained at, in pixels: the base model, and that which predicts v.
STABLE_DIFFUSION_SIZE = {"eps": 512, "v": 768}
# How torch.compile fuses the networks.
FUSION = {
    # Where several kernels need the same values, each computes them again, unless that takes more
    # reads or operations than these. By default they are stored; but a GPU waits for its memory.
    "realize_reads_threshold": 16,
    "realize_opcount_threshold": 200,
    # Trying other loop orders is a tenth of the time to compile, and gains nothing here.
    "loop_ordering_after_fusion": False,
}
# After so many programs of one method PyTorch gives up and runs it uncompiled.
PROGRAMS = 64


# ---- reading a file --------------------------------------------------------------------------

def find_file(name):
    """The path of a model: "tiny" is the shipped one, else see `checkpoint.find`."""
    if name != "tiny":
        return checkpoint.find(name)
    if not TINY.is_file():
        raise UserError(
            "this copy of mvd has no trained weights (mvd/tiny.safetensors): "
            "make some with train.py and name their file"
        )
    return TINY


def read_model(path):
    """The file or folder of a model -> (ModelConfig, {"unet": tensors, "vae": ..., "text": ...}).

    The sizes follow from the shapes of the tensors (`weights.sizes`), all else from the header of
    a file that `MVDream.save` wrote, or from what another one says of itself (`claims`). The
    tensors have our names and are memory-mapped: bytes are read when they are used. Raises
    UserError for a file that is damaged or of another kind.
    """
    tensors, said = checkpoint.read(path)
    try:
        parts = weights.convert(tensors)
        config = told_config(said, parts)
        unet, vae, text = weights.sizes(parts, config.unet, config.vae, config.text)
        check_variant(unet)
        if unet.context_dim != text.width:
            raise UserError(f"the UNet reads {unet.context_dim} numbers per token and the text "
                            f"tower gives {text.width}: they belong to two models")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return replace(config, unet=unet, vae=vae, text=text), parts


def told_config(said, parts):
    """The ModelConfig that a checkpoint states beside its tensors; MVDream's where it is silent."""
    if "mvd" in said:
        try:
            return presets.from_header(said["mvd"])
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"its header is of another version of mvd ({error})") from error
    told = claims.settings(said)
    config = presets.override(ModelConfig(), told)
    if "size" not in told and not has_camera(parts):
        config.size = STABLE_DIFFUSION_SIZE[config.unet.prediction]
    return config


def read_config(name):
    """The ModelConfig of `MVDream.load(name)`. Nothing is downloaded for it. Raises UserError."""
    if name in checkpoint.DOWNLOADS:
        config = ModelConfig()
        if name == "sd21":
            config.size = STABLE_DIFFUSION_SIZE["eps"]
        return config
    config, _ = read_model(find_file(name))
    return config


def has_camera(parts):
    """Do the tensors hold a camera MLP? Plain Stable Diffusion has none."""
    return any(key.startswith("camera_mlp.") for key in parts["unet"])


def cut_table(text, row_of):
    """Leave only the rows of known tokens in the table of all that a diffusers folder has.

    text: the tensors of a text tower, changed in place. row_of: {token: row}, in order.
    """
    table = text.get("token_embedding.weight")
    if table is not None and len(table) == weights.VOCABULARY > len(row_of):
        text["token_embedding.weight"] = table[list(row_of)]


class Uninitialised(TorchFunctionMode):
    """Within this context the layers that are made draw no numbers: a file will hold them.

    On the meta device there is nothing to draw, but `nn.init.normal_` imports the whole compiler
    for it, which takes as long as all else that a sample needs before its first step.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


# ---- the model -------------------------------------------------------------------------------

@torch.inference_mode(False)  # in which weights would be of no use elsewhere
def join_attention(network, arguments=None):
    """Join the weights of each Attention, unless they are joined already (`Attention.join`).

    arguments: those of the call before which it stands, as a hook.
    """
    for module in network.modules():
        if isinstance(module, Attention):
            module.join()


@torch.inference_mode(False)
def lay_out(network):
    """Lay the weights out as fast kernels want them: channels last, those of attention joined.

    Afterwards the network may be moved, converted, copied, loaded into and trained. But of the
    layers to_q, to_k and to_v only the weights may be read then, where it is compiled: hooks and
    adapters there would be passed over.
    """
    network.to(memory_format=torch.channels_last)
    join_attention(network)
    if join_attention not in network._forward_pre_hooks.values():
        # Each call looks where the parameters are by then.
        network.register_forward_pre_hook(join_attention)


def compile_network(network):
    """Let torch.compile fuse the operations of a network, in place, when it runs.

    Each method in its PIECES becomes a program of its own, for each shape that it meets. The first
    shape takes about a minute for all of them, or less where several processes share them
    (ahead.py). Its weights are laid out first.
    """
    lay_out(network)
    # For all that this thread compiles. Later versions call it recompile_limit, too.
    torch._dynamo.config.cache_size_limit = PROGRAMS
    for name in network.PIECES:
        program = torch.compile(getattr(type(network), name), dynamic=False, options=FUSION)
        setattr(network, name, MethodType(program, network))


class MVDream(nn.Module):
    """`unet`, `vae` and `text`, with their `config`.

    Images are [B, V, 3, H, W] in [-1, 1], latents are [B, V, c, h, w].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.unet = MultiViewUNet(config.unet)
        self.vae = VAE(config.vae)
        self.text = TextTower(config.text)
        self.compiled = False
        # {name of a part: (what it was captured for, GraphedStep)}, of the last sample (see
        # `kept_step`).
        self.kept = {}

    def _apply(self, *arguments, **options):
        """As all modules are moved and converted. The graphs that are kept go with their memory."""
        self.kept.clear()
        return super()._apply(*arguments, **options)

    def __getstate__(self):
        """What is copied or pickled: the graphs would read the weights of this model."""
        return {**self.__dict__, "kept": {}}

    @property
    def device(self):
        return self.unet.conv_out.weight.device

    @property
    def size_multiple(self):
        """Pixels: a picture's width must be a multiple of this, since VAE and UNet halve it."""
        return self.latent_factor * 2 ** (len(self.config.unet.channel_mult) - 1)

    @property
    def latent_factor(self):
        """Pixels per latent, along a side of a picture."""
        return 2 ** (len(self.config.vae.channel_mult) - 1)

    def check_size(self, size):
        """Raise UserError unless pictures can have a width of `size` pixels."""
        multiple = self.size_multiple
        if size % multiple:
            raise UserError(f"the size is {size} pixels, but must be a multiple of {multiple}")

    # ---- making, loading, saving ----

    @staticmethod
    def random(preset):
        """A model of a preset's size ("sd21", "tiny", "nano") with random weights, no matrix zero.

        For benchmarks and tests. A layer's output has about the variance of its input.
        """
        model = MVDream(copy.deepcopy(PRESETS[preset].model)).requires_grad_(False).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight[0].numel() ** -0.5)
        return model

    @staticmethod
    def load(name, device="cpu", dtype=torch.float32, override=None):
        """Load a model for inference.

        name: "tiny" (shipped), "mvdream-sd21" or "sd21" (downloaded once), or the path of a
        .safetensors, .pt or .ckpt file, of a diffusers folder, or of the folder of a training.
        override: fields of the configuration to change, {"guidance": 7.5, "unet.head_dim": 16}.

        Tensors go to the device and the dtype one by one. On a CPU, in the file's own dtype, they
        stay mapped: the file is their memory. Raises UserError if there is no such model, or a
        file is damaged or of another kind, or lacks a tensor.
        """
        path = find_file(name)
        config, parts = read_model(path)
        if override:
            config = presets.override(config, override)
        if config.unet.camera != "none" and not has_camera(parts):
            warnings.warn(
                f"{path} knows no cameras (it is plain Stable Diffusion): its 2D mode draws, its "
                "3D mode must be trained first (train.py --init)",
                stacklevel=2,
            )
            for key, tensor in zero_camera_mlp(config.unet).state_dict().items():
                parts["unet"][f"camera_mlp.{key}"] = tensor
        with torch.device("meta"), Uninitialised():
            model = MVDream(config)
        for part, tensors in parts.items():
            module = getattr(model, part)
            if part == "text":
                cut_table(tensors, module.row_of)
            check_tensors(path, part, module.state_dict(), parts)
            for key in tensors:
                # Move first, then convert: the GPU rounds faster.
                tensors[key] = tensors[key].to(device).to(dtype)
            module.load_state_dict(tensors, assign=True)
        return model.requires_grad_(False).eval()

    def save(self, path, dtype=None, layout="mvd"):
        """Write one file, or a folder in the layout of diffusers, in `dtype` if one is given.

        layout "mvd": ours, safetensors with the configuration in its header. layout "mvdream": the
        names of the released file, for other tools; what the model lacks is said and left out. A
        name that ends in .pt or .ckpt makes that a PyTorch file, else it is safetensors with our
        header. layout "diffusers": a folder, which diffusers reads without the camera and mvd as a
        whole. Raises UserError.
        """
        if layout not in LAYOUTS:
            raise UserError(f"there is no layout {layout!r}: choose {', '.join(LAYOUTS)}")
        parts = {}
        for part in ("unet", "vae", "text"):
            state = getattr(self, part).state_dict()
            parts[part] = {key: t.detach().to(dtype or t.dtype) for key, t in state.items()}
        config = self.config
        if layout != "mvd":
            if is_variant(config.unet):
                raise UserError(
                    f"cannot write {path}: {LAYOUTS[layout]} layout has no UNet of this kind "
                    f"(attention {config.unet.attention!r}, camera {config.unet.camera!r}); "
                    "use ours"
                )
            # No other layout has a light encoder.
            config = presets.override(config, {"vae.light": ()})
            parts["vae"] = {k: t for k, t in parts["vae"].items() if not k.startswith("light.")}
        header = {"mvd": json.dumps(presets.to_header(config))}
        if layout == "diffusers":
            self.save_folder(path, parts, config)
        elif Path(path).suffix in (".pt", ".ckpt"):
            check_pickle(path, config, parts, layout)
            tensors = weights.to_released(parts)
            tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            write_atomic(path, lambda file: torch.save(tensors, file))
        else:
            tensors = weights.to_released(parts) if layout == "mvdream" else weights.flat(parts)
            if self.config.unet.prediction == "v":
                header["modelspec.prediction_type"] = "v"
            write_safetensors(path, tensors, header)
        if layout == "mvdream" and self.config.text.output_dim is None:
            warnings.warn(
                f"{path}: the model was loaded without the text tower's text_projection, "
                "logit_scale and the layers that Stable Diffusion does not run, so they are "
                "left out; a tool that insists on them will complain",
                stacklevel=2,
            )

    def save_folder(self, path, parts, config):
        """Write a diffusers folder of the parts of a model with this configuration.

        Its text tower has no layers that are not run, and a table of all of CLIP's tokens: those
        that the model does not know read as the one that pads.
        """
        table = parts["text"]["token_embedding.weight"]
        whole = table[:1].repeat(weights.VOCABULARY, 1)
        whole[list(self.text.row_of)] = table
        parts["text"]["token_embedding.weight"] = whole
        text = config.text
        layers = text.layers - text.unused_layers
        text = replace(text, layers=layers, unused_layers=0, output_dim=None)
        header = json.dumps(presets.to_header(replace(config, text=text)))
        tensors = weights.to_diffusers(parts, config)
        diffusers.write_folder(path, tensors, config, {"mvd": header})

    def compile_networks(self):
        """Let torch.compile fuse the operations of UNet and autoencoder, in place, when they run.

        See `compile_network`. And on CUDA a sample's graphs, of text tower, steps and decoder, are
        kept, with their memory, for the next sample, until one has other shapes, another mode,
        guidance or rescale, or the weights lie elsewhere. What else decides how a part computes
        (its configuration, layers without weights, autocast, TF32) may change between samples only
        if this is called again. Their memory is free after `model.kept.clear()` and Python's
        `gc.collect()`.
        """
        self.compiled = True
        self.kept.clear()
        for network in (self.unet, self.vae.encoder, self.vae.decoder):
            compile_network(network)

    # ---- prompts, images, latents ----

    def embed(self, prompts, tower=None):
        """B prompts -> context [B, L, D]. tower: what stands for `text`, if not it."""
        tower = tower or self.text
        return tower(self.text.tokenize(prompts).to(self.device))

    def encode(self, images, sample=False, encoder=None):
        """Images [B, V, 3, H, W] in [-1, 1] -> scaled latents [B, V, c, h, w].

        They are the posterior's mean, or with `sample` a draw from it. The noise of a draw must
        not depend on how the mean lies in memory (a compiled encoder returns channels last).
        encoder: as of `vae.encode`.
        """
        z, logvar = self.vae.encode(images.flatten(0, 1), encoder)
        if sample:
            noise = torch.randn_like(z, memory_format=torch.contiguous_format)
            z = z + torch.exp(0.5 * logvar) * noise
        return (self.config.vae.scale_factor * z).unflatten(0, images.shape[:2])

    def decode(self, latents, decoder=None):
        """Scaled latents [B, V, c, h, w] -> images [B, V, 3, H, W], about in [-1, 1].

        One picture at a time, since wide feature maps take memory. decoder: what stands for
        `vae.decode`; it may return the same tensor each time, with new numbers.
        """
        decoder = decoder or self.vae.decode
        z = (latents / self.config.vae.scale_factor).flatten(0, 1)
        images = [decoder(one).clone() for one in z.split(1)]
        return torch.cat(images).unflatten(0, latents.shape[:2])

    # ---- sampling ----

    @contextlib.contextmanager
    def kept_step(self, name, step, *baked):
        """Within this context: a GraphedStep of `step`; once compiled, that of the last sample.

        That one if it was captured for the same `baked`, and if the weights of the part of that
        name lie where its graph reads them. baked: what shapes the arguments of `step`, and all
        else that it reads but these weights. After an error none is kept.
        """
        def key():
            places = [(p.data_ptr(), p.dtype) for p in self.get_submodule(name).parameters()]
            return *baked, torch.is_inference_mode_enabled(), *places

        if name != "unet" and not self.compiled:
            yield step  # for a few calls, a graph takes memory and saves no time
            return
        captured_for, graphed = self.kept.pop(name, (None, None))
        if captured_for != key():
            graphed = None  # its memory is needed
            graphed = GraphedStep(step, self.device, eager=1)
        yield graphed
        if self.compiled:
            # The weights may lie elsewhere since the first call (`join_attention`).
            self.kept[name] = key(), graphed

    @torch.no_grad()
    def sample(
        self, prompt, negative=None, *, views=cameras.VIEWS, steps=25, guidance=None, rescale=0.0,
        elevation=15.0, azimuth=0.0, span=360.0, seed=0, sampler="dpm++", eta=0.0, mode="3d",
        size=None, progress=iter
    ):
        """Draw pictures: [B, V, 3, H, W] in [0, 1], for one prompt or a list of B.

        mode "3d": the views stand at azimuths azimuth + k·span/views, all at one elevation
        (degrees), and the model's suffix is added to the prompt. mode "2d": independent pictures.
        negative, guidance, size (pixels): None means the model's own. rescale in [0, 1]: guidance
        rescale (Lin et al. 2023). sampler: "dpm++", "ddim" with `eta`, or "ddpm". progress
        wraps the list of time steps, as tqdm does.

        Noise is drawn on the CPU: a seed gives the same picture on every device. Raises UserError
        for an empty prompt, steps outside 1..1000, a seed that `check_seed` refuses, a size that
        the networks cannot halve, and what `diffusion.sampling_steps` refuses.
        """
        generator = torch.Generator().manual_seed(check_seed(seed))
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not all(p.strip() for p in prompts):
            raise UserError("the prompt is empty: say what to draw")
        B, config, device = len(prompts), self.config, self.device
        guidance = config.guidance if guidance is None else guidance
        negative = config.negative if negative is None else negative
        size = size or config.size
        self.check_size(size)
        camera = None
        if mode == "3d":
            # The suffix is added last: it is known, and alone would make any prompt known.
            prompts = [known_part(p, config.text) + config.suffix for p in prompts]
            azimuths = azimuth + torch.arange(views) * span / views
            camera = cameras.extrinsics(cameras.orbit(elevation, azimuths)).to(device)  # [V, 16]
            camera = camera.repeat(B, 1, 1)

        def guided_noise(x, t, context, camera=None):
            eps, conditional = diffusion.guided_noise(self.unet, x, t, context, camera, guidance)
            return diffusion.rescale(eps, conditional, rescale) if rescale else eps

        h = size // self.latent_factor
        shape = (B, views, config.unet.in_channels, h, h)
        times = diffusion.timesteps(steps, sampler).tolist()
        with side_stream(device):
            with self.kept_step("text", self.text, B) as tower:
                text = self.embed(prompts + [negative], tower)  # [B + 1, L, D]
            context = torch.cat([text[:-1], text[-1:].expand(B, -1, -1)])  # [2B, L, D]
            told = [context] if camera is None else [context, camera]
            baked = shape, mode, guidance, rescale, context.dtype
            with self.kept_step("unet", guided_noise, *baked) as step:
                states = diffusion.sampling_steps(
                    lambda x, t: step(x, t, *told), shape, steps, sampler, eta,
                    generator=generator, device=device,
                )
                for _, (latents, _) in zip(progress(times), states):
                    pass
            with without_cudnn_search(), self.kept_step("vae", self.vae.decode, h) as decoder:
                return (self.decode(latents, decoder).float() / 2 + 0.5).clamp(0, 1)


def check_pickle(path, config, parts, layout):
    """Raise UserError if a PyTorch file, which has no header, could not tell the configuration."""
    if layout == "mvd":
        lacking = "configuration"
    elif config.text.words:
        lacking = "words that the model knows"
    elif weights.sizes(parts) != (config.unet, config.vae, config.text):
        lacking = "configuration, which is not the released model's"
    else:
        return
    raise UserError(
        f"cannot write {path}: a {Path(path).suffix} file has no room for the {lacking}; "
        "choose .safetensors"
    )


def check_tensors(path, part, wanted, parts):
    """Raise UserError unless the tensors of a part are those that the model wants."""
    tensors = parts[part]
    for key, tensor in wanted.items():
        if key in tensors and tensors[key].shape == tensor.shape:
            continue
        found = f"has shape {list(tensors[key].shape)}" if key in tensors else "is missing"
        theirs = weights.released_name(part, key, parts)
        raise UserError(
            f"{path}: the tensor {part}.{key} {found}, wanted {list(tensor.shape)} "
            f"(its name in MVDream's file: {theirs})"
        )
    extra = sorted(tensors.keys() - wanted.keys())
    if extra:
        raise UserError(f"{path}: the tensor {part}.{extra[0]} belongs to no part of the model")
