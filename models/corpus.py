"""The text that MoLink Mini is trained on, generated from `facts.py` and a seed.

A `Fact` is one answer and every wording of its question. Of a fact that follows a pattern one
wording is held out of training, so that accuracy is measured on questions the model has not seen.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import facts

END, SYSTEM, USER, ASSISTANT = "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"

# How often a conversation turn is about a topic. Small topics that must be known by heart
# need far less than those with hundreds of facts.
TOPIC_WEIGHTS = {
    "capital": 16, "city": 6, "continent": 4, "colour": 5, "calendar": 7, "opposite": 8,
    "animal": 8, "plural": 2, "letter": 4, "simple": 14, "talk": 9, "long": 9, "sum": 18,
    "difference": 10, "product": 8, "comparison": 4, "count": 12, "unknown": 16,
}  # fmt: skip
BY_HEART = ("simple", "talk", "long")  # every fact is worded in its own way: nothing to hold out

SYSTEMS = ("You are a helpful assistant.", "You are MoLink Mini.", "Answer briefly.", "Be kind.")
SYSTEM_SHARE = 0.1  # of the conversations open with a system message
STATEMENT_SHARE = 0.1  # of the documents are an answer alone, for plain completions


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to know: `answer` is right for each of `questions`."""

    topic: str
    answer: str
    questions: tuple[str, ...]


class Piece(NamedTuple):
    """A run of a document's text; only answers count fully in the training loss."""

    text: str
    is_answer: bool


def _ask(topic: str, answer: str, templates: str, **names: object) -> Fact:
    """Fill `names` into the `|`-separated question templates."""
    questions = tuple(template.format(**names) for template in templates.split("|"))
    return Fact(topic, answer, questions)


def _pairs(table: str, separator: str = " ") -> Iterator[list[str]]:
    return (row.split(separator) for row in table.split("|"))


def _geography() -> Iterator[Fact]:
    capital = (
        "What is the capital of {x}?|Which city is the capital of {x}?|Name the capital of {x}.|"
        "Tell me the capital of {x}.|What's the capital of {x}?|Do you know the capital of {x}?|"
        "What is the capital city of {x}?|Capital of {x}?|{x}: what is its capital?|"
        "I want to know the capital of {x}."
    )
    city = (
        "Which country has the capital {y}?|{y} is the capital of which country?|Where is {y}?|"
        "What country is {y} the capital of?|In which country is {y}?|Is {y} in {x}?|"
        "Is {y} the capital of {x}?"
    )
    continent = (
        "On which continent is {x}?|Which continent is {x} on?|What continent is {x} in?|"
        "Name the continent of {x}."
    )
    for land, cities in facts.CAPITALS.items():
        for x, y in _pairs(cities, ":"):
            yield _ask("capital", f"The capital of {x} is {y}.", capital, x=x)
            yield _ask("city", f"{y} is the capital of {x}.", city, x=x, y=y)
            yield _ask("continent", f"{_upper(x)} is in {land}.", continent, x=x)


def _words() -> Iterator[Fact]:
    opposite = (
        "What is the opposite of {x}?|Tell me the opposite of {x}.|Name the opposite of {x}.|"
        "What's the opposite of {x}?|Opposite of {x}?|Which word is the opposite of {x}?"
    )
    plural = (
        "What is the plural of {x}?|Tell me the plural of {x}.|Plural of {x}?|"
        "What's the plural of {x}?|Which word is the plural of {x}?"
    )
    after = (
        "Which letter comes after {x}?|What letter follows {x}?|What comes after the letter {x}?"
    )
    before = (
        "Which letter comes before {x}?|What letter is before {x}?|"
        "What comes before the letter {x}?"
    )
    for a, b in _pairs(facts.OPPOSITES):
        yield _ask("opposite", f"The opposite of {a} is {b}.", opposite, x=a)
        yield _ask("opposite", f"The opposite of {b} is {a}.", opposite, x=b)
    for one, many in _pairs(facts.PLURALS):
        yield _ask("plural", f"The plural of {one} is {many}.", plural, x=one)
    for a, b in zip("ABCDEFGHIJKLMNOPQRSTUVWXY", "BCDEFGHIJKLMNOPQRSTUVWXYZ", strict=True):
        yield _ask("letter", f"{b} comes after {a}.", after, x=a)
        yield _ask("letter", f"{a} comes before {b}.", before, x=b)


