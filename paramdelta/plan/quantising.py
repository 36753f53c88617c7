"""What a plan decides about quantised checkpoints beside the arithmetic: which are accepted, where calibration
statistics come from, and the quantisation config of the output."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paramdelta.checkpoint import Checkpoint, Quantisation, recognise
from paramdelta.errors import Complaint, shown
from paramdelta.plan.choice import Stored, unquantised_modules
from paramdelta.plan.naming import Names, grouped
from paramdelta.plan.pairing import Pairing
from paramdelta.plan.quantconfig import output_config
from paramdelta.plan.request import MergeRequest

HF_QUANT_CONFIG = "hf_quant_config.json"
KEYS = ("quantization_config", "compression_config")
# Fields beside the quantisation config that repeat what the headers say.
_ECHOES = ("expert_dtype",)
# Calibration of what goes into a module; other statistics are about what comes out, or the key-value cache.
_INPUT_STATISTICS = (
    *(".input_scale", ".activation_scale", ".input_global_scale", ".input_scale_ub", ".activation_scale_ub"),
    *(".qscale_act", ".activation_scale_inv", ".input_scale_inv", ".input_zero_point", "_input_scale"),
)

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """What the output's configs say about quantisation. ``kept``: what new_base's say, byte for byte; else ``config``
    goes to ``place`` in config.json, ``document`` is hf_quant_config.json, and None stands for nothing. ``echoes`` are
    fields of config.json that follow."""

    kept: bool
    config: Config | None = None
    place: str = "config.json"
    document: Config | None = None
    echoes: Config | None = None

    def applied(self, config: Config) -> Config:
        """Return a config.json with its quantisation config replaced."""
        if self.kept:
            return config
        made = copy.deepcopy(config)
        for level in _levels(made):
            for key in (*KEYS, *_ECHOES):
                level.pop(key, None)
        made.update(self.echoes or {})
        if self.config is not None:
            level = made
            for key in self.place.partition(":")[2].split("."):
                nested = level.get(key)
                level = nested if isinstance(nested, dict) else level
            level[KEYS[0]] = self.config
        return made


def recognise_all(
    request: MergeRequest, checkpoints: Sequence[Checkpoint]
) -> tuple[list[Quantisation], list[Complaint]]:
    """Return what is quantised in each checkpoint, and every complaint."""
    found: list[Quantisation] = []
    wrong: list[Complaint] = []
    for checkpoint in checkpoints:
        quantisation, complaints = recognise(checkpoint, allow_unscaled=request.allow_unscaled)
        found.append(quantisation)
        wrong += complaints
    return found, wrong


def choose_statistics(
    request: MergeRequest, pairing: Pairing, stored: Stored, names: dict[str, Names], wrong: list[Complaint]
) -> list[tuple[str, int]]:
    """Return the calibration tensors of the output, as (role, row): those that the checkpoint whose config is followed
    has, from the donor that ``--activation-scales`` names. A weight that ``--no-quantise`` keeps plain has none."""
    like = stored.like
    if like is None or not any(stored.formats) or request.activation_scales == "drop":
        return []
    donor = names[request.activation_scales.replace("-", "_")]
    table, given = like.checkpoint.tensors, donor.checkpoint.tensors
    offered = {given.names[row]: row for row in donor.quantisation.statistics}
    spared = _spared(pairing, stored) if request.no_quantise else set()
    chosen, missing = [], []
    for row in like.quantisation.statistics:
        if _calibrated(table.names[row]) in spared:
            continue
        found = offered.get(table.names[row])
        if found is None or given.shapes[found] != table.shapes[row]:
            missing.append(table.names[row])
        else:
            chosen.append((donor.role, found))
    if missing:
        other = names["new_base" if donor.role == "post" else "post"]
        others = {other.checkpoint.tensors.names[row] for row in other.quantisation.statistics}
        option = f"--activation-scales {other.role.replace('_', '-')} takes them from there; "
        wrong.append(
            Complaint(
                str(donor.checkpoint.path),
                f"{donor.role} lacks {len(missing):,} scales of activations or of the cache that {like.role} has:"
                f"{grouped(missing)}",
                f"{option if others.issuperset(missing) else ''}--activation-scales drop leaves them out, and the "
                "config says dynamic",
            )
        )
        return [(like.role, row) for row in like.quantisation.statistics]  # what follows from it is not said again
    return chosen


def _spared(pairing: Pairing, stored: Stored) -> set[str]:
    """Return the modules whose weights are plain in the output."""
    return {n.removesuffix(".weight") for n, f in zip(pairing.names, stored.formats, strict=True) if f is None}


def _calibrated(statistic: str) -> str:
    """Return the module whose input a calibration tensor is about; an empty string where it is about anything else."""
    suffix = next((s for s in _INPUT_STATISTICS if statistic.endswith(s)), None)
    return "" if suffix is None else statistic.removesuffix(suffix)


def choose_config(
    request: MergeRequest,
    pairing: Pairing,
    stored: Stored,
    names: dict[str, Names],
    statistics: list[tuple[str, int]],
    wrong: list[Complaint],
) -> QuantConfig:
    """Return the quantisation config of the output: new_base's own where every tensor is stored as there."""
    new_base = names["new_base"]
    formats = [f for f in stored.formats if f is not None]
    if not formats:
        return QuantConfig(kept=new_base.quantisation.method is None and not new_base.checkpoint.zeros)
    added = [] if stored.like is None else _added(pairing, stored, stored.like)
    dropped = bool(new_base.quantisation.statistics) and not statistics
    alike = stored.like is not None and _same_config(stored.like, new_base)
    if alike and not dropped and not added and _as_new_base(pairing, stored, new_base):
        return QuantConfig(kept=True)
    like = None if stored.like is None else stored.like.quantisation
    try:
        config, document = output_config(
            formats,
            ignored=unquantised_modules(pairing, stored.formats, new_base.checkpoint.tied is not False),
            added=added,
            source=like,
            dynamic=not statistics or like is None or like.dynamic,
            cached=bool(statistics) or like is None or not like.statistics,
        )
    except ValueError as error:
        wrong.append(Complaint("--format", shown(str(error)), "--format bf16 needs no such config"))
        return QuantConfig(kept=True)
    source = stored.like.checkpoint.config if stored.like is not None else {}
    experts = "fp4" if any(f.name == "mxfp4" for f in dict.fromkeys(formats)) else "fp8"
    return QuantConfig(
        kept=False,
        config=config,
        place=like.config_place if like is not None and like.config_place.startswith("config.json") else "config.json",
        document=document,
        echoes={key: experts for key in _ECHOES if key in source},
    )


