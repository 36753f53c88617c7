"""A folder appears whole or not at all, and nothing that was there is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from paramdelta import publish
from paramdelta.errors import StorageError
from paramdelta.publish import Staging, write_files


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_publish_renames_once(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with Staging(target) as staging:
        write_files(staging.folder, [("a", b"1")])
        assert not target.exists()
        staging.publish(overwrite=False)
    assert names(tmp_path) == ["out"]
    assert (target / "a").read_bytes() == b"1"


def test_what_is_not_published_leaves_no_trace(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        write_files(staging.folder, [("a", b"1")])
        assert names(tmp_path) == [staging.control.name]
    assert names(tmp_path) == []


def test_an_existing_folder_is_never_replaced_unasked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with Staging(target) as staging:
        target.mkdir()
        with pytest.raises(StorageError, match="appeared while the merge ran"):
            staging.publish(overwrite=False)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_overwrite_replaces_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    target = tmp_path / "out"
    target.mkdir()
    (target / "stale").write_bytes(b"old")
    with Staging(target) as staging:
        write_files(staging.folder, [("new", b"2")])
        staging.publish(overwrite=True)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["new"]


def test_exchange_swaps_in_one_step(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / folder.name).touch()
    if not publish._exchange(a, b):
        pytest.skip("this file system or kernel has no RENAME_EXCHANGE")
    assert (names(a), names(b)) == (["b"], ["a"])


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot create the temporary folder"), Staging(tmp_path / "file" / "out"):
        pass


def test_what_an_earlier_run_wrote_is_written_over(tmp_path: Path) -> None:
    write_files(tmp_path, [("a", b"longer"), ("a", b"2")])
    assert (tmp_path / "a").read_bytes() == b"2"


def test_two_merges_into_one_folder_do_not_meet(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as first:
        with pytest.raises(StorageError, match="another merge is writing it"), Staging(tmp_path / "out"):
            pass
        assert first.folder.is_dir()
    with Staging(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_what_stays_is_found_again(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        write_files(staging.folder, [("a", b"1")])
        staging.keep()
    with Staging(tmp_path / "out") as staging:
        assert names(staging.folder) == ["a"]
        staging.clear()
        assert names(staging.folder) == []
    assert names(tmp_path) == []


def test_large_files_are_copied_from_their_path(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 10_000)
    write_files(tmp_path, [("copy", source)])
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_no_journal_outlives_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exchange puts the old folder where the new one was: a journal that stayed would call it finished."""
    target = tmp_path / "out"
    target.mkdir()
    exchanged = publish._exchange

    def killed(a: Path, b: Path) -> bool:
        exchanged(a, b)
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "_exchange", killed)
    staging = Staging(target)

    def publish_with_journal() -> None:
        with staging:
            (staging.control / "journal").write_bytes(b"{}")
            staging.keep()
            staging.publish(overwrite=True)

    with pytest.raises(KeyboardInterrupt):
        publish_with_journal()
    assert names(staging.control) == ["lock", "output"]
