"""Writes docs/reference/cli.md from the command line's own description of itself, and docs/reference/api.md from the
signatures and docstrings in the sources: `make reference`. Nothing but click is imported, so that the pages are the
same wherever they are made."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGE = ROOT / "paramdelta"

# Modules whose public names are meant to be imported, in the order of the page; a module that is not there is left out.
MODULES = {
    "paramdelta": "Whole checkpoints, and the errors.",
    "paramdelta.ops": "Arrays and tensors in memory.",
    "paramdelta.scaled": "Quantised matrices in memory.",
    "paramdelta.mapping": "Merged tensors by name, in an order of the caller's.",
    "paramdelta.stages": "Kernels of one's own in the streaming engine.",
    "paramdelta.torch_ops": "Operators of PyTorch, with the arguments that [GPUs](../gpu.md#pytorch-operators) lists.",
    "paramdelta.recycling": "What [recycling](../recycling.md) tells while it runs, and when it is done.",
    "paramdelta.integrations.transformers": "Merges as models of transformers.",
    "paramdelta.integrations.mergekit": "The merge method of mergekit.",
    "paramdelta.plan": "What a merge would do, as data.",
    "paramdelta.checkpoint": "Checkpoint folders, by their headers.",
    "paramdelta.engine": "How much of the machine a merge may use.",
    "paramdelta.demo": "Synthetic checkpoints.",
}
# Of these modules only what users name; the rest serves the package.
CHOSEN = {
    "paramdelta.plan": ("make_request", "make_plan", "MergeRequest"),
    "paramdelta.checkpoint": ("open_checkpoint", "describe"),
    "paramdelta.engine": ("EngineOptions",),
    "paramdelta.demo": ("write_demo",),
    "paramdelta.integrations.transformers": ("load_merged",),
    "paramdelta.integrations.mergekit": ("ParamDeltaMerge", "register"),
}
_SECTION = re.compile(r"^([A-Z]\w*)\n-{3,}\n", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|mod|meth):`~?([^`]+)`")


# --- the command line ---


def cli_page() -> str:
    """Return the page of all commands."""
    sys.path.insert(0, str(ROOT))
    from paramdelta.cli.commands import cli

    commands = cli.commands
    lines = [
        "# The command line\n",
        "Made by `make reference` from what `paramdelta COMMAND --help` says.\n",
        f"{_sentence(cli.help)}\n",
        "| command | |",
        "|---|---|",
        *(f"| [`{name}`](#{name}) | {_cell(command.get_short_help_str(200))} |" for name, command in commands.items()),
        "",
        *_epilog(cli),
    ]
    for name, command in commands.items():
        lines += _command(name, command)
    return "\n".join(lines).rstrip() + "\n"


def _command(name: str, command: click.Command) -> Iterator[str]:
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    required = [p for p in command.params if isinstance(p, click.Option) and p.required]
    parts = [_value(p) + (" …" if p.nargs == -1 else "") for p in arguments]
    parts += [f"{p.opts[0]} {_value(p)}".strip() + (" …" if p.multiple else "") for p in required]
    usage = " ".join(["paramdelta", name, *parts, "[OPTIONS]"])
    yield from [f"## {name}\n", f"`{usage}`\n", f"{_sentence(command.help)}\n", "| option | |", "|---|---|"]
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            spelled = ", ".join(
                f"`{o} {_value(option)}`".replace(" `", "`") for o in sorted(option.opts, key=len)[::-1]
            )
            yield f"| {_cell(spelled)} | {_cell(_about(option))} |"
    yield ""
    yield from _epilog(command)


def _value(parameter: click.Parameter) -> str:
    """Return what stands behind an option, spelled alike in every version of click."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return ""
    if parameter.metavar:
        return parameter.metavar
    if isinstance(parameter.type, click.Choice):
        return "|".join(str(choice) for choice in parameter.type.choices)
    return parameter.name.upper() if parameter.name else ""


def _about(option: click.Option) -> str:
    notes = ["required"] if option.required else []
    if option.multiple:
        notes.append("repeatable")
    if option.show_default:
        notes.append(f"default: `{option.default}`")
    return f"{_sentence(option.help)}" + (f" ({'; '.join(notes)})" if notes else "")


def _epilog(command: click.Command) -> Iterator[str]:
    """Examples and the like: paragraphs that click is told to leave as they are."""
    for part in (command.epilog or "").split("\b\n")[1:]:
        title, _, text = part.partition("\n")
        yield from [f"{title.strip()}:\n", "```text", inspect.cleandoc(text).rstrip(), "```\n"]


# --- Python ---


@dataclass(frozen=True)
class Found:
    """A public name, where it is defined, and its definition."""

    name: str
    module: str
    node: ast.FunctionDef | ast.ClassDef


