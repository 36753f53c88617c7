"""How a merge would be split among ranks, and the least time that storage, links and memory allow it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paramdelta.errors import Complaint, InputError
from paramdelta.plan import Plan
from paramdelta.shares import Share, Shares

LARGEST_WORLD = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Bytes per second, None where a speed is not known and does not count.

    ``read`` and ``write``: what the storage gives to all ranks together, both at once. ``link``: what the network of
    one node carries, in each direction. ``memory``: what the memory of one node carries, reads and writes together.
    ``ranks_per_node`` ranks, with neighbouring numbers, share a node.
    """

    read: int | None = None
    write: int | None = None
    link: int | None = None
    memory: int | None = None
    ranks_per_node: int = 1


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The split of a plan among ranks, and for each known speed the seconds below which the merge cannot stay."""

    shares: tuple[Share, ...]
    seam: Share
    bounds: Mapping[str, float]

    @property
    def seconds(self) -> float | None:
        """The lower bound of the time, None where no speed is known."""
        return max(self.bounds.values(), default=None)


def forecast(plan: Plan, world: int, speeds: Speeds | None = None) -> Forecast:
    """Split a plan among ``world`` ranks, as :func:`paramdelta.gathering.merge_part` does, and bound its time.

        seconds ≥ max(read_all / read, written_all / write, max over nodes of max(read, written) / link,
                      max over nodes of (read + written) / memory)

    Each byte crosses a link once, and memory at least once: where the page cache is used, or fast caches are small,
    it is more. What is read twice to find a scale counts twice.
    """
    speeds = speeds or Speeds()
    if not 1 <= world <= LARGEST_WORLD:
        raise InputError(Complaint("--ranks", f"expected 1 to {LARGEST_WORLD:,} ranks, got {world}"))
    if speeds.ranks_per_node < 1:
        raise InputError(Complaint("--ranks-per-node", f"expected at least 1, got {speeds.ranks_per_node}"))
    *shares, seam = Shares(plan.work, world).describe()
    read, written = (sum(getattr(share, name) for share in (*shares, seam)) for name in ("bytes_read", "bytes_written"))
    step = speeds.ranks_per_node
    nodes = [shares[i : i + step] for i in range(0, world, step)]
    moved = [(sum(s.bytes_read for s in node), sum(s.bytes_written for s in node)) for node in nodes]
    bytes_at = {
        "read": (read, speeds.read),
        "write": (written, speeds.write),
        "link": (max(max(pair) for pair in moved), speeds.link),
        "memory": (max(sum(pair) for pair in moved), speeds.memory),
    }
    bounds = {name: count / speed for name, (count, speed) in bytes_at.items() if speed}
    return Forecast(shares=tuple(shares), seam=seam, bounds=bounds)


def describe(plan: Plan, found: Forecast) -> dict[str, Any]:
    """Return a forecast as JSON-ready values."""
    names = [name for name, _ in plan.work.outputs]
    return {
        "ranks": len(found.shares),
        "parts": [_part(share, names) | {"rank": share.rank} for share in found.shares],
        "seam": _part(found.seam, names),
        "at_least_seconds": found.seconds,
        "bounds": dict(found.bounds),
    }


def _part(share: Share, names: list[str]) -> dict[str, Any]:
    return {
        "bytes_read": share.bytes_read,
        "bytes_written": share.bytes_written,
        "files": [names[i] for i in share.files],
    }
