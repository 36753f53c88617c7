"""What happened at the same time, read from a trace of PyTorch's profiler: copies in both directions, and kernels."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

KINDS = ("up", "down", "kernels")
Interval = tuple[float, float]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace in Chrome's format, compressed or not."""
    data = path.read_bytes()
    content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return list(content["traceEvents"] if isinstance(content, dict) else content)


def kind_of(event: dict[str, Any]) -> str | None:
    """Return what the device did in an event: ``up`` (host to device), ``down``, ``kernels``, or None."""
    if event.get("ph") != "X" or "dur" not in event:
        return None
    category = str(event.get("cat", "")).lower()
    name = str(event.get("name", ""))
    if category == "kernel":
        return "kernels"
    if "memcpy" in category:
        return "up" if "HtoD" in name else "down" if "DtoH" in name else None
    return None


def intervals(events: Iterable[dict[str, Any]]) -> dict[str, list[Interval]]:
    """Return when the device did each kind of work, in seconds: disjoint, in order."""
    found: dict[str, list[Interval]] = {kind: [] for kind in KINDS}
    for event in events:
        kind = kind_of(event)
        if kind is not None:
            start = float(event["ts"]) / 1e6
            found[kind].append((start, start + float(event["dur"]) / 1e6))
    return {kind: union(each) for kind, each in found.items()}


def union(spans: Sequence[Interval]) -> list[Interval]:
    """Return the same time as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def common(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Return the time that two lists of disjoint intervals share."""
    found: list[Interval] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(spans: Sequence[Interval]) -> float:
    """Return the seconds of disjoint intervals."""
    return sum(end - start for start, end in spans)


def overlaps(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of each kind of work, of each pair at once, of all three at once, and from first to last."""
    found = intervals(events)
    up, down, kernels = (found[kind] for kind in KINDS)
    both = common(up, down)
    every = [span for spans in found.values() for span in spans]
    return {
        **{kind: length(spans) for kind, spans in found.items()},
        "up_down": length(both),
        "up_kernels": length(common(up, kernels)),
        "down_kernels": length(common(down, kernels)),
        "all": length(common(both, kernels)),
        "span": max((end for _, end in every), default=0.0) - min((start for start, _ in every), default=0.0),
    }
