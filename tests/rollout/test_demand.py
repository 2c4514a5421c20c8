"""Demand is a pure function of configuration, prompts and step."""

import msgspec
import pytest

from core.config import Algorithm, Config, Evaluation, Explorer, Rollout
from core.lease_size import LeaseRows, lease_rows
from core.prompts import PromptSchedule
from core.schema import CompletionKey, Prompt, Source, pack_tokens
from core.seeds import completion_seed
from rollout.demand import Demand
from rollout.messages import Lease

PROMPTS = [Prompt(uid=f"u{i}", token_ids=(i + 2, 7), text=f"prompt {i}", answer=str(i)) for i in range(40)]
ALGORITHM = Algorithm(group_size=4, steps=8, anneal_steps=4, prompts_per_step=10)


def make(**sections: object) -> Demand:
    config = Config(**{"algorithm": ALGORITHM, "rollout": Rollout(lease_prompts=4, max_response_tokens=9), **sections})
    schedule = PromptSchedule(PROMPTS, seed=config.run.seed, per_step=config.algorithm.prompts_per_step)
    return Demand(config, schedule, (1, 3))


def keys(leases: list[Lease]) -> list[CompletionKey]:
    return [
        CompletionKey(source=lease.source, step=lease.step, slot=item.slot, sample=sample)
        for lease in leases
        for item in lease.items
        for sample in item.samples
    ]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 8])
def test_leases_cover_each_owed_completion_once(step: int) -> None:
    demand = make()
    for source in Source:
        owed = demand.count(source, step)
        found = keys(list(demand.leases(source, step)))
        expected = [
            CompletionKey(source=source, step=step, slot=slot, sample=sample)
            for slot in range(10)
            for sample in range(owed)
        ]
        assert found == expected
    assert demand.count(Source.EXPLORER, step) + demand.count(Source.LEARNER, step) == 4


def test_nothing_owed_is_no_lease() -> None:
    demand = make()
    assert list(demand.leases(Source.LEARNER, 1)) == []  # α = 1
    assert list(demand.leases(Source.EXPLORER, 4)) == []  # α = 0


def test_a_lease_is_the_same_whenever_and_wherever_it_is_made() -> None:
    again = make()
    list(again.leases(Source.EXPLORER, 7))
    first, second = list(make().leases(Source.EXPLORER, 3)), list(again.leases(Source.EXPLORER, 3))
    assert msgspec.msgpack.encode(first) == msgspec.msgpack.encode(second)
    assert [lease.lease_id for lease in first] == ["explorer-3-0", "explorer-3-1", "explorer-3-2"]
    assert [len(lease.items) for lease in first] == [4, 4, 2]


def test_items_carry_the_prompt_of_the_step_and_the_seed_of_each_completion() -> None:
    demand = make()
    (lease, *_) = demand.leases(Source.EXPLORER, 2)
    for item in lease.items:
        prompt = demand.prompts_at(2)[item.slot]
        assert (item.prompt_uid, item.prompt_bytes) == (prompt.uid, pack_tokens(prompt.token_ids))
        for sample, seed in zip(item.samples, item.seeds):
            key = CompletionKey(source=Source.EXPLORER, step=2, slot=item.slot, sample=sample)
            assert seed == completion_seed(0, "train", key)


@pytest.mark.parametrize(("lookahead", "versions"), [(0, [0, 1, 4, 7]), (1, [0, 0, 3, 6]), (3, [0, 0, 1, 4])])
def test_learner_leases_ask_for_weights_at_most_lookahead_steps_old(lookahead: int, versions: list[int]) -> None:
    algorithm = msgspec.structs.replace(ALGORITHM, anneal_steps=0, lookahead=lookahead)
    demand = make(algorithm=algorithm)
    assert [next(demand.leases(Source.LEARNER, step)).version for step in (1, 2, 5, 8)] == versions


def test_explorer_leases_never_wait_for_weights() -> None:
    assert {lease.version for step in range(1, 4) for lease in make().leases(Source.EXPLORER, step)} == {0}


def test_sampling_is_that_of_each_source() -> None:
    demand = make(
        explorer=Explorer(temperature=0.7, top_p=0.95, max_response_tokens=30),
        rollout=Rollout(temperature=1.5, lease_prompts=4, max_response_tokens=9),
    )
    explorer, learner = demand.sampling[Source.EXPLORER], demand.sampling[Source.LEARNER]
    assert (explorer.temperature, explorer.top_p, explorer.max_tokens) == (0.7, 0.95, 30)
    assert (learner.temperature, learner.top_p, learner.max_tokens) == (1.5, 1.0, 9)
    assert explorer.stop_token_ids == learner.stop_token_ids == (1, 3)
    assert make().sampling[Source.EXPLORER].max_tokens == 9  # 0 means the learner's limit


