"""The quantisation config of an output: what loaders must read to find its codes and scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paramdelta.checkpoint.weights import Quantisation
from paramdelta.formats import Format

Config = dict[str, Any]


def output_config(
    formats: Sequence[Format], *, ignored: Sequence[str], source: Quantisation | None, dynamic: bool
) -> tuple[Config | None, Config | None]:
    """Return (``quantization_config`` for config.json, content of hf_quant_config.json), None where there is none.

    ``formats`` are those of the output's quantised weights, ``ignored`` the modules that are not quantised, ``source``
    the input whose config is followed where it has the same method, ``dynamic`` whether activations are scaled as they
    come. Raises ValueError where the formats have no config in common.
    """
    return None, None
