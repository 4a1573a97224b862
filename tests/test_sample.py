"""sample.py: the picture it writes, what changes it and what does not, bad input in one line."""

import inspect
import io
import json
import math
import re
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import pytest
import torch

import layouts
import sample
from mvd import MVDream, cameras
from mvd.tools.files import write_safetensors
from mvd.tools.pictures import grid
from scripts import saved_model, status
from test_model import small_config
from toy_data import read_png

SCRIPT = Path(sample.__file__)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), small_config())


@pytest.fixture
def start(model_file, tmp_path, monkeypatch):
    """start(*flags) is the command in this process, two steps long; returns its exit status."""
    monkeypatch.chdir(tmp_path)

    def start(*flags, prompt="a red bulldog"):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "sample.py",
                prompt,
                "--model",
                str(model_file),
                "--device",
                "cpu",
                "--steps",
                "2",
                *flags,
            ],
        )
        return status(sample.main)

    return start


def test_it_writes_what_the_model_draws(start, model_file, capsys):
    assert start() == 0
    assert "samples/a-red-bulldog.png: 4 views" in capsys.readouterr().out
    drawn = MVDream.load(model_file).sample("a red bulldog", steps=2)[0]  # [4, 3, 64, 64]
    picture = read_png("samples/a-red-bulldog.png")
    assert picture.shape == (3, 64, 4 * 66 - 2)
    torch.testing.assert_close(picture, grid(drawn, 4), rtol=0, atol=0.51 / 255)


def test_the_same_seed_gives_the_same_bytes(start):
    def draw(*flags):
        assert start("--out", "deep/er/x.png", *flags) == 0
        drawn = Path("deep/er/x.png").read_bytes()
        Path("deep/er/x.png").unlink()
        return drawn

    first = draw()
    assert draw() == first and draw("--seed", "0") == first
    others = [
        draw(*flags)
        for flags in (
            ["--seed", "1"],
            ["--azimuth", "30"],
            ["--elevation", "0"],
            ["--span", "180"],
            ["--mode", "2d"],
            ["--guidance", "1"],
            ["--negative", "red"],
            ["--rescale", "0.7"],
            ["--sampler", "ddpm"],
            ["--sampler", "ddim"],
            ["--sampler", "ddim", "--eta", "0.5"],
            ["--steps", "3"],
        )
    ]
    assert len({first, *others}) == 1 + len(others)


def test_nothing_is_drawn_over(start, tmp_path):
    """Another seed, a prompt of other letters only, or with the same first 60: other files."""
    long = "a red bulldog " + "and a red bulldog " * 9
    for prompt, flags in (
        ("a red bulldog", []),
        ("a red bulldog", ["--seed", "1"]),
        ("A red bulldog!", ["--mode", "2d"]),
        ("a red bulldog 狗", []),
        (long + "asset", []),
        (long + "3d", []),
    ):
        before = {path: path.read_bytes() for path in Path("samples").glob("*")}
        assert start("--steps", "1", *flags, prompt=prompt) == 0
        after = {path: path.read_bytes() for path in Path("samples").glob("*")}
        assert len(after) == len(before) + 1 and before.items() <= after.items()
    names = {path.name for path in after}
    assert names >= {f"a-red-bulldog{number}.png" for number in ("", "-2", "-3", "-4")}


@pytest.mark.parametrize("out", ["there", "new", "new/er", "there/"])
def test_out_may_be_a_folder(start, out, capsys):
    Path("there").mkdir()
    for name in ("a-red-bulldog.png", "a-red-bulldog-2.png"):
        assert start("--steps", "1", "--out", out) == 0
        assert f"{Path(out, name)}: 4 views" in capsys.readouterr().out
        assert read_png(Path(out, name)).shape == (3, 64, 4 * 66 - 2)


def test_a_name_that_is_taken_meanwhile_is_not_drawn_over(start, monkeypatch):
    """As by another process that draws the same prompt."""
    sample_views = MVDream.sample

    def slowly(*given, **settings):
        Path("x.png").write_text("another's")
        return sample_views(*given, **settings)

    monkeypatch.setattr(MVDream, "sample", slowly)
    assert start("--steps", "1", "--out", "x.png") == 0
    assert Path("x.png").read_text() == "another's" and read_png("x-2.png").shape[0] == 3


