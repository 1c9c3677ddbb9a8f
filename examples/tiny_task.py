"""Facts hidden in real prose: the long-context task of the demo, made from a seed.

A context is a sequence of short passages: fragments of CPython's language reference (``pydoc_data.topics``, part of
every CPython) with several facts of one form among them:

    Code of amber falcon 47 12 83.

The question asks for one of them ("What is the code of amber falcon"); the answer is its value and an end token. Key
and value stand side by side in both, because that is what makes recall emerge within minutes in a model this small.
The *long* context is everything; the *short* context is a window of neighbouring passages around the fact that was
asked for, so it looks like any other short context.

Read from top to bottom: words, prose, one context, one record, sets of records.
"""

import functools
import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

Encode = Callable[[str], list[int]]  # text -> token ids, without special tokens
Split = Literal["train", "eval"]
Record = dict[str, Any]  # one row of the project's schema v1, ready for json.dumps

# A prompt is bos, then every document, then the question; each piece is tokenised on its own and the ids are joined.
DOCUMENT_TEMPLATE = "{text}\n"
QUESTION_TEMPLATE = "Q: {question}"

FACT_SHARE = (0.3, 0.5)  # of the context's tokens, drawn per context
SHORT_CONTEXT_TOKENS = 64  # prompt length, question included, that the short context aims at
MAX_PASSAGE_WORDS = 12
MIN_PASSAGE_CHARS = 20

ADJECTIVES = """
    amber brave calm dark eager faint gentle happy icy jolly keen lazy mellow noble odd pale quick rapid shy
    tidy ugly vivid warm young zesty bold cheap dusty early fresh grand heavy inner jaded kind loud merry neat
    olive proud quiet rusty silver tiny upper velvet wild yellow
""".split()  # noqa: SIM905
NOUNS = """
    anchor badger candle dragon eagle falcon garden hammer island jacket kettle ladder magnet needle orange
    parrot quarry rabbit saddle temple urchin violin walnut yogurt zebra acorn bridge camel donkey engine forest
    guitar helmet igloo jungle kitten lemon mirror napkin oyster pencil quilt ribbon spider tunnel valley window
    wizard
""".split()  # noqa: SIM905
NUMBERS = [str(number) for number in range(10, 100)]
NUMBERS_PER_VALUE = 3


class Fact(NamedTuple):
    key: str
    value: str

    @property
    def sentence(self) -> str:
        return f"Code of {self.key} {self.value}."

    @property
    def question(self) -> str:
        return f"What is the code of {self.key}"


class Passage(NamedTuple):
    text: str
    ids: tuple[int, ...]
    fact: Fact | None = None


def split_of_key(adjective_index: int, noun_index: int) -> Split:
    """One key in five is kept for evaluation; each of its two words is also seen in training."""
    return "eval" if (adjective_index + noun_index) % 5 == 0 else "train"


def keys_of_split(split: Split) -> list[str]:
    return [
        f"{adjective} {noun}"
        for i, adjective in enumerate(ADJECTIVES)
        for j, noun in enumerate(NOUNS)
        if split_of_key(i, j) == split
    ]


def draw_facts(rng: random.Random, keys: Sequence[str], count: int, distinct_nouns: bool = False) -> list[Fact]:
    """``count`` facts about different keys; with ``distinct_nouns`` no two end with the same word, so 48 at most."""
    if distinct_nouns:
        keys = list({key.split()[1]: key for key in rng.sample(keys, len(keys))}.values())
    return [
        Fact(key, " ".join(rng.choices(NUMBERS, k=NUMBERS_PER_VALUE)))
        for key in rng.sample(keys, min(count, len(keys)))
    ]


def prose_paragraphs(split: Split) -> list[str]:
    """Plain paragraphs of the language reference, without code and headings; one topic in five is for evaluation."""
    from pydoc_data.topics import topics

    paragraphs: list[str] = []
    for name in sorted(topics):
        if (zlib.crc32(name.encode()) % 5 == 0) != (split == "eval"):
            continue
        for block in topics[name].split("\n\n"):
            lines = block.strip("\n").split("\n")
            is_heading = re.fullmatch(r"[*=\-~^]{3,}", lines[-1].strip()) is not None
            if is_heading or lines[0].startswith((" ", "|", "+", ">>>")):
                continue
            paragraphs.append(re.sub(r"\s+", " ", block).strip())
    return paragraphs


