"""Which item comes when, and every random number of a batch, as functions of seed and place.

Nothing here has a state. A run that was killed goes on at any step, any number of processes sees
the same sequence, and no two examples share their random numbers: each is a hash of the seed, of
the place, and of what it is for. (The common way, a generator that is drawn from in turn, depends
on all that was drawn before, and on who draws.)
"""
import math
import zlib

import torch

# The constants of SplitMix64 (Steele et al. 2014), as signed numbers of 64 bits.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FACTORS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
# Rounds of the Feistel network that shuffles.
ROUNDS = 8


# ---- the hash --------------------------------------------------------------------------------

def shifted(x, bits):
    """x shifted to the right, int64, with zeros coming in: as if it had no sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def mix(x):
    """SplitMix64's last step: one to one, and every bit of x reaches every bit of the result."""
    x = (x ^ shifted(x, 30)) * FACTORS[0]
    x = (x ^ shifted(x, 27)) * FACTORS[1]
    return x ^ shifted(x, 31)


def hashed(*values):
    """The hash of values in their order, int64: whole numbers, texts, int64 tensors (broadcast)."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    device = tensors[0].device if tensors else "cpu"
    h = torch.zeros((), dtype=torch.int64, device=device)
    for value in values:
        if isinstance(value, str):
            value = zlib.crc32(value.encode())
        h = mix(h + value + GOLDEN)
    return h


def uniform(*values):
    """Numbers in [0, 1) for these values, which are as in `hashed`: float64."""
    return shifted(hashed(*values), 11).double() / 2**53


# ---- the order of the items ------------------------------------------------------------------

def items_at(count, seed, positions):
    """The items at places of the endless sequence of `count` items: int64 [n] -> int64 [n].

    Each stretch of `count` places, an epoch, holds every item once, in another order. The order is
    a Feistel network (Luby & Rackoff 1988): it maps the numbers below 4^k one to one, and a number
    that comes out too large goes in again until it is below `count`.
    """
    epoch = positions // count
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = 2**half - 1

    def encrypt(x):
        left, right = x >> half, x & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (hashed(seed, epoch, turn, right) & low)
        return (left << half) | right

    items = encrypt(positions % count)
    while (items >= count).any():
        items = torch.where(items >= count, encrypt(items), items)
    return items


# ---- the random numbers of a batch -----------------------------------------------------------

class Dice:
    """Random numbers for the examples at `positions` [B] of a step's batch.

    step: int64 tensor [], which a CUDA graph reads; positions: int64 [B], those of all processes
    together count from 0. Each draw is named: the same name gives the same numbers again.
    """

    def __init__(self, seed, step, positions):
        self.key = hashed(seed, step, positions)  # [B]

    def bits(self, name, count):
        """Hashes: int64 [B, count]."""
        each = torch.arange(count, device=self.key.device)
        return hashed(name, self.key[:, None], each)

    def uniform(self, name, shape=()):
        """Numbers in [0, 1): float32 [B, *shape]."""
        bits = self.bits(name, math.prod(shape)).view(-1, *shape)
        return shifted(bits, 40).float() / 2**24

    def below(self, name, count):
        """One whole number per example below `count`, a number or int64 [B]: int64 [B]."""
        return shifted(self.bits(name, 1)[:, 0], 32) * count >> 32

    def normal(self, name, shape):
        """Numbers from N(0, 1): float32 [B, *shape].

        Two from each hash, whose halves are a radius and an angle (Box & Muller 1958).
        """
        size = math.prod(shape)
        bits = self.bits(name, (size + 1) // 2)
        u = (shifted(bits, 32).float() + 0.5) / 2**32
        angle = (bits & (2**32 - 1)).float() * (2 * math.pi / 2**32)
        radius = torch.sqrt(-2 * torch.log(u))
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return both[:, :size].unflatten(1, shape)
