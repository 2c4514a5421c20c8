"""Makes the embedded family: a tiny Qwen3-architecture learner trained on countdown, and an explorer distilled from it.

Shapes: N traces, R response tokens (`<eos>` included), V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3ForCausalLM

from core.countdown import EOS_ID, IDS, PAD_ID, WORDS, encode, pretraining_traces
from trainer.models import save_model

Progress = Callable[[str, float], None]  # what is being done, and the share of all of it that is finished


class Shape(msgspec.Struct, frozen=True):
    """Size of one model, and the standard deviation of its initial weights."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    init_std: float


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Everything but the seed that decides the weights of the embedded family.

    Example: Recipe(learner_steps=2, explorer_steps=2) is made in a second, for tests.
    """

    # From large initial weights the learner memorises more of its traces, so that the explorer passes it at pass@8.
    learner: Shape = Shape(layers=3, hidden=96, heads=4, intermediate=256, init_std=0.1)
    explorer: Shape = Shape(layers=2, hidden=64, heads=2, intermediate=192, init_std=0.08)
    head_dim: int = 32  # the smallest that vLLM's attention takes
    rope_theta: float = 1e4
    max_positions: int = 64
    batch: int = 96  # traces of one update
    learner_steps: int = 450
    learner_rate: float = 4e-3
    explorer_steps: int = 600
    explorer_rate: float = 8e-3
    distil: float = 0.7  # share of KL(learner‖explorer) in the explorer's loss; the rest is cross-entropy
    warmup: int = 30
    beta2: float = 0.95
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    threads: int = 2  # a constant of the recipe, because sums depend on how they are split


class Traces(NamedTuple):
    """Solved problems of one length. ids int64 [N, prompt_length + R]."""

    ids: Tensor
    prompt_length: int

    @property
    def responses(self) -> Tensor:
        """int64 [N, R]"""
        return self.ids[:, self.prompt_length :]


def make_family(folder: Path, seed: int, recipe: Recipe, on_progress: Progress) -> None:
    """Write the two Hugging Face directories `folder/learner` and `folder/explorer`.

    The learner minimises the cross-entropy of the response tokens of few fixed traces, over many epochs, which makes it
    overconfident. The explorer minimises 0.7 KL(learner‖explorer) + 0.3 cross-entropy on the same tokens. Equal seeds
    give equal bytes for one version of torch and one kind of processor.
    """
    traces = read_traces(seed)
    work = [recipe.learner_steps, recipe.explorer_steps]
    with _torch_threads(recipe.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learner, explorer = build_model(recipe.learner, recipe), build_model(recipe.explorer, recipe)
        work = [steps * model.num_parameters() for steps, model in zip(work, (learner, explorer))]
        share = work[0] / sum(work)
        on_step = _step_reporter("pre-training the learner", recipe.learner_steps, 0.0, share, on_progress)
        train(learner, traces, recipe, steps=recipe.learner_steps, rate=recipe.learner_rate, on_step=on_step)
        teacher = response_logprobs(learner, traces)
        on_step = _step_reporter("distilling the explorer", recipe.explorer_steps, share, 1.0, on_progress)
        train(
            explorer, traces, recipe, steps=recipe.explorer_steps, rate=recipe.explorer_rate, teacher=teacher,
            on_step=on_step,
        )  # fmt: skip
    tokenizer = build_tokenizer(recipe.max_positions)
    for name, model in (("learner", learner), ("explorer", explorer)):
        save_model(model, tokenizer, folder / name)


def build_tokenizer(max_positions: int) -> PreTrainedTokenizerFast:
    """One token per word, words separated by whitespace, nothing added; a word outside the vocabulary raises."""
    words = Tokenizer(WordLevel(vocab=dict(IDS)))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=WORDS[PAD_ID],
        eos_token=WORDS[EOS_ID],
        model_max_length=max_positions,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(shape: Shape, recipe: Recipe, kind: type[PreTrainedModel] = Qwen3ForCausalLM) -> PreTrainedModel:
    """A freshly initialised model in float32 on CPU, of Qwen3's or another architecture that has Llama's fields."""
    config = kind.config_class(
        vocab_size=len(WORDS),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=recipe.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=recipe.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        initializer_range=shape.init_std,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    model = kind(config)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    return model


def read_traces(seed: int) -> Traces:
    """The solved pre-training problems, the larger number first in every sum.

    One order instead of two for each sum: the models learn the task in half the steps, and still meet every solution.
    """
    texts = [(problem.prompt, larger_first(trace)) for problem, traces in pretraining_traces(seed) for trace in traces]
    lengths = {len(encode(prompt)) for prompt, _ in texts}
    assert len(lengths) == 1
    return Traces(torch.tensor([[*encode(f"{prompt} {trace}"), EOS_ID] for prompt, trace in texts]), *lengths)


def larger_first(trace: str) -> str:
    """A trace with the operands of each sum in descending order.

    Example: larger_first("2 + 5 = 7 , 7 - 3 = 4") == "5 + 2 = 7 , 7 - 3 = 4"
    """
    steps = []
    for step in trace.split(" , "):
        left, operator, right, equals, result = step.split()
        if operator == "+" and int(left) < int(right):
            left, right = right, left
        steps.append(f"{left} {operator} {right} {equals} {result}")
    return " , ".join(steps)


def train(
    model: PreTrainedModel,
    traces: Traces,
    recipe: Recipe,
    *,
    steps: int,
    rate: float,
    on_step: Callable[[int, float], None],
    teacher: Tensor | None = None,
) -> None:
    """AdamW with linear warm-up and cosine decay to 0 over shuffled epochs, with the process's random numbers.

    With `teacher` (float32 [N, R, V] log-probs, computed once because the traces are fixed) the loss of a token is
    distil·KL(teacher‖model) + (1 − distil)·cross-entropy, else the cross-entropy.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
    )
    warmup = torch.arange(1, steps + 1) / recipe.warmup
    decay = (1 + torch.cos(torch.pi * torch.arange(steps) / steps)) / 2
    rates = (rate * torch.minimum(warmup, decay)).tolist()
    epochs = -(-steps * recipe.batch // len(traces.ids))
    order = torch.cat([torch.randperm(len(traces.ids)) for _ in range(epochs)])
    model.train()
    for step, rows in enumerate(order.split(recipe.batch)[:steps]):
        logprobs = _logprobs(model, traces.ids[rows], traces.prompt_length)
        loss = -logprobs.gather(-1, traces.responses[rows].unsqueeze(-1)).mean()
        if teacher is not None:
            target = teacher[rows]
            divergence = (target.exp() * (target - logprobs)).sum(-1).mean()
            loss = recipe.distil * divergence + (1 - recipe.distil) * loss
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
        on_step(step + 1, loss.item())
    model.eval()


def response_logprobs(model: PreTrainedModel, traces: Traces) -> Tensor:
    """float32 [N, R, V]: log-probs of the whole vocabulary at every response token."""
    with torch.no_grad():
        return torch.cat([_logprobs(model, ids, traces.prompt_length) for ids in traces.ids.split(512)])


def _logprobs(model: PreTrainedModel, ids: Tensor, prompt_length: int) -> Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=ids.shape[1] - prompt_length).logits
    return F.log_softmax(logits, dim=-1)


def _step_reporter(
    what: str, steps: int, start: float, end: float, on_progress: Progress
) -> Callable[[int, float], None]:
    def on_step(step: int, loss: float) -> None:
        on_progress(f"{what}: step {step} of {steps}, loss {loss:.3f}", start + (end - start) * step / steps)

    return on_step


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
