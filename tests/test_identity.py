"""The judge of identities, judged: real renders of the subject pass from every side, others fail, and accessories are told apart."""
import pytest
import torch
from PIL import Image

from mvd.metrics import identity
from mvd.tools import photos
from mvd.toyworld.animals import BLACK, PAINTS
from mvd.tools.errors import UserError
from mvd.tools.files import write_safetensors
from mvd.metrics.judge import Cameras

TWO = Cameras(15.0, (0.0, 135.0))                                                # a side that a photo shows, and one that none shows


@pytest.fixture(autouse=True)
def small_judge(monkeypatch):
    monkeypatch.setattr(identity, "INSTANCES", 4)
    monkeypatch.setattr(identity, "FIELDS_OF_VIEW", (22.0, 45.0))


def test_real_renders_are_recognised_and_others_are_not():
    real = identity.real_views("duck", 1, TWO, sets=2)                           # [2, 2, 3, 64, 64]
    assert identity.identity(real, "duck", 1, TWO).tolist() == [[True, True]] * 2
    assert not identity.identity(identity.real_views("duck", 2, TWO, sets=1), "duck", 1, TWO).any()
    half = torch.stack([real[0, 0], identity.real_views("duck", 3, TWO, sets=1)[0, 1]])[None]
    assert identity.identity(half, "duck", 1, TWO).tolist() == [[True, False]]   # view by view


def test_a_face_at_the_back_is_seen():
    four = Cameras(15.0, (0.0, 90.0, 180.0, 270.0))
    real = identity.real_views("duck", 1, four, sets=2)
    right, janus = identity.sides(torch.cat([real, real[:, [0, 1, 0, 3]]]), "duck", 1, four)
    assert right.tolist() == [[True] * 4] * 2 + [[True, True, False, True]] * 2
    assert janus.tolist() == [False, False, True, True]


def test_outlines_are_told_apart_whatever_the_colours(monkeypatch):
    """The duck has the cat's colours, slot by slot, the last cat the opposite ones; candidates wear what the pictures should show."""
    monkeypatch.setattr(identity, "SUBJECTS", {name: identity.SUBJECTS[name] for name in ("cat", "duck", "car")})
    drawn, draw, palette = [], identity.draw, identity.palette
    monkeypatch.setattr(identity, "palette", lambda *given: palette(*given) * torch.tensor([0.0, 1.0, 1.0]))   # nothing is red
    monkeypatch.setattr(identity, "draw", lambda name, seeds, *rest: drawn.append((name, seeds, rest[4])) or draw(name, seeds, *rest))
    for accessory in (None, "top hat"):
        cat, duck = (identity.real_views(name, 1, TWO, accessory, sets=1) for name in ("cat", "duck"))
        drawn.clear()
        assert identity.has_outline(torch.cat([cat, duck, 1 - cat]), "cat", 1, TWO, accessory).tolist() == [True, False, True]
        assert drawn == [(name, [1], accessory) for name in ("cat", "duck", "car") for _ in identity.FIELDS_OF_VIEW]


def test_accessories_are_told_apart(monkeypatch):
    monkeypatch.setattr(identity, "ACCESSORIES", ("top hat", "skateboard"))
    worn, bare = (identity.real_views("duck", 1, TWO, accessory, sets=1) for accessory in ("top hat", None))
    assert identity.wears(worn, "duck", 1, "top hat", TWO).tolist() == [True]
    assert identity.wears(bare, "duck", 1, "top hat", TWO).tolist() == [False]
    assert identity.wears(worn, "duck", 1, "skateboard", TWO).tolist() == [False]


def test_accessories_keep_their_colours(monkeypatch):
    odd, ordinary = identity.palette([1, 2]).chunk(2, dim=1)
    assert torch.equal(ordinary[0], ordinary[1]) and not torch.equal(odd[0], odd[1])
    assert torch.allclose(ordinary[0, 3:], torch.tensor([rgb for rgb in PAINTS.values() if rgb]))
    assert torch.allclose(odd[:, BLACK], torch.tensor(PAINTS["black"]))
    red = torch.tensor([1.0, 0, 0]).expand(1, len(PAINTS), 3)
    monkeypatch.setattr(identity, "palette", lambda seeds, device="cpu": torch.cat([red, ordinary[:1]], 1))
    bare, board = (identity.draw("duck", [1], (0.0, 90.0), accessory=accessory)[0] for accessory in (None, "skateboard"))
    blue = [((rgba[:, 2] > rgba[:, 0]) & (rgba[:, 3] > 0.5)).sum((1, 2)).tolist() for rgba in (bare, board)]
    assert blue[0] == [0, 0] and min(blue[1]) > 10                               # the board is cyan


def test_unseen_sides():
    assert identity.unseen(identity.EIGHT).tolist() == [azimuth in (135, 180, 225) for azimuth in range(0, 360, 45)]
    assert identity.unseen(Cameras(0.0, (300.0, 239.0, -60.0, 121.0))).tolist() == [False, True, False, True]


def test_the_photos_that_it_writes_can_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["identity", "duck", "1", "--photos", str(tmp_path / "photos")])
    identity.main()
    names, rgba = photos.load(tmp_path / "photos", 64)
    assert len(names) == 5 and len({tuple(picture.flatten().tolist()) for picture in rgba}) == 5
    with Image.open(tmp_path / "photos" / names[0]) as picture:
        assert picture.mode == "RGBA"
    monkeypatch.setattr("sys.argv", ["identity", "duck", "1"])
    with pytest.raises(UserError, match="--photos"):
        identity.main()


def test_the_report_of_an_object(tmp_path, monkeypatch, capsys):
    """What distill.py writes, here with real renders in place of an object's."""
    cameras = identity.EIGHT._replace(fov_deg=40.0)
    tensors = {"rgb": identity.real_views("duck", 1, cameras, sets=1)[0], "elevation": torch.tensor(15.0), "fov": torch.tensor(40.0),
               "azimuth": torch.tensor(cameras.azimuth)}
    write_safetensors(tmp_path / "views.safetensors", tensors)
    monkeypatch.setattr("sys.argv", ["identity", "duck", "1", "--run", str(tmp_path), "--device", "cpu"])
    identity.main()
    assert capsys.readouterr().out.strip() == (
        f"{tmp_path}: identity 1.00 (1.00), unseen sides 1.00 (1.00), outline 1.00, view accuracy 1.00, Janus 0.00")
