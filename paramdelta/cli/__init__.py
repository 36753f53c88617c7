"""The command line: one function per command, each a thin layer over the Python function of the same name. Nothing
heavy is imported until a command runs, so ``--help`` answers at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from typing import Any, NoReturn

import click

from paramdelta import JSON_VERSION
from paramdelta.errors import EXIT_FAILED, InputError, ParamDeltaError, ResourceError, StorageError

EXIT_INTERRUPTED = 130
_NO_MEMORY = ("annot allocate memory", "failed to map segment")  # from the dynamic linker


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    from paramdelta.cli.commands import cli

    signals: list[int] = []

    def interrupt(number: int, _frame: object) -> NoReturn:
        """All these signals end alike: workers stop, the temporary folder goes away."""
        signals.append(number)
        raise KeyboardInterrupt

    _open_standard_streams()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, interrupt)
    as_json = "--json" in sys.argv[1:]
    try:
        code = cli.main(prog_name="paramdelta", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt) as interrupted:
        _end_interrupted(str(interrupted.__cause__ or interrupted))
    except ImportError as error:
        # An interrupt within the start of an extension module comes out as its failure; so does a lack of memory.
        if signals:
            _end_interrupted()
        if not any(words in str(error) for words in _NO_MEMORY):
            raise
        _end_without_memory(as_json=as_json)
    except MemoryError:
        _end_without_memory(as_json=as_json)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except ParamDeltaError as error:
        report_error(error, as_json=as_json)
        code = error.exit_code
    except SystemExit:  # click's answer to a reader that went away before the document was written
        code = _report_lost(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))
    except OSError as error:
        code = _report_lost(error)
    sys.exit(_flushed(code))


def _open_standard_streams() -> None:
    """Put /dev/null where a standard stream is closed: the next file opened would take its number, and a stray message
    would be written into a checkpoint."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _flushed(code: Any) -> Any:
    """Flush standard output; return the exit code. A reader that has gone away changes nothing, a full disk does."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # what is left in the buffer must not be tried again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            return _report_lost(error)
    return code


def _report_lost(error: OSError) -> int:
    """Say that what the command had to tell could not be told: an error, though a merge may be published."""
    where = error.filename or "standard output"
    published = "".join(f"; {folder} is published, complete" for folder in _folders("published"))
    report_error(StorageError(error.errno, f"{where}: {error.strerror}{published}"), as_json=False)
    return EXIT_FAILED


def _end_without_memory(*, as_json: bool) -> NoReturn:
    error = ResourceError("this process may have no more memory")
    try:
        report_error(error, as_json=as_json)
        _flushed(EXIT_FAILED)
    except MemoryError:  # not even for that
        os.write(2, b"error: this process may have no more memory\n")
    # Not sys.exit: the interpreter's own end takes memory too. Workers are joined and files are gone by now.
    os._exit(EXIT_FAILED)


def report_error(error: ParamDeltaError, *, as_json: bool) -> None:
    """Print an error: lines on standard error, or a JSON document on standard output."""
    from paramdelta.cli import render

    if as_json:
        print(json.dumps(error_document(error), indent=2))
    else:
        render.print_error(error)
        for line in _remains():
            render.say(f"    → {line}", err=True)


def error_document(error: ParamDeltaError) -> dict[str, Any]:
    """Return an error as the JSON document described in docs/json.md."""
    complaints = (
        [{"subject": c.subject, "problem": c.problem, "remedy": c.remedy} for c in error.complaints]
        if isinstance(error, InputError)
        else [{"subject": "", "problem": str(error), "remedy": error.remedy}]
    )
    return {
        "version": JSON_VERSION,
        "kind": "error",
        "error": type(error).__name__,
        "exit_code": error.exit_code,
        "complaints": complaints,
        "left": [str(folder) for kind in ("kept", "stuck") for folder in _folders(kind)],
    }


def _end_interrupted(said: str = "") -> NoReturn:
    """End as interrupted, with what the interrupted command has to say, or else with what is published and left."""
    from paramdelta.cli import render

    if said:
        render.say(f"interrupted: {said}", err=True)
        os._exit(EXIT_INTERRUPTED)
    published = _folders("published")
    outcome = f"{', '.join(published)} is published, complete" if published else "nothing was published"
    left = _remains() or ["the temporary folder is removed"]
    render.say(f"interrupted: {'; '.join([outcome, *left])}", err=True)
    # Not sys.exit: an interrupt that fell into an exec() during an import makes the interpreter end by SIGINT, handled
    # or not. Workers are joined and files are gone by now.
    os._exit(EXIT_INTERRUPTED)


def _folders(kind: str) -> list[str]:
    """Folders that a merge kept, could not remove, or published; nothing is imported to find that there are none."""
    publish = sys.modules.get("paramdelta.publish")
    return [str(folder) for folder in getattr(publish, kind, ())]


def _remains() -> list[str]:
    """Return what is to be said of the temporary folders that are still there."""
    kept, stuck = _folders("kept"), _folders("stuck")
    lines = [f"what is finished stays in {', '.join(kept)}: the same command continues there"] if kept else []
    return lines + ([f"{', '.join(stuck)} could not be removed: remove it yourself"] if stuck else [])
