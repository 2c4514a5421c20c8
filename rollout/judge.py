"""Whether a delivered completion is believed and wanted."""

from core.schema import check_completion
from rollout.leases import LeaseBook, Verdict
from rollout.messages import Deliver


def judge(deliver: Deliver, book: LeaseBook, worker: str, vocab_size: int, newest: int) -> tuple[str, str]:
    """Why a delivery of `worker` is rejected, as a word and a sentence; both empty where it is believed and wanted.

    `newest`: newest weights version that it can have been sampled from.
    """
    completion = deliver.completion
    key = completion.key
    verdict = book.verdict(deliver.lease_id, deliver.purpose, key)
    if verdict != Verdict.WANTED:
        return verdict.value, f"{key} of lease {deliver.lease_id}"
    lease = book.lookup(deliver.lease_id)
    try:
        check_completion(completion, vocab_size=vocab_size, max_tokens=lease.sampling.max_tokens)
        last = completion.spans[-1][1] if completion.spans else completion.version
        if last > newest:
            raise ValueError(f"weights version {last} is not published: the newest is {newest}")
        if completion.prompt_uid != book.prompt_uid(deliver.lease_id, key.slot):
            raise ValueError(f"prompt {completion.prompt_uid} is not the lease's")
        if completion.worker != worker or not completion.started_s <= completion.finished_s:
            raise ValueError(f"worker {completion.worker}, {completion.started_s} to {completion.finished_s} s")
    except ValueError as problem:
        return "invalid", f"{key}: {problem}"
    if completion.version < lease.version:  # beyond what algorithm.lookahead allows: its lease stays open
        return "stale", f"{key}: weights version {completion.version}, the lease wants {lease.version} or newer"
    return "", ""
