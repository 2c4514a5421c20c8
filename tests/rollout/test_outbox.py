"""When a worker's network thread has something to send: it is woken then, and only then."""

import numpy as np

from core.schema import Completion, CompletionKey, Source, pack_logprobs, pack_tokens
from rollout.outbox import Outbox


def completion(sample: int) -> Completion:
    return Completion(
        key=CompletionKey(source=Source.LEARNER, step=1, slot=0, sample=sample), prompt_uid="p",
        token_bytes=pack_tokens([3, 1]), logprob_bytes=pack_logprobs(np.array([-1.0, -0.5])), finish="stop",
        version=0, worker="w", started_s=1.0, finished_s=2.0,
    )  # fmt: skip


def test_there_is_something_to_send_from_a_put_until_it_is_sent_and_again_once_it_got_lost():
    outbox = Outbox(8)
    assert not outbox.has_unsent
    outbox.put("lease", "train", completion(0))
    outbox.put("lease", "train", completion(1))
    assert outbox.has_unsent
    first = outbox.unsent(1 << 20, 1)
    outbox.sent(first, beat=1)
    assert outbox.has_unsent, "the second one waits"
    outbox.sent(outbox.unsent(1 << 20, 8), beat=1)
    assert not outbox.has_unsent
    outbox.acknowledge((1,), beat=1)
    assert not outbox.has_unsent, "the trainer may not have heard of the second one yet"
    outbox.acknowledge((), beat=2)
    assert outbox.has_unsent, "sent before beat 2 was heard, and not acknowledged: it got lost"
