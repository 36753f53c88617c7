"""Coordinates the ranks of one job under torchrun: who failed, how far all are, what became of the merge.

torch.distributed gives a key-value store and nothing else: no data, no collectives, so neither gloo nor NCCL is needed,
and a rank that fails leaves nobody in a barrier. Each rank writes how it fares; all look whether one has failed.

Under torchrun the store lives in its agent and outlives the ranks: what killed ranks wrote there is still to be read,
and each agent counts restarts for itself. So the ranks that run first find each other: each shows a number that only it
has drawn, and rank 0 answers it with the name under which they all keep their keys.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from paramdelta.errors import EXIT_FAILED, ParamDeltaError, StorageError

if TYPE_CHECKING:
    from paramdelta.ranks import Rank

PULSE_SECONDS = 15.0
SILENCE_SECONDS = 900.0  # a rank that gives no sign of life for so long is gone; its machine may be
_JOIN_SECONDS = 900.0  # to start all ranks of a job
_PARTING_SECONDS = 30.0  # for the others to read the outcome before the store may go with rank 0
_WAKE_SECONDS = 0.2
_LOOK_SECONDS = 1.0
_FAILED, _OUTCOME = "failed", "outcome"


class OtherRankError(ParamDeltaError):
    """Another rank failed, or said that the merge did; ``document`` is its error as in docs/json.md. That rank has told
    the user."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.exit_code = int(document.get("exit_code", EXIT_FAILED))
        super().__init__(f"rank {document.get('rank', '?')} failed")


def coordinated(rank: Rank | None, environment: Mapping[str, str]) -> bool:
    """Whether a launcher gives what torch.distributed needs, and torch is there."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return (
        rank is not None
        and rank.source.startswith("RANK")
        and all(name in environment for name in needed)
        and importlib.util.find_spec("torch") is not None
    )


def restarts(environment: Mapping[str, str]) -> int:
    """Return how often this machine's torchrun has restarted its ranks."""
    text = environment.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(text) if text.isdecimal() else 0


