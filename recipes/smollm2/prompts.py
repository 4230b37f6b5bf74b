"""Writes the prompts that SmolLM2's heads are trained on: conversations whose answers the base itself will give.

Sources: Dolly (CC-BY-SA-3.0), passages of the old fairy-tale books (public domain), and templates that stand in this file.
Nothing comes from `bench/`; `overlaps` proves it: no prompt shares 13 words in a row with any benchmark prompt.

    python -m recipes.smollm2.prompts ../shared/data prompts.jsonl heldout.jsonl

Each line: {"id", "messages", "temperature"}; a message of the assistant with content null is to be answered. The held-out
file has 184 Dolly prompts that are in no training line.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SEED = 17
HELD_OUT = 184
PASSAGES = 2600
TEMPLATED = 6500
ANSWER = {"role": "assistant", "content": None}
TEMPERATURES = (0.0, 0.0, 0.0, 0.7, 1.0, 1.0)

TOPICS = """the water cycle|photosynthesis|black holes|the French Revolution|compound interest|machine
learning|vaccines|the stock market|climate change|the history of bread|how bicycles stay upright|coral reefs|the Silk
Road|jazz music|the immune system|supply and demand|volcanoes|recycling|the Renaissance|solar panels|dreams|time
management|public speaking|the moon landing|honey bees|inflation|the Roman Empire|plate tectonics|chess|tea
ceremonies|wind turbines|electric cars|the human heart|meditation|urban gardening|the Great Wall of
China|antibiotics|space telescopes|penguins|photography|the printing press|cryptocurrencies|rainforests|marathon
training|sleep|nuclear energy|the internet|Shakespeare's plays|dinosaurs|budgeting|earthquakes|dogs| the Industrial
Revolution|learning a language|robots|ocean currents|democracy|nutrition|gravity|the violin|remote
work|lighthouses|genetics|origami| ancient Egypt|airplanes|data privacy|the Olympic Games|cooking pasta|desert
animals|the speed of light|poetry|car maintenance|sailing|camping| the
brain|bridges|friendship|negotiation|stress|digital art|steam engines|whales|world trade|mountains|public
libraries|chocolate|magnets|the periodic table|job interviews|film making|board games|sustainable fashion|mental
health|running a small business|railways|the Arctic|mathematics in nature| statistics|customer service|online
education|hiking in the Alps|a vegetarian diet|city traffic|museums|soil|glaciers|weather forecasts"""
FORMS = """Explain {} to a ten-year-old.|What is {} and why does it matter?|Write a short essay about {}.|List five
facts about {}.|Give me three tips about {}.|Write a poem about {}.|Write a blog post introduction about {}.|What are
the advantages and disadvantages of {}?|Compose an engaging story in which {} plays a role.|Describe {} in exactly
three sentences.|Draft a professional email to a colleague about {}.|Make an outline for a presentation about {}.|
Imagine you are an expert on {}. Answer a beginner's three most common questions.|Summarize what is known about
{}.|What are common misconceptions about {}?|Create a quiz with five questions and answers about {}.|Write a dialogue
between a teacher and a student about {}.|How would you explain {} to somebody from the year 1800?|Write a persuasive
speech about {}.|Give a step-by-step guide for somebody who is new to {}.|Compare {} with something similar and say
how they differ.|Write a product description inspired by {}.|What questions should I ask to learn more about
{}?|Pretend to be a journalist and report on {}.|Write a JSON object that describes {} with at least four fields.|Make
a table in Markdown about {}.|Write a letter to a friend about {}.| What is the history of {}?|Which three books or
resources would you recommend about {}, and why?|Discuss how {} could change in the next 50 years."""
CODE = """reverses a string|checks whether a number is prime|sorts a list of dictionaries by a key|counts the words of
a text file|finds the largest element of a list|computes the factorial of a number|merges two sorted lists|removes
duplicates from a list|converts Celsius to Fahrenheit|checks whether two words are anagrams|generates the first n
Fibonacci numbers|finds the most frequent element|flattens a nested list|reads a CSV file and prints the mean of a
column|validates an email address|implements a stack|implements a queue with two stacks|performs binary search|draws a
triangle of stars|computes the greatest common divisor|counts vowels in a sentence|rotates a matrix by 90
degrees|parses a date|simulates rolling two dice|implements a linked list|checks balanced parentheses|finds all pairs
that sum to a target|converts a Roman numeral to an integer|computes a moving average|downloads a web page| traverses
a binary tree in order|implements bubble sort|shuffles a deck of cards|encrypts text with a Caesar cipher|finds the
longest common prefix| transposes a matrix|computes the median of a list|capitalizes every word|splits a list into
chunks of size n|checks whether a string is a palindrome"""
LANGUAGES = ("Python", "Python", "Python", "JavaScript", "C++", "Java", "Go", "Rust")
CODE_FORMS = (
    "Write a {language} function that {task}.",
    "Implement a {language} program that {task}. Add comments.",
    "Show me how to write {language} code that {task}, and explain it.",
    "Write a {language} function that {task} and three test cases for it.",
)
MATH = (
    "{name} has {a} {things}. {other} gives {name} {b} more, and then {name} loses {c}. How many {things} does {name} have?",
    "A box of {things} costs ${a}. {name} buys {b} boxes and pays with ${big}. How much change does {name} get?",
    "{name} reads {a} pages a day. How many days does it take to read a book of {big} pages?",
    "A train travels at {big} km per hour for {b} hours and then at {a} km per hour for {c} hours. How far does it go?",
    "{name} earns ${a} an hour and works {b} hours a day, {c} days a week. How much does {name} earn in {d} weeks?",
    "If {a} {things} cost ${big}, how much do {b} {things} cost? Show your work.",
    "The sum of two numbers is {big} and their difference is {a}. What are the numbers?",
    "A rectangle is {a} meters long and {b} meters wide. What are its area and its perimeter?",
    "{name} is {a} years older than {other}. In {b} years, the sum of their ages will be {big}. How old is {name} now?",
    "Solve for x: {b}x + {a} = {big}.",
    "What is {big} * {a} - {b}? Think step by step.",
    "{name} shares {big} {things} equally among {b} friends. How many does each get, and how many are left over?",
    "A shop sells {things} at ${a} each with a discount of {c}0%. {name} buys {b}. What is the total price?",
    "A tank holds {big} liters and loses {b} liters every hour. After how many hours are {a} liters left?",
)  # fmt: skip
NAMES = ("Maria", "Tom", "Aisha", "Lukas", "Grace", "Omar", "Nina", "Victor", "Elena", "Sam", "Priya", "Jonas")
THINGS = ("apples", "pencils", "marbles", "cookies", "stickers", "tickets", "oranges", "stamps", "cards", "balloons")
GERMAN = """Der Zug nach Hamburg hat heute Verspätung|Die Regierung plant neue Regeln für den Verkehr in den
Städten|Meine Schwester arbeitet seit drei Jahren in einem Krankenhaus|Wir haben gestern im Garten Tomaten
gepflanzt|Die Preise für Lebensmittel sind im letzten Jahr gestiegen|Der Wissenschaftler erklärte die Ergebnisse
seiner Studie|Kinder lernen am besten beim Spielen|Das Museum zeigt eine Ausstellung über das Mittelalter|Nach dem
Sturm blieben viele Schulen geschlossen|Die Mannschaft gewann das Spiel in der letzten Minute|Ich möchte einen Tisch
für zwei Personen reservieren|Der Bürgermeister eröffnete die neue Brücke|Viele Menschen fahren jeden Tag mit dem
Fahrrad zur Arbeit|Das Buch erzählt die Geschichte einer Familie aus Berlin|Die Firma sucht junge Leute mit guten
Ideen|Im Winter fällt in den Bergen viel Schnee|Die Polizei bittet Zeugen um Hinweise|Ein Feuer zerstörte in der Nacht
eine alte Fabrik|Der Arzt empfiehlt mehr Bewegung und weniger Zucker|Die Wahlen finden im Herbst statt"""
FOLLOW_UPS = """Now make it shorter.|Rewrite your answer in simpler words.|Can you give an example?|Turn your answer
into a list of bullet points.|What is the most important point, and why?|Rewrite it so that a child understands
it.|Are you sure? Explain your reasoning.|Translate your answer into a more formal style.|Add two more details.|What
would somebody say who disagrees?|Now write it as a short story.|Summarize your answer in one sentence.|How could this
be improved?|Give me three questions that test whether I understood your answer.|Rewrite it as an email.|Please
continue."""
PASSAGE_FORMS = (
    "Summarize: {text}",
    "Summarize the following text in two sentences.\n\n{text}",
    "{text}\n\nWhat happens in this passage?",
    "{text}\n\nWho is mentioned in this passage, and what do they do?",
    "Answer with the help of the text.\n\nText: {text}\n\nQuestion: What is the main idea of the text?",
    "Continue this story:\n\n{text}",
    "Rewrite the following passage in modern English:\n\n{text}",
    "Extract all names and places of the following text as a list.\n\n{text}",
    "What is the mood of this passage? Explain.\n\n{text}",
)  # fmt: skip


def choices(text: str) -> list[str]:
    """The parts of one of the lists above."""
    return [" ".join(part.split()) for part in text.split("|")]


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines, packed by gzip or not; a last line without its end was cut off by a crash."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n") and line.strip():
                yield json.loads(line)


def dolly(data: Path) -> Iterator[str]:
    """Every Dolly prompt once."""
    seen = set()
    for record in json.loads((data / "instruct/dolly_3k.json").read_text(encoding="utf-8")):
        text = "\n\n".join(part for part in (record["instruction"].strip(), record["input"].strip()[:2400]) if part)
        if record["instruction"] not in seen:
            seen.add(record["instruction"])
            yield text
    for record in json_lines(data / "instruct/dolly_hhrlhf_train_small.jsonl"):
        text = (
            record["prompt"]
            .split("### Instruction:\n")[-1]
            .split("\n\n### Response:")[0]
            .replace("\n\n### Input:\n", "\n\n")
        )
        if text not in seen and text.split("\n\n")[0] not in seen:
            seen.add(text)
            yield text.strip()[:2600]


def split_dolly(data: Path, rng: random.Random) -> tuple[list[str], list[str]]:
    """Dolly's prompts in random order: those that are held out, and the others."""
    questions = list(dolly(data))
    rng.shuffle(questions)
    return questions[:HELD_OUT], questions[HELD_OUT:]


