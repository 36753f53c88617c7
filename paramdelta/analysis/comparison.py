"""What is summed up of a run of elements: which differences of its operands, which inner products of them, and what
each of the results means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Key = tuple[str, int, int]  # what, and of which deltas


@dataclass(frozen=True)
class Comparison:
    """The operands of a run, in this order: post of every delta there is, every different base, new_base if it is
    compared. Differences are the deltas, then drift (new_base − base) of every base, then the bases themselves."""

    deltas: tuple[int, ...]
    bases: tuple[int, ...]  # of each of these deltas, which of the different bases
    drift: bool

    @classmethod
    def of(cls, deltas: Sequence[int], base_of: Sequence[int], *, drift: bool) -> Comparison:
        """Compare ``deltas``, ``base_of`` saying which delta's base serves as each delta's."""
        used = sorted({base_of[k] for k in deltas})
        return cls(tuple(deltas), tuple(used.index(base_of[k]) for k in deltas), drift)

    @property
    def n_bases(self) -> int:
        """How many different bases there are."""
        return max(self.bases) + 1

    @property
    def n_operands(self) -> int:
        """How many operands are read."""
        return len(self.deltas) + self.n_bases + self.drift

    def differences(self) -> list[tuple[int, int]]:
        """Return (minuend, subtrahend) by number of operand, −1 for none."""
        n = len(self.deltas)
        found = [(at, n + base) for at, base in enumerate(self.bases)]
        if self.drift:
            found += [(n + self.n_bases, n + base) for base in range(self.n_bases)]
        return found + [(n + base, -1) for base in range(self.n_bases)]

    def products(self) -> dict[Key, tuple[int, int]]:
        """Return what each inner product is, and its two differences by number."""
        n = len(self.deltas)
        first_base = n + (self.n_bases if self.drift else 0)
        found: dict[Key, tuple[int, int]] = {}
        for at, (k, base) in enumerate(zip(self.deltas, self.bases, strict=True)):
            for other in range(at, n):
                found["delta", k, self.deltas[other]] = (at, other)
            found["delta_base", k, k] = (at, first_base + base)
            found["base", k, k] = (first_base + base, first_base + base)
            if self.drift:
                found["delta_drift", k, k] = (at, n + base)
                found["drift", k, k] = (n + base, n + base)
                found["drift_base", k, k] = (n + base, first_base + base)
        return found

    def sums(self) -> Any:
        """Return empty sums of this comparison, as the extension keeps them."""
        from paramdelta import _cpu

        products = list(dict.fromkeys(self.products().values()))
        return _cpu.GramSums(operands=self.n_operands, differences=self.differences(), products=products)

    def named(self, values: Sequence[float]) -> dict[Key, float]:
        """Return the inner products by what they are."""
        products = self.products()
        place = {pair: at for at, pair in enumerate(dict.fromkeys(products.values()))}
        return {key: values[place[pair]] for key, pair in products.items()}
