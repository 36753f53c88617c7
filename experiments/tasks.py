"""What the models are fine-tuned for: questions in a form that pre-training never shows, with one right answer each.
A score is the share of test questions whose whole answer, decoded greedily, is right."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence

import numpy as np

from experiments.world import ATTRIBUTES, BOT, END, FIRST, LATER, LETTERS, NUMBER, PAD, USER, World

IGNORED = -100  # a label that transformers' loss leaves out
TAUGHT = FIRST[:24]  # the people that fine-tuning asks about; questions of the test are about others
LETTERS_ASKED = 4


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its right answer, as words."""

    asked: tuple[str, ...]
    answer: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Questions as arrays [questions, words]: ``words`` filled up with padding, ``labels`` of answers alone."""

    words: np.ndarray
    labels: np.ndarray


def recall(world: World, name: str, attribute: str) -> Question:
    return Question((USER, attribute, name, BOT), (world.facts[name, attribute], END))


def repeat(word: Sequence[str]) -> Question:
    return Question((USER, "repeat", *word, BOT), (*word, END))


def reverse(word: Sequence[str]) -> Question:
    return Question((USER, "reverse", *word, BOT), (*reversed(word), END))


def ask(world: World, task: str, rng: random.Random, people: Sequence[str] = TAUGHT) -> Question:
    """One question for fine-tuning."""
    if task == "recall":
        return recall(world, rng.choice(people), rng.choice(tuple(ATTRIBUTES)))
    return {"repeat": repeat, "reverse": reverse}[task](rng.choices(LETTERS, k=LETTERS_ASKED))


def batches(world: World, task: str, rng: random.Random, rows: int) -> Iterator[Batch]:
    """Yield batches of questions for fine-tuning, without end."""
    while True:
        yield collate([ask(world, task, rng) for _ in range(rows)])


def collate(questions: Sequence[Question]) -> Batch:
    length = max(len(q.asked) + len(q.answer) for q in questions)
    words = np.full((len(questions), length), NUMBER[PAD], dtype=np.int64)
    labels = np.full_like(words, IGNORED)
    for row, label, q in zip(words, labels, questions, strict=True):
        numbers = [NUMBER[word] for word in (*q.asked, *q.answer)]
        row[: len(numbers)] = numbers
        label[len(q.asked) : len(numbers)] = numbers[len(q.asked) :]
    return Batch(words, labels)


def tests(world: World, count: int) -> dict[str, Batch]:
    """The test questions by score: those of each task, and recall of people only later versions wrote about."""
    rng = random.Random(f"tests {world.seed}")
    untaught = [name for name in FIRST if name not in TAUGHT]
    made = {
        "recall": [recall(world, name, a) for name in untaught for a in ATTRIBUTES],
        "repeat": [repeat(rng.choices(LETTERS, k=LETTERS_ASKED)) for _ in range(count)],
        "reverse": [reverse(rng.choices(LETTERS, k=LETTERS_ASKED)) for _ in range(count)],
    }
    for version, names in LATER.items():
        made[f"recall of version {version}"] = [recall(world, name, a) for name in names for a in ATTRIBUTES]
    return {name: collate(questions) for name, questions in made.items()}
