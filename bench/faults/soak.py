"""A million completions and ten thousand workers through the trainer's end of the stream: resident memory stays flat.

One process, no sockets: frames are encoded as a worker does, decoded, judged, leased, buffered, scored and taken.
"""

import time
from collections import Counter

from bench.faults.engine import VOCAB
from bench.faults.parts import SAMPLING, make_lease
from bench.faults.rows import Verdict, row
from bench.faults.stream import resident_bytes
from core.config import Config
from core.schema import Completion, CompletionKey, Source, pack_logprobs, pack_tokens
from rollout.buffer import ReplayBuffer
from rollout.frame import trainer_codec, worker_codec
from rollout.leases import LeaseBook
from rollout.ledger import Ledger
from rollout.messages import Deliver, Fingerprints, FromWorker, Heartbeat, Hello, Join, Leave
from rollout.peers import Peers
from rollout.roster import MAX_PEERS, RoleTerms, Roster
from rollout.terms import welcome

COMPLETIONS, STEP, FRAME = 1_000_000, 4096, 256
CHURN = 10_000
MARKS = Fingerprints(tokenizer="t", weights="w")
_TOKENS, _LOGPROBS = pack_tokens([7] * SAMPLING.max_tokens), pack_logprobs([-0.5] * SAMPLING.max_tokens)


class Trainer:
    """Roster, book, buffer and ledger, wired as the pool and the mixer wire them."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.buffer = ReplayBuffer(self.ledger, max_bytes=1 << 30)
        self.book = LeaseBook(credit=1 << 20)
        terms = {Source.EXPLORER: RoleTerms("m", MARKS, VOCAB)}  # type: ignore[arg-type]
        self.roster = Roster(
            self.book,
            session=7,
            welcome=welcome(Config(), "soak", 1),
            terms=terms,
            liveness_s=10,
            hang_s=10,
            on_completion=self.receive,
        )
        self.codec = trainer_codec(1 << 24)

    def receive(self, purpose: str, completion: Completion) -> None:
        if self.buffer.insert(completion):
            self.buffer.score(completion.key, 1.0, "")

    def hear(self, identity: bytes, messages: list[FromWorker], now: float) -> None:
        frame = worker_codec(1 << 24).encode(messages, 7)
        session, heard = self.codec.decode(bytes(frame))
        self.roster.hear(identity, session, heard, now)


def enter(trainer: Trainer, name: str) -> None:
    """A worker joins and is ready."""
    trainer.hear(name.encode(), [Join(worker=name, role=Source.EXPLORER, pid=1, host="h")], 0.0)
    trainer.hear(name.encode(), [Hello(fingerprints=MARKS, vocab_size=VOCAB)], 0.0)


def one_step(trainer: Trainer, name: str, step: int, seq: int) -> int:
    """All completions of a step arrive, a tenth of them twice, and train."""
    lease = make_lease(step=step, slots=STEP // 16, samples=16)
    trainer.book.submit(lease)
    list(trainer.roster.grants(0.0, None))
    delivers = []
    for item in lease.items:
        for sample in item.samples:
            seq += 1
            key = CompletionKey(source=Source.EXPLORER, step=step, slot=item.slot, sample=sample)
            completion = Completion(
                key=key, prompt_uid=item.prompt_uid, token_bytes=_TOKENS, logprob_bytes=_LOGPROBS, finish="length",
                version=0, worker=name, started_s=0.0, finished_s=1.0,
            )  # fmt: skip
            delivers.append(Deliver(seq=seq, lease_id=lease.lease_id, purpose="train", completion=completion))
    for first in range(0, len(delivers), FRAME):
        trainer.hear(name.encode(), list(delivers[first : first + FRAME]), 0.0)
        trainer.hear(name.encode(), list(delivers[first : first + FRAME // 10]), 0.0)
    trainer.buffer.take(step, list(trainer.buffer.scored(step)))
    return seq


@row("F31", "soak: 1,000,000 completions, a tenth of them delivered twice")
def soak(seed: int) -> Verdict:
    trainer, name = Trainer(), "soak.1"
    enter(trainer, name)
    seq, step, sizes = 0, 0, []
    start = time.process_time()
    while seq < COMPLETIONS:
        step += 1
        seq = one_step(trainer, name, step, seq)
        sizes.append(resident_bytes())
    seconds = time.process_time() - start
    warm = len(sizes) // 10
    grown = (max(sizes[-warm:]) - max(sizes[warm : 2 * warm])) / 1e6
    report = trainer.ledger.report(
        {source.value: _of_pool(trainer, source) for source in Source}, trainer.buffer.resident()
    )
    assert report["conserved"], report
    trained = report["explorer"]["trained"]
    assert grown < 10, f"resident memory grew by {grown:.1f} MB over 8 × 10^5 completions"
    text = f"{trained:,} trained, resident memory {grown:+.1f} MB, {1e6 * seconds / seq:.0f} µs of CPU each"
    return Verdict("tolerated", text, None, seq - trained, 0)


def _of_pool(trainer: Trainer, source: Source) -> dict[str, object]:
    account = trainer.roster.peers.accounts()[source]
    return {
        "produced": account["received"],
        "accepted": account.group("accepted"),
        "rejected": account.group("rejected"),
        "in_flight": 0,
        "lost": 0,
    }


@row("F31b", "10,000 workers come and go, half of them without a word", quick=True)
def churn(seed: int) -> Verdict:
    trainer = Trainer()
    sizes = []
    for number in range(CHURN):
        name = f"w.{number}"
        enter(trainer, name)
        beat = Heartbeat(beat=1, progress=1, doing="", produced=1, unacknowledged=1, leases=(), version=0)
        trainer.hear(name.encode(), [beat], float(number))
        if number % 2:
            trainer.hear(name.encode(), [Leave(reason="bye")], float(number))
        if number % 4 == 0:
            trainer.roster.tick(float(number))
        if number % 1000 == 999:
            sizes.append(resident_bytes())
    peers: Peers = trainer.roster.peers
    account = peers.accounts()[Source.EXPLORER]
    kinds = Counter(peer.state.value for peer in peers.values())
    grown = (sizes[-1] - sizes[2]) / 1e6
    assert len(peers) <= MAX_PEERS, len(peers)
    assert account["produced"] == CHURN, account
    assert grown < 4, f"resident memory grew by {grown:.1f} MB"
    return Verdict("tolerated", f"{len(peers)} remembered ({dict(kinds)}), all {CHURN} counted, memory {grown:+.1f} MB")
