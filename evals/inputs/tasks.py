"""Retrieval tasks made from a seed: passkey and its variants, and RULER's tasks that need no downloads.

* passkey: the template of Stuffed Mamba's released code (arXiv 2410.07145, appendix): a five-digit key in a repeated sentence block.
  `noise=prose` takes the noise from a text, `keys=n` hides n keys under names and asks for one.
* niah_single, niah_multikey, vt (variable tracking), cwe (common words), fwe (frequent coded words): after RULER (arXiv 2404.06654), in our
  own wording, without its in-context example. Scores of RULER itself are not comparable.
* order: just-read-twice prompting (arXiv 2407.05483). D document, Q question: DQ (plain), QDQ, DQDQ, QDDQ.

Prompts are put together from token ids, so a prompt has exactly the length asked for; the same (seed, length, depth, number) gives the
same ids on every machine. The ids of an answer are those it has after its question: tokenizers that mark the beginning of a text
(Llama-2, Mistral) give other ids to the answer alone, which no model would write.

Each sample says what a guess scores without reading (`chance`), and `copiers` what programs would write that copy without understanding:
a score near theirs is no understanding of the task.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import numpy as np

from data.tokenizer import TextCoder
from evals.adapters.base import ItemError
from evals.inputs.texts import Text

HEAD = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n\n"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
ADJECTIVES = (
    "amber brave calm clever cold dusty eager early faint gentle golden grand green happy heavy honest humble icy jolly kind lively lonely "
    "loud lucky mellow narrow noble pale plain proud quick quiet rapid rusty silent silver simple steady tender young"
).split()
NOUNS = (
    "anchor apple arrow barrel basket beacon bell bottle bridge button cabin candle canyon carpet castle cellar chapel cherry circle coffee "
    "copper corner cotton desert dragon engine falcon feather fiddle forest garden harbor hammer island jacket kettle ladder lantern lemon "
    "market meadow mirror needle orchard packet palace pebble pencil planet pocket river saddle spider temple ticket timber tunnel valley "
    "violin window"
).split()
ORDERS = ("DQ", "QDQ", "DQDQ", "QDDQ")
NAMES = ("passkey", "niah_single", "niah_multikey", "vt", "cwe", "fwe")


@dataclass
class Sample:
    """One question about one text."""

    prompt: list[int]  # ids
    answer: list[int]  # ids that follow the prompt
    answers: list[str]  # texts whose recall in what is written is the score of tasks that ask for a list
    new_tokens: int  # that a model may write
    body: list[int] = field(default_factory=list)  # ids of the text between heading and question
    chance: float = 0.0  # score, 0 to 1, of a guess from the task's own set of answers

    def copies(self, rng: np.random.Generator) -> dict[str, list[int]]:
        """Three answers that need no understanding: as many tokens as a model may write, copied from the text's beginning, its end, or a
        random place."""
        n = self.new_tokens
        place = int(rng.integers(0, max(1, len(self.body) - n + 1)))
        return {
            "copies the beginning": self.body[:n],
            "copies the end": self.body[-n:],
            "copies from anywhere": self.body[place : place + n],
        }


def after_question(coder: TextCoder, question: str, answer: str) -> tuple[list[int], list[int]]:
    """(ids of the question, ids of the answer) of the two tokenised together: what they share with the question alone belongs to the question,
    the rest to the answer, so a token across the border is the answer's first."""
    alone, whole = coder.encode(question), coder.encode(question + answer)
    shared = next((i for i, (a, b) in enumerate(zip(alone, whole)) if a != b), min(len(alone), len(whole)))
    return whole[:shared], whole[shared:]


