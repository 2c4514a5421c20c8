"""The nouns: frozen, strict at every decode, validated across fields where they enter."""

import msgspec
import numpy as np
import pytest

from core.schema import (
    Completion,
    CompletionKey,
    Group,
    Prompt,
    Sampling,
    ScoredCompletion,
    Source,
    check_completion,
    pack_logprobs,
    pack_tokens,
)

KEY = CompletionKey(source=Source.LEARNER, step=3, slot=17, sample=0)
PROMPT = Prompt(uid="7f3a", token_ids=(10, 7), text="8 5", answer="15", columns={"level": "1"})


def completion(tokens: object = (5, 6, 1), logprobs: object = (-0.5, -1.0, -0.1), **changes: object) -> Completion:
    fields: dict[str, object] = {
        "key": KEY,
        "prompt_uid": "7f3a",
        "token_bytes": pack_tokens(tokens),
        "logprob_bytes": pack_logprobs(logprobs),
        "finish": "stop",
        "version": 2,
        "worker": "learner-0",
        "started_s": 1.0,
        "finished_s": 2.0,
    }
    return Completion(**(fields | changes))


@pytest.mark.parametrize(
    "noun",
    [
        KEY,
        PROMPT,
        completion(),
        Sampling(temperature=0.7, max_tokens=4, stop_token_ids=(1, 2)),
        ScoredCompletion(completion=completion(), reward=0.5, text="x"),
        Group(
            prompt=PROMPT, step=3, slot=17, advantages=(1.0,),
            rows=(ScoredCompletion(completion=completion(), reward=0.5, text="x"),),
        ),
    ],
    ids=lambda noun: type(noun).__name__,
)  # fmt: skip
def test_nouns_are_frozen_round_trip_and_refuse_unknown_fields(noun: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(noun)
    assert msgspec.msgpack.decode(data, type=type(noun)) == noun
    with pytest.raises(AttributeError):
        setattr(noun, noun.__struct_fields__[0], None)
    more = msgspec.msgpack.decode(data) | {"surprise": 1}
    with pytest.raises(msgspec.ValidationError, match="surprise"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(more), type=type(noun))


@pytest.mark.parametrize(
    ("field", "value"),
    [("source", "teacher"), ("step", -1), ("slot", -1), ("sample", -1), ("step", 1.5), ("step", "1"), ("slot", None)],
)
def test_a_key_is_checked_where_it_is_decoded(field: str, value: object) -> None:
    wrong = msgspec.to_builtins(KEY) | {field: value}
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(wrong), type=CompletionKey)


@pytest.mark.parametrize(
    ("field", "value"), [("finish", "abort"), ("version", -1), ("token_bytes", [1]), ("worker", None), ("key", 3)]
)
def test_a_completion_is_checked_where_it_is_decoded(field: str, value: object) -> None:
    wrong = msgspec.msgpack.decode(msgspec.msgpack.encode(completion())) | {field: value}
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(wrong), type=Completion)


def test_arrays_are_views_of_little_endian_bytes() -> None:
    row = completion(tokens=(258, 1), logprobs=(-0.5, 0.0))
    assert row.token_bytes[:4] == b"\x02\x01\x00\x00"
    assert row.tokens.tolist() == [258, 1]
    assert row.logprobs.tolist() == [-0.5, 0.0]
    assert row.num_bytes == 16
    with pytest.raises(ValueError, match="read-only"):
        row.tokens[0] = 0


def test_a_valid_completion_passes() -> None:
    check_completion(completion(), vocab_size=7, max_tokens=3)
    check_completion(completion(logprobs=(0.0, 1e-6, -9999.0)), vocab_size=7, max_tokens=3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (completion(tokens=(), logprobs=()), "0 and 0 bytes"),
        (completion(logprobs=(-0.5, -1.0)), "12 and 8 bytes"),
        (completion(token_bytes=b"\x01\x00\x00", logprob_bytes=b"\x01\x00\x00"), "3 and 3 bytes"),
        (completion(tokens=(5,) * 4, logprobs=(-1.0,) * 4), "4 tokens exceed the lease's limit of 3"),
        (completion(tokens=(5, 7, 1)), "outside 0 … 6"),
        (completion(tokens=(5, -1, 1)), "outside 0 … 6"),
        (completion(logprobs=(-0.5, float("nan"), -0.1)), "log-prob outside"),
        (completion(logprobs=(-0.5, float("-inf"), -0.1)), "log-prob outside"),
        (completion(logprobs=(-0.5, 0.01, -0.1)), "log-prob outside"),
        (completion(logprobs=(-0.5, -2e4, -0.1)), "log-prob outside"),
    ],
)
def test_what_spans_fields_is_checked(row: Completion, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_completion(row, vocab_size=7, max_tokens=3)


def test_keys_order_explorer_first_then_by_step_slot_and_sample() -> None:
    keys = [
        CompletionKey(source=source, step=step, slot=slot, sample=sample)
        for source in Source
        for step in (1, 2)
        for slot in (0, 10)
        for sample in (0, 1)
    ]
    assert sorted(np.random.default_rng(0).permutation(keys).tolist()) == keys


def test_a_group_has_an_advantage_for_each_row() -> None:
    rows = (ScoredCompletion(completion=completion(), reward=0.5, text="x"),)
    with pytest.raises(AssertionError):
        Group(prompt=PROMPT, step=3, slot=17, rows=rows, advantages=(1.0, 2.0))
    with pytest.raises(AssertionError):
        Group(prompt=PROMPT, step=3, slot=17, rows=(), advantages=())