def test_called_by_another_program(model_file, tmp_path, monkeypatch):
    """In another thread, more than once, with another stdout, relative to where it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    flags = ["--model", str(model_file), "--device", "cpu", "--steps", "1"]

    def program():
        for _ in range(2):
            sample.main(["a red bulldog", *flags])

    thread = threading.Thread(target=program)
    thread.start()
    thread.join()
    assert {path.name for path in Path("samples").iterdir()} == {
        "a-red-bulldog.png", "a-red-bulldog-2.png"}
    assert sys.stdout.getvalue().count("4 views in") == 2


@pytest.mark.parametrize("views, width, height", [(1, 1, 1), (3, 3, 1), (9, 8, 2)])
def test_views_stand_in_rows_of_eight(start, views, width, height):
    assert start("--views", str(views), "--steps", "1", "--out", "x.png") == 0
    assert read_png("x.png").shape == (3, 66 * height - 2, 66 * width - 2)


def test_a_batch_is_drawn_row_by_row(start, model_file):
    assert start("--batch", "2", "--views", "9", "--size", "32", "--out", "x.png") == 0
    drawn = MVDream.load(model_file).sample(
        ["a red bulldog"] * 2, steps=2, views=9, size=32
    )  # [2, 9, 3, 32, 32]
    picture = read_png("x.png")
    assert picture.shape == (3, 34 * 4 - 2, 34 * 8 - 2)
    for row, top in ((0, 0), (1, 68)):
        for i in range(9):
            y, x = top + i // 8 * 34, i % 8 * 34
            torch.testing.assert_close(
                picture[:, y : y + 32, x : x + 32],
                drawn[row, i],
                rtol=0,
                atol=0.51 / 255,
            )


def assert_views(folder, drawn, *, elevation, azimuths):
    """A folder holds the views [V, 3, H, W] one by one, and cameras at these angles."""
    scene = json.loads((folder / "transforms.json").read_text())
    # The whole of a cube of side 1 is seen from here.
    assert math.degrees(scene["camera_angle_x"]) == pytest.approx(40)
    distance = 0.5 / math.tan(math.radians(20))
    files = [frame["file_path"] for frame in scene["frames"]]
    assert files == [f"{k:03d}.png" for k in range(len(azimuths))]
    assert {path.name for path in folder.iterdir()} == {*files, "transforms.json"}
    for k, frame in enumerate(scene["frames"]):
        found = torch.tensor(frame["transform_matrix"])
        expected = cameras.orbit(elevation, azimuths[k], distance)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        picture = read_png(folder / files[k])
        torch.testing.assert_close(picture, drawn[k], rtol=0, atol=0.51 / 255)


def test_the_views_one_by_one_for_other_tools(start, model_file, tmp_path, capsys):
    flags = ["--views", "3", "--elevation", "-20", "--azimuth", "30", "--span", "180"]
    assert start(*flags, "--transforms", "deep/car") == 0
    assert "deep/car" in capsys.readouterr().out
    model = MVDream.load(model_file)
    drawn = model.sample(
        "a red bulldog", steps=2, views=3, elevation=-20.0, azimuth=30.0, span=180.0
    )
    assert_views(tmp_path / "deep/car", drawn[0], elevation=-20.0, azimuths=[30.0, 90.0, 150.0])
    assert Path("samples/a-red-bulldog.png").exists()


def test_each_sample_of_a_batch_has_its_folder_of_views(start, model_file, tmp_path):
    assert start("--batch", "2", "--views", "2", "--transforms", "cars") == 0
    drawn = MVDream.load(model_file).sample(["a red bulldog"] * 2, steps=2, views=2)
    assert {path.name for path in Path("cars").iterdir()} == {"000", "001"}
    for i in range(2):
        folder = tmp_path / "cars" / f"{i:03d}"
        assert_views(folder, drawn[i], elevation=15.0, azimuths=[0.0, 180.0])


def test_the_released_model_by_its_name(monkeypatch, tmp_path):
    """The whole way of `sample.py --model mvdream-sd21`, with a small file as the download."""
    torch.save(layouts.released_tensors(), tmp_path / "sd-v2.1-base-4view.pt")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repository, file: str(tmp_path / file)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "sample.py",
            "an astronaut",
            "--model",
            "mvdream-sd21",
            "--device",
            "cpu",
            "--steps",
            "1",
            "--size",
            "64",
        ],
    )
    sample.main()
    model = MVDream.load("mvdream-sd21")
    assert (
        model.config.suffix,
        model.config.guidance,
        model.config.negative,
        model.config.size,
    ) == (", 3d asset", 10.0, "", 256)
    drawn = model.sample(
        "an astronaut", "", steps=1, guidance=10.0, elevation=15.0, azimuth=0.0, size=64
    )[0]
    torch.testing.assert_close(
        read_png("samples/an-astronaut.png"), grid(drawn, 4), rtol=0, atol=0.51 / 255
    )


@pytest.mark.parametrize(
    "flags, prompt, words",
    [
        ([], " ", "prompt is empty"),
        (
            [],
            "zebra",
            "knows nothing in 'zebra'; it knows: 3d a asset bulldog red",
        ),  # although the suffix is known
        (["--negative", "ugly"], "a bulldog", "knows nothing in 'ugly'"),
        (["--view", "3"], "a bulldog", "--view"),
        (["--views", "0"], "a bulldog", "--views"),
        (["--seed", "99999999999999999999"], "a bulldog", "--seed"),
        (["--steps", "1001"], "a bulldog", "--steps"),
        (["--model", "tinny"], "a bulldog", "no model 'tinny'"),
        (["--model", "damaged"], "a bulldog", "damaged"),
        (["--model", "other"], "a bulldog", "not a tensor of an MVDream"),
        (["--size", "72"], "a bulldog", "must be a multiple of 16"),
        (["--batch", "0"], "a bulldog", "--batch"),
        (["--device", "cuda"], "a bulldog", "no device 'cuda'"),
        (["--out", "damaged/x.png"], "a bulldog", "cannot make the folder damaged"),
        (["--out", "damaged/x"], "a bulldog", "cannot make the folder damaged/x"),
        (["--out", "damaged"], "a bulldog", "cannot make the folder damaged"),
        (["--out", "folder/x.png"], "a bulldog", "folder/x.png exists already"),
        (["--out", "x.jpg"], "a bulldog", "x.jpg is no PNG file"),
        (["--out", "x.png.webp"], "a bulldog", "x.png.webp is no PNG file"),
        (["--transforms", "folder"], "a bulldog", "folder holds a 000.png already"),
        (["--transforms", "damaged/x"], "a bulldog", "cannot make the folder damaged/x"),
        (["--transforms", "views/000"], "a bulldog", "holds a transforms.json already"),
        (["--transforms", "views/000", "--batch", "2"], "a bulldog", "views/000 holds a"),
        (["--transforms", "views", "--batch", "2"], "a bulldog", "views/000 holds a"),
        (["--transforms", "new", "--mode", "2d"], "a bulldog", "--transforms needs --mode 3d"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    start, flags, prompt, words, tmp_path, model_file, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("damaged").write_bytes(model_file.read_bytes()[:-100])
    write_safetensors("other", {"weight": torch.zeros(2)})
    Path("folder").mkdir()
    Path("folder/x.png").write_text("mine")
    Path("folder/000.png").write_text("mine")
    Path("views/000").mkdir(parents=True)
    Path("views/000/transforms.json").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert start("--out", "folder/new.png", *flags, prompt=prompt) == 2
    out, err = capsys.readouterr()
    errors = [
        line for line in err.replace("\r", "\n").splitlines() if line and "%|" not in line
    ]  # not the progress bar's
    assert (
        len(errors) == 1
        and errors[0].startswith("error: ")
        and words in errors[0]
        and out == ""
    )
    assert {
        path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")
    } == before


@pytest.fixture(scope="module")
def process(model_file, tmp_path_factory):
    """A real process, with nothing between it and stderr, that says what it imports, too.

    Returns (its folder, its lines on stderr, the names of the imported modules).
    """
    folder = tmp_path_factory.mktemp("process")
    flags = ["--model", model_file, "--device", "cpu", "--steps", "1"]
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPT, "a red wombat", *flags],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in re.split("[\r\n]", ended.stderr) if line and "%|" not in line]
    imports = [line for line in lines if line.startswith("import time:")]
    others = [line for line in lines if line not in imports]
    return folder, others, {line.rpartition("|")[2].strip() for line in imports}


def test_unknown_words_are_named_once_in_one_clean_line(process):
    folder, lines, _ = process
    assert (folder / "samples" / "a-red-wombat.png").exists()
    assert lines == [
        "warning: the model does not know wombat: left out; it knows: 3d a asset bulldog red"
    ]


@pytest.mark.parametrize("name", ["torch._dynamo", "sympy", "open_clip", "huggingface_hub"])
def test_a_sample_imports_no_compiler_and_no_other_network(process, name):
    """Each takes a second or more; the first picture should not wait for what it does not use."""
    _, _, imported = process
    assert "torch" in imported and "mvd.text" in imported
    found = sorted(module for module in imported if module.split(".")[0] == name or module == name)
    assert not found, f"sample.py imports {name}, which takes long and draws nothing"


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_pictures_that_are_nan_are_not_written(part, start, model_file, tmp_path, capsys):
    """They would be black."""
    model = MVDream.load(model_file)
    list(getattr(model, part).parameters())[-1].data.fill_(math.nan)
    model.save(tmp_path / "nan.safetensors")
    flags = ["--model", str(tmp_path / "nan.safetensors"), "--out", "a.png", "--transforms", "b"]
    assert start(*flags) == 2
    assert "error: the model's pictures are not numbers (NaN)" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png")), "a black picture was written"


def test_eta_needs_ddim(start, monkeypatch, capsys):
    """Refused before the model is loaded; other samplers would take no notice of it."""
    monkeypatch.setattr(MVDream, "load", lambda *a: pytest.fail("the model is loaded first"))
    assert start("--eta", "0.5") == 2
    said = capsys.readouterr().err
    assert "--eta is a setting of --sampler ddim, and the sampler is dpm++" in said


def test_the_flags_have_the_defaults_of_the_function():
    """Where the function says None it takes the model's own, as --help does."""
    parameters = inspect.signature(MVDream.sample).parameters
    for field in fields(sample.SampleSettings):
        default = parameters[field.name].default if field.name in parameters else None
        if default not in (None, inspect.Parameter.empty):
            assert field.default == default, (
                f"--{field.name} is {field.default}, but {field.name} of MVDream.sample {default}"
            )
