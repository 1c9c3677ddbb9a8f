"""Make OPSDL's training data from your own documents: (long document, short chunk, question), one JSON line each.

    python -m opsd_megatron.server --model MODEL --port 8199 &
    python tools/make_triplets.py --documents books/ more.jsonl --tokenizer MODEL --output runs/data/train.jsonl

From every document a random run of whole paragraphs is drawn (the short context), the model behind the inference
server writes four questions about it, and one of them is kept (OPSDL section 3.2, after LongPO's data preparation). No
answer is written. Stop it at any time: the same command goes on where it stopped.
"""

import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opsd_megatron.data.documents import count_documents, read_documents, split_document
from opsd_megatron.data.evidence import chunk_row, draw_chunk
from opsd_megatron.data.ledger import Ledger
from opsd_megatron.data.schema import Document, Span
from opsd_megatron.data.tokenizer import Tokenizer, load_tokenizer
from opsd_megatron.errors import DataError, UserError
from opsd_megatron.evaluation.exact_match import answer_part
from opsd_megatron.rollout.backend import GenerateRequest, RolloutBackend, Sample, ServerRefused
from opsd_megatron.rollout.embedded import EmbeddedBackend
from opsd_megatron.rollout.sampler import sample_seed

QUESTIONS = 4
SERVER_WAIT_S = 20.0
INSTRUCTION = (
    "{chunk}\n\n"
    "Write four questions about the text above. Each must be answerable from this text alone, stand by itself without "
    "pointing to 'the text', and ask the reader to connect facts from different places in it. "
    "Write exactly four lines, beginning with 1:, 2:, 3: and 4:, and nothing else.\n"
)
NUMBERED = re.compile(r"^\s*(?:question\s*)?(\d+)\s*[:.)]\s*(\S.*)$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class MakeTriplets:
    """Make (long document, short chunk, question) records from documents, with questions by the served model."""

    documents: tuple[Path, ...]
    """Text files (.txt, .md: one document each), .jsonl or .jsonl.gz files with a "text" in each row, or folders."""
    tokenizer: Path
    """Tokenizer directory of the served model."""
    output: Path
    """Records go here; OUTPUT with .corpus.jsonl holds each document once, .progress.jsonl what has been tried."""
    url: str = "http://127.0.0.1:8199"
    """Inference server."""
    token_variable: str = "OPSD_SERVER_TOKEN"
    """Environment variable that holds the server's bearer token."""
    min_document_tokens: int = 32768
    """Shorter documents are dropped."""
    max_document_tokens: int = 131072
    """Longer documents are cut into pieces of whole paragraphs, each a document of its own."""
    min_chunk_tokens: int = 16384
    """Shortest short context."""
    max_chunk_tokens: int = 30000
    """Longest short context."""
    chunks_per_document: int = 1
    """Records that are tried for each document."""
    max_question_tokens: int = 1024
    """Room for the four questions."""
    temperature: float = 0.7
    """Of the question writer."""
    top_p: float = 0.9
    """Of the question writer."""
    concurrent: int = 16
    """Chunks that are sent to the server at once; progress is saved after each such batch."""
    seed: int = 0
    """Chunks, sampling and the choice among the four questions."""

    def __post_init__(self):
        if not 1 <= self.min_chunk_tokens <= self.max_chunk_tokens <= self.max_document_tokens:
            raise DataError(
                f"--min-chunk-tokens {self.min_chunk_tokens}, --max-chunk-tokens {self.max_chunk_tokens}, "
                f"--max-document-tokens {self.max_document_tokens}: expected 1 <= min chunk <= max chunk <= document"
            )

    def recipe(self) -> dict[str, Any]:
        """What decides which records come out; a run that goes on must have the same."""
        technical = ("url", "token_variable", "concurrent", "documents", "output", "tokenizer")
        return {name: value for name, value in asdict(self).items() if name not in technical}


@dataclass(frozen=True)
class Draft:
    """One chunk to be asked about, or the reason why there is none."""

    id: str
    document: Document
    span: Span | None = None
    prompt: tuple[int, ...] = ()
    drop: str | None = None


def draft_chunks(document: Document, arguments: MakeTriplets, tokenizer: Tokenizer, max_prompt: int) -> Iterator[Draft]:
    """`chunks_per_document` drafts for each piece of the document, the same for the same seed."""
    for piece in split_document(document, arguments.max_document_tokens, tokenizer) if document.text.strip() else []:
        if len(tokenizer.encode(piece.text)) < arguments.min_document_tokens:
            yield Draft(f"{piece.id}#0", piece, drop="document too short")
            continue
        for number in range(arguments.chunks_per_document):
            name = f"{piece.id}#{number}"
            rng = random.Random(f"{arguments.seed} {name}")
            span = draw_chunk(piece, arguments.min_chunk_tokens, arguments.max_chunk_tokens, tokenizer, rng)
            if span is None:
                yield Draft(name, piece, drop="no run of paragraphs of that length")
                continue
            prompt = question_prompt(piece.text[span.start : span.end], tokenizer)
            too_long = len(prompt) + arguments.max_question_tokens > max_prompt
            yield Draft(name, piece, span, prompt, "chunk too long for the server" if too_long else None)
    if not document.text.strip():
        yield Draft(f"{document.id}#0", document, drop="no text")


def question_prompt(chunk: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    text = INSTRUCTION.format(chunk=chunk.strip())
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat([{"role": "user", "content": text}], enable_thinking=False)
    return (() if tokenizer.bos_id is None else (tokenizer.bos_id,)) + tokenizer.encode(text)


def parse_questions(text: str) -> list[str] | None:
    """The four questions in order; None where there are not exactly the lines 1 to 4."""
    found = NUMBERED.findall(text.rsplit("</think>", 1)[-1])
    if [int(number) for number, _ in found] != list(range(1, QUESTIONS + 1)):
        return None
    return [question.strip() for _, question in found]


def choose_question(draft: Draft, sample: Sample, arguments: MakeTriplets, tokenizer: Tokenizer) -> tuple[str, str]:
    """(question, "") or ("", reason for dropping the draft)."""
    if sample.finish_reason == "abort":
        raise ServerRefused(f"the server aborted the request for {draft.id}; the same command goes on from there")
    if sample.finish_reason == "length":
        return "", "questions cut off"
    ids, _ = answer_part(sample.token_ids, tokenizer.eos_ids)
    questions = parse_questions(tokenizer.decode(ids))
    if questions is None:
        return "", "not four numbered questions"
    return random.Random(f"{arguments.seed} question {draft.id}").choice(questions), ""


def finish_batch(
    drafts: Sequence[Draft], arguments: MakeTriplets, tokenizer: Tokenizer, backend: RolloutBackend, ledger: Ledger
) -> None:
    """Asks the server about the drafts and writes what came of them."""
    requests = [
        GenerateRequest(
            request_id=draft.id[:200], token_ids=draft.prompt, max_tokens=arguments.max_question_tokens,
            temperature=arguments.temperature, top_p=arguments.top_p,
            seed=sample_seed(arguments.seed, 0, draft.id), stop_token_ids=tokenizer.eos_ids,
        )
        for draft in drafts
    ]  # fmt: skip
    for draft, result in zip(drafts, backend.generate(requests), strict=True):
        question, reason = choose_question(draft, result.samples[0], arguments, tokenizer)
        if reason:
            ledger.mark(draft.id, reason)
            continue
        assert draft.span is not None
        reference = {"id": draft.document.id, "ref": ledger.reference(draft.document)}
        depth = round(draft.span.start / len(draft.document.text), 4)
        meta = {"source": draft.document.id, "depth": depth, "question_prompt_tokens": len(draft.prompt)}
        ledger.keep(chunk_row(draft.id, reference, draft.span, question, meta))


def make_triplets(
    arguments: MakeTriplets, tokenizer: Tokenizer, backend: RolloutBackend, console: Console
) -> Counter[str]:
    """Counts of all that was ever tried for this output: "kept", and each reason for dropping."""
    info = backend.info()
    if info.vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"{arguments.tokenizer} has {tokenizer.vocab_size} tokens, the served model {info.vocab_size}; "
            "--tokenizer must be that of the served model"
        )
    ledger = Ledger(arguments.output, arguments.recipe())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    waiting: list[Draft] = []
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("documents", total=count_documents(arguments.documents))
            for document in read_documents(arguments.documents):
                for draft in draft_chunks(document, arguments, tokenizer, info.max_model_len):
                    if draft.id in ledger.done:
                        continue
                    if draft.drop:
                        ledger.mark(draft.id, draft.drop)
                        continue
                    waiting.append(draft)
                    if len(waiting) == arguments.concurrent:
                        finish_batch(waiting, arguments, tokenizer, backend, ledger)
                        waiting = []
                progress.update(task, advance=1, description=describe(ledger.counts))
            if waiting:
                finish_batch(waiting, arguments, tokenizer, backend, ledger)
            progress.update(task, description=describe(ledger.counts))
    finally:
        ledger.close()
    return ledger.counts


def describe(counts: Counter[str]) -> str:
    return f"{counts['kept']} kept, {counts.total() - counts['kept']} dropped"


def main() -> None:
    try:
        arguments = tyro.cli(MakeTriplets, description=__doc__)
        token = os.environ.get(arguments.token_variable, "")
        tokenizer = load_tokenizer(arguments.tokenizer)
        count_documents(arguments.documents)  # a missing file is found before a missing server
        with EmbeddedBackend(arguments.url, token, timeout_s=600.0, max_concurrent=arguments.concurrent) as backend:
            backend.wait_until_healthy(SERVER_WAIT_S)
            counts = make_triplets(arguments, tokenizer, backend, Console(stderr=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    with suppress(BrokenPipeError):
        for outcome, count in counts.most_common():
            print(f"{count:8d}  {outcome}")


if __name__ == "__main__":
    main()
