"""``verify`` without the sources: silent about a folder as it was written, and every kind of damage is named."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from recorded_sums import recorded, sums_of

import paramdelta
from paramdelta.demo import write_demo
from paramdelta.errors import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, and below "out" a folder of several shards merged from them."""
    root = tmp_path_factory.mktemp("made")
    write_demo(root, size="tiny")
    paramdelta.merge(**sources(root), out=root / "out", max_shard_size=150_000)
    assert len(list((root / "out").glob("*.safetensors"))) > 2
    return root


def sources(root: Path) -> dict[str, Path]:
    return {role: root / role for role in ("post", "base", "new_base")}


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the merged folder, to be damaged."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def weights(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paramdelta", "verify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_folder_as_it_was_written(made: Path, out: Path) -> None:
    report = paramdelta.verify(out)
    assert (report.problems, report.notes) == ((), ())
    assert report.checksums == report.tensors == len(sums_of(out))
    assert report.files == len(list(out.iterdir()))
    assert (report.elements, report.fraction) == (0, 0.0)
    with_sources = paramdelta.verify(out, **sources(made))
    assert with_sources.problems == ()
    assert with_sources.elements > 0
    assert with_sources.checksums == report.checksums


def test_any_changed_byte_of_data_is_found(out: Path) -> None:
    rng = random.Random(11)
    for _ in range(25):
        path = rng.choice(weights(out))
        before = sums_of(out)
        at, bit = rng.randrange(data_start(path), path.stat().st_size), rng.randrange(8)
        flip(path, at, bit)
        after = sums_of(out)
        (name,) = (n for n in before if before[n] != after[n])
        report = paramdelta.verify(out, threads=2, memory=1 << 18)
        assert report.problems == (f"{name}: its CRC-32 in {path.name} is {after[name]}, expected {before[name]}",)
        flip(path, at, bit)
    assert paramdelta.verify(out).problems == ()


def test_any_changed_byte_of_a_header_or_side_file_is_found(out: Path) -> None:
    rng = random.Random(12)
    for path in [*weights(out), *(p for p in out.iterdir() if p.suffix != ".safetensors")]:
        if path.name == "paramdelta.json":
            continue
        end = data_start(path) if path.suffix == ".safetensors" else path.stat().st_size
        for _ in range(6):
            at, bit = rng.randrange(end), rng.randrange(8)
            flip(path, at, bit)
            problems = paramdelta.verify(out).problems
            assert problems, (path.name, at, bit)
            assert path.name in problems[0]
            flip(path, at, bit)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def exchange(a: Path, b: Path) -> None:
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "config gone": (lambda o: (o / "config.json").unlink(), ["config.json: missing"]),
    "config longer": (lambda o: (o / "config.json").open("a").write(" "), ["config.json: ", "bytes, expected"]),
    "shard gone": (lambda o: weights(o)[1].unlink(), ["model-00002", "missing", "tensors were not found"]),
    "shard cut": (lambda o: cut(weights(o)[0]), ["model-00001", "bytes, expected", "truncated", "were not found"]),
    "shard too many": (
        lambda o: shutil.copy(weights(o)[0], o / "more.safetensors"),
        ["more.safetensors: was not written by the merge"],
    ),
    "shard renamed": (lambda o: weights(o)[0].rename(o / "x"), ["x: was not written by the merge", "missing"]),
    "shards exchanged": (lambda o: exchange(*weights(o)[:2]), ["its header is not the one that was written"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders(out: Path, kind: str) -> None:
    damage, texts = DAMAGE[kind]
    damage(out)
    problems = "\n".join(paramdelta.verify(out).problems)
    assert all(text in problems for text in texts), problems


def test_everything_is_listed_at_once(made: Path, out: Path) -> None:
    first, *_, last = weights(out)
    flip(first, data_start(first))
    flip(last, last.stat().st_size - 1)
    (out / "config.json").unlink()
    (out / "extra.txt").write_text("")
    assert len(paramdelta.verify(out).problems) == 4
    with_sources = paramdelta.verify(out, **sources(made), everything=True).problems
    assert sum("CRC-32" in problem for problem in with_sources) == 2
    assert "config.json: missing" in with_sources


def test_a_record_that_says_otherwise(made: Path, out: Path) -> None:
    """A changed sum, and tensors that only the record or only the folder has."""
    path = out / "paramdelta.json"
    document = json.loads(path.read_text())
    sums = document["checksums"]["tensors"]
    one, two = sorted(sums)[:2]
    was, sums[one], sums["ghost"] = sums[one], "00000000", sums.pop(two)
    path.write_text(json.dumps(document, indent=2) + "\n")
    problems = paramdelta.verify(out).problems
    assert len(problems) == 3
    text = "\n".join(problems)
    assert "ghost: missing" in text
    assert f"{two}: is in " in text
    assert f"is {was}, expected 00000000" in text
    assert any("expected 00000000" in p for p in paramdelta.verify(out, **sources(made)).problems)


def test_what_other_tools_leave_is_only_noted(out: Path) -> None:
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    report = paramdelta.verify(out)
    assert report.problems == ()
    assert report.notes == (".gitattributes: was not written by the merge",)


def test_a_folder_without_checksums(made: Path, tmp_path: Path) -> None:
    paramdelta.merge(**sources(made), out=tmp_path / "out", checksums=False)
    with pytest.raises(InputError, match=r"paramdelta\.json: has no checksums[\s\S]*--post, --base and --new-base"):
        paramdelta.verify(tmp_path / "out")
    report = paramdelta.verify(tmp_path / "out", **sources(made))
    assert (report.problems, report.checksums) == ((), 0)
    with pytest.raises(InputError, match="does not say how the folder was made"):
        paramdelta.verify(made / "post")
    with pytest.raises(InputError, match="only some of post, base and new_base"):
        paramdelta.verify(made / "out", post=made / "post")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(algorithm="crc64"), "of a kind that is not known here: crc64"),
        (lambda c: c.update(tensors=[]), "damaged"),
        (lambda c: c["files"].update({"../x": {"bytes": 1, "crc32": ""}}), "damaged"),
        (lambda c: c["files"].update({"config.json": {"bytes": 1}}), "damaged"),
        (lambda c: c.update(files={"a": 1}), "damaged"),
    ],
)
def test_a_damaged_record_is_refused(out: Path, change: Callable[[dict], object], text: str) -> None:
    document = json.loads((out / "paramdelta.json").read_text())
    assert document["checksums"] == recorded(out)
    change(document["checksums"])
    (out / "paramdelta.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=text):
        paramdelta.verify(out)


def test_the_command(made: Path, out: Path) -> None:
    done = run(str(out))
    assert (done.returncode, "none: bit-equal" in done.stdout) == (0, True), done.stderr
    assert "summed up and compared" in done.stdout
    path = weights(out)[0]
    flip(path, path.stat().st_size - 1)
    done = run(str(out), "--threads=2", "--memory=1MiB")
    assert done.returncode == 1
    assert "CRC-32" in done.stderr
    done = run(str(out), "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["kind"], len(document["problems"])) == (1, "verify", 1)
    assert document["checksums"] == len(recorded(out)["tensors"])
    done = run(str(made / "post"))
    assert done.returncode == 2
    done = run(str(out), "--memory=x")
    assert done.returncode == 2
