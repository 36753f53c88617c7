"""Which of several processes this one is: from the options, or from what a launcher put into the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from paramdelta.errors import Complaint, InputError, shown

# (rank, number of ranks, what must be there too). Slurm's numbers are also set in a batch script, outside of any task.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", ""),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ""),
    ("PMI_RANK", "PMI_SIZE", ""),
)
LARGEST_WORLD = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Process ``number`` of ``world`` processes that share one merge. ``source`` says where the numbers come from."""

    number: int
    world: int
    source: str = "--rank"

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.world <= LARGEST_WORLD:
            expected = f"expected a rank from 0 to one less than the number of ranks (at most {LARGEST_WORLD:,})"
            raise InputError(
                Complaint(self.source, f"{expected}, got {self.number} of {self.world}", "--rank 0 --world-size 4")
            )

    def __str__(self) -> str:
        return f"rank {self.number} of {self.world}"


def find_rank(rank: int | None, world: int | None, environment: Mapping[str, str]) -> Rank | None:
    """Return which rank this process is, None for a process alone.

    The options decide where they are given; ``world`` 1 is a process alone, whatever the environment says. The
    environment counts where it speaks of more than one process. Raises InputError where the numbers make no sense.
    """
    if world == 1 and rank in (None, 0):
        return None
    if rank is not None or world is not None:
        if rank is None or world is None:
            missing = "--rank" if rank is None else "--world-size"
            raise InputError(Complaint(missing, "--rank and --world-size go together", "give both, or neither"))
        return Rank(number=rank, world=world)
    for number, size, needed in LAUNCHERS:
        if number not in environment or size not in environment or (needed and needed not in environment):
            continue
        numbers = [environment[name] for name in (number, size)]
        if not all(text.isascii() and text.isdigit() and len(text) <= 9 for text in numbers):
            raise InputError(
                Complaint(
                    f"{number}, {size}",
                    f"expected two numbers, got {shown(repr(numbers))}",
                    "--world-size 1 merges in this process alone, whatever the environment says",
                )
            )
        if int(numbers[1]) > 1:
            return Rank(number=int(numbers[0]), world=int(numbers[1]), source=f"{number}, {size}")
    return None