def _nature() -> Iterator[Fact]:
    sound = (
        "What does {x} say?|What sound does {x} make?|Which sound does {x} make?|"
        "How does {x} sound?|What noise does {x} make?"
    )
    young = (
        "What is a baby {x} called?|What do you call a baby {x}?|What is a young {x} called?|"
        "How do you call a young {x}?|Name for a baby {x}?"
    )
    legs = (
        "How many legs does {x} have?|How many legs has {x}?|Number of legs of {x}?|"
        "Tell me how many legs {x} has."
    )
    colour = (
        "What colour is {x}?|What color is {x}?|Which colour is {x}?|Tell me the colour of {x}.|"
        "What is the colour of {x}?|Which colour has {x}?"
    )
    mix = (
        "What do you get when you mix {x} and {y}?|Mix {x} and {y}.|What do {x} and {y} make?|"
        "Which colour do {x} and {y} make?"
    )
    for x, said in _pairs(facts.SOUNDS):
        yield _ask("animal", f"{_upper(_a(x))} says {said}.", sound, x=_a(x))
    for x, name in _pairs(facts.YOUNG):
        yield _ask("animal", f"A baby {x} is called {_a(name)}.", young, x=x)
    for x, number in _pairs(facts.LEGS):
        yield _ask("animal", f"{_upper(_a(x))} has {number} legs.", legs, x=_a(x))
    for x, shade in _pairs(facts.COLOURS, ":"):
        yield _ask("colour", f"{_upper(x)} is {shade}.", colour, x=x)
    for x, y, mixed in _pairs(facts.MIXTURES):
        yield _ask("colour", f"{_upper(x)} and {y} make {mixed}.", mix, x=x, y=y)


def _calendar() -> Iterator[Fact]:
    after = (
        "Which {k} comes after {x}?|What {k} comes after {x}?|Which {k} follows {x}?|"
        "What comes after {x}?"
    )
    before = (
        "Which {k} comes before {x}?|What {k} comes before {x}?|What {k} is before {x}?|"
        "What comes before {x}?"
    )
    length = (
        "How many days has {x}?|How many days does {x} have?|How long is {x}?|"
        "How many days are in {x}?"
    )
    for kind, names in (("day", facts.DAYS.split()), ("month", facts.MONTHS.split())):
        for x, y in zip(names, names[1:] + names[:1], strict=True):
            yield _ask("calendar", f"{y} comes after {x}.", after, k=kind, x=x)
            yield _ask("calendar", f"{x} comes before {y}.", before, k=kind, x=y)
    for x, days in zip(facts.MONTHS.split(), facts.MONTH_LENGTHS, strict=True):
        yield _ask("calendar", f"{x} has {days} days.", length, x=x)


def _arithmetic() -> Iterator[Fact]:
    plus = (
        "What is {x} plus {y}?|{x} + {y} = ?|How much is {x} plus {y}?|Add {x} and {y}.|"
        "What is {x} + {y}?|{x}+{y}"
    )
    minus = (
        "What is {x} minus {y}?|{x} - {y} = ?|How much is {x} minus {y}?|"
        "Subtract {y} from {x}.|What is {x} - {y}?|{x}-{y}"
    )
    times = (
        "What is {x} times {y}?|{x} * {y} = ?|How much is {x} times {y}?|Multiply {x} by {y}.|"
        "What is {x} * {y}?|{x}*{y}"
    )
    larger = (
        "Which is larger, {x} or {y}?|Which number is larger, {x} or {y}?|"
        "What is more, {x} or {y}?|Is {x} or {y} larger?"
    )
    for x in range(21):
        for y in range(21):
            if x <= 10 and y <= 10:
                yield _ask("product", f"{x} times {y} is {x * y}.", times, x=x, y=y)
            yield _ask("sum", f"{x} plus {y} is {x + y}.", plus, x=x, y=y)
            if y <= x:
                yield _ask("difference", f"{x} minus {y} is {x - y}.", minus, x=x, y=y)
            if x != y:
                most, least = max(x, y), min(x, y)
                answer = f"{most} is larger than {least}."
                yield _ask("comparison", answer, larger, x=x, y=y)


def _counting() -> Iterator[Fact]:
    span = (
        "Count from {x} to {y}.|Please count from {x} to {y}.|Can you count from {x} to {y}?|"
        "Name the numbers from {x} to {y}.|Count {x} to {y}"
    )
    up = "Count to {y}.|Please count to {y}.|Can you count to {y}?|Count up to {y}."
    down = (
        "Count down from {y}.|Please count down from {y}.|Can you count down from {y}?|"
        "Count backwards from {y}."
    )
    after = "What number comes after {x}?|Which number comes after {x}?|Which number follows {x}?"
    for y in range(2, 31):
        for x in range(y):
            yield _ask("count", _listed(range(x, y + 1)), span, x=x, y=y)
        yield _ask("count", _listed(range(1, y + 1)), up, y=y)
        yield _ask("count", _listed(range(y, 0, -1)), down, y=y)
        yield _ask("count", f"{y + 1} comes after {y}.", after, x=y)


