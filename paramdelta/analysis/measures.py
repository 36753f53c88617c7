"""What an analysis says of a tensor, a layer, a type of module or a whole checkpoint: sums, and the ratios made of
them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from paramdelta.analysis.passing import TensorSums, added

_WEIGHT = re.compile(r"\.weight$")


@dataclass(frozen=True, kw_only=True)
class DeltaMeasures:
    """One delta, post − base, in some tensors. Sums run over the elements compared, those left out whose difference is
    not finite.

    ``delta_squared`` is ‖post − base‖², ``base_squared`` ‖base‖², ``delta_base`` ⟨post − base, base⟩. With a new base,
    ``drift_squared`` is ‖new_base − base‖², ``drift_base`` and ``delta_drift`` are the inner products of the drift with
    base and with the delta; without one, None. ``largest`` is the largest |post − base|.
    """

    elements: int
    unchanged: int  # bit-equal; where the types differ, of equal value
    nonfinite: int
    delta_squared: float
    base_squared: float
    delta_base: float
    drift_squared: float | None
    drift_base: float | None
    delta_drift: float | None
    largest: float

    @property
    def norm(self) -> float:
        """‖post − base‖."""
        return _root(self.delta_squared)

    @property
    def base_norm(self) -> float:
        """‖base‖."""
        return _root(self.base_squared)

    @property
    def relative_norm(self) -> float | None:
        """‖post − base‖ / ‖base‖, None where base is zero."""
        return _quotient(self.norm, self.base_norm)

    @property
    def unchanged_fraction(self) -> float | None:
        """Bit-equal elements of all, None where there are none."""
        return _quotient(float(self.unchanged), float(self.elements))

    @property
    def drift_norm(self) -> float | None:
        """‖new_base − base‖."""
        return None if self.drift_squared is None else _root(self.drift_squared)

    @property
    def relative_drift(self) -> float | None:
        """‖new_base − base‖ / ‖base‖."""
        return None if self.drift_norm is None else _quotient(self.drift_norm, self.base_norm)

    @property
    def drift_to_delta(self) -> float | None:
        """‖new_base − base‖ / ‖post − base‖, None where the delta is zero."""
        return None if self.drift_norm is None else _quotient(self.drift_norm, self.norm)

    @property
    def cosine_to_drift(self) -> float | None:
        """The cosine of the angle between delta and drift, None where either is zero."""
        if self.delta_drift is None or self.drift_squared is None:
            return None
        return cosine(self.delta_drift, self.delta_squared, self.drift_squared)

    @property
    def cosine_post_base(self) -> float | None:
        """The cosine of the angle between the weights of post and of base."""
        return _cosine_moved(self.base_squared, self.delta_base, self.delta_squared)

    @property
    def cosine_new_base_base(self) -> float | None:
        """The cosine of the angle between the weights of new_base and of base."""
        if self.drift_base is None or self.drift_squared is None:
            return None
        return _cosine_moved(self.base_squared, self.drift_base, self.drift_squared)

    @property
    def post_to_new_base_squared(self) -> float | None:
        """‖post − new_base‖² = ‖delta‖² + ‖drift‖² − 2 ⟨delta, drift⟩; cancellation costs digits where the two are
        nearly equal."""
        if self.drift_squared is None or self.delta_drift is None:
            return None
        return max(self.delta_squared + self.drift_squared - 2.0 * self.delta_drift, 0.0)

    RATIOS = (
        "norm", "base_norm", "relative_norm", "unchanged_fraction", "drift_norm", "relative_drift", "drift_to_delta",
        "cosine_to_drift", "cosine_post_base", "cosine_new_base_base",
    )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return sums and ratios as JSON-ready values; what is not finite is null."""
        names = [f.name for f in fields(self)] + list(self.RATIOS)
        return {name: _plain(getattr(self, name)) for name in names}

    @classmethod
    def of(cls, sums: TensorSums, k: int) -> DeltaMeasures:
        """Return the measures of delta ``k`` in a tensor."""
        products, facts = sums.products(), sums.facts[k]

        def product(what: str) -> float | None:
            return products.get((what, k, k))

        return cls(
            elements=facts.elements,
            unchanged=facts.unchanged,
            nonfinite=facts.nonfinite,
            delta_squared=products["delta", k, k],
            base_squared=products["base", k, k],
            delta_base=products["delta_base", k, k],
            drift_squared=product("drift"),
            drift_base=product("drift_base"),
            delta_drift=product("delta_drift"),
            largest=facts.largest,
        )

    @classmethod
    def total(cls, parts: Iterable[DeltaMeasures]) -> DeltaMeasures:
        """Return the measures of several tensors together; sums are correctly rounded, so that no order matters."""
        parts = list(parts)
        drift = all(p.drift_squared is not None for p in parts)

        def summed(name: str) -> float:
            return added([getattr(p, name) for p in parts])

        return cls(
            elements=sum(p.elements for p in parts),
            unchanged=sum(p.unchanged for p in parts),
            nonfinite=sum(p.nonfinite for p in parts),
            delta_squared=summed("delta_squared"),
            base_squared=summed("base_squared"),
            delta_base=summed("delta_base"),
            drift_squared=summed("drift_squared") if drift else None,
            drift_base=summed("drift_base") if drift else None,
            delta_drift=summed("delta_drift") if drift else None,
            largest=max((p.largest for p in parts), default=0.0),
        )


