"""What the numbers suggest, in words that name the numbers and the thresholds. docs/analysis.md argues each
threshold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paramdelta.analysis.measures import DeltaMeasures, Group, Tensor
from paramdelta.errors import shown
from paramdelta.plan.naming import EMBEDDINGS, is_head
from paramdelta.plan.order import CLOSER, judge_order

# Weights of one family point the same way: fine-tuning moves them by percents, and unrelated ones are orthogonal.
SAME_FAMILY = 0.5
# A delta is added to first order around base; half of base's own length away, little of that is left.
FAR_DRIFT = 0.5
LONG_DRIFT = 10.0  # times the delta
ALONG_DRIFT = 0.3  # cosine: a tenth of the delta's square is in the drift already
SIMILAR = 0.9  # cosine of two deltas
OPPOSED = -0.1
# Chance alone puts two directions among n elements within a few √(1/n), far below either, from a million elements on.
FEWEST = 10_000  # elements, below which cosines say little
LOW_RANK = 0.9  # of ‖A‖_F² in the singular values that were computed
LOW_RANK_SIDES = 8  # times as many rows and columns as these
OTHER_TOKENS = 0.01  # of the tokens both have

Weight = Literal["problem", "caution", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing the numbers suggest. ``weight``: ``problem`` (the merge would make no sense), ``caution`` (it may be
    worse than hoped), ``note``. ``numbers`` are what it rests on, thresholds included."""

    code: str
    weight: Weight
    text: str
    delta: int | None  # from 0; None: about all
    numbers: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values; deltas are numbered from 1."""
        delta = None if self.delta is None else self.delta + 1
        return {
            "code": self.code,
            "weight": self.weight,
            "delta": delta,
            "text": self.text,
            "numbers": self.numbers,
        }


def findings_of(
    total: Group, layers: Sequence[Group], modules: Sequence[Group], tensors: Sequence[Tensor]
) -> tuple[Finding, ...]:
    """Return what the measures suggest, of each delta and between them; problems first."""
    found: list[Finding] = []
    for k, delta in enumerate(total.deltas):
        if delta is not None:
            found += _of_delta(k, delta, layers, modules, tensors)
    found += _between(total)
    return in_order(found)


def in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return findings, problems first, notes last."""
    order = ("problem", "caution", "note")
    return tuple(sorted(findings, key=lambda f: order.index(f.weight)))


def _of_delta(
    k: int, delta: DeltaMeasures, layers: Sequence[Group], modules: Sequence[Group], tensors: Sequence[Tensor]
) -> Iterator[Finding]:
    def finding(code: str, weight: Weight, text: str, **numbers: float | None) -> Finding:
        given = {name: value for name, value in numbers.items() if value is not None}
        return Finding(code=code, weight=weight, text=text, delta=k, numbers=given)

    if delta.nonfinite:
        names = [t.name for t in tensors if (d := t.deltas[k]) is not None and d.nonfinite]
        yield finding(
            "nonfinite",
            "problem",
            f"{delta.nonfinite:,} elements of post − base are NaN or infinite, in {_listed(names)}; they are left out "
            "of every sum",
            nonfinite=delta.nonfinite,
        )
    if delta.delta_squared == 0.0:
        yield finding(
            "zero-delta", "problem", "post and base hold the same values: there is no delta", elements=delta.elements
        )
        return
    yield from _order(finding, delta)
    yield from _family(finding, delta)
    yield from _drift(finding, delta)
    yield from _reach(finding, k, layers, modules, tensors)
    yield from _rank(finding, k, tensors)


def _order(finding: Any, delta: DeltaMeasures) -> Iterator[Finding]:
    nearer = delta.post_to_new_base_squared
    if nearer is not None and nearer < CLOSER * delta.delta_squared:
        text = judge_order(delta.delta_squared, nearer, delta.base_squared, "over all tensors")
        sizes = {"post_to_new_base_squared": nearer, "delta_squared": delta.delta_squared}
        yield finding("operand-order", "problem", text, **sizes, threshold=CLOSER)


def _family(finding: Any, delta: DeltaMeasures) -> Iterator[Finding]:
    for code, cosine, who, cost in (
        ("other-family", delta.cosine_post_base, "post", "the delta is no fine-tuning of this base"),
        ("other-new-base", delta.cosine_new_base_base, "new_base", "a delta means nothing there"),
    ):
        if cosine is not None and cosine < SAME_FAMILY:
            moved = delta.relative_norm if who == "post" else delta.relative_drift
            yield finding(
                code,
                "problem",
                f"{who} and base do not look like one family: the cosine between their weights is {cosine:.2f} "
                f"(unrelated models: near 0; threshold {SAME_FAMILY}) and ‖{who} − base‖ is {_percent(moved)} of "
                f"‖base‖: {cost}",
                cosine=cosine,
                relative_norm=moved,
                threshold=SAME_FAMILY,
            )