def api_page() -> str:
    """Return the page of all functions and classes."""
    lines = [
        "# Python\n",
        "Made by `make reference` from the signatures and docstrings in the sources; `help()` says more. Importing "
        "`paramdelta` imports none of what is below, and nothing imports torch until a torch tensor is asked for.\n",
    ]
    for module, about in MODULES.items():
        if _source(module):
            lines += [f"## {module}\n", f"{about}\n"]
            for one in _public(module):
                lines += _described(one)
    return "\n".join(lines).rstrip() + "\n"


def _source(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _tree(module: str) -> ast.Module | None:
    path = _source(module)
    return None if path is None else ast.parse(path.read_text())


def _public(module: str) -> Iterator[Found]:
    """The names in ``__all__``, else all that are defined there without an underscore."""
    tree = _tree(module)
    if tree is None:
        return
    listed = next(
        (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets)
        ),
        [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")],
    )
    found = [one for name in CHOSEN.get(module, listed) if (one := _definition(module, name))]
    yield from sorted(found, key=lambda one: (isinstance(one.node, ast.ClassDef), one.name.endswith("Error")))


def _definition(module: str, name: str) -> Found | None:
    """Find a function or class where it is defined, along ``from … import``; None of a module or a constant."""
    tree = _tree(module)
    if tree is None:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name and node in tree.body:
            return Found(name, module, node)
        imports = isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and imports and node.module not in (None, module):
            return _definition(str(node.module), name)
    return None


def _described(found: Found) -> Iterator[str]:
    node = found.node
    yield f"### {found.name}\n"
    yield from ["```pyi", *_declared(node), "```\n"]
    yield from _documented(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                about = _first(ast.get_docstring(method) or "")
                if about:
                    yield f"- `{_method(method)}`: {about}"
        yield ""


def _declared(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """A definition without its body, wrapped where it is long; of a class with its fields."""
    decorators = [f"@{ast.unparse(d)}" for d in node.decorator_list]
    if isinstance(node, ast.ClassDef):
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        fields = [_quoted(ast.unparse(n)) for n in node.body if isinstance(n, ast.AnnAssign) and not _hidden(n)]
        head = f"class {node.name}{bases}:"
        return [head, *(f"    {f}" for f in fields)] if fields else [f"{head} ..."]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = _arguments(node.args)
    line = f"def {node.name}({', '.join(arguments)}){returns}: ..."
    if len(line) <= 120:
        return [*decorators, line]
    return [*decorators, f"def {node.name}(", *(f"    {a}," for a in arguments), f"){returns}: ..."]


def _method(node: ast.FunctionDef) -> str:
    """A method in one line, without ``self``; of a property what it is."""
    if any("property" in ast.unparse(decorator) for decorator in node.decorator_list) and node.returns:
        return f"{node.name}: {ast.unparse(node.returns)}"
    arguments = [a for a in _arguments(node.args) if a not in ("self", "cls")]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({', '.join(arguments)}){returns}"


def _hidden(node: ast.AnnAssign) -> bool:
    return isinstance(node.target, ast.Name) and node.target.id.startswith("_")


def _quoted(text: str) -> str:
    """Text in double quotes, as a formatter spells it."""
    return text.replace("'", '"')


def _arguments(arguments: ast.arguments) -> list[str]:
    """Return arguments one by one, as a formatter spells them."""
    parts, depth = [""], 0
    for letter in ast.unparse(arguments):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += " = " if letter == "=" and depth == 0 and ":" in parts[-1] else letter
    return [_quoted(part.strip()) for part in parts if part.strip()]


def _documented(docstring: str) -> Iterator[str]:
    """The first paragraph, then each section as a list: parameters, what comes back, errors."""
    yield f"{_first(docstring)}\n"
    pieces = _SECTION.split(docstring)
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        if title in ("Parameters", "Returns", "Yields", "Raises", "Attributes"):
            yield f"{title}:\n"
            yield from (f"- {entry}" for entry in _entries(body))
            yield ""


def _entries(body: str) -> Iterator[str]:
    """Entries of a NumPy section: a line at the margin, and what is indented below it."""
    for entry in re.split(r"\n(?=\S)", body.strip("\n")):
        head, _, below = entry.partition("\n")
        name, colon, kind = head.partition(" : ")
        about = _sentence(inspect.cleandoc(below))
        text = f"`{name.strip()}`" + (f": {_sentence(kind)}" if colon else "")
        if about:
            joined = " " if colon and below and _goes_on(kind) else ": " if not colon else ". "
            text += joined + about
        yield text


def _goes_on(kind: str) -> bool:
    """Whether a description begins beside the name and goes on below it, rather than a type standing there."""
    return len(kind) > 60


def _first(docstring: str) -> str:
    return _sentence(_SECTION.split(docstring)[0].split("\n\n")[0])


def _sentence(text: str | None) -> str:
    """Text in one line, in the spelling of Markdown."""
    joined = " ".join((text or "").replace("\b", "").split())
    return _ROLE.sub(r"`\1`", joined).replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"cli.md": cli_page, "api.md": api_page}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make())
