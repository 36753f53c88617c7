"""What every refusal must be: complaints that say something, in text that a terminal does not obey."""

from __future__ import annotations

from paramdelta.errors import InputError


def check(error: InputError) -> None:
    """Check the complaints of a refusal."""
    assert error.complaints
    assert all(c.subject and c.problem for c in error.complaints)
    assert str(error).replace("\n", "").isprintable(), "a complaint that a terminal would obey"
