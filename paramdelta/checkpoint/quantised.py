"""Quantised formats that no merge can treat: how they are recognised, why they are refused, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable

from paramdelta.checkpoint.folder import Checkpoint
from paramdelta.dtypes import BY_NAME
from paramdelta.errors import Complaint, shown

_FROM_SOURCE = "use the checkpoint it was made from"
_RESAVE = "use the checkpoint it was made from, or dequantise it with its own library"

# quant_method: (why differences of its codes mean nothing or cannot be formed, what to do)
HOPELESS: dict[str, tuple[str, str]] = {
    "gptq": ("its codes fit one set of scales and zero points", _FROM_SOURCE),
    "awq": ("it folds a smoothing scale into other layers", _FROM_SOURCE),
    "bitsandbytes": ("its codes are blocks of one release of one library", _FROM_SOURCE),
    "aqlm": ("its codes point into code books", _FROM_SOURCE),
    "vptq": ("its codes point into code books", _FROM_SOURCE),
    "gguf": ("its blocks mix several code books", _FROM_SOURCE),
    "hqq": ("its zero points were fitted to one set of weights", _FROM_SOURCE),
    "quanto": ("its codes are pickled by one library", _RESAVE),
    "torchao": ("its codes are tensor subclasses of one library", _RESAVE),
    "eetq": ("its codes are interleaved for one kernel", _FROM_SOURCE),
    "higgs": ("it rotates weights and its codes point into a grid", _FROM_SOURCE),
    "spqr": ("it keeps outliers apart from its codes", _FROM_SOURCE),
    "bitnet": ("ternary weights have no room for a difference", _FROM_SOURCE),
    "fp_quant": ("it rotates weights", _FROM_SOURCE),
    "auto-round": ("its codes were rounded to fit one set of weights", _FROM_SOURCE),
    "quark": ("its layouts are not known here", _RESAVE),
    "sinq": ("it scales rows and columns at once", _FROM_SOURCE),
    "quip": ("it rotates weights", _FROM_SOURCE),
    "exl2": ("it mixes code widths within a tensor", _FROM_SOURCE),
    "exl3": ("it rotates weights", _FROM_SOURCE),
}
_ALIASES = {"bnb": "bitsandbytes", "awq_marlin": "awq", "gptq_marlin": "gptq", "auto_round": "auto-round"}

_BYTES = frozenset(BY_NAME[name].code for name in ("u8", "i8", "i32", "u32", "f8_e4m3"))
# Suffixes of tensors that hold codes of such a format, or lie beside them.
_CODES = {
    ".qweight": "gptq",
    ".qzeros": "gptq",
    ".weight_g_idx": "gptq",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
}
_SPOKEN = {"gptq": "GPTQ or AWQ"}
_BESIDE = (".absmax", ".SCB", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".weight_g_idx")


def hopeless(method: str) -> tuple[str, str] | None:
    """Return why a quantisation method cannot be merged and what to do, None for one that is not in the list."""
    name = method.lower()
    return HOPELESS.get(_ALIASES.get(name, name))


def refusal(checkpoint: Checkpoint, what: str, why: str, remedy: str) -> Complaint:
    """Return the complaint about a checkpoint whose codes cannot be merged."""
    return Complaint(
        str(checkpoint.path),
        f"{checkpoint.role} is quantised: {what}. Differences of such codes mean nothing: {why}",
        remedy,
    )


def hopeless_codes(checkpoint: Checkpoint, low_bit: Iterable[int]) -> tuple[str, Complaint] | None:
    """Return what it is and the complaint where the tensors alone give such a format away. ``low_bit`` are the rows of
    codes: where there are none, names do not matter."""
    table = checkpoint.tensors
    if not any(int(table.dtype[row]) in _BYTES for row in low_bit):
        return None
    suffixes = tuple(_CODES)
    for name in table.names:
        if not name.endswith(suffixes):
            continue
        suffix = next(s for s in suffixes if name.endswith(s))
        coded = _coded_by(name, suffix) if suffix in _BESIDE else name
        if coded in table and int(table.dtype[table.row(coded)]) in _BYTES:
            method = _CODES[suffix]
            why, remedy = HOPELESS[method]
            words = f"{_SPOKEN.get(method, method)} (tensor {shown(name)})"
            return words, refusal(checkpoint, words, why, remedy)
    return None


def _coded_by(name: str, suffix: str) -> str:
    """Return the name of the codes that a tensor of statistics belongs to."""
    stem = name.removesuffix(suffix)
    return {".SCB": f"{stem}.weight", ".weight_g_idx": f"{stem}.weight_packed"}.get(suffix, stem)
