"""Models by name: how large their networks are, and with which settings the scripts use them.

This is the place to read the settings of a model, and to change them. Each script has defaults of
its own: the released model's, but train.py's are the tiny model's. A preset lists what is different
for its model, `--help` shows the outcome for the model that the command line names, and a run
prints it at its start.

A file of weights holds sizes, words and the *name* of a preset, not the settings. So what you
edit here takes effect for every file that was trained with that preset.
"""
import copy
import math
import typing
from dataclasses import asdict, dataclass, field, is_dataclass, replace

from .text import TextConfig
from .tools.errors import UserError
from .unet import UNetConfig
from .vae import VAEConfig


@dataclass
class ModelConfig:
    """All of a model but its weights. The defaults are the released model's: 4 views of 256²."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    # Height and width of a picture, in pixels.
    size: int = 256
    # The preset whose settings the scripts use for this model.
    preset: str = "sd21"
    # Of sampling: the guidance scale, the negative prompt, what 3D mode adds to a prompt.
    guidance: float = 10.0
    negative: str = ""
    suffix: str = ", 3d asset"


@dataclass
class Preset:
    """A model's configuration, and how it differs from the defaults of each script."""
    model: ModelConfig
    train: dict = field(default_factory=dict)
    distill: dict = field(default_factory=dict)
    dreambooth: dict = field(default_factory=dict)
    # What is different from `distill` for a model that dreambooth.py has taught a subject.
    distill_taught: dict = field(default_factory=dict)


# ---- the released model: the defaults of sample.py, distill.py and dreambooth.py -------------

SD21 = Preset(ModelConfig())

# ---- the model that the repository ships, trained on the toy world ---------------------------

TINY = Preset(
    # 128² pixels, latents of 16×16.
    ModelConfig(
        unet=UNetConfig(
            in_channels=8,
            out_channels=8,
            model_channels=96,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_resolutions=(1, 2, 4),
            head_dim=32,
            context_dim=192,
            groups=8,
        ),
        vae=VAEConfig(
            channels=32,
            channel_mult=(1, 2, 2, 4),
            num_res_blocks=1,
            z_channels=8,
            scale_factor=1.0,
            groups=8,
            # A ninth of the encoder's arithmetic.
            light=(32, 64),
        ),
        text=TextConfig(
            width=192, heads=6, layers=2, unused_layers=0, output_dim=None, context_length=24
        ),
        size=128,
        preset="tiny",
        guidance=4.0,
    ),
    distill=dict(
        steps=300,
        save_every=25,
        guidance=5.0,
        t_max=0.3,
        negative="",
        # All captions of its 3D training ended so.
        suffix=", 3d asset",
        coarse_size=32,
        coarse_sets=1,
        fine_size=64,
        coarse_budget=24576,
        fine_budget=24576,
        step_size=0.027,
        # It was trained on grey backgrounds.
        random_background=1.0,
        grey_background=True,
        smoothness=12.0,
        smooth_points=512,
        levels=8,
        log2_entries=15,
        coarsest=8,
        finest=96,
        lr_grid=0.02,
        lr=0.005,
        occupancy_cells=32,
        occupancy_every=8,
        density_threshold=10.0,
    ),
    dreambooth=dict(
        batch=16,
        lr=2e-4,
        cosine=True,
        preservation=100.0,
        wordings=True,
        class_preservation=1.0,
        # Its text tower has seen 65 words, and hardly hears a new one.
        identifier_lr=1e-2,
        text_preservation=0.12,
    ),
    # More of it pulls a subject towards its class, which the model knows better.
    distill_taught=dict(guidance=2.5),
)

# ---- a model to try a change in a minute with, not to get a picture --------------------------

