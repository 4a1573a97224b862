"""What was found under one path, before anybody trains."""
from dataclasses import dataclass, field

from .shards import printable

# More than this share of bad pictures stops a run.
MOST_BAD = 0.05


def full_name(path, name):
    """What reports call a member: the path that was searched and its name below that, or path."""
    return printable("/".join(part for part in (path.rstrip("/"), name) if part))


@dataclass
class Found:
    """What lies under one path: for a report, and to decide whether it can be trained on."""
    path: str
    kind: str                     # "objects" or "images"
    layout: str = ""              # in words: "transforms.json", "picture + .npy", "tar shards", …
    convention: str = ""          # of the matrices, in words; of objects only
    up: str = ""                  # the world axis that is up in the files: "z", "y", …
    items: int = 0                # objects or images that can be used, as far as was looked
    pictures: int = 0             # pictures of these
    views: float = 0              # of an object, on the average
    fill: float | None = None     # how far an object reaches from the middle; 1: to the border
    cut: bool = False             # whether less than the whole picture is taken, as fill is small
    left_out: list = field(default_factory=list)  # (full name, reason, how many pictures that is)

    def leave_out(self, name, reason, pictures=1):
        """Count a member that cannot be used. name: below the path; "" for the path itself."""
        self.left_out.append((full_name(self.path, name), reason, pictures))

    def line(self):
        """All that in one line."""
        parts = [f"{self.path}: {self.items} {self.kind}", self.layout, self.convention]
        if self.up and self.up != "z":
            parts.append(f"turned, as {self.up} was up")
        if self.left_out:
            parts.append(f"{len(self.left_out)} left out")
        return ", ".join(part for part in parts if part)