def _drift(finding: Any, delta: DeltaMeasures) -> Iterator[Finding]:
    away, times, along = delta.relative_drift, delta.drift_to_delta, delta.cosine_to_drift
    if away is None or times is None:
        return
    if away > FAR_DRIFT:
        yield finding(
            "far-drift",
            "caution",
            f"new_base lies far from base: ‖new_base − base‖ is {_percent(away)} of ‖base‖ (threshold "
            f"{_percent(FAR_DRIFT)}); transfer is likely to be weak",
            relative_drift=away,
            threshold=FAR_DRIFT,
        )
    elif times > LONG_DRIFT:
        yield finding(
            "long-drift",
            "caution",
            f"new_base has moved {times:.3g} times as far from base as post has (threshold {LONG_DRIFT:g}): the delta "
            "was learnt at a place that is far away by its own measure, so that transfer may be weak; try it",
            drift_to_delta=times,
            threshold=LONG_DRIFT,
        )
    if along is not None and along > ALONG_DRIFT and delta.elements >= FEWEST:
        yield finding(
            "along-drift",
            "caution",
            f"new_base has moved along the delta (cosine {along:.2f}, threshold {ALONG_DRIFT}): it may have learnt "
            "part of what the delta adds; a smaller alpha may do better",
            cosine=along,
            threshold=ALONG_DRIFT,
        )


def _reach(
    finding: Any, k: int, layers: Sequence[Group], modules: Sequence[Group], tensors: Sequence[Tensor]
) -> Iterator[Finding]:
    """Say which parts of the model the delta leaves alone."""
    there = [t for t in tensors if t.deltas[k] is not None]
    moved = [t for t in there if _moves(t, k)]
    if moved and all(len(t.shape) < 2 for t in moved) and len(moved) < len(there):
        yield finding(
            "vectors-only",
            "note",
            f"only norms and biases differ ({len(moved):,} of {len(there):,} tensors): no matrix was trained",
            moved=len(moved),
            tensors=len(there),
        )
    numbered = {t.place.layer_name for t in there if t.place.layer is not None}
    still = [g.name for g in layers if g.name in numbered and not _moves(g, k)]
    if still and len(still) < len(numbered):
        yield finding(
            "some-layers",
            "note",
            f"{len(still):,} of {len(numbered):,} layers are untouched: {_listed(still)}",
            untouched=len(still),
            layers=len(numbered),
        )
    kept = [g.name for g in modules if g.deltas[k] is not None and not _moves(g, k)]
    embeddings = [t.name for t in there if not _moves(t, k) and (_is_embedding(t.name) or is_head(t.name))]
    if embeddings:
        yield finding(
            "embeddings-untouched",
            "note",
            f"embeddings are untouched: {_listed(embeddings)}",
            untouched=len(embeddings),
        )
    kept = [name for name in kept if name not in {t.place.module for t in tensors if t.name in embeddings}]
    if kept:
        yield finding(
            "some-modules",
            "note",
            f"these types of module are untouched: {_listed(kept)}",
            untouched=len(kept),
            modules=len(modules),
        )


def _rank(finding: Any, k: int, tensors: Sequence[Tensor]) -> Iterator[Finding]:
    looked = [(t, s) for t in tensors for s in t.spectra if s.delta == k and s.energy is not None]
    large = [(t, s) for t, s in looked if min(t.shape) >= LOW_RANK_SIDES * len(s.values)]
    low = [t.name for t, s in large if (s.energy or 0.0) >= LOW_RANK]
    if low and 2 * len(low) > len(large):
        count = len(next(s for t, s in large if t.name in low).values)
        yield finding(
            "low-rank",
            "note",
            f"the delta has low rank, as of LoRA: in {len(low):,} of {len(large):,} matrices that differ {count} "
            f"singular values hold at least {_percent(LOW_RANK)} of the squared norm",
            low=len(low),
            matrices=len(large),
            threshold=LOW_RANK,
        )


def _between(total: Group) -> Iterator[Finding]:
    for i, j in sorted(total.inner):
        cosine, pair = total.cosine(i, j), f"deltas {i + 1} and {j + 1}"
        enough = all(d is not None and d.elements >= FEWEST for d in (total.deltas[i], total.deltas[j]))
        if cosine is None or not enough:
            continue
        if cosine > SIMILAR:
            text = f"{pair} are nearly the same (cosine {cosine:.2f}, threshold {SIMILAR}): their sum counts it twice"
            yield Finding(code="same-deltas", weight="caution", text=text, delta=None, numbers={"cosine": cosine})
        elif cosine < OPPOSED:
            text = f"{pair} point against each other (cosine {cosine:.2f}, threshold {OPPOSED}): they cancel in part"
            yield Finding(code="opposed-deltas", weight="caution", text=text, delta=None, numbers={"cosine": cosine})


def _moves(group: Group, k: int) -> bool:
    delta = group.deltas[k]
    return delta is not None and (delta.unchanged < delta.elements)


def _is_embedding(name: str) -> bool:
    return any(name.endswith(ending) for ending in EMBEDDINGS)


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(shown(name) for name in names[:4])
    return text + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")


def _percent(fraction: float | None) -> str:
    return "?" if fraction is None else f"{100 * fraction:.3g} %"
