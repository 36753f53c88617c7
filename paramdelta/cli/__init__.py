"""The command line: one function per command, each a thin layer over the Python function of the same name. Nothing
heavy is imported until a command runs, so ``--help`` answers at once."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, NoReturn

import click

from paramdelta import JSON_VERSION
from paramdelta.errors import EXIT_FAILED, InputError, ParamDeltaError

EXIT_INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    from paramdelta.cli.commands import cli

    signals: list[int] = []

    def interrupt(number: int, _frame: object) -> NoReturn:
        """Both signals end alike: workers stop, the temporary folder goes away."""
        signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    as_json = "--json" in sys.argv[1:]
    try:
        code = cli.main(prog_name="paramdelta", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _end_interrupted()
    except ImportError:
        # An interrupt within the start of an extension module comes out as its failure.
        if signals:
            _end_interrupted()
        raise
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except ParamDeltaError as error:
        report_error(error, as_json=as_json)
        code = error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        code = EXIT_FAILED
    sys.exit(code)


def report_error(error: ParamDeltaError, *, as_json: bool) -> None:
    """Print an error: lines on standard error, or a JSON document on standard output."""
    from paramdelta.cli import render

    if as_json:
        print(json.dumps(error_document(error), indent=2))
    else:
        render.print_error(error)
        if _kept():
            print(f"    → {_what_is_left()}", file=sys.stderr)


def error_document(error: ParamDeltaError) -> dict[str, Any]:
    """Return an error as the JSON document described in docs/json.md."""
    complaints = (
        [{"subject": c.subject, "problem": c.problem, "remedy": c.remedy} for c in error.complaints]
        if isinstance(error, InputError)
        else [{"subject": "", "problem": str(error), "remedy": ""}]
    )
    return {
        "version": JSON_VERSION,
        "kind": "error",
        "error": type(error).__name__,
        "exit_code": error.exit_code,
        "complaints": complaints,
    }


def _end_interrupted() -> NoReturn:
    print(f"interrupted: nothing was published, {_what_is_left()}", file=sys.stderr, flush=True)
    # Not sys.exit: an interrupt that fell into an exec() during an import makes the interpreter end by SIGINT, handled
    # or not. Workers are joined and files are gone by now.
    os._exit(EXIT_INTERRUPTED)


def _kept() -> list[str]:
    """Folders with the unfinished work of a merge; nothing is imported to find that there are none."""
    publish = sys.modules.get("paramdelta.publish")
    return [str(folder) for folder in publish.kept] if publish is not None else []


def _what_is_left() -> str:
    folders = _kept()
    if not folders:
        return "the temporary folder is removed"
    return f"what is finished stays in {', '.join(folders)}: the same command continues there"