def _added(pairing: Pairing, stored: Stored, like: Names) -> list[str]:
    """Return the unquantised modules that the checkpoint whose config is followed does not have plain."""
    rows = {"post": pairing.post, "base": pairing.base, "new_base": pairing.new_base}[like.role]

    def plain_there(i: int) -> bool:
        row = rows[i] if rows[i] >= 0 else like.rows.get(pairing.names[i], -1)
        return row >= 0 and row not in like.weights

    return unquantised_modules(pairing, stored.formats, False, plain_there)


def _same_config(like: Names, new_base: Names) -> bool:
    """Whether two checkpoints have the same quantisation config in the same place."""
    a, b = like.quantisation, new_base.quantisation
    return like is new_base or (a.config_place == b.config_place and a.config == b.config)


def _as_new_base(pairing: Pairing, stored: Stored, new_base: Names) -> bool:
    """Whether every tensor is stored in the format that new_base has for that name."""
    for name, row, format_ in zip(pairing.names, pairing.new_base, stored.formats, strict=True):
        weight = new_base.weights.get(row if row >= 0 else new_base.rows.get(name, -1))
        if (weight.format if weight is not None else None) != format_:
            return False
    return True


def _levels(config: Config) -> list[Config]:
    """Return a config and those it nests."""
    nested = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)]
    return [config, *(level for value in nested if not _is_quantisation(value) for level in _levels(value))]


def _is_quantisation(config: Config) -> bool:
    return "quant_method" in config or "quant_algo" in config or "config_groups" in config