def passages(data: Path, rng: random.Random) -> Iterator[str]:
    """Passages of the fairy-tale books in a task's words, for ever."""
    books = [
        [" ".join(part.split()) for part in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="ignore"))]
        for path in sorted((data / "stories/fairytales").glob("*.txt"))
    ]
    while True:
        book = rng.choice(books)
        start, words, text = rng.randrange(len(book)), rng.randint(60, 330), ""
        for part in book[start:]:
            text = f"{text}\n{part}".strip()
            if len(text.split()) >= words:
                break
        text = " ".join(text.split(" ")[:420])
        if len(text.split()) >= 50:
            yield rng.choice(PASSAGE_FORMS).format(text=text)


def templated(rng: random.Random) -> Iterator[str]:
    """Questions of this file's templates, for ever."""
    topics, forms, tasks, german = choices(TOPICS), choices(FORMS), choices(CODE), choices(GERMAN)
    while True:
        kind = rng.random()
        if kind < 0.60:
            yield rng.choice(forms).format(rng.choice(topics))
        elif kind < 0.74:
            yield rng.choice(CODE_FORMS).format(language=rng.choice(LANGUAGES), task=rng.choice(tasks))
        elif kind < 0.95:
            name, other = rng.sample(NAMES, 2)
            a, b, c, d = rng.randint(3, 40), rng.randint(2, 12), rng.randint(1, 6), rng.randint(2, 9)
            numbers = {"a": a, "b": b, "c": c, "d": d, "big": rng.randint(60, 900)}
            yield rng.choice(MATH).format(name=name, other=other, things=rng.choice(THINGS), **numbers)
        else:
            yield f"Translate German to English: {', und '.join(rng.sample(german, rng.randint(1, 2)))}."


