"""The text the models are pre-trained on: sentences of a small made-up world, drawn from a seed. Facts about people,
sums, echoed letters, and a grammar of animals; each pre-training version has its own mix of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator

import numpy as np

PAD, USER, BOT, END = "<pad>", "<user>", "<bot>", "<end>"

_SYLLABLES = ("ba", "de", "ki", "lo", "mu", "na", "ra", "vo")
NAMES = tuple(
    first + second for first in _SYLLABLES for second in ("ndo", "ril", "sha", "tev", "zim", "fy", "gor", "lu")
)
ATTRIBUTES = {
    "colour": ("red", "blue", "green", "white", "black", "brown", "pink", "grey"),
    "town": ("rome", "oslo", "lima", "cairo", "delhi", "kyoto", "paris", "quito"),
    "food": ("figs", "rice", "beans", "bread", "plums", "soup", "eggs", "corn"),
}
LETTERS = tuple("abcdefghijkl")
DIGITS = tuple("0123456789")
_ADJECTIVES = ("old", "small", "quick", "quiet", "bold", "lazy")
_NOUNS = ("dog", "cat", "bird", "horse", "mouse", "fox")
_VERBS = ("sees", "hears", "follows", "finds", "fears", "likes")
_WORDS = ("'s", "is", "the", "of", ".", ",", ":", "plus", "say", "and", "let", "=", "repeat", "reverse")

VOCABULARY = (
    *(PAD, USER, BOT, END),
    *NAMES,
    *(name for name in ATTRIBUTES),
    *(value for values in ATTRIBUTES.values() for value in values),
    *LETTERS,
    *DIGITS,
    *(_ADJECTIVES + _NOUNS + _VERBS + _WORDS),
)
NUMBER = {word: i for i, word in enumerate(VOCABULARY)}

# Who is written about from which version on. Fine-tuning sees a part of the first group only (tasks.py).
FIRST = NAMES[:40]
LATER = {2: NAMES[40:48], 3: NAMES[48:56], 4: NAMES[56:64]}


@dataclasses.dataclass(frozen=True)
class Mix:
    """One pre-training version's data: who is known, and how often each kind of sentence comes."""

    people: tuple[str, ...]
    weights: tuple[tuple[str, float], ...]


FIRST_MIX = Mix(FIRST, (("fact", 5), ("sum", 1), ("echo", 2), ("animals", 2)))


def later_mix(version: int) -> Mix:
    """The data of version 2, 3, 4: more people each time, fewer sums, more stories. Half of the facts are new ones."""
    fresh = LATER[version]
    known = tuple(name for group in (FIRST, *(LATER[v] for v in range(2, version))) for name in group)
    people = known + fresh * (len(known) // len(fresh))
    return Mix(people, (("fact", 5), ("sum", 1 / version), ("echo", 2), ("animals", 1 + version)))


# Continued on other data: mostly programs, a little of what was known.
FAR_MIX = Mix(FIRST, (("program", 6), ("sum", 1), ("animals", 2), ("fact", 1)))


class World:
    """What is true under one seed: every person's colour, town and food."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = random.Random(f"world {seed}")
        self.facts = {(name, a): rng.choice(values) for name in NAMES for a, values in ATTRIBUTES.items()}

    def sentences(self, mix: Mix, rng: random.Random) -> Iterator[list[str]]:
        """Yield sentences of a mix without end."""
        kinds: dict[str, Callable[[Mix, random.Random], list[str]]] = {
            "fact": self._fact,
            "sum": _sum,
            "echo": _echo,
            "animals": _animals,
            "program": _program,
        }
        makers = [kinds[name] for name, _ in mix.weights]
        weights = [weight for _, weight in mix.weights]
        while True:
            for maker in rng.choices(makers, weights, k=64):
                yield maker(mix, rng)

    def batches(self, mix: Mix, rng: random.Random, rows: int, length: int) -> Iterator[np.ndarray]:
        """Yield int64 arrays [rows, length] of word numbers; each row begins with a sentence."""
        stream = self.sentences(mix, rng)
        while True:
            batch = np.empty((rows, length), dtype=np.int64)
            for row in batch:
                words: list[str] = []
                while len(words) < length:
                    words += next(stream)
                row[:] = [NUMBER[word] for word in words[:length]]
            yield batch

    def _fact(self, mix: Mix, rng: random.Random) -> list[str]:
        name = rng.choice(mix.people)
        attribute = rng.choice(tuple(ATTRIBUTES))
        value = self.facts[name, attribute]
        form = rng.randrange(4)
        if form == 0:
            return [name, "'s", attribute, "is", value, "."]
        if form == 1:
            return ["the", attribute, "of", name, "is", value, "."]
        if form == 2:
            return [value, "is", "the", attribute, "of", name, "."]
        return [name, ":", *(word for a in ATTRIBUTES for word in (a, self.facts[name, a])), "."]


def _sum(_: Mix, rng: random.Random) -> list[str]:
    a, b = rng.randrange(10), rng.randrange(10)
    return [DIGITS[a], "plus", DIGITS[b], "is", DIGITS[(a + b) % 10], "."]


def _echo(_: Mix, rng: random.Random) -> list[str]:
    word = rng.choices(LETTERS, k=rng.randint(3, 6))
    return ["say", *word, ":", *word, "."]


def _animals(_: Mix, rng: random.Random) -> list[str]:
    def phrase() -> list[str]:
        return ["the", *rng.sample(_ADJECTIVES, rng.randrange(3)), rng.choice(_NOUNS)]

    first = phrase()
    words = [*first, rng.choice(_VERBS), *phrase()]
    # Who was named first acts again: something for attention to find.
    return [*words, "and", first[-1], rng.choice(_VERBS), *phrase(), "."] if rng.random() < 0.5 else [*words, "."]


def _program(_: Mix, rng: random.Random) -> list[str]:
    names = rng.sample(LETTERS, 3)
    values = [rng.randrange(10) for _ in range(2)]
    lines = [
        word for name, value in zip(names[:2], values, strict=True) for word in ("let", name, "=", DIGITS[value], ",")
    ]
    return [*lines, "let", names[2], "=", names[0], "plus", names[1], ":", DIGITS[sum(values) % 10], "."]