def test_a_replacement_is_a_lease_of_its_own_with_a_fresh_seed() -> None:
    demand = make()
    key = CompletionKey(source=Source.EXPLORER, step=2, slot=5, sample=3)
    lease = demand.replacement(key)
    assert keys([lease]) == [key]
    assert lease.items[0].seeds[0] not in {
        seed for other in demand.leases(Source.EXPLORER, 2) for item in other.items for seed in item.seeds
    }
    assert lease.items[0].prompt_uid == demand.prompts_at(2)[5].uid
    assert lease.lease_id == "explorer-2-slot5-3"


def test_evaluation_leases_sample_the_learner_after_its_step() -> None:
    settings = Evaluation(samples=6, temperature=0.6, top_p=0.9, top_k=20, k=(1,))
    demand = make(evaluation=settings)
    leases = list(demand.evaluation(3, PROMPTS[:5]))
    assert [len(lease.items) for lease in leases] == [2, 2, 1]  # 4 × 4 rows of a training lease hold 2 × 6
    assert {(lease.purpose, lease.source, lease.step, lease.version) for lease in leases} == {
        ("eval", Source.LEARNER, 3, 3)
    }
    assert {(lease.sampling.temperature, lease.sampling.top_p, lease.sampling.top_k) for lease in leases} == {
        (0.6, 0.9, 20)
    }
    found = keys(leases)
    assert len(found) == len(set(found)) == 5 * 6
    seeds = [seed for lease in leases for item in lease.items for seed in item.seeds]
    training = [seed for lease in demand.leases(Source.LEARNER, 3) for item in lease.items for seed in item.seeds]
    assert not set(seeds) & set(training)


@pytest.mark.parametrize("lease_prompts", [1, 4, 32])
@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"mixing": "rescue", "rescue_quota": 3},
        {"mixing": "authors_code"},
        {"schedule": "constant", "alpha": 0.6},
        {"schedule": "constant"},  # the learner is only evaluated
    ],
)
@pytest.mark.parametrize("samples", [1, 8, 50])
def test_no_lease_is_larger_than_memory_and_credit_are_counted_for(
    lease_prompts: int, algorithm: dict[str, object], samples: int
) -> None:
    demand = make(
        algorithm=msgspec.structs.replace(ALGORITHM, **algorithm),
        rollout=Rollout(lease_prompts=lease_prompts, max_response_tokens=9),
        evaluation=Evaluation(samples=samples, k=(1,)),
    )

    def largest(leases: list[Lease]) -> int:
        return max((len(keys([lease])) for lease in leases), default=0)

    def training(source: Source) -> list[Lease]:
        return [lease for step in range(1, 9) for lease in demand.leases(source, step)]

    assert lease_rows(demand.config) == LeaseRows(
        explorer=largest(training(Source.EXPLORER)),
        learner=largest(training(Source.LEARNER)),
        evaluation=largest(list(demand.evaluation(8, PROMPTS))),
    )


def test_lease_ids_of_a_run_are_unique() -> None:
    demand = make(evaluation=Evaluation(samples=2, k=(1,)))
    leases = [lease for step in range(1, 9) for source in Source for lease in demand.leases(source, step)]
    leases += [lease for step in (0, 4, 8) for lease in demand.evaluation(step, PROMPTS[:9])]
    leases += [
        demand.replacement(CompletionKey(source=source, step=step, slot=slot, sample=9))
        for source in Source
        for step in (1, 2)
        for slot in (0, 9)
    ]
    ids = [lease.lease_id for lease in leases]
    assert len(ids) == len(set(ids))


def test_a_driver_moves_the_quota_and_later_steps_are_bounded_until_they_are_decided() -> None:
    algorithm = msgspec.structs.replace(ALGORITHM, driver="ess")
    demand = make(algorithm=algorithm, explorer=Explorer(ahead_steps=1))
    assert demand.explorer_steps == list(range(1, 8))  # held to the end, α would be 0 at step 8
    with pytest.raises(ValueError, match="not 2"):
        demand.quota(2)
    demand.pace.observe(1, {"explorer/ess": 0.9})
    demand.pace.observe(2, {"explorer/ess": 0.1})
    assert [tuple(demand.quota(step)) for step in (1, 2, 3)] == [(4, 0), (4, 0), (2, 2)]
    assert len(keys(list(demand.leases(Source.EXPLORER, 3)))) == 2 * 10
    demand.pace.observe(3, {"explorer/ess": 0.1})
    assert demand.explorer_steps == [1, 2, 3]
    assert demand.last_explorer_step == 3


def test_by_the_clock_the_last_explorer_step_is_the_schedules() -> None:
    demand = make()
    assert demand.explorer_steps == [1, 2, 3]
    assert make(algorithm=msgspec.structs.replace(ALGORITHM, anneal_steps=0)).last_explorer_step == 0
