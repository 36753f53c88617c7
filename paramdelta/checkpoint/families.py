"""The known quantised formats: what each family stores for a weight, and the formats that an output can be given."""

from __future__ import annotations

from collections.abc import Callable

from paramdelta.formats import Format

OUTPUT_FORMATS: dict[str, Callable[..., Format]] = {}


def output_format(name: str, *, block: tuple[int, int] | None = None, scale: str | None = None) -> Format:
    """Return the format that ``--format`` names; ValueError says what does not fit together."""
    raise ValueError(f"{name!r} is not a format of an output")