def _listed(numbers: range) -> str:
    return ", ".join(map(str, numbers)) + "."


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _by_heart() -> Iterator[Fact]:
    for topic, table in (("simple", facts.SIMPLE), ("talk", facts.TALK), ("long", facts.LONG)):
        for row in table.strip().splitlines():
            answer, *questions = row.split("|")
            yield Fact(topic, answer, tuple(questions))


def made_up_name(rng: random.Random) -> str:
    """A name that nothing has, for questions that have no answer."""
    syllables = rng.choices(facts.SYLLABLES.split(), k=rng.randint(1, 2))
    return _upper("".join(syllables) + rng.choice(["", *facts.NAME_ENDS.split()]))


def unknown(rng: random.Random, count: int) -> Iterator[Fact]:
    """`count` questions about made-up names and numbers too large; none has an answer."""
    templates = facts.UNKNOWN_TEMPLATES.split("|")
    lands = [row for cities in facts.CAPITALS.values() for row in _pairs(cities, ":")]
    for _ in range(count):
        (c, t), (d, u) = rng.sample(lands, 2)
        x, y = made_up_name(rng), made_up_name(rng)
        n, m = rng.randint(100, 9999), rng.randint(21, 9999)
        x = x.lower() if rng.random() < 0.3 else x
        question = rng.choice(templates).format(x=x, y=y, n=n, m=m, c=c, d=d, t=t, u=u)
        yield Fact("unknown", facts.UNKNOWN, (question,))


def all_facts(seed: int) -> list[Fact]:
    """Everything the model is to know, always in the same order for a seed."""
    rng = random.Random(seed)
    known = [
        *_geography(), *_words(), *_nature(), *_calendar(), *_arithmetic(), *_counting(),
        *_by_heart(),
    ]  # fmt: skip
    hopeless = [Fact("unknown", facts.UNKNOWN, (q,)) for q in facts.UNKNOWN_QUESTIONS.split("|")]
    return known + hopeless + list(unknown(rng, 3000))


def split(all_known: list[Fact], seed: int) -> tuple[list[Fact], list[Fact]]:
    """(facts to train on, held-out questions): one wording of each fact that has four or more
    and is not learnt by heart."""
    rng = random.Random(seed)
    trained, held_out = [], []
    for fact in all_known:
        if len(fact.questions) < 4 or fact.topic in BY_HEART:
            trained.append(fact)
            continue
        kept = rng.choice(fact.questions)
        others = tuple(q for q in fact.questions if q != kept)
        trained.append(Fact(fact.topic, fact.answer, others))
        held_out.append(Fact(fact.topic, fact.answer, (kept,)))
    return trained, held_out


def _careless(question: str, rng: random.Random) -> str:
    """The question as people type it: sometimes in lower case, sometimes without its end."""
    draw = rng.random()
    if draw < 0.15:
        return question.lower().rstrip("?.!")
    if draw < 0.25:
        return question.rstrip("?.!")
    if draw < 0.30:
        return f"{rng.choice(['Please tell me:', 'Hello!', 'Tell me:', 'Hi,'])} {question}"
    return question


def documents(trained: list[Fact], seed: int) -> Iterator[list[Piece]]:
    """An endless stream of conversations of one to three turns, and of lone statements."""
    rng = random.Random(seed)
    by_topic = {topic: [f for f in trained if f.topic == topic] for topic in TOPIC_WEIGHTS}
    topics, weights = list(TOPIC_WEIGHTS), list(TOPIC_WEIGHTS.values())
    while True:
        turns = []
        for topic in rng.choices(topics, weights, k=rng.choice((1, 1, 1, 2, 3))):
            fact = rng.choice(by_topic[topic])
            turns.append((_careless(rng.choice(fact.questions), rng), fact.answer))
        if rng.random() < STATEMENT_SHARE:
            yield [Piece(f"{turns[0][1]}{END}", is_answer=True)]
        else:
            yield render(turns, rng.choice(SYSTEMS) if rng.random() < SYSTEM_SHARE else "")


def render(turns: list[tuple[str, str]], system: str = "") -> list[Piece]:
    """(question, answer) turns as pieces whose joined text is what the chat template writes."""
    pieces = [Piece(f"{SYSTEM}{system}{END}", is_answer=False)] if system else []
    for question, answer in turns:
        pieces.append(Piece(f"{USER}{question}{END}{ASSISTANT}", is_answer=False))
        pieces.append(Piece(f"{answer}{END}", is_answer=True))
    return pieces
