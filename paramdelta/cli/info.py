"""``paramdelta info``: the version, the threads, and every backend, with why it cannot run here."""

from __future__ import annotations

import platform
from typing import Any

import click

from paramdelta import __version__, backends
from paramdelta.backends.threads import default_threads


def gather() -> dict[str, Any]:
    """Return the facts as what ``--json`` prints."""
    found: dict[str, Any] = {}
    for name in backends.names():
        reason = backends.why_not(name)
        found[name] = {"available": reason is None, "why_not": reason}
        if reason is None:
            able = backends.get(name).capabilities()
            found[name] |= {
                "devices": list(able.devices),
                "operations": list(able.operations),
                "variants": list(able.variants),
            }
    return {
        "version": 1,
        "kind": "info",
        "paramdelta": __version__,
        "python": platform.python_version(),
        "threads": default_threads(),
        "backends": found,
    }


def show(facts: dict[str, Any]) -> None:
    """Print them, a line each."""
    click.echo(f"paramdelta {facts['paramdelta']}, Python {facts['python']}, {facts['threads']} threads")
    for name, backend in facts["backends"].items():
        if backend["available"]:
            click.echo(f"{name}: {', '.join(backend['variants'])} ({', '.join(backend['operations'])})")
        else:
            click.echo(f"{name}: not available: {backend['why_not']}")
