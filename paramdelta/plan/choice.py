"""Chooses how each output tensor is stored: quantised in which format, or plain in which dtype."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from paramdelta.checkpoint.families import output_format
from paramdelta.dtypes import BF16, BY_NAME, F8_E4M3, DType
from paramdelta.errors import Complaint, shown
from paramdelta.formats import Format
from paramdelta.plan.naming import EMBEDDINGS, Names, is_head
from paramdelta.plan.pairing import NONE, Kind, Pairing
from paramdelta.plan.request import PLAIN_FORMATS, MergeRequest, matcher

# What consumers never expect quantised, whatever its shape: routers score experts with a handful of numbers.
_NEVER = ("*norm*", "*.gate.weight", "*router*", "*embed*", "*.wte.weight", "*.wpe.weight")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How the output stores each tensor of a pairing: a format, or None and a dtype. ``like`` is the checkpoint whose
    quantisation the output's config follows; None where the config must be written from the formats alone. ``notes``
    are warnings for the user."""

    formats: list[Format | None]
    dtypes: list[DType]
    like: Names | None
    notes: tuple[str, ...] = ()


def choose(
    request: MergeRequest, pairing: Pairing, post: Names, base: Names, new_base: Names, wrong: list[Complaint]
) -> Stored:
    """Choose how each tensor of ``pairing`` is stored. By default as new_base stores it, or post what only post has."""
    chooser = _Chooser(request, pairing, post, base, new_base, wrong)
    stored = chooser.run()
    methods = sorted({f.method for f in stored.formats if f is not None})
    if len(methods) > 1:
        wrong.append(
            Complaint(
                "format",
                f"the output would mix the formats of {' and '.join(methods)}, which no config can describe",
                "--format writes all in one format, for example bf16 or fp8-block",
            )
        )
    return stored


