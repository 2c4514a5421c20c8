"""Hugging Face directories in and out, and the gate that keeps an explorer with another tokenizer away.

Shape suffixes: R rows, L tokens of a row, H hidden, V vocabulary.
"""

import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kernels.ops import linear_logprob
from rollout.torch_weights import AGAIN
from trainer.model_files import read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BIT_PATTERNS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
PROBE_TOKENS = 8

transformers_logging.disable_progress_bar()  # the run has a live line of its own


def load_model(directory: Path, *, dtype: torch.dtype, device: torch.device, key: str) -> PreTrainedModel:
    """The causal language model of a Hugging Face directory: safetensors only, SDPA attention, dropout off.

    `key` is the setting that named the directory, for messages. ValueError for a missing directory or config.json, for
    weights that do not fit the architecture, and for a head that is more than one linear layer.
    """
    _check_directory(directory, key)
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if wrong:
        raise ValueError(f"the weights in {directory} do not fit its config.json ({key}): {wrong}")
    model.eval().to(device)
    _check_linear_head(model, directory)
    return model


def load_tokenizer(directory: Path, *, key: str = "learner.model") -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory; ValueError if it is missing or cannot be read."""
    _check_directory(directory, key)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        text = " ".join(str(error).split())[:300]
        raise ValueError(f'{key} = "{directory}": its tokenizer cannot be read ({text}): {AGAIN}') from error


def vocab_size(directory: Path, *, key: str = "learner.model") -> int:
    """Rows of the model's output head, which may be more than the tokenizer has tokens; loads no weights."""
    return int(read_config(directory, key).get_text_config().vocab_size)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write config.json, generation_config.json, safetensors weights and tokenizer files that transformers loads.

    `weights` are the model's, where it does not hold them itself because they are spread over ranks.
    """
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


def hidden_states(model: PreTrainedModel, ids_RL: Tensor) -> Tensor:
    """The head's inputs [R·L, H] of right-padded rows.

    No attention mask: attention is causal and padding stands to the right, so no real token sees a pad.
    """
    hidden_RLH = model.base_model(input_ids=ids_RL, use_cache=False).last_hidden_state
    return hidden_RLH.flatten(0, 1)


def head_weight(model: PreTrainedModel) -> Tensor:
    """The output head's matrix [V, H]; the embedding's own where they are tied."""
    return model.get_output_embeddings().weight


def use_liger(model: PreTrainedModel, *, rotary: bool) -> bool:
    """Liger's RMSNorm, rotary embedding and SwiGLU in the place of the model's own; False where that cannot be.

    Weights and their names stay. The rotary embedding is exchanged for every model of the family in this process.
    """
    if not importlib.util.find_spec("liger_kernel"):
        return False
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    # Its cross entropies stay out: the head and the loss are ours.
    _apply_liger_kernel_to_instance(model, rope=rotary, cross_entropy=False, fused_linear_cross_entropy=False)
    return True


def weight_checksum(model: PreTrainedModel) -> str:
    """The sum of every parameter's bit patterns, as text: equal weights have equal text, whatever device and however
    many threads added them up, which a sum of floats does not promise."""
    patterns = (p.detach().view(BIT_PATTERNS[p.element_size()]) for p in model.parameters())
    return torch.stack([pattern.sum(dtype=torch.int64) for pattern in patterns]).cpu().numpy().tobytes().hex()


def require_same_tokenizer(learner_dir: Path, explorer_dir: Path) -> None:
    """Raise ValueError unless both directories hold the same tokenizer, special tokens and chat template.

    Token ids travel between the models, so equal ids must mean equal tokens, and the same prompt must become the same
    ids.
    """
    learner = load_tokenizer(learner_dir, key="learner.model")
    explorer = load_tokenizer(explorer_dir, key="explorer.model")
    for what, ours, theirs in (
        ("vocabulary", learner.get_vocab(), explorer.get_vocab()),
        ("special tokens", _special_tokens(learner), _special_tokens(explorer)),
        ("tokenization rules", _rules(learner), _rules(explorer)),
        ("chat template", {"chat_template": learner.chat_template}, {"chat_template": explorer.chat_template}),
    ):
        difference = _first_difference(ours, theirs)
        if difference:
            raise ValueError(
                f"learner and explorer differ in their {what}: {difference} "
                f"(learner.model = {learner_dir}, explorer.model = {explorer_dir}); "
                "both must have the same tokenizer: choose models of one family"
            )


def _check_directory(directory: Path, key: str) -> None:
    if not directory.is_dir():
        raise ValueError(f"no such directory: {directory}; set {key} to a Hugging Face model directory")
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json; set {key} to a Hugging Face model directory")


@torch.no_grad()
def _check_linear_head(model: PreTrainedModel, directory: Path) -> None:
    """Refuse a model whose logits are not hidden states times one matrix (a bias, a soft cap, a scale)."""
    ids_RL = torch.arange(PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    expected_T = model(input_ids=ids_RL, use_cache=False).logits[0].float().log_softmax(-1).gather(1, ids_RL.T)[:, 0]
    found_T = linear_logprob(hidden_states(model, ids_RL), head_weight(model), ids_RL[0])[0]
    gap = float((expected_T - found_T).abs().max())
    if not gap <= (1e-3 if model.dtype == torch.float32 else 0.25):
        raise ValueError(
            f"{directory} ({model.config.model_type}): log-probs differ by {gap:.3g} from a plain linear head's; "
            "models with a head bias, logit soft-capping or logit scaling are not supported"
        )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    named = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    added = {str(token_id): str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
    return {**named, **added}


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Normalisation, splitting and merges, as the tokenizers library writes them; slow classes have only a name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"class": type(tokenizer).__name__}
    rules = json.loads(backend.to_str())
    # Padding and truncation are state that a caller changes; the vocabulary and added tokens were compared before.
    return {
        name: value for name, value in rules.items() if name not in ("padding", "truncation", "added_tokens", "version")
    }


def _first_difference(ours: object, theirs: object) -> str:
    """Where two JSON-like values part, down to the entry or the character; empty if nowhere."""
    if ours == theirs:
        return ""
    if isinstance(ours, list) and isinstance(theirs, list):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        name = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
        return f"{name!r}: {_first_difference(ours.get(name), theirs.get(name))}"
    start = 0
    if isinstance(ours, str) and isinstance(theirs, str):
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        start = max(0, first - 20)
        ours, theirs = ours[start:], theirs[start:]
    at = f" at character {start}" if start else ""
    return f"{_brief(ours)} for the learner, {_brief(theirs)} for the explorer{at}"


def _brief(value: object) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
