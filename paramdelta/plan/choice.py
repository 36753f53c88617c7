"""Chooses how each output tensor is stored: quantised in which format, or plain in which dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from paramdelta.checkpoint.families import output_format
from paramdelta.dtypes import BF16, BY_NAME, F8_E4M3, DType
from paramdelta.errors import Complaint, shown
from paramdelta.formats import GPT_OSS_SPELLING, Format
from paramdelta.plan.naming import EMBEDDINGS, Names, grouped, is_head
from paramdelta.plan.pairing import NONE, Kind, Pairing
from paramdelta.plan.request import PLAIN_FORMATS, MergeRequest
from paramdelta.plan.values import matcher

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
        self.rows = {"post": pairing.post, "base": pairing.base, "new_base": pairing.new_base}
        self.never = matcher(_NEVER)
        self.excluded = matcher(request.no_quantise)
        self.notes: tuple[str, ...] = ()

    def run(self) -> Stored:
        wanted = self.request.format
        if wanted is None and self.request.dtype is not None:  # --dtype is about every tensor
            wanted = "plain"
        like: Names | None = None
        if wanted is None:
            formats, like = self.own_formats(), self.new_base
        elif wanted == "like-post":
            formats, like = self.like_post(), self.post
        elif wanted == "plain" or wanted in PLAIN_FORMATS:
            formats = [None] * len(self.pairing.names)
        else:
            formats, like = self.named(wanted)
        # fp8 codes that are values have no scale to write: what is stored so is a plain type.
        formats = [f if f is not None and (f.spelling.scale or f.spelling.stacked_scale) else None for f in formats]
        written = {id(f): _written(f) for f in formats if f is not None}  # formats are shared: hashing each is slow
        formats = [None if f is None else written[id(f)] for f in formats]
        dtypes = [self.dtype(i, format_) for i, format_ in enumerate(formats)]
        return Stored(formats=formats, dtypes=dtypes, like=like, notes=self.notes)

    def own_formats(self) -> list[Format | None]:
        """Return the formats that new_base has for its tensors, and post for those that only post has."""
        new_base, post = self.new_base.weights, self.post.weights
        weights = [
            post.get(there) if kind == Kind.FROM_POST else new_base.get(row)
            for kind, row, there in zip(self.pairing.kinds, self.pairing.new_base, self.pairing.post, strict=True)
        ]
        return [None if weight is None else weight.format for weight in weights]

    def stored_as(self, names: Names) -> list[Format | None]:
        """Return the format that a checkpoint has for each tensor of the output."""
        weights, rows = names.weights, self.rows[names.role]
        if not weights:
            return [None] * len(rows)
        found = [
            weights.get(row if row != NONE else names.rows.get(name, NONE))
            for name, row in zip(self.pairing.names, rows, strict=True)
        ]
        return [None if weight is None else weight.format for weight in found]

    def like_post(self) -> list[Format | None]:
        """Choose post's formats, where the tensors of the output can have them."""
        formats = self.stored_as(self.post)
        refused = []
        for i, format_ in enumerate(formats):
            if format_ is None:
                continue
            pieces = self.pairing.bridges.get(i)
            turned = pieces is not None and pieces[0].post.transposed != pieces[0].out.transposed
            own_name = format_.spelling.of(self.pairing.names[i], "scale") is not None
            if format_.spelling is GPT_OSS_SPELLING and own_name:  # the output is turned as post is (plan/turning.py)
                continue
            if self.fitted(format_, i) is None or (turned and format_.rows != format_.cols):
                formats[i] = None
                if pieces is not None:
                    refused.append(self.pairing.names[i])
        if refused:
            self.wrong.append(
                Complaint(
                    "--format",
                    f"{len(refused):,} tensors cannot be stored like post, which holds their parts otherwise "
                    f"than new_base:{grouped(refused)}",
                    "--format bf16 writes them plain; without --format they are as in new_base",
                )
            )
        return formats

    def named(self, name: str) -> tuple[list[Format | None], Names | None]:
        """Choose tensors for ``--format NAME``: those that new_base or post stores so already, and what it has in
        another format; else those that any checkpoint stores quantised; else every matrix that is no embedding, head,
        norm or router."""
        try:
            template = output_format(name, block=self.request.block_size, scale=self.request.scale_type)
        except ValueError as error:
            self.wrong.append(Complaint("--format", str(error)))
            return [None] * len(self.pairing.names), None
        like, own = self.followed(name)
        there = [self.stored_as(names) for names in (self.new_base, self.post, self.base)]
        quantised = [any(formats) for formats in zip(*there, strict=True)]
        if like is not None and own is not None:
            lacking = self.lacking(like)
            stored = self.stored_as(like)
            chosen = [f is not None or (lacks and q) for f, lacks, q in zip(stored, lacking, quantised, strict=True)]
            made = [f if f is not None and f.name == name else own for f in stored]
        else:
            chosen = quantised if any(quantised) else [self.linear(i) for i in range(len(quantised))]
            made = [template] * len(chosen)
        allowed = [is_chosen and self.allowed(i) for i, is_chosen in enumerate(chosen)]
        formats = [
            (f if like is not None and f is stored[i] and self.whole_bytes(f, i) else self.made_anew(f, i))
            if allowed[i]
            else None
            for i, f in enumerate(made)
        ]
        unfit = [i for i, wanted in enumerate(allowed) if wanted and formats[i] is None]
        if not any(formats):
            self.nothing(template, sum(chosen), unfit)
        elif unfit:
            more = f" and {len(unfit) - 1:,} more" if len(unfit) > 1 else ""
            self.notes = (f"not stored as {name}: {self.misfit(template, unfit[0])}{more}",)
        return formats, like

    def followed(self, name: str) -> tuple[Names, Format] | tuple[None, None]:
        """Return the checkpoint that has this format already, and its variant, where no other variant is asked for."""
        if self.request.block_size is None and self.request.scale_type is None:
            for names in (self.new_base, self.post):
                own = next((w.format for w in names.weights.values() if w.format.name == name), None)
                if own is not None:
                    return names, own
        return None, None

    def lacking(self, names: Names) -> list[bool]:
        """Return which tensors of the output a checkpoint does not have."""
        pairs = zip(self.pairing.names, self.rows[names.role], strict=True)
        return [row == NONE and name not in names.rows for name, row in pairs]

    def nothing(self, template: Format, chosen: int, unfit: list[int]) -> None:
        """Complain that no tensor is left for a wanted format."""
        problem, remedy = "there are no weights of linear layers to quantise", "choose another format"
        if unfit:
            more = f" and {len(unfit) - 1:,} more" if len(unfit) > 1 else ""
            problem = f"{self.misfit(template, unfit[0])}{more}"
        elif chosen:
            problem, remedy = "--no-quantise matches every weight that could be", "name fewer tensors"
        self.wrong.append(Complaint("--format", f"no weight can be stored as {template.name}: {problem}", remedy))

    def misfit(self, template: Format, i: int) -> str:
        """Return why a weight has no place in a format."""
        name, shape = shown(self.pairing.names[i]), self.pairing.shapes[i]
        if template.spelling.of(self.pairing.names[i], "scale") is None:
            return f"{name} (the format has no names for stacks of experts)"
        if not self.pairing.names[i].endswith(".weight") and template.rows != template.cols:
            return f"{name} (a stack that may be stored transposed, and scales along its rows)"
        if self.pairing.kinds[i] == Kind.EXTENDED:
            return f"{name} (its rows are paired one by one)"
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
        in_groups = template.rows == 1 and template.cols > 1
        if (in_groups and shape[-1] % template.cols) or not self.whole_bytes(template, i):
            return None
        if self.pairing.kinds[i] == Kind.EXTENDED or not self.number(i):
            return None
        return template

    def whole_bytes(self, format_: Format | None, i: int) -> bool:
        """Whether rows of a tensor are whole bytes of codes: post may have a format whose shape is not the output's."""
        return format_ is None or self.pairing.shapes[i][-1] * format_.bits % 8 == 0

    def made_anew(self, template: Format, i: int) -> Format | None:
        """Return the format for one tensor, None where it has to stay plain: stacks that no suffix tells apart from
        transposed ones have formats that look the same either way round, or none."""
        stack = not self.pairing.names[i].endswith(".weight")
        return None if stack and template.rows != template.cols else self.fitted(template, i)

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


def unquantised_modules(
    pairing: Pairing, formats: list[Format | None], tied: bool, plain_anyway: Callable[[int], bool] | None = None
) -> list[str]:
    """Return the modules of linear layers that the output does not quantise, for configs that list them.

    A tied head is one, although no tensor of its own is stored; stacks of experts are one together. With
    ``plain_anyway`` only those whose tensor (a number in the pairing) it does not hold for.
    """
    head = ["lm_head"] if tied and not any(is_head(name) for name in pairing.names) else []
    found = dict.fromkeys(head if plain_anyway is None else [])
    quantised: set[str] = set()
    for i, (name, shape, format_) in enumerate(zip(pairing.names, pairing.shapes, formats, strict=True)):
        stack = len(shape) == 3 and "experts" in name
        if not stack and (len(shape) != 2 or not name.endswith(".weight") or name.endswith(EMBEDDINGS)):
            continue
        module = name.removesuffix(".weight") if name.endswith(".weight") else name.rpartition(".")[0]
        if format_ is not None:
            quantised.add(module)
        elif plain_anyway is None or not plain_anyway(i):
            found[shown(module)] = None
    return [module for module in found if module not in quantised]
