"""The documentation holds: every block of README.md and docs/ is run in a folder with small checkpoints of the names in
the text, output that is shown is compared, links lead somewhere, and the generated reference is current.

In front of a block, a comment of HTML may say

    not run: REASON                 it is parsed all the same, and its options are looked up
    needs: MODULE                   it is run where that is installed
    given: NAME = ROLE [FORMAT]     a checkpoint that the option before its name does not describe
    lacks: NAME                     a checkpoint that is not there
    file: NAME                      what the block shows is in that file
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pages import CONSOLE, PYTHON, ROOT, SHELL, SHOWN, Block, anchors_of, blocks_of, links_of, pages, prose_of

import paramdelta
from paramdelta.cli.commands import cli
from paramdelta.demo import write_demo

if not (ROOT / "docs").is_dir():
    pytest.skip("the documentation is only in the source tree", allow_module_level=True)

PAGES = pages()
PROGRAMS = {
    "paramdelta": "-m paramdelta",
    "python": "",
    "python3": "",
    "torchrun": "-m torch.distributed.run",
}
_BOXES = re.compile("[─│╭╮╰╯├┤┬┴┼\\s]+")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


class World:
    """Makes checkpoints of the names in a page, and runs its blocks in one folder."""

    def __init__(self, models: Path, folder: Path, programs: Path) -> None:
        self.models, self.folder, self.names = models, folder, {"__name__": "__documentation__"}
        self.environment = {name: v for name, v in os.environ.items() if not re.match("(HF|SLURM|OMPI|PMI)_", name)} | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "100",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def provide(self, block: Block) -> None:
        """Make what the block reads, where no block before it has; remove what it writes, if one before it did."""
        if "given" in block.notes:
            for one in block.notes["given"].split(";"):
                name, _, kind = (text.strip() for text in one.partition("="))
                self.make(name, *kind.split())
        for role, name in block.inputs:
            if name not in block.outputs and name not in block.notes.get("lacks", "").split():
                self.make(name, role)
        for name in block.outputs:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def make(self, name: str, role: str, quantised: str = "") -> None:
        target = self.folder / name
        within = self.folder / Path(name).parts[0]
        if target.exists() or (within != target and within.exists()):  # the latter: in a folder that the page has made
            return
        assert not Path(name).is_absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        if role == "post" and "aths" in name:
            role = "other_post"
        source = self.models / role
        if not source.exists():
            post, base, new_base = (self.models / r for r in ("post", "base", "new_base"))
            if role == "delta":
                paramdelta.extract(post=post, base=base, out=source)
            else:
                paramdelta.merge(post=post, base=base, new_base=new_base, out=source)
        if quantised:
            paramdelta.merge(post=source, base=source, new_base=source, out=target, format=quantised)
        else:
            shutil.copytree(source, target)

    def shell(self, script: str, *, where: str, options: str = "-euo") -> str:
        done = subprocess.run(
            ["bash", options, "pipefail", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{script}\n{done.stdout}"
        return done.stdout

    def run(self, block: Block, *, where: str) -> None:
        self.provide(block)
        if block.language in SHELL:
            self.shell(block.code, where=where)
        elif block.language in CONSOLE:
            for command, shown in block.commands:
                found = self.shell(command, where=where, options="-uo")
                assert matches(shown, found), f"{where}: shown is\n{shown}\nbut `{command.strip()}` prints\n{found}"
        else:
            exec(compile(block.code, where, "exec"), self.names)


def matches(shown: str, found: str) -> bool:
    """Whether output is what a page shows. Frames of tables and white space do not count; … stands for anything within
    a line, and alone in a line for any lines."""
    pattern = ""
    for line in plain(shown).splitlines():
        pattern += r"(?:.*\n)*?" if line == "…" else r".*?".join(map(re.escape, line.split("…"))) + r"\n"
    return re.fullmatch(pattern, plain(found)) is not None


def plain(text: str) -> str:
    lines = (_BOXES.sub(" ", line).strip() for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if line)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small checkpoints by role. ``other_post`` has another delta to the same base."""
    folder, other = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("others")
    write_demo(folder, size="tiny")
    post, base, _ = write_demo(other, size="tiny", seed=1)
    paramdelta.merge(post=post, base=base, new_base=folder / "base", out=folder / "other_post")
    return folder


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the programs that pages call are those of this environment."""
    folder = tmp_path_factory.mktemp("programs")
    for name, arguments in PROGRAMS.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_blocks_run(path: Path, models: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    world = World(models, tmp_path, programs)
    for block in blocks_of(path.read_text()):
        where = f"{named(path)}:{block.line}"
        lacking = [name for name in block.notes.get("needs", "").split() if find_spec(name) is None]
        if block.language in SHOWN:
            if "file" in block.notes:
                (tmp_path / block.notes["file"]).write_text(block.code)
        elif "not run" in block.notes:
            print(f"{where} is not run: {block.notes['not run']}")
        elif lacking:
            print(f"{where} is not run: {', '.join(lacking)} not installed")
        else:
            world.run(block, where=where)


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_blocks_parse(path: Path) -> None:
    """Also those that are not run; and the options in them exist."""
    for block in blocks_of(path.read_text()):
        where = f"{named(path)}:{block.line}"
        assert block.language in SHELL + PYTHON + CONSOLE + SHOWN, f"{where}: a block of {block.language or 'nothing'}"
        if block.language in PYTHON:
            compile(block.code, where, "exec")
        elif block.language in SHELL + CONSOLE:
            assert block.script.strip(), f"{where}: no command; those of console begin with $"
            subprocess.run(["bash", "-n", "-c", block.script], check=True)
            for call in block.calls:
                assert unknown(call.command, call.options) == [], f"{where}: {call}"


def unknown(command: str, given: list[str]) -> list[str]:
    """Return what of a call the command line does not have."""
    if command.startswith("-"):
        return [] if command in ("--help", "--version", "-h") else [command]
    if command not in cli.commands:
        return [command]
    parameters = cli.commands[command].params
    known = {name for p in parameters for name in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
    return [option for option in given if option not in known]


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for link in links_of(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link} leads nowhere"
        assert ROOT in target.parents or target == ROOT, f"{link} leads out of the project"
        if anchor:
            assert anchor in anchors_of(target.read_text()), f"{link}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_code_is_in_blocks_that_run(path: Path) -> None:
    """Indented by four spaces they would look the same and be run by nobody; Python likewise."""
    begins = r"(?:\$ )?(?:paramdelta|torchrun|srun|pip|make) |>>> |import |from \S+ import |for .* in .*:|def .*:"
    assert re.findall(rf"^ {{4,}}(?:{begins}).*$", prose_of(path.read_text()), re.MULTILINE) == []


def test_every_page_is_reached() -> None:
    """From README.md, link by link."""
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        path = ahead.pop()
        if path in seen:
            continue
        seen.add(path)
        targets = ((path.parent / link.partition("#")[0]).resolve() for link in links_of(path.read_text()))
        ahead += [t for t in targets if t.suffix == ".md" and t.is_file()]
    assert set(PAGES) - seen == set()


@pytest.mark.parametrize("page", ["cli.md", "api.md"])
def test_the_reference_is_current(page: str) -> None:
    names = runpy.run_path(str(ROOT / "docs" / "reference" / "generate.py"))
    found = (ROOT / "docs" / "reference" / page).read_text()
    assert found == names["PAGES"][page](), f"docs/reference/{page} is out of date: `make reference` writes it"


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.svg")), ids=named)
def test_pictures_are_drawn_without_help(path: Path) -> None:
    """As GitHub shows them: well-formed, and without anything from elsewhere."""
    for element in ElementTree.parse(path).iter():
        assert element.tag.rpartition("}")[2] not in ("script", "foreignObject", "image")
        assert not any(name.endswith("href") for name in element.attrib)