def bench_prompts(data: Path) -> Iterator[str]:
    """The text of every benchmark's prompts."""
    bench = data / "bench"
    for name in ("spec_bench", "mt_bench", "vicuna_bench", "ifeval"):
        for record in json_lines(bench / f"{name}.jsonl"):
            yield from record.get("turns") or [record.get("prompt") or record["text"]]
    yield from (record["question"] for record in json_lines(bench / "gsm8k_test.jsonl"))
    yield from (record["prompt"] for record in json_lines(bench / "HumanEval.jsonl.gz"))


def grams(text: str, size: int = 13) -> set[tuple[str, ...]]:
    """All runs of `size` words."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}


def overlaps(prompts: Iterable[str], data: Path) -> list[str]:
    """Prompts that share 13 words in a row with a benchmark prompt, or are one."""
    texts = list(bench_prompts(data))
    known, whole = set().union(*map(grams, texts)), {" ".join(text.lower().split()) for text in texts}
    return [prompt for prompt in prompts if grams(prompt) & known or " ".join(prompt.lower().split()) in whole]


def main(data: Path, out: Path, held_out: Path) -> None:
    """Writes both files."""
    rng = random.Random(SEED)
    kept, questions = split_dolly(data, rng)
    pool = [("dolly", text) for text in questions]
    from_books, from_templates = passages(data, rng), templated(rng)
    pool += [("passage", next(from_books)) for _ in range(PASSAGES)]
    pool += [("template", text) for text in dict.fromkeys(next(from_templates) for _ in range(TEMPLATED))]
    shared = set(overlaps((text for _, text in pool), data))
    pool = [(source, text) for source, text in pool if text not in shared]
    rng.shuffle(pool)
    follow_ups = choices(FOLLOW_UPS)
    with out.open("w", encoding="utf-8") as file:
        for number, (source, text) in enumerate(pool):
            messages = [{"role": "user", "content": text}, ANSWER]
            if rng.random() < 0.2:
                messages += [{"role": "user", "content": rng.choice(follow_ups)}, ANSWER]
            record = {"id": f"{source}-{number}", "messages": messages, "temperature": rng.choice(TEMPERATURES)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    with held_out.open("w", encoding="utf-8") as file:
        for text in kept:
            file.write(json.dumps({"prompt": text}, ensure_ascii=False) + "\n")
    print(f"{len(pool)} training prompts, {len(shared)} left out because a benchmark has them; {len(kept)} held out.")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
