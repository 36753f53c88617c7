"""The merge method ``paramdelta`` of mergekit: ``base_model + Σ alpha · (post − base)`` with this package's arithmetic.

Importing this module registers the method. mergekit looks for no plugins, so its own command does not import it;
``paramdelta-mergekit CONFIG OUT …``, or ``python -m`` with this module, registers, then runs mergekit's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from paramdelta import ops
from paramdelta.errors import Complaint, InputError, NonFiniteError, ParamDeltaError, shown

try:
    import torch
    from mergekit import merge_methods
    from mergekit.merge_methods.base import (
        BasePolicy,
        InputContract,
        MergeMethod,
        MergeMethodSpec,
        ParameterScope,
        ParameterSpec,
        TensorEntry,
        TensorGroup,
    )
except ImportError as error:
    _TEXT = f"mergekit 0.1.5 or later cannot be imported ({error})"
    raise ImportError(f"{_TEXT}: pip install 'paramdelta[mergekit]'") from error

NAME = "paramdelta"
ROLES = ("post", "base")


class Delta(NamedTuple):
    """One delta of a group: ``alpha · (post − base)``."""

    post: TensorEntry
    base: TensorEntry
    alpha: float


class ParamDeltaMerge(MergeMethod):  # type: ignore[misc]
    """``out = base_model + Σ_k alpha_k · (post_k − base_k)`` for one tensor, binary64 throughout, rounded once.

    Parameters of a model: ``role``, ``post`` (the default) or ``base``; ``alpha`` (default 1) of a post, with
    mergekit's filters and gradients. The k-th post goes with the k-th base; a single base goes with every post; without
    any, the deltas are taken against ``base_model``. A parameter of the merge: ``allow_nonfinite`` (default false).

    The result has base_model's dtype, or the configuration's ``dtype``, in which mergekit reads every tensor. Raises
    InputError where roles do not pair, NonFiniteError where a result is NaN, infinite or overflowed.
    """

    spec = MergeMethodSpec(
        name=NAME,
        pretty_name="ParamΔ",
        reference_url="https://arxiv.org/abs/2504.21023",
        contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        uses_accelerator=False,
        parameters=(
            ParameterSpec("role", str, ParameterScope.NON_BASE, default="post"),
            ParameterSpec("alpha", float, ParameterScope.NON_BASE, default=1.0),
            ParameterSpec("allow_nonfinite", bool, ParameterScope.SHARED, default=False),
        ),
    )

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: Any,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Merge each group from its inputs as they were read: casting them to one dtype first, and the result last, as
        mergekit does for other methods, would round more than once."""
        return tuple(self._merged(group, given, out_dtype) for group, given in zip(groups, parameters, strict=True))

    def _merged(self, group: TensorGroup, given: dict[str, Any], dtype: torch.dtype | None) -> torch.Tensor:
        new_base = group.base.tensor
        deltas = [
            (_operand(delta.post.tensor), _operand(delta.base.tensor), delta.alpha)
            for delta in paired(group, given["role"], given["alpha"])
        ]
        merged = ops.merge_deltas(_operand(new_base), deltas, dtype=dtype)
        if not merged.counts.clean and not given["allow_nonfinite"]:
            raise NonFiniteError(
                f"{shown(group.metadata.name)}: results that are not finite: {merged.counts.nan:,} NaN, "
                f"{merged.counts.inf:,} Inf, {merged.counts.overflow:,} overflow "
                "(the parameter allow_nonfinite: true lets them pass)"
            )
        out: torch.Tensor = merged.out
        return out.to(new_base.device)


def paired(group: TensorGroup, roles: Any, alphas: Any) -> list[Delta]:
    """Return the deltas of a group, in the order of its posts. Raises InputError where roles do not pair."""
    wrong = sorted({str(roles[entry.id]) for entry in group.non_base} - set(ROLES))
    posts = [entry for entry in group.non_base if roles[entry.id] == "post"]
    bases = [entry for entry in group.non_base if roles[entry.id] == "base"]
    if wrong:
        raise InputError(Complaint("role", f"expected post or base, got {shown(', '.join(wrong))}"))
    if not posts or len(bases) not in (0, 1, len(posts)):
        raise InputError(
            Complaint(
                "role",
                f"of the models, {len(posts)} are post and {len(bases)} are base, which makes no pairs",
                "list as many bases as posts, in the same order; one for all posts; or none, for base_model",
            )
        )
    against = bases if len(bases) == len(posts) else [bases[0] if bases else group.base] * len(posts)
    return [Delta(post, base, float(alphas[post.id])) for post, base in zip(posts, against, strict=True)]


def _operand(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()


def register() -> None:
    """Make ``merge_method: paramdelta`` known to mergekit in this process; more than once is no more than once."""
    if not any(method.spec.name == NAME for method in merge_methods.registered_methods()):
        merge_methods.register(ParamDeltaMerge())


def main() -> None:
    """Run mergekit's command ``mergekit-yaml`` with the arguments of this process. Our errors end it with their lines
    and exit codes, without a traceback."""
    from mergekit.scripts.run_yaml import main as run_yaml

    register()
    try:
        run_yaml(prog_name="paramdelta-mergekit")
    except ParamDeltaError as error:
        raise SystemExit(_reported(error)) from None


def _reported(error: ParamDeltaError) -> int:
    from paramdelta.cli import report_error

    report_error(error, as_json=False)
    return error.exit_code


register()

if __name__ == "__main__":
    main()