class _Chooser:
    def __init__(
        self,
        request: MergeRequest,
        pairing: Pairing,
        post: Names,
        base: Names,
        new_base: Names,
        wrong: list[Complaint],
    ) -> None:
        self.request, self.pairing, self.wrong = request, pairing, wrong
        self.post, self.base, self.new_base = post, base, new_base
        self.never = matcher((*_NEVER, *request.no_quantise))
        self.excluded = matcher(request.no_quantise)
        self.notes: tuple[str, ...] = ()

    def run(self) -> Stored:
        wanted = self.request.format
        if wanted is None and self.request.dtype is not None:  # --dtype is about every tensor
            wanted = "plain"
        if wanted is None:
            formats = [self.own_format(i) for i in range(len(self.pairing.names))]
            like: Names | None = self.new_base
        elif wanted == "like-post":
            formats = [self.in_checkpoint(self.post, i) for i in range(len(self.pairing.names))]
            like = self.post
        elif wanted == "plain" or wanted in PLAIN_FORMATS:
            formats, like = [None] * len(self.pairing.names), None
        else:
            formats, like = self.named(wanted)
        formats = [None if f is None else _written(f) for f in formats]
        dtypes = [self.dtype(i, format_) for i, format_ in enumerate(formats)]
        return Stored(formats=formats, dtypes=dtypes, like=like, notes=self.notes)

    def own_format(self, i: int) -> Format | None:
        donor = self.post if self.pairing.kinds[i] == Kind.FROM_POST else self.new_base
        row = self.pairing.post[i] if donor is self.post else self.pairing.new_base[i]
        weight = donor.weights.get(row)
        return None if weight is None else weight.format

    def in_checkpoint(self, names: Names, i: int) -> Format | None:
        """Return the format that a checkpoint has for a tensor of the output."""
        rows = {id(self.post): self.pairing.post, id(self.base): self.pairing.base}.get(
            id(names), self.pairing.new_base
        )
        row = rows[i] if rows[i] != NONE else names.rows.get(self.pairing.names[i], NONE)
        weight = names.weights.get(row)
        return None if weight is None else weight.format

    def named(self, name: str) -> tuple[list[Format | None], Names | None]:
        """Choose tensors for ``--format NAME``: those that a checkpoint stores so already; else those that any stores
        quantised; else every matrix that is no embedding, head, norm or router."""
        try:
            template = output_format(name, block=self.request.block_size, scale=self.request.scale_type)
        except ValueError as error:
            self.wrong.append(Complaint("--format", str(error)))
            return [None] * len(self.pairing.names), None
        count = range(len(self.pairing.names))
        sources = (self.new_base, self.post, self.base)
        if self.request.block_size is None and self.request.scale_type is None:
            for names in sources:
                if any(w.format.name == name for w in names.weights.values()):
                    found = [self.in_checkpoint(names, i) for i in count]
                    return [f if self.allowed(i) else None for i, f in enumerate(found)], names
        quantised = [any(self.in_checkpoint(names, i) for names in sources) for i in count]
        chosen = quantised if any(quantised) else [self.linear(i) for i in count]
        made = [self.fitted(template, i) if chosen[i] and self.allowed(i) else None for i in count]
        unfit = [i for i in count if chosen[i] and made[i] is None and self.allowed(i)]
        if not any(made):
            reason = self.misfit(template, unfit[0]) if unfit else "there are no weights of linear layers to quantise"
            self.wrong.append(
                Complaint("--format", f"no weight can be stored as {name}: {reason}", "choose another format")
            )
        elif unfit:
            more = f" and {len(unfit) - 1:,} more" if len(unfit) > 1 else ""
            self.notes = (f"not stored as {name}: {self.misfit(template, unfit[0])}{more}",)
        return made, None

    def misfit(self, template: Format, i: int) -> str:
        """Return why a weight has no place in a format."""
        name, shape = shown(self.pairing.names[i]), self.pairing.shapes[i]
        if template.spelling.of(self.pairing.names[i], "scale") is None:
            return f"{name} (the format has no names for stacks of experts)"
        if self.pairing.kinds[i] == Kind.EXTENDED:
            return f"{name} (its vocabulary is extended)"
        if not self.number(i):
            return f"{name} (it holds no numbers that can be quantised)"
        group = template.cols if template.rows == 1 and template.cols > 1 else 8 // template.bits
        return f"{name} (its rows of {shape[-1] if shape else 1:,} do not go in whole groups of {group})"

    def allowed(self, i: int) -> bool:
        return not self.excluded(self.pairing.names[i])

    def linear(self, i: int) -> bool:
        """Whether a tensor looks like the weight of a linear layer or a stack of them."""
        name, shape = self.pairing.names[i], self.pairing.shapes[i]
        stack = len(shape) == 3 and "experts" in name
        matrix = len(shape) == 2 and name.endswith(".weight")
        return (matrix or stack) and not (self.never(name) or is_head(name) or name.endswith(EMBEDDINGS))

    def fitted(self, template: Format, i: int) -> Format | None:
        """Return the format for one tensor's shape, None where it does not go in whole groups or has no names there."""
        name, shape = self.pairing.names[i], self.pairing.shapes[i]
        if len(shape) < 2 or template.spelling.of(name, "scale") is None:
            return None
        grouped = template.rows == 1 and template.cols > 1
        if (grouped and shape[-1] % template.cols) or shape[-1] * template.bits % 8:
            return None
        if self.pairing.kinds[i] == Kind.EXTENDED or not self.number(i):
            return None
        return template

    def number(self, i: int) -> bool:
        """Whether a tensor holds numbers that can be quantised."""
        names, row = self.donor(i)
        return row in names.weights or names.dtype(row).merges

    def donor(self, i: int) -> tuple[Names, int]:
        if self.pairing.kinds[i] == Kind.FROM_POST:
            return self.post, self.pairing.post[i]
        return self.new_base, self.pairing.new_base[i]

    def dtype(self, i: int, format_: Format | None) -> DType:
        """Return the dtype of an output tensor: of its codes, or its own where it is plain."""
        if format_ is not None:
            return format_.codes_dtype
        names, row = self.donor(i)
        stored = names.dtype(row)
        quantised = row in names.weights
        if not quantised and not stored.merges:
            return stored
        if self.request.dtype is not None:
            return self.request.dtype
        if self.request.format == "like-post":
            there = self.pairing.post[i] if self.pairing.post[i] != NONE else self.post.rows.get(self.pairing.names[i])
            if there is not None and there not in self.post.weights and self.post.dtype(there).merges:
                return self.post.dtype(there)
        if not quantised:
            return stored
        return BY_NAME[self.request.format] if self.request.format in PLAIN_FORMATS else BF16


@functools.cache
def _written(stored: Format) -> Format:
    """Return the form in which a format is written: without zero points, and in its recipe's own codes."""
    made = replace(stored, zero_points=False, codec=stored.recipe.codec)
    return made if made.codec == stored.codec else replace(made, codes_dtype=F8_E4M3)


def unquantised_modules(pairing: Pairing, formats: list[Format | None], tied: bool) -> list[str]:
    """Return the modules of linear layers that the output does not quantise, for configs that list them. A tied head
    is one, although no tensor of its own is stored."""
    head = ["lm_head"] if tied and not any(is_head(name) for name in pairing.names) else []
    return head + [
        shown(name).removesuffix(".weight")
        for name, shape, format_ in zip(pairing.names, pairing.shapes, formats, strict=True)
        if format_ is None and len(shape) == 2 and name.endswith(".weight") and not name.endswith(EMBEDDINGS)
    ]
