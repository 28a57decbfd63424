"""Finding facts in a long context: a needle in a haystack, and questions about one of several documents.

Both run offline: names, codes and documents are made from a seed, the haystack is any text. What is measured
is whether a model goes on with the right answer, by where in its context the answer stands.

Source   The needle test is Kamradt's (github.com/gkamradt/LLMTest_NeedleInAHaystack, 2023), many documents
         are Liu et al., arXiv:2307.03172. Decided here: `match="greedy"` asks whether greedy decoding begins
         with the answer, which one forward pass tells; `match="generate"` generates and looks for the answer
         anywhere in what comes, letter case, punctuation and articles aside, for models that answer in
         sentences.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from weightsmith.errors import InputError
from weightsmith.evaluation import likelihood
from weightsmith.evaluation.prompting import token_ids

Match = Literal["greedy", "generate"]

NEEDLE = " The code of {name} is {code}. "
NEEDLE_QUESTION = "\nThe code of {name} is"
DOCUMENT = "Document [{number}] {text}\n"
QUESTION = "Question: {question}\nAnswer:"
LEAST_HAY = 8  # tokens of a haystack, below which nothing has to be found
_MORE = 12  # tokens that may come before an answer in what is generated
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo", "zu")
_THINGS = ("color", "number", "animal", "town", "tree", "tool")
_ANSWERS = (
    "amber",
    "seven",
    "heron",
    "arles",
    "maple",
    "chisel",
    "ivory",
    "forty",
    "otter",
    "turin",
    "cedar",
    "plane",
)


@dataclass(frozen=True, slots=True)
class Cell:
    """How often answers were found that stand at one place.

    Attributes:
        length: Tokens of a prompt with its answer (needle), or documents (questions).
        place: Depth of the needle, 0 at the beginning to 1 at the end; or the number of the document.
        found: Answers found.
        n: Answers looked for.
    """

    length: int
    place: float
    found: int
    n: int

    @property
    def recall(self) -> float:
        """Share of the answers that were found."""
        return self.found / self.n

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "recall": self.recall}


@dataclass(frozen=True)
class Question:
    """A question that one of several documents answers.

    Attributes:
        question: Its text.
        answers: What counts as right.
        documents: Texts; the first one has the answer.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


def niah_grid(
    model: Any,
    tokenizer: Any,
    haystack_text: str,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    needles: int = 20,
    seed: int = 0,
    needle: str = NEEDLE,
    question: str = NEEDLE_QUESTION,
    match: Match = "greedy",
    suppress: Sequence[int] = (),
    batch_size: int | None = None,
) -> list[Cell]:
    """A sentence with a code hidden in a text, and the text's end asks for it.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        haystack_text: Any text; one that is too short is repeated.
        lengths: Tokens of whole prompts, answer included.
        depths: Where in the text the sentence stands, 0 (beginning) to 1 (end).
        needles: Sentences for each length and depth.
        seed: Decides names, codes, and where in the text each prompt begins.
        needle: The sentence, with `{code}`, and with `{name}` where there is one.
        question: What comes last, with `{name}` where there is one; the answer is a blank and the code.
        match: See above.
        suppress: Ids that `match="generate"` must not generate, such as a mask token's.
        batch_size: Prompts at once.

    Returns:
        A cell for each length and depth, lengths first.

    Raises:
        InputError: a length beyond the model's positions or without room for the needle, a depth outside
            0..1, an empty haystack, or a sentence without the code or with fields that nothing fills.
    """
    _check_template("niah: needle", needle, ("code",), name="wowowo", code="00000")
    _check_template("niah: question", question, (), name="wowowo")
    hay = list(token_ids(tokenizer, haystack_text))
    _check_grid(model, lengths, depths, needles, hay)
    start, rng = likelihood.start_token(tokenizer), random.Random(seed)
    places: list[tuple[int, float]] = []
    pairs: list[tuple[list[int], list[int]]] = []
    texts: list[tuple[str, ...]] = []
    for length in lengths:
        for depth in depths:
            for _ in range(needles):
                name, code = _name(rng), str(rng.randrange(10_000, 100_000))
                sentence = list(token_ids(tokenizer, needle.format(name=name, code=code)))
                asked, answer = _cut(tokenizer, question.format(name=name), f" {code}")
                room = length - 1 - len(sentence) - len(asked) - len(answer)
                if room < LEAST_HAY:
                    raise InputError(
                        f"niah: {length} tokens have no room for the needle: it takes {length - room}, "
                        f"and {LEAST_HAY} or more of the text are needed"
                    )
                first = rng.randrange(len(hay))
                piece = [hay[(first + at) % len(hay)] for at in range(room)]
                at = round(depth * room)
                pairs.append(([start, *piece[:at], *sentence, *piece[at:], *asked], answer))
                texts.append((code,))
                places.append((length, depth))
    hits = _hits(model, tokenizer, pairs, texts, match, suppress, batch_size)
    return _cells(places, hits)


