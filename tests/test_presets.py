"""Settings have one source: which preset a file belongs to, and what a header holds."""
import copy
import json
from dataclasses import asdict, replace

import pytest
import torch

import distill
from mvd import MVDream, presets
from mvd.model import read_config
from mvd.presets import PRESETS, ModelConfig, from_header, nearest_preset, settings_for, to_header
from mvd.sds import DistillSettings
from mvd.tools import cli
from mvd.tools.errors import UserError
from mvd.tools.files import read_safetensors, write_safetensors
from scripts import saved_model
from test_model import small_config


def as_read(header):
    """A header as it comes out of a file."""
    return json.loads(json.dumps(header))


@pytest.mark.parametrize("name", PRESETS)
def test_a_header_gives_the_configuration_back(name):
    config = copy.deepcopy(PRESETS[name].model)
    config.text.words = ("a", "bulldog")
    config.vae.scale_factor = 0.7
    header = as_read(to_header(config))
    assert from_header(header) == config and header["preset"] == name
    assert "distill" not in header and "guidance" not in header and "suffix" not in header


def test_a_taught_model_keeps_its_own_guidance():
    config = replace(small_config(), guidance=2.5)
    header = as_read(to_header(config))
    assert header["guidance"] == 2.5 and from_header(header).guidance == 2.5


def test_an_edit_of_a_preset_takes_effect(monkeypatch, tmp_path):
    """Not what the header was written with, but what stands in presets.py, is in force."""
    file = saved_model(tmp_path, small_config())
    monkeypatch.setattr(PRESETS["nano"].model, "guidance", 7.5)
    monkeypatch.setitem(PRESETS["nano"].distill, "steps", 123)
    config = read_config(file)
    assert config.guidance == 7.5
    assert settings_for("distill", config)[1]["steps"] == 123


def older_header(config):
    """What files held before there were presets: all settings, and no preset's name."""
    header = asdict(config)
    del header["preset"]
    return {**header, "guidance": 99.0, "distill": {"steps": 5}, "dreambooth": {"steps": 6}}


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_without_a_preset_takes_it_from_its_sizes(name):
    config = copy.deepcopy(PRESETS[name].model)
    found = from_header(as_read(older_header(config)))
    assert found == config, "sizes as in the file, settings as in presets.py"


@pytest.mark.parametrize("width, name", [(16, "nano"), (32, "nano"), (64, "tiny"), (200, "sd21")])
def test_the_nearest_preset(width, name):
    assert nearest_preset(replace(PRESETS["tiny"].model.unet, model_channels=width)) == name


def test_the_shipped_files_settings_are_those_of_the_preset():
    assert read_config("tiny").preset == "tiny"
    place, changes = settings_for("distill", read_config("tiny"))
    assert changes is PRESETS["tiny"].distill and "mvd/presets.py" in place


def test_distill_has_other_settings_for_taught_models(tmp_path, monkeypatch, capsys):
    """Only distill.py has; a flag counts more; and a run says where they come from."""
    monkeypatch.setattr(PRESETS["nano"], "distill_taught", {"guidance": 1.5})
    config = small_config()
    config.text.identifier = "phol"
    file = saved_model(tmp_path, config)
    place, changes = settings_for("distill", read_config(file))
    usual = PRESETS["nano"].distill
    assert changes == {**usual, "guidance": 1.5} and usual["guidance"] != 1.5
    assert settings_for("dreambooth", config)[1] is PRESETS["nano"].dreambooth

    def parse(*flags):
        arguments = ["a [v] bulldog", "--model", str(file), *flags]
        return cli.parse(DistillSettings, arguments, None, distill.preset_settings)

    assert parse("--guidance", "7").guidance == 7
    cli.print_changes(parse(), place, changes)
    source, flags = capsys.readouterr().out.splitlines()[0].split(": ")
    assert source == 'settings from the preset "nano" (mvd/presets.py) for taught models'
    assert "--guidance 1.5" in flags


def test_nothing_is_downloaded_for_the_settings(monkeypatch):
    monkeypatch.setattr("mvd.tools.checkpoint.download", lambda *_: pytest.fail("a download"))
    assert read_config("mvdream-sd21") == ModelConfig()
    assert read_config("sd21") == ModelConfig(size=512)


def test_a_header_of_another_version_is_refused_in_one_line(tmp_path):
    file = saved_model(tmp_path, small_config())
    tensors, metadata = read_safetensors(file)
    header = json.loads(metadata["mvd"])
    for change, words in (
        ({"preset": "huge"}, "names the preset 'huge', but there are sd21, tiny, nano"),
        ({"unet": {**header["unet"], "gears": 5}}, "its header is of another version of mvd"),
        ({"size": None}, None),
    ):
        changed = {**header, **change}
        if words is None:
            del changed["size"]
            words = "its header is of another version of mvd"
        write_safetensors(file, tensors, {"mvd": json.dumps(changed)})
        with pytest.raises(UserError, match=words):
            MVDream.load(file)


def test_a_field_of_the_configuration_can_be_overridden(tmp_path):
    file = saved_model(tmp_path, small_config())
    plain = MVDream.load(file)
    wider = MVDream.load(file, override={"unet.head_dim": 32, "guidance": 7.5})
    assert wider.unet.config.head_dim == 32 and wider.config.guidance == 7.5
    attention = wider.unet.middle[1].attention.self_attention
    assert attention.heads == 2, "64 channels in heads of 32"
    assert plain.config == MVDream.load(file).config, "the file is what it was"
    x, t, context = torch.randn(1, 2, 8, 8, 8), torch.tensor([500]), torch.randn(1, 24, 32)
    assert not torch.allclose(plain.unet(x, t, context), wider.unet(x, t, context))
    for name in ("unet.heads", "unet.head_dim.x", "colour"):
        with pytest.raises(UserError, match=f"no field '{name}'"):
            MVDream.load(file, override={name: 1})


def test_nano_is_small_enough_for_a_trial():
    model = MVDream.random("nano")
    networks = sum(weight.numel() for weight in model.parameters())
    networks -= model.text.token_embedding.weight.numel()  # CLIP's whole vocabulary here
    assert networks < 2_000_000
    assert presets.NANO.train["steps"] <= 200 and presets.NANO.distill["steps"] <= 40
