"""What an analysis is told as: JSON, CSV, the HTML report (also in a real browser), the command line."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from analysis_folders import LAYERS, base_tensors, moved, noise, write

import paramdelta

EVIL = 'model.layers.0.<img src=x onerror="alert(1)">\u202e</script><script>document.title="owned"</script>.weight'
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """post, base and new_base, of which one tensor has a hostile name, in folders with names to escape."""
    root = tmp_path_factory.mktemp("report")
    base = base_tensors()
    base[EVIL] = base.pop("model.layers.0.self_attn.q_proj.weight")
    steps, drift = noise(base, 1e-3, 1), noise(base, 2e-3, 2)
    return {
        "base": write(root / "base <b>&", base),
        "post": write(root / "post", moved(base, steps)),
        "new_base": write(root / "new_base", moved(base, drift)),
    }


@pytest.fixture(scope="module")
def found(folders: dict[str, Path]) -> paramdelta.Analysis:
    return paramdelta.analyze(**folders, spectrum="*up_proj*", singular_values=4)


class Page(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._open[-1] if self._open else "", []).append(data)


def test_the_document(found: paramdelta.Analysis) -> None:
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (document["version"], document["kind"]) == (1, "analysis")
    assert [len(document[k]) for k in ("deltas", "layers", "tensors")] == [1, LAYERS + 3, len(found.tensors)]
    up = next(t for t in document["tensors"] if t["name"] == "model.layers.1.mlp.up_proj.weight")
    assert (up["layer"], up["module"], up["shape"]) == ("model.layers.1", "mlp.up_proj", [384, 128])
    own = next(t for t in found.tensors if t.name == up["name"])
    assert up["deltas"][0]["relative_norm"] == own.deltas[0].relative_norm
    assert len(up["spectra"][0]["singular_values"]) == 4


def test_the_table(found: paramdelta.Analysis) -> None:
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["name"] for row in rows] == [t.name for t in found.tensors]
    for row, t in zip(rows, found.tensors, strict=True):
        assert float(row["delta_squared"]) == t.deltas[0].delta_squared
        assert tuple(map(int, row["largest_at"].split())) == t.where[0]


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    base = {"=1+1": base_tensors()["lm_head.weight"]}
    folder = write(tmp_path / "base", base)
    rows = list(csv.reader(io.StringIO(paramdelta.analyze(folder, folder).to_csv())))
    assert rows[1][:3] == ["'=1+1"] * 3


def test_the_page_asks_for_nothing_and_escapes_names(found: paramdelta.Analysis) -> None:
    text = found.to_html()
    page = Page(text)
    assert {"img", "link", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in page.tags)
    assert [tag for tag, _ in page.tags].count("script") == 1
    for _, attributes in page.tags:
        assert not {"src", "href", "action", "style", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    shown = "".join(page.text["td"])
    assert r"\u202e" in shown
    assert '<img src=x onerror="alert(1)">' in shown
    assert "\u202e" not in text


def test_warnings_are_escaped_too(found: paramdelta.Analysis) -> None:
    text = dataclasses.replace(found, warnings=("a field <b>\u202e",)).to_html()
    assert r"a field &lt;b&gt;\u202e</li>" in text


def test_every_plot_says_its_values(found: paramdelta.Analysis) -> None:
    text = found.to_html()
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles == [
        *("Relative norm", "Unchanged", "Cosine to the drift", "Relative drift", "Stable rank", "Spectra"),
        *("Along the layers", "By type of module"),
    ]
    for figure in re.findall(r"<figure>.*?</figure>", text, re.S)[:4]:
        cells = re.findall(r"<rect class=\"[sd]\d+\" x=\"\d+\" y=\"\d+\"[^>]*><title>(.*?)</title>", figure)
        assert (
            len(cells) == 3 * LAYERS
        )  # q_proj, up_proj and a norm; the hostile name is a module of its own in layer 0
    value = f"layer 1 · mlp.up_proj: {_cell(found)}"
    assert html.unescape(text).count(value) >= 1


def _cell(found: paramdelta.Analysis) -> str:
    t = next(t for t in found.tensors if t.name == "model.layers.1.mlp.up_proj.weight")
    return f"{t.deltas[0].relative_norm:.3g}"


def test_a_table_of_many_tensors_is_cut(found: paramdelta.Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    from paramdelta.analysis import page

    monkeypatch.setattr(page, "MOST_ROWS", 3)
    text = found.to_html()
    assert len(re.findall(r"<tr><td>", text)) == 3
    assert "The 3 with the largest relative norm; --csv has" in text


@pytest.mark.skipif(BROWSER is None, reason="no chromium here to open the report (apt-get install chromium)")
def test_in_a_real_browser(found: paramdelta.Analysis, tmp_path: Path) -> None:
    """The page runs its script under its own policy, draws every plot, and asks a listening server for nothing."""
    text, asked = found.to_html(), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        page = tmp_path / "report.html"
        # The table is sorted by the page's own handler. A request to the server would have to pass the policy.
        click = "document.querySelectorAll('th button')[0].click();"
        probe = f"fetch('http://127.0.0.1:{port}/').catch(() => {{ document.title += ' kept in' }});"
        script = re.search(r"<script>(.*)</script>", text, re.S)
        assert script is not None
        page.write_text(_with_script(text, script[1] + click + probe))
        thread = threading.Thread(target=_accept, args=(server, asked), daemon=True)
        thread.start()
        done = _chromium(tmp_path, "--dump-dom", "--virtual-time-budget=3000", page.as_uri())
    dom = Page(done.stdout)
    assert asked == []
    assert "kept in" in "".join(dom.text["title"])
    assert "owned" not in dom.text["title"][0]
    assert [tag for tag, _ in dom.tags].count("figure") == 8
    assert sum(tag == "rect" for tag, _ in dom.tags) > 60
    assert next(a.get("aria-sort") for tag, a in dom.tags if tag == "th") == "ascending"
    names = re.findall(r"<tr><td>(.*?)</td>", done.stdout)
    assert names == sorted(names, key=lambda n: html.unescape(n).lower())
    shot = tmp_path / "report.png"
    _chromium(tmp_path, f"--screenshot={shot}", "--window-size=500,900", page.as_uri())
    assert shot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert shot.stat().st_size > 20_000  # plots and text, not an empty page


def _with_script(text: str, script: str) -> str:
    """Return the page with another script and a policy that lets it run, and nothing else."""
    from paramdelta.analysis.page import _digest

    old = re.search(r"<script>(.*)</script>", text, re.S)
    assert old is not None
    return text.replace(old[1], script).replace(html.escape(_digest(old[1])), html.escape(_digest(script)))


def _accept(server: socket.socket, asked: list[Any]) -> None:
    try:
        while True:
            connection, address = server.accept()
            asked.append(address)
            connection.close()
    except OSError:
        pass


def _chromium(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    options = ("background-networking", "component-update", "sync", "gpu", "extensions", "default-apps")
    command = [BROWSER, "--headless", "--no-sandbox", *(f"--disable-{o}" for o in options), "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'browser'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paramdelta", "analyze", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command(folders: dict[str, Path], found: paramdelta.Analysis, tmp_path: Path) -> None:
    inputs = ["--post", folders["post"], "--base", folders["base"], "--new-base", folders["new_base"]]
    names = {kind: tmp_path / f"delta.{kind}" for kind in ("json", "csv", "html")}
    done = run(*inputs, *(x for kind, path in names.items() for x in (f"--{kind}", path)))
    assert done.returncode == 0, done.stderr
    assert "‖delta‖ / ‖base‖" in done.stdout
    assert "\u202e" not in done.stdout
    document = json.loads(names["json"].read_text())
    assert document["total"] == json.loads(json.dumps(found.total.to_dict()))
    assert names["csv"].read_text().startswith("name,layer,module,shape,dtype,elements")
    assert names["html"].read_text().startswith("<!doctype html>")
    printed = run(*inputs, "--json")
    assert json.loads(printed.stdout)["total"] == document["total"]


def test_the_command_refuses_before_it_reads(folders: dict[str, Path], tmp_path: Path) -> None:
    inputs = ["--post", folders["post"], "--base", folders["base"]]
    done = run(*inputs, "--html", tmp_path / "nowhere" / "x.html", "--csv", tmp_path)
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    assert "is a folder" in done.stderr
    assert run(*inputs, "--spectrum", "*no such*").returncode == 2
    assert run("--post", tmp_path, "--base", folders["base"]).returncode == 2