def mdqa(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    positions: Sequence[int] = (1, 5, 10, 15, 20),
    *,
    num_documents: int = 20,
    document: str = DOCUMENT,
    question: str = QUESTION,
    match: Match = "greedy",
    suppress: Sequence[int] = (),
    batch_size: int | None = None,
) -> list[Cell]:
    """Questions about one of several documents, by which of them it is.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        questions: Their first document has the answer.
        positions: Numbers, from 1, at which that document is put.
        num_documents: Documents of a prompt.
        document: How one is written, with `{number}` and `{text}`.
        question: What comes last, with `{question}`; the answer is a blank and one of the answers.
        match: See above.
        suppress: Ids that `match="generate"` must not generate.
        batch_size: Prompts at once.

    Returns:
        A cell for each position.

    Raises:
        InputError: no position or one that isn't there, a question with too few documents or without an
            answer, a prompt beyond the model's positions, or one that doesn't show a text or a question.
    """
    _check_template("mdqa: document", document, ("text",), number=1, text="wowowo")
    _check_template("mdqa: question", question, ("question",), question="wowowo")
    if not positions:
        raise InputError("mdqa: expected at least one position")
    for position in positions:
        if not 1 <= position <= num_documents:
            raise InputError(
                f"mdqa: position {position} is none of {num_documents} documents, numbered from 1"
            )
    if not questions:
        raise InputError("mdqa: there are no questions")
    start = likelihood.start_token(tokenizer)
    places: list[tuple[int, float]] = []
    pairs: list[tuple[list[int], list[int]]] = []
    owners: list[int] = []
    texts: list[tuple[str, ...]] = []
    for position in positions:
        for number, asked in enumerate(questions, start=1):
            if len(asked.documents) < num_documents or not asked.answers:
                raise InputError(
                    f"mdqa: question {number} has {len(asked.documents)} documents and {len(asked.answers)} "
                    f"answers, expected {num_documents} and at least one"
                )
            gold, *others = asked.documents[:num_documents]
            others.insert(position - 1, gold)
            shown = "".join(document.format(number=at, text=text) for at, text in enumerate(others, start=1))
            prompt = shown + question.format(question=asked.question)
            # Greedy decoding may begin with any of the answers; what is generated is looked through once.
            for answer in asked.answers if match == "greedy" else asked.answers[:1]:
                before, after = _cut(tokenizer, prompt, f" {answer}")
                pairs.append(([start, *before], after))
                owners.append(len(places))
                texts.append(asked.answers)
            places.append((num_documents, float(position)))
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    _check_length(model, longest, "mdqa")
    hits = [False] * len(places)
    found = _hits(model, tokenizer, pairs, texts, match, suppress, batch_size)
    for owner, hit in zip(owners, found, strict=True):
        hits[owner] = hits[owner] or hit
    return _cells(places, hits)


def made_questions(count: int, num_documents: int = 20, seed: int = 0) -> list[Question]:
    """Questions about made-up people, each with documents about others."""
    rng = random.Random(seed)
    questions = []
    for _ in range(count):
        names: dict[str, None] = {}
        while len(names) < num_documents:
            names[_name(rng)] = None
        thing = rng.choice(_THINGS)
        facts = [(name, rng.choice(_ANSWERS)) for name in names]
        documents = tuple(f"The {thing} of {name} is {answer}." for name, answer in facts)
        asked, answer = facts[0]
        questions.append(Question(f"What is the {thing} of {asked}?", (answer,), documents))
    return questions


def mean_recall(cells: Sequence[Cell]) -> tuple[float, int]:
    """Share of all answers found, and how many were looked for."""
    total = sum(cell.n for cell in cells)
    return sum(cell.found for cell in cells) / total, total


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single blanks."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _hits(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[list[int], list[int]]],
    texts: Sequence[tuple[str, ...]],
    match: Match,
    suppress: Sequence[int],
    batch_size: int | None,
) -> list[bool]:
    if match == "greedy":
        hits = [False] * len(pairs)
        for batch in likelihood.answers(model, pairs, batch_size):
            for index, answer in batch:
                hits[index] = answer.is_greedy
        return hits
    if match != "generate":
        raise InputError(f"match must be greedy or generate, got {match!r}")
    import torch

    hits = []
    options: Mapping[str, Any] = {"suppress_tokens": list(suppress)} if suppress else {}
    for (prompt, answer), right in zip(pairs, texts, strict=True):
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=len(answer) + _MORE,
                do_sample=False,
                **options,
            )
        said = f" {normalised(tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True))} "
        hits.append(any(f" {normalised(text)} " in said for text in right))
    return hits


def _cells(places: Sequence[tuple[int, float]], hits: Sequence[bool]) -> list[Cell]:
    found: dict[tuple[int, float], list[bool]] = {}
    for place, hit in zip(places, hits, strict=True):
        found.setdefault(place, []).append(hit)
    return [Cell(length, place, sum(hit), len(hit)) for (length, place), hit in found.items()]


def _cut(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of what follows, tokenised together: a token may span the two."""
    before, both = list(token_ids(tokenizer, prompt)), list(token_ids(tokenizer, prompt + answer))
    cut = min(len(before), len(both) - 1)
    return both[:cut], both[cut:]


def _name(rng: random.Random) -> str:
    return "".join(rng.choice(_SYLLABLES) for _ in range(3))


def _check_template(what: str, template: str, needed: Sequence[str], **fields: Any) -> None:
    known = ", ".join(f"{{{name}}}" for name in fields)
    try:
        written = template.format(**fields)
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{what} {template!r} can't be filled in, expected the fields {known}") from error
    for name in needed:
        if str(fields[name]) not in written:
            raise InputError(f"{what} {template!r} doesn't show {{{name}}}, so nothing could be found")


def _check_grid(
    model: Any, lengths: Sequence[int], depths: Sequence[float], needles: int, hay: Sequence[int]
) -> None:
    if not hay:
        raise InputError("niah: the haystack is empty")
    if not lengths or not depths or needles < 1:
        raise InputError("niah: expected at least one length, one depth and one needle")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise InputError(f"niah: a depth must be in 0..1, got {depth}")
    _check_length(model, max(lengths), "niah")


def _check_length(model: Any, length: int, what: str) -> None:
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions and length > positions:
        raise InputError(f"{what}: a prompt of {length} tokens is beyond the model's {positions} positions")
