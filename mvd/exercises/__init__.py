"""Exercises: functions of the paper to write yourself, in the paper's order.

    python -m mvd.exercises                 # the list
    python -m mvd.exercises start 3         # take the body of a function out
    python -m mvd.exercises check 3         # grade what you wrote, in words
    python -m mvd.exercises solution 3      # bring the body back
    python -m mvd.exercises projects        # three larger projects

A function is written from its docstring, the paper, and what `check` says. `pytest -m exercise
tests` grades all. A function that you wrote is kept: `solution` puts it into `attempts/` first.
"""
from pathlib import Path
from typing import NamedTuple


class Exercise(NamedTuple):
    """Functions of one file, and what to read before writing them."""
    file: str       # from the repository's root
    names: tuple    # of the functions; Class.method
    read: str       # paper and place
    level: int      # 1 to 3
    minutes: int    # our guess, for someone who knows PyTorch and reads the place first

    @property
    def tests(self):
        """The file of the tests that grade it: those marked exercise(number)."""
        return f"tests/test_{Path(self.file).stem}.py"


# By number, from 1 on.
EXERCISES = dict(enumerate([
    Exercise(
        "mvd/diffusion.py", ("q_sample",),
        "DDPM (Ho et al. 2020) §2, eq. 4", 1, 10,
    ),
    Exercise(
        "mvd/diffusion.py", ("solve_x0",),
        "DDPM §4.3, eq. 15: eq. 4 solved for x0", 1, 10,
    ),
    Exercise(
        "mvd/diffusion.py", ("ddim_step",),
        "DDIM (Song et al. 2021) §4.1, eq. 12; §5, eq. 16", 2, 30,
    ),
    Exercise(
        "mvd/diffusion.py", ("ddpm_step",),
        "DDPM §2, eq. 6 and 7", 2, 40,
    ),
    Exercise(
        "mvd/diffusion.py", ("guide", "rescale"),
        "Ho & Salimans 2022 §3.2; Lin et al. 2023 §3.4, eq. 15 and 16", 1, 20,
    ),
    Exercise(
        "mvd/cameras.py", ("orbit", "rays"),
        "the picture at the top of the file; NeRF §4", 2, 60,
    ),
    Exercise(
        "mvd/cameras.py", ("extrinsics",),
        "MVDream §3.1, camera embeddings", 1, 15,
    ),
    Exercise(
        "mvd/unet.py", ("MultiViewTransformer.forward",),
        "MVDream §3.1, figure 3; the top of the file, and __init__ of the class", 3, 60,
    ),
    Exercise(
        "mvd/hashgrid.py", ("encode_plainly",),
        "Instant NGP (Müller et al. 2022) §3, eq. 4; `levels_of` above it", 3, 60,
    ),
    Exercise(
        "mvd/render.py", ("composite",),
        "NeRF §4, eq. 3", 3, 60,
    ),
    Exercise(
        "mvd/nerf.py", ("NeRF.geometry",),
        "DreamFusion §3.2 (normals); the chain rule in its docstring", 3, 60,
    ),
    Exercise(
        "mvd/sds.py", ("distillation_loss",),
        "MVDream §3.2, eq. 4; DreamFusion §3, eq. 3", 2, 45,
    ),
    Exercise(
        "mvd/sds.py", ("draw_cameras",),
        "MVDream, appendix (cameras)", 2, 30,
    ),
    Exercise(
        "mvd/mesh.py", ("marching_tetrahedra",),
        "Doi & Koide 1991; the helpers above it", 3, 90,
    ),
    Exercise(
        "dreambooth.py", ("preserve",),
        "MVDream §3.3", 2, 30,
    ),
], start=1))