class Company:
    """All ranks of a job. Use as a context: whatever ends it with an error tells the others."""

    def __init__(self, rank: Rank, document: Callable[[BaseException], dict[str, Any]]) -> None:
        self.rank, self._document = rank, document
        self.restarts = 0  # of the ranks, since the job began
        self.spoke = True  # whether this rank was the first to fail, and should tell the user
        self._looked = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> Company:
        from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_JOIN_SECONDS)))
            name, self.restarts = self._find_each_other(PrefixStore("paramdelta", store))
        except (RuntimeError, ValueError, OSError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise StorageError(f"{self.rank} does not reach the others at {address}: {error}") from error
        self._store: Store = PrefixStore(f"paramdelta/{name}", store)
        self.spoke = False
        threading.Thread(target=self._live, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._ended.set()
        if error is None or isinstance(error, OtherRankError):
            return
        document = json.dumps(self._document(error) | {"rank": self.rank.number})
        self.spoke = True
        with contextlib.suppress(RuntimeError):  # the store may be what failed
            self.spoke = self._store.compare_set(_FAILED, "", document) == document.encode()

    def _find_each_other(self, store: Any) -> tuple[str, int]:
        """Return the name of this gathering of ranks, and how often any of them was restarted."""
        own, name = self.rank.number, secrets.token_hex(8)
        deadline = time.monotonic() + _JOIN_SECONDS
        others = [number for number in range(self.rank.world) if number != own]
        drawn = secrets.token_hex(8)
        if own:
            store.set(f"hello/{own}", drawn)
        welcomed = not own
        while True:
            if not own:
                for number in others:
                    if store.check([f"hello/{number}"]):
                        store.set(f"welcome/{number}", store.get(f"hello/{number}").decode() + name)
                if all(store.check([f"{name}/joined/{number}"]) for number in others):
                    counts = [int(store.get(f"{name}/joined/{number}")) for number in others]
                    store.set(f"{name}/restarts", str(max([*counts, restarts(os.environ)])))
                    welcomed = True
            elif not welcomed and store.check([f"welcome/{own}"]):
                answer = store.get(f"welcome/{own}").decode()
                if answer.startswith(drawn):
                    name, welcomed = answer.removeprefix(drawn), True
                    store.set(f"{name}/joined/{own}", str(restarts(os.environ)))
            if welcomed and store.check([f"{name}/restarts"]):
                return name, int(store.get(f"{name}/restarts"))
            if time.monotonic() > deadline:
                raise RuntimeError(f"not all ranks were there within {_JOIN_SECONDS / 60:.0f} minutes")
            time.sleep(_WAKE_SECONDS)

    def _live(self) -> None:
        """Give a sign of life now and then."""
        with contextlib.suppress(RuntimeError):
            while not self._ended.wait(PULSE_SECONDS):
                self._store.add(f"pulse/{self.rank.number}", 1)

    def check(self) -> None:
        """Raise OtherRankError where a rank has failed."""
        with self._reaching():
            failed = self._store.check([_FAILED])
            document = json.loads(self._store.get(_FAILED)) if failed else None
        if document is not None:
            raise OtherRankError(document)

    def watch(self, shown: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        """Return a callback for progress that tells the others, shows that of all where ``shown`` is given, and ends
        this rank's work where another has failed."""

        def update(read: int, written: int) -> None:
            now = time.monotonic()
            if now - self._looked < _LOOK_SECONDS:
                return
            self._looked = now
            self.check()
            with self._reaching():
                self._store.set(self._progress(self.rank.number), json.dumps([read, written]))
            self.show(shown)

        return update

    def show(self, shown: Callable[[int, int], None] | None) -> None:
        """Show how far all ranks are."""
        if shown is None:
            return
        keys = [self._progress(number) for number in range(self.rank.world)]
        with self._reaching():
            known = [key for key in keys if self._store.check([key])]
            rows = [json.loads(self._store.get(key)) for key in known]
        shown(sum(row[0] for row in rows), sum(row[1] for row in rows))

    def _progress(self, number: int) -> str:
        return f"progress/{number}"

    def once(self, name: str, act: Callable[[], None]) -> None:
        """Let rank 0 do something before any rank goes on, when the job begins; not when ranks are restarted."""
        if self.rank.number == 0:
            if not self.restarts:
                act()
            with self._reaching():
                self._store.set(name, "done")
        self._wait(lambda: self._has(name), [0])

    def finished(self, conclude: Callable[[], None], shown: Callable[[int, int], None] | None) -> None:
        """Say that this rank's part is done. When all are, rank 0 calls ``conclude``; return when it has, everywhere.
        Raises OtherRankError where a rank, or ``conclude`` on rank 0, failed."""
        with self._reaching():
            self._store.set(f"part/{self.rank.number}", "done")
        if self.rank.number:
            self._wait(lambda: self._has(_OUTCOME), [0])
            with self._reaching():
                self._store.set(f"left/{self.rank.number}", "done")
            return
        others = set(range(1, self.rank.world))
        self._wait(lambda: self._all("part", others), others, shown)
        conclude()
        with self._reaching():
            self._store.set(_OUTCOME, "published")
        self._part_from(others)

    def _part_from(self, others: set[int]) -> None:
        """Stay until the others know how it ended: the store may live in this process."""
        deadline = time.monotonic() + _PARTING_SECONDS
        left = set(others)
        with contextlib.suppress(RuntimeError):
            while not self._all("left", left) and time.monotonic() < deadline:
                time.sleep(_WAKE_SECONDS)

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _all(self, what: str, ranks: set[int]) -> bool:
        """Whether all of ``ranks`` have said something; those that have are taken out."""
        for number in sorted(ranks):
            if not self._has(f"{what}/{number}"):
                return False
            ranks.discard(number)
        return True

    def _wait(
        self,
        until: Callable[[], bool],
        whom: set[int] | list[int],
        shown: Callable[[int, int], None] | None = None,
    ) -> None:
        """Wait for ranks; raise OtherRankError where one fails, StorageError where one is silent for too long."""
        heard: dict[int, tuple[int, float]] = {}
        looked = time.monotonic()
        while True:
            with self._reaching():
                if until():
                    return
            time.sleep(_WAKE_SECONDS)
            now = time.monotonic()
            if now - looked < _LOOK_SECONDS:
                continue
            looked = now
            self.check()
            self.show(shown)
            with self._reaching():
                for number in sorted(whom):
                    pulse = int(self._store.add(f"pulse/{number}", 0))
                    if heard.get(number, (-1, 0.0))[0] != pulse:
                        heard[number] = (pulse, now)
            silent = [number for number, (_, last) in heard.items() if now - last > SILENCE_SECONDS and number in whom]
            if silent:
                raise StorageError(
                    f"rank {silent[0]} has given no sign of life for {SILENCE_SECONDS / 60:.0f} minutes: what is "
                    "finished is kept; the same command continues"
                )

    @contextlib.contextmanager
    def _reaching(self) -> Any:
        try:
            yield
        except RuntimeError as error:  # torch's DistError, where the store has gone
            raise StorageError(f"{self.rank} has lost the other ranks: {error}") from error