class Place(NamedTuple):
    """Where a tensor stands in a model, read off its name: the stack of layers it is in, the layer, the module."""

    stack: str
    layer: int | None
    module: str

    @property
    def layer_name(self) -> str:
        """``model.layers.3``; for what is in no layer, its own name."""
        return self.module if self.layer is None else f"{self.stack}.{self.layer}".lstrip(".")


def place_of(name: str) -> Place:
    """Return where a tensor stands: the first number in a dotted name is its layer, later ones count as any (experts).

    ``model.layers.3.mlp.experts.7.up_proj.weight`` is in layer 3 of ``model.layers``, module ``mlp.experts.*.up_proj``.
    """
    parts = _WEIGHT.sub("", name).split(".")
    numbers = [i for i, part in enumerate(parts) if part.isascii() and part.isdecimal() and len(part) < 10]
    if not numbers:
        return Place("", None, ".".join(parts))
    first = numbers[0]
    rest = ["*" if i in numbers else part for i, part in enumerate(parts)][first + 1 :]
    return Place(".".join(parts[:first]), int(parts[first]), ".".join(rest) or "weight")


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The largest singular values of the delta matrix of a tensor, the largest first.

    ``error`` bounds how far each is from a singular value of the matrix as it is in binary32, rounding aside; 0 where
    all were computed. ``stable_rank`` is ‖A‖_F² / ‖A‖₂².
    """

    delta: int
    values: tuple[float, ...]
    error: float
    frobenius_squared: float

    @property
    def stable_rank(self) -> float | None:
        """‖A‖_F² / ‖A‖₂², None for a matrix of zeros."""
        return _quotient(self.frobenius_squared, self.values[0] ** 2) if self.values else None

    @property
    def energy(self) -> float | None:
        """The part of ‖A‖_F² that the given singular values hold."""
        return _quotient(math.fsum(v * v for v in self.values), self.frobenius_squared)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return {
            "delta": self.delta + 1,
            "stable_rank": _plain(self.stable_rank),
            "singular_values": [_plain(v) for v in self.values],
            "error": _plain(self.error),
            "energy": _plain(self.energy),
        }


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some tensors together. ``deltas`` are the measures of each delta, None where it reaches none of them; ``inner``
    is ⟨delta i, delta j⟩ for i < j."""

    name: str
    tensors: int
    deltas: tuple[DeltaMeasures | None, ...]
    inner: dict[tuple[int, int], float] = field(default_factory=dict)

    def cosine(self, i: int, j: int) -> float | None:
        """Return the cosine of the angle between two deltas, numbered from 0; None where either is zero or absent."""
        a, b = self.deltas[i], self.deltas[j]
        if a is None or b is None:
            return None
        inner = a.delta_squared if i == j else self.inner.get((min(i, j), max(i, j)))
        return None if inner is None else cosine(inner, a.delta_squared, b.delta_squared)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values; deltas are numbered from 1."""
        return {
            "name": self.name,
            "tensors": self.tensors,
            "deltas": [None if d is None else d.to_dict() for d in self.deltas],
            "cosines": [{"deltas": [i + 1, j + 1], "cosine": _plain(self.cosine(i, j))} for i, j in sorted(self.inner)],
        }


@dataclass(frozen=True, kw_only=True)
class Tensor(Group):
    """One tensor. ``where`` is the index of each delta's largest element, first of all in row-major order."""

    shape: tuple[int, ...]
    dtype: str  # new_base's, or the first base's without one
    place: Place
    where: tuple[tuple[int, ...] | None, ...]
    spectra: tuple[Spectrum, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        found = {key: value for key, value in super().to_dict().items() if key != "tensors"}
        return found | {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "layer": self.place.layer_name,
            "module": self.place.module,
            "largest_at": [None if at is None else list(at) for at in self.where],
            "spectra": [s.to_dict() for s in self.spectra],
        }


def gathered(name: str, tensors: Sequence[Tensor]) -> Group:
    """Return several tensors as one group. The inner product of two deltas is that of tensors that both reach; where
    one alone reaches a tensor, it is 0 there."""
    count = max((len(t.deltas) for t in tensors), default=0)
    deltas = []
    for k in range(count):
        parts = [d for t in tensors if (d := t.deltas[k]) is not None]
        deltas.append(DeltaMeasures.total(parts) if parts else None)
    pairs = sorted({pair for t in tensors for pair in t.inner})
    inner = {pair: added([t.inner[pair] for t in tensors if pair in t.inner]) for pair in pairs}
    return Group(name=name, tensors=len(tensors), deltas=tuple(deltas), inner=inner)


def cosine(inner: float, first_squared: float, second_squared: float) -> float | None:
    """Return ⟨a, b⟩ / (‖a‖ ‖b‖) within [−1, 1], None where either vector is zero."""
    found = _quotient(inner, _root(first_squared) * _root(second_squared))
    return None if found is None or math.isnan(found) else max(-1.0, min(1.0, found))


def _cosine_moved(start_squared: float, inner: float, step_squared: float) -> float | None:
    """Return the cosine between x and x + step, from ‖x‖², ⟨x, step⟩ and ‖step‖²."""
    end_squared = start_squared + 2.0 * inner + step_squared
    return cosine(start_squared + inner, start_squared, max(end_squared, 0.0))


def _root(squared: float) -> float:
    return math.sqrt(squared) if squared >= 0.0 else math.nan


def _quotient(a: float, b: float) -> float | None:
    return a / b if b != 0.0 else None


def _plain(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None
