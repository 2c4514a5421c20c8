"""Seeds as pure functions of what they are for, so that a lost completion can be generated again, equal."""

import hashlib

from core.schema import CompletionKey


def recorded_seed(prompt_uid: str, number: int) -> int:
    """Unsigned 64-bit seed of an explorer completion that is kept for other runs: the prompt's `number`-th.

    It names neither run nor step, so that every run that wants this completion wants the same one (docs/store.md).

    Example: recorded_seed("7f3a", 0)
    """
    return _hashed(f"recorded/{prompt_uid}/{number}")


def completion_seed(run_seed: int, purpose: str, key: CompletionKey) -> int:
    """Unsigned 64-bit seed of one completion: the first 8 bytes of BLAKE2b over what identifies it.

    Example: completion_seed(0, "train", CompletionKey(source=Source.EXPLORER, step=1, slot=0, sample=0))
    """
    return _hashed(f"{run_seed}/{purpose}/{key.source.value}/{key.step}/{key.slot}/{key.sample}")


def _hashed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