NANO = Preset(
    ModelConfig(
        unet=UNetConfig(
            in_channels=8,
            out_channels=8,
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(1, 2),
            head_dim=16,
            context_dim=32,
            groups=8,
        ),
        vae=VAEConfig(
            channels=32,
            channel_mult=(1, 1, 1, 1),
            num_res_blocks=1,
            z_channels=8,
            scale_factor=1.0,
            groups=8,
        ),
        text=TextConfig(
            width=32, heads=2, layers=2, unused_layers=0, output_dim=None, context_length=24
        ),
        size=64,
        preset="nano",
        guidance=4.0,
    ),
    train=dict(vae_steps=40, steps=150, batch=4, vae_batch=8, copies=1, save_every=100),
    distill={
        **TINY.distill,
        "steps": 40,
        "coarse_size": 16,
        "fine_size": 32,
        "coarse_budget": 8192,
        "fine_budget": 8192,
        "levels": 4,
        "finest": 64,
        "density_threshold": 5.0,
    },
    dreambooth={**TINY.dreambooth, "steps": 40, "batch": 4},
    distill_taught=TINY.distill_taught,
)

PRESETS = {"sd21": SD21, "tiny": TINY, "nano": NANO}


def settings_for(script, config):
    """What a model changes of a script's defaults: (where it stands, {setting: value}).

    script: "train", "distill" or "dreambooth". config: the model's ModelConfig.
    """
    preset = PRESETS[config.preset]
    place = f'the preset "{config.preset}" (mvd/presets.py)'
    changes = getattr(preset, script)
    if script == "distill" and config.text.identifier:
        place += " for taught models"
        changes = {**changes, **preset.distill_taught}
    return place, changes


# ---- the header of a file --------------------------------------------------------------------

PARTS = {"unet": UNetConfig, "vae": VAEConfig, "text": TextConfig}
# A file holds these only where a model wants its own instead of its preset's.
SAMPLING = ("guidance", "negative", "suffix")


def to_header(config):
    """What belongs to the weights, as JSON values: sizes, words, the preset's name."""
    header = asdict(config)
    usual = PRESETS[config.preset].model
    for name in SAMPLING:
        if header[name] == getattr(usual, name):
            del header[name]
    return header


def from_header(header):
    """The ModelConfig of a file that mvd wrote.

    Older files name no preset: they get the one whose UNet is nearest in width, and the settings
    that they hold are ignored. Raises UserError for a preset that this version does not have or a
    value that no model has; TypeError, ValueError or KeyError for a header of another version.
    """
    sizes = {}
    for part, make in PARTS.items():
        values = {}
        for key, value in dict(header[part]).items():
            values[key] = tuple(value) if isinstance(value, list) else value
        sizes[part] = make(**values)
        check(sizes[part])
    name = header.get("preset") or nearest_preset(sizes["unet"])
    if name not in PRESETS:
        raise UserError(f"its header names the preset {name!r}, but there are {', '.join(PRESETS)}")
    own = {}
    if "preset" in header:
        own = {key: header[key] for key in SAMPLING if key in header}
    usual = copy.deepcopy(PRESETS[name].model)
    config = replace(usual, **sizes, **own, size=header["size"], preset=name)
    check(config)
    return config


# The least that a number may be, where that is not above 0.
LOWEST = {"unused_layers": 0, "guidance": -math.inf}


def check(config):
    """Raise UserError, naming the field, if a configuration has a value that no model has."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(value):
            check(value)
        elif not fits(name, kind, value):
            raise UserError(f"{name} is {value!r:.60}, which no model has")


def fits(name, kind, value):
    """Can a field of this name and type have this value? Its numbers are finite."""
    if kind is tuple:
        kind = str if name == "words" else int
        return isinstance(value, tuple) and all(fits(name, kind, item) for item in value)
    if isinstance(value, float | int) and not LOWEST.get(name, 1e-9) <= value < math.inf:
        return False
    return isinstance(value, float | int if kind is float else kind)


def nearest_preset(unet):
    """The name of the preset whose UNet is nearest in width."""
    def ratio(name):
        width = PRESETS[name].model.unet.model_channels
        return abs(math.log(width / unet.model_channels))

    return min(PRESETS, key=ratio)


def override(config, changes):
    """A copy of a ModelConfig with some fields changed: {"unet.head_dim": 16, "size": 96}.

    Raises UserError for an unknown field, or a value that no model has.
    """
    config = copy.deepcopy(config)
    for name, value in changes.items():
        *path, leaf = name.split(".")
        owner = config
        for step in path:
            owner = getattr(owner, step, None)
        if not hasattr(owner, leaf):
            raise UserError(f"the configuration has no field {name!r}")
        setattr(owner, leaf, value)
    check(config)
    return config
