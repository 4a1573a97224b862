"""The judge of identities, judged: real renders of the subject pass from every side, others fail,
and accessories are told apart."""
import types

import pytest
import torch
from PIL import Image

from mvd.metrics import identity
from mvd.metrics.candidates import Cameras, even_azimuths
from mvd.metrics.identity import Subject
from mvd.tools import photos
from mvd.tools.errors import UserError
from mvd.tools.files import write_safetensors
from mvd.toyworld import PAINTS, SLOT

DUCK = Subject("duck", 1)
# A side that a photo shows, and one that none shows.
TWO = Cameras(15.0, (0.0, 135.0))
EIGHT = Cameras(15.0, even_azimuths(8))


@pytest.fixture(autouse=True)
def small_judge(monkeypatch):
    monkeypatch.setattr(identity, "INSTANCES", 4)
    monkeypatch.setattr(identity, "FIELDS_OF_VIEW", (22.0, 45.0))


def real_views(subject, cameras=TWO, sets=1):
    return identity.real_subject_views(subject, cameras, sets)


def test_real_renders_are_recognised_and_others_are_not():
    # [2, 2, 3, 64, 64]
    real = real_views(DUCK, sets=2)
    assert identity.shows_subject(real, DUCK, TWO).tolist() == [[True, True]] * 2
    second = real_views(DUCK._replace(seed=2))
    assert not identity.shows_subject(second, DUCK, TWO).any()
    third = real_views(DUCK._replace(seed=3))
    half = torch.stack([real[0, 0], third[0, 1]])[None]
    shown = identity.shows_subject(half, DUCK, TWO).tolist()
    assert shown == [[True, False]], "each view is judged by itself"


def test_a_face_at_the_back_is_seen():
    four = Cameras(15.0, even_azimuths(4))
    real = real_views(DUCK, four, sets=2)
    two_faces = real[:, [0, 1, 0, 3]]
    views = torch.cat([real, two_faces])
    right, janus = identity.subject_sides_and_janus(views, DUCK, four)
    assert right.tolist() == [[True] * 4] * 2 + [[True, True, False, True]] * 2
    assert janus.tolist() == [False, False, True, True]


@pytest.mark.parametrize("accessory", [None, "top hat"])
def test_outlines_are_told_apart_whatever_the_colours(monkeypatch, accessory):
    """The duck has the cat's colours, slot by slot, and the last cat the opposite ones.

    Candidates have what the pictures should show: the same seed and accessory.
    """
    some = {name: identity.SUBJECTS[name] for name in ("cat", "duck", "car")}
    monkeypatch.setattr(identity, "SUBJECTS", some)
    palette = identity.instance_palette
    render_subjects = identity.render_subjects
    drawn = []

    def without_red(seeds, device):
        return palette(seeds, device) * torch.tensor([0.0, 1.0, 1.0])

    def recorded(subjects, *args, **kwargs):
        drawn.append(subjects)
        return render_subjects(subjects, *args, **kwargs)

    monkeypatch.setattr(identity, "instance_palette", without_red)
    monkeypatch.setattr(identity, "render_subjects", recorded)
    asked = Subject("cat", 1, accessory)
    cat = real_views(asked)
    duck = real_views(asked._replace(name="duck"))
    drawn.clear()
    views = torch.cat([cat, duck, 1 - cat])
    assert identity.has_outline(views, asked, TWO).tolist() == [True, False, True]
    expected = []
    for name in some:
        for _ in identity.FIELDS_OF_VIEW:
            expected.append([Subject(name, 1, accessory)])
    assert drawn == expected


def test_accessories_are_told_apart(monkeypatch):
    monkeypatch.setattr(identity, "ACCESSORIES", ("top hat", "skateboard"))
    with_hat = DUCK._replace(accessory="top hat")
    on_board = DUCK._replace(accessory="skateboard")
    worn = real_views(with_hat)
    bare = real_views(DUCK)
    assert identity.wears_accessory(worn, with_hat, TWO).tolist() == [True]
    assert identity.wears_accessory(bare, with_hat, TWO).tolist() == [False]
    assert identity.wears_accessory(worn, on_board, TWO).tolist() == [False]