def prose_passages(split: Split) -> list[str]:
    """Sentences of the prose in reading order, cut into pieces of at most ``MAX_PASSAGE_WORDS`` words."""
    passages: list[str] = []
    for paragraph in prose_paragraphs(split):
        for sentence in re.split(r"(?<=[.:;?!]) ", paragraph):
            words = sentence.split(" ")
            pieces = -(-len(words) // MAX_PASSAGE_WORDS)
            size = -(-len(words) // pieces)
            passages += [" ".join(words[start : start + size]) for start in range(0, len(words), size)]
    return [passage for passage in passages if len(passage) >= MIN_PASSAGE_CHARS]


def encode_document(encode: Encode, text: str) -> list[int]:
    return encode(DOCUMENT_TEMPLATE.format(text=text))


def encode_question(encode: Encode, question: str) -> list[int]:
    return encode(QUESTION_TEMPLATE.format(question=question))


def render_prompt(encode: Encode, bos_id: int, documents: Sequence[str], question: str) -> list[int]:
    """Token ids of a prompt; pieces are tokenised apart, so that prompts sharing documents share their ids."""
    ids = [bos_id]
    for text in documents:
        ids += encode_document(encode, text)
    return ids + encode_question(encode, question)


class FactTask:
    """Contexts and records of one split; tokenises the prose once."""

    def __init__(self, encode: Encode, split: Split):
        self.encode = encode
        self.split = split
        self.keys = keys_of_split(split)
        self.prose = [Passage(text, tuple(encode_document(encode, text))) for text in prose_passages(split)]

    @functools.cached_property
    def question_tokens(self) -> int:
        """Longest question, with its template."""
        return max(len(encode_question(self.encode, Fact(key, "").question)) for key in self.keys)

    def fact_passage(self, fact: Fact) -> Passage:
        return Passage(fact.sentence, tuple(encode_document(self.encode, fact.sentence)), fact)

    def draw_passages(
        self,
        rng: random.Random,
        budget_tokens: int,
        fact_share: tuple[float, float] = FACT_SHARE,
        distinct_nouns: bool = False,
    ) -> list[Passage]:
        """Passages of a context, at most ``budget_tokens`` long and at most a word or two shorter.

        Facts take a share drawn from ``fact_share`` and stand at random places in a stretch of consecutive prose.
        """
        share = rng.uniform(*fact_share)
        fact_tokens = len(self.fact_passage(Fact(self.keys[0], "10 10 10")).ids)
        count = max(2, int(share * budget_tokens / fact_tokens))
        facts = [self.fact_passage(fact) for fact in draw_facts(rng, self.keys, count, distinct_nouns)]
        prose = self.draw_prose(rng, budget_tokens - sum(len(fact.ids) for fact in facts))
        places = set(rng.sample(range(len(facts) + len(prose)), len(facts)))
        facts_left, prose_left = iter(facts), iter(prose)
        return [next(facts_left) if i in places else next(prose_left) for i in range(len(facts) + len(prose))]

    def draw_prose(self, rng: random.Random, budget_tokens: int) -> list[Passage]:
        """Consecutive passages from a random place, the last one cut at a word so that the budget is used up."""
        chosen: list[Passage] = []
        index = rng.randrange(len(self.prose))
        while budget_tokens > 0:
            passage = self.prose[index]
            if len(passage.ids) > budget_tokens:
                cut = self.cut_passage(passage, budget_tokens)
                return [*chosen, cut] if cut else chosen
            chosen.append(passage)
            budget_tokens -= len(passage.ids)
            index = (index + 1) % len(self.prose)
        return chosen

    def cut_passage(self, passage: Passage, budget_tokens: int) -> Passage | None:
        words = passage.text.split(" ")
        for count in range(len(words) - 1, 0, -1):
            text = " ".join(words[:count])
            ids = encode_document(self.encode, text)
            if len(ids) <= budget_tokens:
                return Passage(text, tuple(ids))
        return None

    def draw_records(self, rng: random.Random, record_id: str, context_tokens: int, questions: int) -> list[Record]:
        """Records of one context of at most ``context_tokens`` tokens, each about another fact while there are any.

        Nouns are distinct: the demo's model tells keys apart by their second word (where another fact shares it, exact
        match is .5 at 96 tokens and .98 elsewhere), and what the teacher does not know is not what the demo is about.
        """
        passages = self.draw_passages(rng, context_tokens - 1 - self.question_tokens, distinct_nouns=True)
        facts = [i for i, passage in enumerate(passages) if passage.fact]
        needles = rng.sample(facts, questions) if questions <= len(facts) else rng.choices(facts, k=questions)
        return [
            self.make_record(rng, f"{record_id}.{i}", context_tokens, passages, needle)
            for i, needle in enumerate(needles)
        ]

    def make_record(
        self, rng: random.Random, record_id: str, context_tokens: int, passages: Sequence[Passage], needle: int
    ) -> Record:
        """The record that asks for the fact in passage ``needle``; only eval records hold the answer."""
        fact = passages[needle].fact
        assert fact is not None
        names = [f"d{i}" for i in range(len(passages))]
        fixed_tokens = 1 + len(encode_question(self.encode, fact.question))
        window = evidence_window(rng, passages, needle, SHORT_CONTEXT_TOKENS - fixed_tokens)
        record: Record = {
            "id": record_id,
            "task": "opsdl" if self.split == "train" else "eval",
            "question": fact.question,
            "documents": [{"id": name, "text": passage.text} for name, passage in zip(names, passages, strict=True)],
            "evidence": names[window.start : window.stop],
            "meta": {
                "source": "pydoc_data.topics with facts",
                "split": self.split,
                "context_tokens": context_tokens,
                "n_tokens": fixed_tokens + sum(len(passage.ids) for passage in passages),
                "n_short_tokens": fixed_tokens + sum(len(passages[i].ids) for i in window),
                "n_facts": sum(passage.fact is not None for passage in passages),
                "depth": round(needle / max(1, len(passages) - 1), 3),
            },
        }
        if self.split == "eval":
            record["answers"] = [fact.value]
        return record


def evidence_window(rng: random.Random, passages: Sequence[Passage], needle: int, budget_tokens: int) -> range:
    """Widest window around ``needle`` within the budget, grown to a random side until neither neighbour fits."""
    start, stop = needle, needle + 1
    left = budget_tokens - len(passages[needle].ids)
    while True:
        fits_before = start > 0 and len(passages[start - 1].ids) <= left
        fits_after = stop < len(passages) and len(passages[stop].ids) <= left
        if not fits_before and not fits_after:
            return range(start, stop)
        if fits_before and (not fits_after or rng.random() < 0.5):
            start -= 1
            left -= len(passages[start].ids)
        else:
            left -= len(passages[stop].ids)
            stop += 1


def make_training_set(encode: Encode, seed: int, context_tokens: Sequence[int], questions: int = 1) -> list[Record]:
    """``questions`` records without an answer per entry of ``context_tokens``, in that order."""
    task, rng = FactTask(encode, "train"), random.Random(f"train {seed}")
    return [
        record
        for i, tokens in enumerate(context_tokens)
        for record in task.draw_records(rng, f"train-{seed}-{i}", tokens, questions)
    ]


def make_eval_set(encode: Encode, seed: int, context_tokens: int, count: int) -> list[Record]:
    """``count`` records with answers, of about ``context_tokens`` tokens; prose and keys never occur in training."""
    task, rng = FactTask(encode, "eval"), random.Random(f"eval {seed} {context_tokens}")
    drawn = (task.draw_records(rng, f"eval-{seed}-{context_tokens}-{i}", context_tokens, 1) for i in range(count))
    return [record for records in drawn for record in records]
