"""What four small runs compute, pinned: a change of how the code reads must not change a bit of it.

Bits depend on the processor and on PyTorch, so the hashes count where they were taken; everywhere
else the mean and the deviation of the same numbers must agree. `python tests/test_pin.py` takes
them again, for a change that is meant to change what is computed.
"""
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import distill
import dreambooth
import sample
import toy_data
import train
from mvd import MVDream, fit
from mvd.tools import run
from mvd.tools.files import read_safetensors
from scripts import saved_model
from test_model import small_config
from test_train import blank

PINS = Path(__file__).parent / "data" / "pins.json"
WORDS = ("3d", "a", "asset", "ball", "blue", "bulldog", "of", "phol", "photo", "red")
FIELD = """--levels 2 --log2-entries 10 --coarsest 4 --finest 16 --hidden 8 --lr-grid 0.01
    --lr 0.001 --blob-strength 10 --occupancy-cells 32 --occupancy-every 2 --occupancy-warm-up 0.5
    --step-size 0.1 --density-threshold 1000 --coarse-size 8 --fine-size 16 --coarse-sets 2
    --fine-sets 1 --coarse-budget 1024 --fine-budget 1024 --fine-from 0.5 --guidance 20
    --rescale 0.5 --loss x0 --t-start 0.98 --t-min 0.02 --t-max 0.5 --anneal 0.8 --negative asset
    --random-background 0.5 --no-grey-background --shading --shading-from 0.5 --steps 6
    --save-every 2""".split()
TRAIN = """--vae-steps 4 --steps 6 --batch 1 --vae-batch 4 --vae-lr 1e-3 --lr 6e-4 --copies 1
    --ema 0.999 --sample-every 100 --save-every 2""".split()
DREAMBOOTH = """--steps 4 --batch 2 --lr 1e-3 --cosine --weight-decay 0.01 --preservation 100
    --wordings --class-preservation 1 --identifier-lr 0.01 --text-preservation 0.03
    --sample-every 100 --save-every 2""".split()


def machine():
    """What the last bit depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), name]


def fingerprint(tensors):
    """{"hash", "mean", "std"} of tensors, whatever their names and order."""
    digests = []
    for tensor in tensors:
        tensor = tensor.detach().contiguous()
        header = f"{tensor.dtype} {list(tensor.shape)}".encode()
        content = tensor.flatten().view(torch.uint8).numpy().tobytes()
        digests.append(hashlib.sha256(header + content).hexdigest())
    # Pixels count as much as other numbers in [0, 1].
    scaled = [t.double() / 255 if t.dtype == torch.uint8 else t.double() for t in tensors]
    numbers = torch.cat([tensor.detach().flatten() for tensor in scaled])
    return {
        "hash": hashlib.sha256("".join(sorted(digests)).encode()).hexdigest(),
        "mean": numbers.mean().item(),
        "std": numbers.std().item(),
    }


def small_model(folder):
    config = small_config()
    config.size, config.text.words = 32, WORDS
    return str(saved_model(folder, config))


def losses(folder):
    rows = run.read_log(folder / "log.jsonl")
    numbers = [row[name] for row in rows for name in ("loss", "multiview", "single") if name in row]
    return torch.tensor(numbers, dtype=torch.float64)


def command(patch, main, *arguments):
    """Run a script's main function as from the command line."""
    patch.setattr(sys, "argv", ["script", *map(str, arguments)])
    main()


def run_sample(folder, patch):
    """The shipped model's own numbers, and what the command writes of a small model."""
    views = MVDream.load("tiny").sample("a bulldog wearing a crown", steps=3, seed=1)
    command(patch, sample.main, "a red bulldog", "--model", small_model(folder), "--device", "cpu",
            "--steps", 3, "--guidance", 4, "--out", folder / "x.png")
    png = Image.open(folder / "x.png")
    pixels = torch.frombuffer(bytearray(png.tobytes()), dtype=torch.uint8)
    return [views, pixels]


def run_distill(folder, patch):
    command(patch, distill.main, "a red bulldog", "--model", small_model(folder), "--device", "cpu",
            "--out", folder / "run", "--mesh-size", "16", *FIELD)
    field, _ = read_safetensors(folder / "run" / "field.safetensors")
    views, _ = read_safetensors(folder / "run" / "views.safetensors")
    return [*field.values(), views["rgb"], views["opacity"], losses(folder / "run")]


def run_train(folder, patch):
    toy_data.write(folder / "data", size=64)
    command(patch, train.main, "--data", folder / "data", "--out", folder / "run",
            "--preset", "nano", "--device", "cpu", *TRAIN)
    tensors, _ = read_safetensors(folder / "run" / "model.safetensors")
    return [*tensors.values(), losses(folder / "run")]


def run_dreambooth(folder, patch):
    (folder / "photos").mkdir()
    for i, azimuth in enumerate((0, 100, 200)):
        toy_data.view("red", azimuth, 40 + i).save(folder / "photos" / f"{i}.png")
    command(patch, dreambooth.main, folder / "photos", "--prompt", "a photo of [v] bulldog",
            "--model", small_model(folder), "--out", folder / "run", "--device", "cpu", *DREAMBOOTH)
    tensors, _ = read_safetensors(folder / "run" / "model.safetensors")
    return [*tensors.values(), losses(folder / "run")]


RUNS = {"sample": run_sample, "distill": run_distill, "train": run_train,
        "dreambooth": run_dreambooth}


def measure(name, folder, patch):
    patch.setattr(MVDream, "sample", MVDream.sample if name == "sample" else blank)
    patch.setattr(distill, "LOG_EVERY", 1)
    patch.setattr(fit, "LOG_EVERY", 1)
    patch.setattr(dreambooth, "LOG_EVERY", 1)
    return fingerprint(RUNS[name](folder, patch))


@pytest.mark.parametrize("name", RUNS)
def test_a_small_run_computes_what_it_did(name, tmp_path, monkeypatch):
    pins = json.loads(PINS.read_text())
    pinned, found = pins[name], measure(name, tmp_path, monkeypatch)
    for figure in ("mean", "std"):
        assert found[figure] == pytest.approx(pinned[figure], rel=2e-5, abs=1e-7), (
            f"{name}: the {figure} of all results was {pinned[figure]:.6g}, "
            f"now {found[figure]:.6g}")
    if machine() == pins["machine"]:
        assert found["hash"] == pinned["hash"], (
            f"{name}: the numbers are nearly those of before, but not to the bit; "
            "if that is meant, take them again with `python tests/test_pin.py`")


if __name__ == "__main__":
    import tempfile
    torch.set_num_threads(1)
    pins = {"machine": machine()}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            pins[name] = measure(name, Path(folder), patch)
    PINS.write_text(json.dumps(pins, indent=2) + "\n")
    print(PINS.read_text())