def test_accessories_keep_their_colours(monkeypatch):
    odd, ordinary = identity.instance_palette([1, 2]).chunk(2, dim=1)
    assert torch.equal(ordinary[0], ordinary[1])
    assert not torch.equal(odd[0], odd[1])
    paints = torch.tensor([rgb for rgb in PAINTS.values() if rgb])
    assert torch.allclose(ordinary[0, 3:], paints)
    black = torch.tensor(PAINTS["black"])
    assert torch.allclose(odd[:, SLOT["black"]], black), "pupils and noses are black"

    red = torch.tensor([1.0, 0, 0]).expand(1, len(PAINTS), 3)
    palette = torch.cat([red, ordinary[:1]], 1)
    monkeypatch.setattr(identity, "instance_palette", lambda seeds, device: palette)

    def blue_pixels(subject):
        rgba = identity.render_subjects([subject], (0.0, 90.0))[0]
        blue = (rgba[:, 2] > rgba[:, 0]) & (rgba[:, 3] > 0.5)
        return blue.sum((1, 2)).tolist()

    assert blue_pixels(DUCK) == [0, 0]
    board = blue_pixels(DUCK._replace(accessory="skateboard"))
    assert min(board) > 10, "the board is cyan"


def test_unseen_sides():
    behind = [azimuth in (135, 180, 225) for azimuth in range(0, 360, 45)]
    assert identity.unseen(EIGHT).tolist() == behind
    odd = Cameras(0.0, (300.0, 239.0, -60.0, 121.0))
    assert identity.unseen(odd).tolist() == [False, True, False, True]


def test_two_sets_are_in_the_order_of_their_cameras():
    """A model whose pictures are as bright as their azimuth."""
    def sample(prompts, azimuth, elevation, seed, views):
        azimuths = azimuth + torch.tensor(even_azimuths(views))
        return azimuths.view(1, -1, 1, 1, 1).expand(len(prompts), -1, 3, 2, 2)

    model = types.SimpleNamespace(sample=sample)
    views = identity.sample_two_sets(model, "a duck", 3)
    assert views.shape == (3, len(identity.TWO_SETS.azimuth), 3, 2, 2)
    assert views[2, :, 0, 0, 0].tolist() == list(identity.TWO_SETS.azimuth)


def test_the_photos_that_it_writes_can_be_read(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos"
    monkeypatch.setattr("sys.argv", ["identity", "duck", "1", "--photos", str(folder)])
    identity.main()
    names, rgba = photos.load(folder, 64)
    assert len(names) == 5
    different = {tuple(picture.flatten().tolist()) for picture in rgba}
    assert len(different) == 5
    with Image.open(folder / names[0]) as picture:
        assert picture.mode == "RGBA"
    with pytest.raises(UserError, match="holds pictures already"):
        identity.main(["duck", "2", "--photos", str(folder)])
    monkeypatch.setattr("sys.argv", ["identity", "duck", "1"])
    with pytest.raises(UserError, match="--photos"):
        identity.main()


def test_the_report_of_an_object(tmp_path, monkeypatch, capsys):
    """What distill.py writes, here with real renders in place of an object's."""
    cameras = EIGHT._replace(fov_deg=40.0)
    tensors = {
        "rgb": real_views(DUCK, cameras)[0],
        "elevation": torch.tensor(15.0),
        "fov": torch.tensor(40.0),
        "azimuth": torch.tensor(cameras.azimuth),
    }
    write_safetensors(tmp_path / "views.safetensors", tensors)
    flags = ["duck", "1", "--run", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["identity", *flags])
    identity.main()
    assert capsys.readouterr().out.strip() == (
        f"{tmp_path}: identity 1.00 (1.00), unseen sides 1.00 (1.00), outline 1.00, "
        "view accuracy 1.00, Janus 0.00")
