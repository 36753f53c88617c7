"""What keeps tensors from being paired, collected while pairing and told at once, each with the option that resolves
it."""

from __future__ import annotations

from dataclasses import dataclass, field

from paramdelta.errors import Complaint, shown
from paramdelta.plan.naming import Names, grouped, proposed_rename
from paramdelta.plan.request import ROLES, MergeRequest


@dataclass
class Problems:
    """Names that cannot be paired, by what is the matter."""

    missing: dict[str, list[str]] = field(default_factory=lambda: {role: [] for role in ROLES})
    extra: dict[str, list[str]] = field(default_factory=lambda: {role: [] for role in ROLES})
    shapes: list[str] = field(default_factory=list)
    vocab: list[str] = field(default_factory=list)
    quantised_vocab: list[str] = field(default_factory=list)
    other_tokens: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    no_donor: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    unscaled: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)


def by_role(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(f"{list(shape)} in {role}" for shape, role in zip(shapes, ROLES, strict=True))


def _listing(lines: list[str]) -> str:
    text = "".join(f"\n      {line}" for line in lines[:20])
    return text + (f"\n      and {len(lines) - 20:,} more" if len(lines) > 20 else "")


def complaints(problems: Problems, request: MergeRequest, names: dict[str, Names]) -> list[Complaint]:
    found: list[Complaint] = []
    owner = "post" if request.kind == "extract" else "new_base"  # whose names the output has
    for role in ("post", "base"):
        if role not in request.folders:  # zeros with the names of the other one, which has the same problems
            continue
        missing, extra = problems.missing[role], problems.extra[role]
        if missing:
            remedy = "--copy-from new-base (or post) takes such tensors over; --exclude GLOB names them"
            rename = proposed_rename(missing, extra, role, names[role]) if extra else ""
            remedy = f"{rename} would pair them; otherwise {remedy}" if rename else remedy
            found.append(
                Complaint(
                    str(request.folder(role)),
                    f"{role} lacks {len(missing):,} tensors that {owner} has:{grouped(missing)}",
                    remedy,
                )
            )
        if extra:
            found.append(
                Complaint(
                    str(request.folder(role)),
                    f"{role} has {len(extra):,} tensors that {owner} lacks:{grouped(extra)}",
                    "--copy-from new-base drops them, --copy-from post adds post's to the output; "
                    "--exclude GLOB leaves them out",
                )
            )
    if problems.shapes:
        found.append(
            Complaint(
                "shapes",
                f"{len(problems.shapes):,} tensors differ in shape:{_listing(problems.shapes)}",
                "--copy-from new-base (or post) takes such tensors over; --exclude GLOB copies them from new_base",
            )
        )
    if problems.vocab:
        found.append(
            Complaint(
                "vocabulary",
                f"{len(problems.vocab):,} tensors differ in their number of tokens:{_listing(problems.vocab)}",
                "--vocab extend gives the output as many rows as the larger of post and new_base; "
                "--vocab align pairs rows by token, where tokenizers give tokens other ids",
            )
        )
    if problems.quantised_vocab:
        found.append(
            Complaint(
                "vocabulary",
                "rows of quantised tensors cannot be added one by one, because they share scales:"
                f"{_listing(problems.quantised_vocab)}",
                "dequantise these checkpoints first, or --exclude GLOB copies them from new_base",
            )
        )
    if problems.other_tokens:
        found.append(
            Complaint(
                "--copy-from post",
                f"would copy rows in the order of post's tokens, but the output has new_base's tokenizer:"
                f"{_listing(problems.other_tokens)}",
                "--tokenizer post, or --copy-from new-base",
            )
        )
    if problems.kinds:
        found.append(
            Complaint(
                "dtypes",
                f"{len(problems.kinds):,} tensors have types that cannot be subtracted from each other:"
                f"{_listing(problems.kinds)}",
                "--exclude GLOB copies them from new_base",
            )
        )
    if problems.ambiguous:
        found.append(
            Complaint(
                "stacked experts",
                "their shapes do not say whether they are stored as [experts, out, in] or transposed:"
                f"{_listing(list(dict.fromkeys(problems.ambiguous)))}",
                "--stacks ROLE=straight (or transposed), for example --stacks post=transposed",
            )
        )
    if problems.taken:
        found.append(
            Complaint(
                str(request.post),
                f"--copy-from post: {len(problems.taken):,} tensors of post would take the name of another tensor "
                f"of new_base:{grouped(problems.taken)}",
                "--rename-post gives them other names; --exclude GLOB leaves them out",
            )
        )
    if problems.no_donor:
        found.append(
            Complaint(
                str(request.post),
                f"--copy-from post: post lacks {len(problems.no_donor):,} of the tensors:{grouped(problems.no_donor)}",
                "--exclude GLOB copies them from new_base",
            )
        )
    if problems.untied:
        found.append(
            Complaint(
                "tied embeddings",
                "new_base ties its output embedding to the input embedding, post has one of its own "
                f"({shown(problems.untied[0])}): the result could not keep it",
                f"--exclude '{shown(problems.untied[0])}' ignores post's: the merged input embedding serves as both",
            )
        )
    if problems.unscaled:
        found.append(
            Complaint(
                "fp8",
                f"{len(problems.unscaled):,} tensors are fp8 without scales that could be found:"
                f"{grouped(problems.unscaled)}",
                "--allow-unscaled takes them for plain numbers",
            )
        )
    return found
