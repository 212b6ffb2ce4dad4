"""Dialogues of two people and summaries of what came of them.

    summarise : tom : hi ann . ann : hi tom . tom : shall we go to the park on monday ? ann : monday is bad , what
    about friday ? tom : fine , friday then . ann : let us meet at two .
    -> tom and ann will go to the park on friday at two .

An offline twin of DialogSum. A dialogue is made of a few events with small talk between them; a summary has a sentence
for each event, in order, in any of several wordings. What was proposed and then changed must not be in it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

from skd_plugin.tasks import scorers
from skd_plugin.tasks.arithmetic import NAMES
from skd_plugin.tasks.base import Example, mean
from skd_plugin.tasks.generated import GeneratedTask, closed_vocabulary

EVENTS = (2, 3)  # of a dialogue, inclusive
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
HOURS = "one two three four five six seven eight nine ten".split()
PLACES = "park zoo cinema theatre museum library market beach lake castle gallery stadium harbour circus".split()
ITEMS = "bike tent camera ladder guitar drill suitcase umbrella kettle scarf map torch laptop radio".split()
NEWS = "job house puppy car garden piano teacher office boat horse".split()
PARTS = "back knee tooth head foot shoulder throat ear".split()
REMEDIES = "a rest|some tea|a doctor|a warm bath|more sleep|a long walk|less coffee".split("|")
MEALS = "soup pasta curry salad pancakes noodles rice dumplings".split()
GREETINGS = "hi hello hey".split()
SMALL_TALK = (
    "it is so cold today|i was up late|the bus was full again|i like your hat|what a week|i am so hungry".split("|")
)
REPLIES = "oh well|i see|yes indeed|tell me about it|same here".split("|")

Lines = list[tuple[str, str]]  # who says what
Event = tuple[Lines, list[str], list[str]]  # what is said, the wordings of its summary, the facts in them


def _outing(rng: random.Random, a: str, b: str) -> Event:
    place, hour = rng.choice(PLACES), rng.choice(HOURS)
    day, first = rng.sample(DAYS, 2)
    lines = [(a, f"shall we go to the {place} on {first if (moved := rng.random() < 0.5) else day} ?")]
    if moved:
        lines += [(b, f"{first} is bad , what about {day} ?"), (a, f"fine , {day} then .")]
    else:
        lines += [(b, f"{day} is fine .")]
    lines += [(rng.choice((a, b)), f"let us meet at {hour} .")]
    wordings = [
        f"{a} and {b} will go to the {place} on {day} at {hour}",
        f"{a} and {b} will visit the {place} together on {day} at {hour}",
        f"{a} and {b} agree to meet at the {place} on {day} at {hour}",
        f"on {day} at {hour} {a} and {b} will go to the {place}",
    ]
    return lines, wordings, [place, day, hour]


def _loan(rng: random.Random, a: str, b: str) -> Event:
    item, day = rng.choice(ITEMS), rng.choice(DAYS)
    lines = [(a, f"can i borrow your {item} ?")]
    if rng.random() < 0.6:
        lines += [(b, f"sure , but i need it back by {day} .")]
        wordings = [
            f"{b} lends {a} the {item} until {day}",
            f"{a} borrows the {item} from {b} until {day}",
            f"{a} may use the {item} of {b} until {day}",
        ]
        return lines, wordings, [a, b, item, day]
    lines += [(b, f"sorry , my {item} is broken .")]
    wordings = [
        f"{b} cannot lend {a} the broken {item}",
        f"{a} wants to borrow the {item} of {b} but it is broken",
        f"{a} cannot have the {item} because it is broken",
    ]
    return lines, wordings, [a, item, "broken"]


def _news(rng: random.Random, a: str, b: str) -> Event:
    who, thing = rng.choice([name for name in NAMES if name not in (a, b)]), rng.choice(NEWS)
    feeling = rng.choice(("happy", "worried"))
    lines = [(a, f"{who} has a new {thing} .")]
    lines += [(b, "oh , that is great news !" if feeling == "happy" else "oh no , not another one !")]
    wordings = [
        f"{a} tells {b} about the new {thing} of {who} and {b} is {feeling}",
        f"{b} is {feeling} to hear that {who} has a new {thing}",
        f"{b} hears from {a} that {who} has a new {thing} and is {feeling}",
    ]
    return lines, wordings, [who, thing, feeling]


def _ache(rng: random.Random, a: str, b: str) -> Event:
    part, remedy = rng.choice(PARTS), rng.choice(REMEDIES)
    lines = [(a, f"my {part} hurts ."), (b, f"try {remedy} .")]
    wordings = [
        f"{a} has a sore {part} and {b} suggests {remedy}",
        f"{b} suggests {remedy} for the sore {part} of {a}",
        f"{b} thinks that {remedy} will help {a} with the sore {part}",
    ]
    return lines, wordings, [a, part, *remedy.split()]


def _dinner(rng: random.Random, a: str, b: str) -> Event:
    day = rng.choice(DAYS)
    meal, other = rng.sample(MEALS, 2)
    lines = [(a, f"i will cook on {day} , {other} or {meal} ?"), (b, f"{meal} , please .")]
    wordings = [
        f"{a} will cook {meal} for {b} on {day}",
        f"on {day} {a} will make {meal} for {b}",
        f"{b} would like {a} to cook {meal} on {day}",
    ]
    return lines, wordings, [a, meal, day]


EVENT_KINDS: tuple[Callable[[random.Random, str, str], Event], ...] = (_outing, _loan, _news, _ache, _dinner)


class Summary(GeneratedTask):
    name = "summary"
    metric = "rouge_l"
    max_new_tokens = 80
    packages = ("rouge_score",)

    def draw(self, rng: random.Random) -> Example:
        a, b = rng.sample(NAMES, 2)
        lines: Lines = [(a, f"{rng.choice(GREETINGS)} {b} ."), (b, f"{rng.choice(GREETINGS)} {a} .")]
        events, facts = [], []
        for kind in rng.sample(EVENT_KINDS, rng.randint(*EVENTS)):
            said, wordings, known = kind(rng, *rng.sample((a, b), 2))
            if rng.random() < 0.4:
                lines += [(a, f"{rng.choice(SMALL_TALK)} ."), (b, f"{rng.choice(REPLIES)} .")]
            lines += said
            events.append(wordings)
            facts += known
        prompt = "summarise : " + " ".join(f"{who} : {what}" for who, what in lines)
        reference = "".join(f" {rng.choice(wordings)} ." for wordings in events)
        return Example(prompt, reference, json.dumps({"events": events, "facts": facts}))

    def score(self, response: str, label: str) -> float:
        """ROUGE-L to the wordings that are most like the response, sentence by sentence; 1.0 for any of them."""
        nearest = self._nearest(response, json.loads(label)["events"])
        return 1.0 if response.strip() == nearest else scorers.rouge(response, [nearest])["rouge_l"]

    def metrics(self, responses: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
        """`fact_recall`: share of the facts (names, places, days ...) that the summaries have."""
        known = [json.loads(label) for label in labels]
        pairs = [(r, self._nearest(r, k["events"])) for r, k in zip(responses, known, strict=True)]
        scores = [scorers.rouge(response, [nearest]) for response, nearest in pairs]
        recall = [mean([f in r.split() for f in k["facts"]]) for r, k in zip(responses, known, strict=True)]
        return {
            "rouge_1": mean([score["rouge_1"] for score in scores]),
            "rouge_2": mean([score["rouge_2"] for score in scores]),
            "exact": mean([float(response.strip() == nearest) for response, nearest in pairs]),
            "fact_recall": mean(recall),
        }

    @staticmethod
    def _nearest(response: str, events: list[list[str]]) -> str:
        """The reference that has, for each event, the wording nearest to the response's sentence at its place."""
        said = [sentence.strip() for sentence in response.split(".")]
        chosen = []
        for place, wordings in enumerate(events):
            sentence = said[place] if place < len(said) else ""
            scores = [(wording == sentence, scorers.rouge(sentence, [wording])["rouge_l"]) for wording in wordings]
            chosen.append(wordings[scores.index(max(scores))])
        return " ".join(f"{wording} ." for wording in chosen)

    def vocabulary(self) -> list[str]:
        """Every word of the lists above, and of the sentences around them, read off enough dialogues."""
        rng = random.Random("summary/vocabulary")
        listed = [*NAMES, *DAYS, *HOURS, *PLACES, *ITEMS, *NEWS, *PARTS, *MEALS, *GREETINGS]
        listed += [word for text in (*REMEDIES, *SMALL_TALK, *REPLIES) for word in text.split()]
        drawn = [self.draw(rng) for _ in range(200)]
        written = {word for e in drawn for word in f"{e.prompt} {e.reference}".split()[1:]}
        wordings = {
            word for e in drawn for event in json.loads(e.label)["events"] for text in event for word in text.split()
        }
        return closed_vocabulary({*listed, *written, *wordings}, ["summarise"])
