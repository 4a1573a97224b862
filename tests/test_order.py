"""Hashes against Python's own integers, permutations, and the distributions of random numbers."""
import itertools
import math
import zlib

import pytest
import torch

from mvd.data.order import Dice, hashed, items_at, mix, shifted, uniform

# ---- the hash --------------------------------------------------------------------------------

MASK = 2**64 - 1


def splitmix64(x):
    """The last step of Steele et al. 2014, fig. 16, in whole numbers that never overflow."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def expected_hash(*values):
    """`hashed` without torch, signed."""
    h = 0
    for value in values:
        number = zlib.crc32(value.encode()) if isinstance(value, str) else value
        h = splitmix64((h + number + 0x9E3779B97F4A7C15) & MASK)
    return h - 2**64 if h >= 2**63 else h


def test_the_mixing_is_splitmix64():
    """Its published generator, begun with 1234567, gives these numbers."""
    golden = 0x9E3779B97F4A7C15
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64((1234567 + k * golden) & MASK) for k in (1, 2, 3)] == known
    numbers = [0, 1, -1, 2**62, -(2**63), 2**63 - 1, *range(-50, 50)]
    expected = [splitmix64(n & MASK) for n in numbers]
    found = [n & MASK for n in mix(torch.tensor(numbers)).tolist()]
    assert found == expected


def test_a_shift_brings_in_zeros():
    numbers = [0, 1, -1, -(2**63), 2**63 - 1, 12345, -98765]
    for bits in (1, 11, 31, 40, 63):
        expected = [(n & MASK) >> bits for n in numbers]
        assert shifted(torch.tensor(numbers), bits).tolist() == expected


@pytest.mark.parametrize("values", [
    (0,), (1, 2), (2, 1), ("grey",), (2**63 - 2, "t", 7), (-5, 0, 0), ("", 3, "ü"),
])
def test_hashes_are_those_of_whole_numbers(values):
    assert hashed(*values).item() == expected_hash(*values)


def test_hashes_of_tensors_are_those_of_their_numbers():
    rows, columns = torch.arange(-2, 3), torch.tensor([0, 5, 2**40])
    found = hashed(9, rows[:, None], "name", columns)
    expected = [[expected_hash(9, r, "name", c) for c in columns.tolist()] for r in rows.tolist()]
    assert found.dtype == torch.int64 and found.tolist() == expected


def test_one_bit_of_a_value_changes_half_of_the_bits():
    values = torch.arange(500)
    for bit in (0, 17, 40, 63):
        flipped = values ^ torch.tensor(1 << bit if bit < 63 else -(2**63))
        difference = hashed(3, values) ^ hashed(3, flipped)
        each = torch.stack([(difference >> k) & 1 for k in range(64)])
        share = each.double().mean(1)
        assert (share - 0.5).abs().max() < 0.1, f"of bit {bit} some bits know too much or nothing"


def test_a_number_of_a_hash_lies_in_the_unit_interval():
    for values in ((3, "a"), (4, "a"), ("b",)):
        assert uniform(*values) == ((expected_hash(*values) & MASK) >> 11) / 2**53
    numbers = [uniform("n", k) for k in range(2000)]
    assert 0 <= min(numbers) and max(numbers) < 1
    assert abs(sum(numbers) / 2000 - 0.5) < 0.02


def test_the_numbers_stay_what_they_are():
    """Else a run that another version began would go on with other items and noise."""
    assert hashed(1, "t", -5).item() == 6197173087990758867
    assert items_at(10, 7, torch.arange(20)).tolist() == [
        3, 6, 8, 4, 0, 1, 5, 2, 7, 9, 9, 3, 8, 6, 2, 7, 5, 4, 0, 1,
    ]
    dice = Dice(5, torch.tensor(123), torch.arange(3))
    assert dice.below("t", 1000).tolist() == [879, 749, 861]
    assert dice.uniform("grey").tolist() == pytest.approx([0.6753633, 0.2115839, 0.2875772])
    expected = torch.tensor([
        [-0.8564286, 1.9010937, 0.0455313],
        [-0.7514771, -1.4110437, -0.1612318],
        [1.0702177, -0.6782588, -0.8431069],
    ])
    torch.testing.assert_close(dice.normal("noise", (3,)), expected, rtol=0, atol=1e-5)


# ---- the order of the items ------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000, 1024, 1025])
@pytest.mark.parametrize("start", [0, 10**12])
def test_an_epoch_has_every_item_once(count, start):
    epochs = [start // count + 1 + k for k in range(4)]
    for epoch in epochs:
        items = items_at(count, 11, epoch * count + torch.arange(count))
        assert items.dtype == torch.int64
        assert items.sort().values.tolist() == list(range(count)), f"epoch {epoch} of {count}"


def test_epochs_and_seeds_differ():
    places = torch.arange(3000)
    epochs = items_at(1000, 1, places).view(3, 1000)
    other = items_at(1000, 2, places).view(3, 1000)
    for a, b in itertools.combinations([*epochs, *other, torch.arange(1000)], 2):
        assert (a == b).sum() < 10, "two epochs, or an epoch and the items' own order, are alike"


def test_no_neighbours_stay_together():
    """What is read one after the other in one epoch is far apart in the next."""
    epochs = items_at(1000, 1, torch.arange(2000)).view(2, 1000)
    assert (epochs.diff(dim=1).abs() == 1).sum() < 20, "items come in their own order"
    place = epochs[1].argsort()
    assert (place[epochs[0]].diff().abs() == 1).sum() < 20, "an epoch repeats the one before"
    correlation = torch.corrcoef(epochs.double())[0, 1].abs()
    assert correlation < 0.1


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_every_item_comes_about_equally_often_at_a_place_of_an_epoch(count):
    for place in (0, count - 1):
        items = items_at(count, 4, torch.arange(20000) * count + place)
        often = items.bincount(minlength=count) * count / 20000
        assert (often - 1).abs().max() < 0.15, f"place {place}: {often.tolist()} times the mean"


def test_one_place_is_as_many():
    places = [0, 1, 998, 999, 1000, 10**12 + 7]
    together = items_at(1000, 3, torch.tensor(places)).tolist()
    alone = [items_at(1000, 3, torch.tensor([place])).item() for place in places]
    assert alone == together
    assert items_at(1000, 3, torch.tensor(places[::-1])).tolist() == together[::-1]


# ---- the random numbers of a batch -----------------------------------------------------------

def dice_of(count, seed=0, step=0, first=0):
    return Dice(seed, torch.tensor(step), first + torch.arange(count))


def kinds_of_numbers(dice):
    """Some of each kind, by name."""
    return {
        "uniform": dice.uniform("a"),
        "uniform with a shape": dice.uniform("a", (3, 1, 2)),
        "below": dice.below("a", 1000),
        "normal": dice.normal("a", (5,)),
        "normal with a shape": dice.normal("a", (2, 3, 3)),
    }


def test_shapes_and_types():
    found = {name: (x.shape, x.dtype) for name, x in kinds_of_numbers(dice_of(4)).items()}
    assert found == {
        "uniform": ((4,), torch.float32),
        "uniform with a shape": ((4, 3, 1, 2), torch.float32),
        "below": ((4,), torch.int64),
        "normal": ((4, 5), torch.float32),
        "normal with a shape": ((4, 2, 3, 3), torch.float32),
    }


def test_the_same_name_gives_the_same_numbers():
    """Whatever was drawn in between, and from other Dice of the same place."""
    dice = dice_of(4)
    first = kinds_of_numbers(dice)
    for again in (kinds_of_numbers(dice), kinds_of_numbers(dice_of(4))):
        for name, numbers in first.items():
            assert torch.equal(numbers, again[name]), name


def test_a_batch_in_parts_gives_the_numbers_of_the_whole():
    whole = kinds_of_numbers(dice_of(10, step=3))
    parts = [kinds_of_numbers(dice_of(n, step=3, first=f)) for f, n in ((0, 4), (4, 1), (5, 5))]
    for name, numbers in whole.items():
        together = torch.cat([part[name] for part in parts])
        assert torch.equal(together, numbers), f"{name}: a part has other numbers"


def test_other_names_steps_places_and_seeds_give_independent_numbers():
    """No correlation of 20,000 numbers is larger than chance makes it (4 / √20,000)."""
    draws = {
        "name a": dice_of(20000).uniform("a"),
        "name b": dice_of(20000).uniform("b"),
        "step 1": dice_of(20000, step=1).uniform("a"),
        "seed 1": dice_of(20000, seed=1).uniform("a"),
        "other places": dice_of(20000, first=20000).uniform("a"),
        "the next place": dice_of(20000, first=1).uniform("a"),
        "a second number": dice_of(20000).uniform("a", (2,))[:, 1],
        "below": dice_of(20000).below("c", 10**6).float(),
        "radius": dice_of(20000).normal("d", (2,))[:, 0],
        "angle": dice_of(20000).normal("d", (2,))[:, 1],
    }
    matrix = torch.corrcoef(torch.stack(list(draws.values())).double()) - torch.eye(len(draws))
    for row, name in zip(matrix, draws):
        other = list(draws)[row.abs().argmax()]
        assert row.abs().max() < 0.03, f"{name} and {other} go together"


def test_radius_and_angle_of_a_pair_do_not_go_together():
    pair = dice_of(20000).normal("d", (2,)).double()
    squares = torch.corrcoef(pair.T**2)[0, 1]
    assert abs(squares) < 0.03


def assert_flat(numbers, cells):
    """Whole numbers of range(cells) occur equally often, by chi²."""
    expected = len(numbers) / cells
    chi2 = ((numbers.bincount(minlength=cells) - expected) ** 2 / expected).sum().item()
    off = (chi2 - (cells - 1)) / math.sqrt(2 * (cells - 1))
    assert abs(off) < 4, f"chi² is {off:.1f} deviations off"


def test_uniform_numbers_are_flat():
    numbers = dice_of(1000).uniform("u", (100,)).flatten()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert_flat((numbers * 100).long(), 100)
    # Of the 24 bits of each number the last ones are random, too.
    assert_flat((numbers * 2**24).long() % 64, 64)


def test_numbers_below_a_count_are_flat_and_reach_it_nowhere():
    for count in (1, 2, 7, 1000):
        numbers = dice_of(50000).below("n", count)
        assert 0 <= numbers.min() and numbers.max() == count - 1
        if count > 1:
            assert_flat(numbers, count)
    largest = 2**31 - 1
    numbers = dice_of(50000).below("n", largest)
    assert 0 <= numbers.min() and numbers.max() < largest
    assert_flat(numbers * 50 // largest, 50)


def test_each_example_may_have_a_count_of_its_own():
    counts = torch.arange(50000) % 9 + 1
    numbers = dice_of(50000).below("n", counts)
    for count in range(1, 10):
        of_count = numbers[counts == count]
        assert 0 <= of_count.min() and of_count.max() == count - 1
        if count > 1:
            assert_flat(of_count, count)


def test_normal_numbers_are_normal():
    """Moments, and the distance of Kolmogorov and Smirnov to erf."""
    x = dice_of(1000).normal("n", (199,)).double().flatten()
    n = len(x)
    assert x.isfinite().all()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    ordered = x.sort().values
    normal = 0.5 + 0.5 * torch.erf(ordered / math.sqrt(2))
    empirical = (torch.arange(n) + 0.5) / n
    distance = (normal - empirical).abs().max() * math.sqrt(n)
    assert distance < 1.95, f"Kolmogorov and Smirnov's distance is {distance:.2f}"
    assert 4 < x.abs().max() < 7, "the tails are cut, or too long"


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1, 1), (3, 5, 1), (2, 2)])
def test_odd_and_even_sizes_are_normal_in_every_place(shape):
    x = dice_of(20000).normal("n", shape)
    assert x.shape == (20000, *shape)
    x = x.flatten(1).double()
    assert (x.mean(0).abs() < 0.03).all() and ((x.std(0) - 1).abs() < 0.03).all()
    assert x.shape[1] == 1 or (torch.corrcoef(x.T) - torch.eye(x.shape[1])).abs().max() < 0.03


def test_the_extreme_hashes_give_finite_numbers():
    """All bits 0 (the radius is the largest) and all bits 1 (it is 0)."""
    dice = dice_of(2)
    dice.bits = lambda name, count: torch.tensor([[0], [-1]]).expand(2, count)
    assert dice.normal("n", (2,)).isfinite().all()
    assert dice.uniform("u").tolist() == [0, 1 - 2**-24]
    assert dice.below("b", 2**31 - 1).tolist() == [0, 2**31 - 2]


@pytest.mark.gpu
def test_a_gpu_draws_the_same():
    on_cpu = dice_of(50, seed=3, step=2)
    on_gpu = Dice(3, torch.tensor(2).cuda(), torch.arange(50).cuda())
    assert torch.equal(on_gpu.key.cpu(), on_cpu.key)
    for name, numbers in kinds_of_numbers(on_gpu).items():
        assert numbers.is_cuda
        torch.testing.assert_close(numbers.cpu(), kinds_of_numbers(on_cpu)[name], msg=name)
    places = torch.arange(100)
    assert torch.equal(items_at(30, 1, places.cuda()).cpu(), items_at(30, 1, places))