@dataclass
class Task:
    """A kind of sample. by_ids: scored by exact match of the answer's ids (teacher-forced); else by recall in what greedy decoding writes."""

    name: str
    noise: str = "repeat"  # repeat | prose
    keys: int = 1  # keys in the text, one is asked for
    order: str = "DQ"
    hops: int = 4
    by_ids: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.name not in NAMES or self.noise not in ("repeat", "prose") or self.order not in ORDERS or self.keys < 1:
            raise ValueError(
                f"There is no task {self.label}; tasks are {', '.join(NAMES)}, noise repeat or prose, order {', '.join(ORDERS)}."
            )
        self.by_ids = self.name in ("passkey", "niah_single", "niah_multikey")

    @property
    def label(self) -> str:
        """The task with what differs from its defaults, as items and reports call it."""
        parts = [self.name, *([self.noise] if self.noise != "repeat" else []), *([f"keys{self.keys}"] if self.keys > 1 else [])]
        return "-".join([*parts, *([self.order] if self.order != "DQ" else [])])

    @property
    def has_depth(self) -> bool:
        """Whether the answer stands at one place of the text, whose depth can be asked for."""
        return self.by_ids

    def sample(self, coder: TextCoder, length: int, depth: float, number: int, seed: int, text: Text | None = None) -> Sample:
        """Sample `number` of `seed`: its prompt has exactly `length` tokens in the order DQ (other orders repeat parts).

        depth: where the answer stands, from 0 (the beginning) to 1; text: where noise=prose is taken from. Raises ItemError where length is too short.
        """
        rng = np.random.default_rng([seed, zlib.crc32(self.label.encode()), length, round(depth * 1000), number])
        if self.name in ("cwe", "fwe"):
            return self._words(coder, length, rng)
        head, needles, question, answer, answers = getattr(self, f"_{self.name}")(rng)
        depths = [depth, *rng.random(len(needles) - 1).tolist()] if self.has_depth else np.sort(rng.random(len(needles))).tolist()
        question_ids, answer_ids = after_question(coder, question, answer)
        self._check(coder, answer_ids, answers)
        document = self._document(coder, head, needles, depths, length - len(coder.start_ids) - len(question_ids), rng, text)
        ids = self._ordered(coder, document, question, question_ids)
        chance = {"passkey": 1e-5, "vt": 0.0}.get(self.name, 1 / 9_000_000)
        new_tokens = len(answer_ids) if self.by_ids else len(answer_ids) + 10
        return Sample(ids, answer_ids, answers, new_tokens, document[len(coder.encode(head)) :], chance)

    def _check(self, coder: TextCoder, answer_ids: list[int], answers: list[str]) -> None:
        """Raises ItemError where the tokens of the answers do not spell them: of unknown tokens any text would be the answer, and a text that comes back
        otherwise (with other blanks) is looked for in vain in what a model writes."""
        written = coder.decode(answer_ids)
        blanks = "" if self.by_ids else " "  # what is told by its ids may be written with any blanks
        found = blanks.join(written.lower().split())
        for answer in answers:
            if blanks.join(answer.lower().split()) not in found:
                raise ItemError(
                    f"The tokenizer cannot be asked task {self.label}: it has no tokens that spell {answer!r}, which comes back as {written[:80]!r}."
                )

    def _ordered(self, coder: TextCoder, document: list[int], question: str, question_ids: list[int]) -> list[int]:
        """The prompt; a question before the last one is whole, the last one what `after_question` leaves of it."""
        ids = list(coder.start_ids)
        for i, part in enumerate(self.order, 1):
            ids += document if part == "D" else question_ids if i == len(self.order) else coder.encode(question)
        return ids

    @property
    def keys_in_text(self) -> int:
        """Answers of the right kind in the text, of which one is asked for."""
        return max(self.keys, 4) if self.name == "niah_multikey" else self.keys

    def _document(
        self, coder: TextCoder, head: str, needles: list[str], depths: list[float], length: int, rng: np.random.Generator, text: Text | None
    ) -> list[int]:
        head_ids, needle_ids = coder.encode(head), [coder.encode(n + "\n") for n in needles]
        room = length - len(head_ids) - sum(map(len, needle_ids))
        if room < 0:
            raise ItemError(f"Task {self.label} does not fit into the length asked for; it needs {-room} tokens more.")
        noise, step = self._noise(coder, room, rng, text)
        # As published, a needle stands between whole blocks of noise: at block int(depth (n-1)).
        places = [step * int(d * max(0, room // step - 1)) if step > 1 else int(d * room) for d in depths]
        ids, at = list(head_ids), 0
        for place, needle in sorted(zip(places, needle_ids), key=lambda pair: pair[0]):
            ids += noise[at:place] + needle
            at = place
        return ids + noise[at:]

    def _noise(self, coder: TextCoder, room: int, rng: np.random.Generator, text: Text | None) -> tuple[list[int], int]:
        """(`room` ids, ids of a block)."""
        if self.noise == "prose":
            if text is None:
                raise ItemError("Prose noise needs a text.")
            return text.rows(1, max(1, room), int(rng.integers(1 << 31)))[0, :room].tolist(), 1
        block = coder.encode(NOISE)
        return (block * (room // len(block) + 1))[:room], len(block)

    def _passkey(self, rng: np.random.Generator) -> tuple[str, list[str], str, str, list[str]]:
        keys = [f"{k:05d}" for k in rng.choice(100_000, self.keys, replace=False)]
        if self.keys == 1:
            needle, question = f"The passkey is {keys[0]}. Remember it. {keys[0]} is the passkey.", "\nWhat is the pass key? The passkey is"
            return HEAD, [needle], question, f" {keys[0]}", [keys[0]]
        names = self._names(rng, self.keys)
        needles = [f"The passkey of {n} is {k}. Remember it. {k} is the passkey of {n}." for n, k in zip(names, keys)]
        return HEAD, needles, f"\nWhat is the pass key of {names[0]}? The passkey of {names[0]} is", f" {keys[0]}", [keys[0]]

    @staticmethod
    def _names(rng: np.random.Generator, n: int) -> list[str]:
        picked = rng.choice(len(ADJECTIVES) * len(NOUNS), n, replace=False)
        return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in picked]

    def _niah_single(self, rng: np.random.Generator) -> tuple[str, list[str], str, str, list[str]]:
        n = self.keys_in_text if self.name == "niah_multikey" else 1
        names, values = self._names(rng, n), [str(v) for v in rng.choice(9_000_000, n, replace=False) + 1_000_000]
        head = "Some special magic numbers are hidden within the following text. Memorize them; one will be asked for afterwards.\n\n"
        needles = [f"One of the special magic numbers for {k} is: {v}." for k, v in zip(names, values)]
        question = f"\nWhat is the special magic number for {names[0]} mentioned in the text? The special magic number for {names[0]} is"
        return head, needles, question, f" {values[0]}", [values[0]]

    _niah_multikey = _niah_single

    def _vt(self, rng: np.random.Generator) -> tuple[str, list[str], str, str, list[str]]:
        letters = [chr(65 + i) for i in range(26)]
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(rng.choice(letters, 5))
            if name not in names:
                names.append(name)
        value = str(int(rng.integers(10_000, 100_000)))
        needles = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in zip(names, names[1:])]
        head = "Memorize and follow the chain of variable assignments hidden in the following text.\n\n"
        question = f"\nWhich variables hold the value {value} at the end? These {len(names)} variables hold the value {value}:"
        return head, needles, question, " " + " ".join(names), names

    def _words(self, coder: TextCoder, length: int, rng: np.random.Generator) -> Sample:
        """cwe: ten words occur ten times as often as each of the others. fwe: coded words whose counts fall as 1/(rank + 2), the first three are
        asked for. In both the words asked for are a quarter of the list, so that copying it finds few of them."""
        if self.name == "cwe":
            head, n_answers = "Below is a list of words. Some of them occur much more often than the others. Memorize those.\n\n", 10
            question = f"\nWhat are the {n_answers} most common words in the list? The {n_answers} most common words are:"
            vocabulary = self._names(rng, 300)
            weights, chance = (
                np.array([10.0] * n_answers + [1.0] * (len(vocabulary) - n_answers)),
                n_answers / (len(ADJECTIVES) * len(NOUNS)),
            )
        else:
            head, n_answers = "Below is a coded text. Count how often each coded word occurs and remember the most frequent ones.\n\n", 3
            question = f"\nWhat are the {n_answers} most frequent coded words? The {n_answers} most frequent coded words are:"
            vocabulary = ["".join(rng.choice(list("bcdfghjklmnpqrstvwxz"), 6)) for _ in range(60)]
            weights, chance = 1 / np.arange(3, len(vocabulary) + 3), 0.0
        question_ids, answer = after_question(coder, question, " " + " ".join(vocabulary[:n_answers]))
        self._check(coder, answer, vocabulary[:n_answers])
        head_ids = coder.encode(head)
        room = length - len(coder.start_ids) - len(head_ids) - len(question_ids)
        encoded = [coder.encode(" " + w) for w in vocabulary]
        counts = self._counts(weights, np.array([len(e) for e in encoded], dtype=np.float64), room, n_answers)
        order = np.repeat(np.arange(len(vocabulary)), counts)
        rng.shuffle(order)
        ids = [i for w in order for i in encoded[w]]
        # What is left is less than any word that may still be added: the beginning of one, as if the list had been cut there.
        rare = max(encoded[n_answers:], key=len)
        ids += (rare * room)[: room - len(ids)]
        prompt = self._ordered(coder, head_ids + ids, question, question_ids)
        return Sample(prompt, answer, vocabulary[:n_answers], len(answer) + 10, ids, chance)

    def _counts(self, weights: np.ndarray, sizes: np.ndarray, room: float, n_answers: int) -> np.ndarray:
        """How often each word occurs: by the weights as far as whole numbers allow, filling `room` tokens but for less than a word. The wanted
        words surely are the most frequent; what does not fit evenly goes to others, the rarest first. Raises ItemError where a wanted word would
        occur less than twice."""
        scale = max(0.0, room) / float(weights @ sizes)
        counts = np.floor(weights * scale).astype(int)
        least = int(counts[:n_answers].min())
        if least < 2:
            need = float(weights @ sizes) * 2 / float(weights[:n_answers].min())
            raise ItemError(
                f"Task {self.label} does not fit: a wanted word would occur less than twice; ask for {math.ceil(need - room)} tokens more."
            )
        counts[n_answers:] = np.minimum(counts[n_answers:], least - 1)
        left = room - float(counts @ sizes)
        for i in sorted(range(n_answers, len(counts)), key=lambda i: counts[i] - weights[i] * scale):
            if sizes[i] <= left and counts[i] < least - 1:
                counts[i] += 1
                left -= sizes[i]
        while left >= (smallest := min((sizes[i] for i in range(n_answers, len(counts)) if counts[i] < least - 1), default=math.inf)):
            i = min((i for i in range(n_answers, len(counts)) if sizes[i] == smallest and counts[i] < least - 1), key=lambda i: counts[i])
            counts[i] += 1
            left -= smallest
        return counts
