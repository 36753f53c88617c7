"""Where the output may go: never into an input, never over anything that no merge wrote, and all of it said at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_folders import complaint, llama, plan, three

ROLES = ("post", "base", "new_base")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return three(tmp_path / "in", llama(1), llama(2), llama(3))


def test_a_new_folder(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert plan(folders, out=tmp_path / "out").request.out == tmp_path / "out"
    assert not (tmp_path / "out").exists()


def test_no_output_folder(folders: dict[str, Path]) -> None:
    assert plan(folders).request.out is None


def test_an_existing_folder_needs_overwrite(tmp_path: Path, folders: dict[str, Path]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "paramdelta.json").write_text("{}")
    text = complaint(folders, out=out)
    assert f"{out}: exists already" in text
    assert "--overwrite" in text
    assert plan(folders, out=out, overwrite=True)


def test_an_empty_folder_may_be_overwritten(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in complaint(folders, out=tmp_path / "out")
    assert plan(folders, out=tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("made", ["file", "folder"])
def test_only_what_a_merge_wrote_is_overwritten(tmp_path: Path, folders: dict[str, Path], made: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    if made == "folder":  # not the record that a merge writes
        (out / "paramdelta.json").mkdir()
    text = complaint(folders, out=out, overwrite=True)
    assert "has no paramdelta.json" in text
    assert "name another --out" in text
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_is_no_folder_is_never_replaced(
    tmp_path: Path, folders: dict[str, Path], kind: str, overwrite: bool
) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged"
    if kind == "file":
        out.write_text("mine")
    else:
        if kind == "link":
            merged.mkdir()
            (merged / "paramdelta.json").write_text("{}")
        out.symlink_to(merged)
    text = complaint(folders, out=out, overwrite=overwrite)
    problem = "is a symbolic link, to" if out.is_symlink() else "exists and is not a folder"
    assert f"{out}: {problem}" in text
    assert "name another --out" in text


@pytest.mark.parametrize("role", ROLES)
def test_inputs_are_never_written_to(tmp_path: Path, folders: dict[str, Path], role: str) -> None:
    (folders[role] / "paramdelta.json").write_text("{}")  # a merge's folder may be an input
    assert f"is {role} itself" in complaint(folders, out=folders[role], overwrite=True)
    assert f"lies inside {role}" in complaint(folders, out=folders[role] / "deep" / "out", overwrite=True)


def test_an_output_that_contains_the_inputs(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "in" / "paramdelta.json").write_text("{}")
    text = complaint(folders, out=tmp_path / "in", overwrite=True)
    assert all(f"contains {role}" in text for role in ROLES)


@pytest.mark.parametrize("place", ["itself", "inside", "dots"])
def test_links_and_dots_do_not_hide_an_input(tmp_path: Path, folders: dict[str, Path], place: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(folders["base"])
    out, said = {
        "itself": (link, "is base itself"),
        "inside": (link / "out", "lies inside base"),
        "dots": (folders["post"] / ".." / "base", "is base itself"),
    }[place]
    assert said in complaint(folders, out=out, overwrite=True)


def test_an_input_through_a_link(tmp_path: Path, folders: dict[str, Path]) -> None:
    link = tmp_path / "link"
    link.symlink_to(folders["post"])
    assert "lies inside post" in complaint({**folders, "post": link}, out=folders["post"] / "out")


def test_a_folder_whose_name_starts_like_an_input_s(folders: dict[str, Path]) -> None:
    assert plan(folders, out=folders["post"].with_name("post-merged"))


def test_the_parent_must_exist(tmp_path: Path, folders: dict[str, Path]) -> None:
    text = complaint(folders, out=tmp_path / "a" / "out")
    assert f"its parent folder {tmp_path / 'a'} does not exist" in text
    assert f"mkdir -p {tmp_path / 'a'}" in text
    assert not (tmp_path / "a").exists()


def test_a_parent_that_is_a_file(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "a").write_text("")
    assert "its parent folder" in complaint(folders, out=tmp_path / "a" / "out")


def test_the_target_is_complained_about_with_the_rest(tmp_path: Path) -> None:
    post = llama(1) | {"odd.weight": llama(1)["model.norm.weight"]}
    text = complaint(three(tmp_path / "in", post, llama(2), llama(3)), out=tmp_path / "a" / "out")
    assert "its parent folder" in text
    assert "odd.weight" in text
