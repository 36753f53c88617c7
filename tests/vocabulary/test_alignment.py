"""Which rows go together, worked out by hand on tokenizers of a few tokens."""

from __future__ import annotations

from pathlib import Path

from paramdelta.checkpoint.tokens import Tokens
from paramdelta.plan.gathers import AS_START, IN_NEW_BASE, ZEROS
from paramdelta.plan.vocabulary import Alignment


def tokens(**ids: int) -> Tokens:
    return Tokens(path=Path("x"), ids=ids, special=frozenset(), alphabet="", normaliser="null")


def alignment(role: str, post: Tokens, base: Tokens, new_base: Tokens, **more: Tokens) -> Alignment:
    return Alignment(role, {"post": post, "base": base, "new_base": new_base, **more})


def test_each_rule() -> None:
    found = alignment("post", tokens(all=0, pb=1, pn=2, p=3), tokens(n=0, pb=1, all=2), tokens(pn=0, all=1))
    gather = found.gather(4, 2, {0: (4, 3)})
    assert gather.start.tolist() == [1, 1, 0, ZEROS]
    assert gather.start_in.tolist() == [IN_NEW_BASE, 0, IN_NEW_BASE, IN_NEW_BASE]
    post, base = gather.deltas[0]
    assert post.tolist() == [0, 1, 2, 3]
    assert base.tolist() == [2, 1, AS_START, ZEROS]


def test_what_post_lacks_has_no_delta() -> None:
    found = alignment("new_base", tokens(a=0), tokens(a=0, n=1), tokens(n=0, a=1))
    gather = found.gather(2, 2, {0: (1, 2)})
    assert gather.start.tolist() == [0, 1]
    assert [column.tolist() for column in gather.deltas[0]] == [[ZEROS, 0], [ZEROS, 0]]


def test_rows_without_a_token_go_by_number() -> None:
    found = alignment("post", tokens(a=0, b=2), tokens(a=0, b=1), tokens(a=0, b=2, c=4))
    gather = found.gather(6, 5, {0: (6, 4)})  # rows 1, 3, 4, 5 of post have no token
    assert gather.start.tolist() == [0, 1, 2, 3, ZEROS, ZEROS]  # new_base's row 4 is c's, and it has no row 5
    post, base = gather.deltas[0]
    assert post.tolist() == list(range(6))
    assert base.tolist() == [0, AS_START, 1, 3, ZEROS, ZEROS]  # base's row 1 is b's
    assert found.ids["base"].tolist() == [0, -1, 1]


def test_tokens_beyond_the_rows_are_lacking() -> None:
    found = alignment("post", tokens(a=0, b=1, c=2), tokens(c=0, b=1, a=2), tokens(a=0, b=1, c=2))
    gather = found.gather(2, 3, {0: (2, 2)})
    assert gather.start.tolist() == [0, 1]
    assert gather.deltas[0][1].tolist() == [AS_START, 1]


def test_texts_that_share_an_id() -> None:
    found = alignment("post", tokens(a=0, b=1, c=1), tokens(c=0, a=1, b=2), tokens(c=1, a=0))
    assert found.ids["base"].tolist() == [1, 2]  # b comes first
    assert found.ids["new_base"].tolist() == [0, 1]  # and is not there
    assert found.translated("post", 1) == 1
    assert [found.translated("base", number) for number in range(4)] == [1, 0, 1, 3]


def test_ids_in_the_output() -> None:
    found = alignment("new_base", tokens(a=0, b=1, only=2), tokens(a=0), tokens(b=0, a=5))
    assert [found.translated("post", number) for number in (0, 1, 2)] == [5, 0, None]
    assert found.translated("post", -1) == -1
    assert found.translated("post", 7) == 7  # no token here or there
    assert found.translated("post", 5) is None  # no token here, another one there


def test_the_first_base_stands_for_new_base() -> None:
    found = alignment(
        "post", tokens(t=0, u=1), tokens(u=0), tokens(u=1), post_2=tokens(t=1, u=0), base_2=tokens(t=1, u=0)
    )
    gather = found.gather(2, 2, {0: (2, 1), 1: (2, 2)})
    assert gather.start.tolist() == [1, 1]
    assert gather.start_in.tolist() == [1, IN_NEW_BASE]
    assert gather.deltas[0][1].tolist() == [AS_START, 0]
    assert gather.deltas[1][1].tolist() == [1, 0]
