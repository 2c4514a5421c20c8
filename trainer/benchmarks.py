"""The benchmarks by name: where their problems come from, how they are put to a model, and how answers are checked."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from core.config import Config, Data
from core.countdown import problems
from core.datasets import Question
from core.schema import Prompt
from rollout.prompting import to_prompt
from trainer.benchmark_files import places_of, read_rows
from trainer.benchmark_rows import (
    LeftOut,
    Row,
    choice_question,
    countdown_question,
    integer_question,
    math_question,
    olympiad_question,
)

# Qwen3's model card asks for these; the authors' code adds the soft switch (MODES) and says no more.
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
LETTER = "Please reason step by step, and put the letter of your choice within \\boxed{}."


class Decoding(NamedTuple):
    """How completions are drawn; `suffix` ends the question.

    Example: MODES["nothink"].temperature -> 0.7
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    suffix: str = ""


# The authors' settings, which are those that Qwen3's model card advises.
MODES = {
    "nothink": Decoding(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5, suffix=" /no_think"),
    "think": Decoding(temperature=0.6, top_p=0.95, top_k=20),
}


class Benchmark(NamedTuple):
    """One set of problems.

    Example: BENCHMARKS["math500"]
    """

    published: int  # problems in the published set
    part: str  # of a downloaded repository: the split or configuration
    to_question: Callable[[Row], Question]
    reward: str  # the strict check, as reward.function takes it
    max_tokens: int
    chat: bool = True  # rendered by the chat template, under a mode; else as it stands, at temperature 1

    def decoding(self, mode: str) -> Decoding:
        """The published sampling settings."""
        return MODES[mode] if self.chat else Decoding(temperature=1.0)


BENCHMARKS = {
    "aime24": Benchmark(30, "train", partial(integer_question, instruction=BOXED), "math", 38912),
    "aime25": Benchmark(30, "test", partial(integer_question, instruction=BOXED), "math", 38912),
    "math500": Benchmark(500, "test", partial(math_question, instruction=BOXED), "math", 32768),
    "olympiadbench": Benchmark(
        674,
        "OE_TO_maths_en_COMP",
        partial(olympiad_question, instruction=BOXED),
        "core.strict:score_olympiad",
        32768,
    ),
    "commonsenseqa": Benchmark(
        1221, "validation", partial(choice_question, instruction=LETTER), "core.strict:score_choice", 32768
    ),
    "countdown": Benchmark(256, "test", countdown_question, "countdown", 24, chat=False),
}


class Problems(NamedTuple):
    """A benchmark's prompts in their own order, and what to tell the user about them."""

    prompts: list[Prompt]
    report: list[str]


def find_benchmark(name: str) -> Benchmark:
    """ValueError for an unknown name, with those that there are."""
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def load_problems(
    name: str, tokenizer: PreTrainedTokenizerBase, *, data: Path | None, mode: str, seed: int
) -> Problems:
    """Every problem of a benchmark once, rendered and tokenised; `seed` makes those of the embedded task.

    Raises ValueError for files that are missing or broken, for a row without question or answer, by number, and for a
    tokenizer without a chat template.
    """
    benchmark = find_benchmark(name)
    if benchmark.chat and tokenizer.chat_template is None:
        raise ValueError(
            f"{name} is put to a model through its chat template, and {tokenizer.name_or_path} has none: "
            "save the template of its family with its tokenizer (chat_template.jinja)"
        )
    rows, origin = _rows(name, benchmark, data, seed)
    questions, report = _questions(name, benchmark, rows, origin)
    settings = Data(template="chat" if benchmark.chat else "plain", suffix=benchmark.decoding(mode).suffix)
    prompts = [to_prompt(question, Config(data=settings), tokenizer) for question in questions]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    report.append(f"{name}: prompts of up to {longest:,} tokens")
    report.append(f"{name}: the first is {prompts[0].text!r}, its gold answer {prompts[0].answer!r}")
    return Problems(prompts, report)


def _rows(name: str, benchmark: Benchmark, data: Path | None, seed: int) -> tuple[list[Row], str]:
    """Rows and where they are from; those of countdown are embedded, unless the directory has others."""
    if name == "countdown" and (data is None or (data.is_dir() and not places_of(name, data))):
        embedded = problems("eval", seed)
        return [{"prompt": one.prompt, "answer": one.target} for one in embedded], "embedded"
    if data is None:
        raise ValueError(f"{name} is not embedded: give the directory of its files with --data DIR")
    rows, files = read_rows(name, data, part=benchmark.part)
    return list(rows), ", ".join(str(file) for file in files)


def _questions(name: str, benchmark: Benchmark, rows: list[Row], origin: str) -> tuple[list[Question], list[str]]:
    """The problems, each once, and how many there were of what."""
    questions: dict[str, Question] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows):
        try:
            question = benchmark.to_question(row)
        except LeftOut as reason:
            left_out[str(reason)] += 1
            continue
        except ValueError as error:
            raise ValueError(f"{name}: row {number} (counted from 0) of {origin}: {error}") from error
        known = questions.setdefault(question.uid, question)
        left_out["repeated"] += known is not question
        if known.answer != question.answer:
            raise ValueError(
                f"{name}: row {number} (counted from 0) of {origin} repeats a question with another answer: "
                f"{question.answer!r} after {known.answer!r}"
            )
    if not questions:
        raise ValueError(f"{name}: {origin} holds no problem ({len(rows)} rows)")
    lines = [f"{name}: {len(questions)} problems in {len(rows)} rows of {origin}"]
    lines += [f"{name}: {count} rows left out: {reason}" for reason, count in left_out.items() if count]
    if len(questions) != benchmark.published:
        lines.append(f"{name}: the published set has {benchmark.published} problems, this one {len(questions)}")
    return list(questions.values()), lines
