"""A whole update against the same update written row by row, unpadded, with plain autograd over logits in float64."""

import math
from dataclasses import replace

import msgspec
import pytest
import torch

from core.schema import Source, pack_logprobs
from trainer.batch import pack_step
from trainer.learner import Learner
from trainer.objective import fix_scores, policy_objective
from trainer.world import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def load(config, learner_dir, explorer_dir):
    return Learner.load(config, model_dir=learner_dir, explorer_dir=explorer_dir, world=WORLD)


def near_policy(groups, model, temperature, noise=0.3):
    """The same groups with log μ close to the learner's own log-probs, so that clips and weights are both at work."""
    generator = torch.Generator().manual_seed(0)
    moved = []
    for group in groups:
        rows = []
        for row in group.rows:
            logprob, _ = plain_logprob(model, group.prompt.token_ids, row.completion.tokens.tolist(), temperature)
            shifted = logprob.detach() + noise * torch.randn(len(logprob), generator=generator)
            completion = msgspec.structs.replace(
                row.completion, logprob_bytes=pack_logprobs(shifted.clamp(max=0).numpy())
            )
            rows.append(msgspec.structs.replace(row, completion=completion))
        moved.append(msgspec.structs.replace(group, rows=tuple(rows)))
    return moved


def plain_logprob(model, prompt_ids, tokens, temperature):
    ids = torch.tensor([[*prompt_ids, *tokens]])
    logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].double() / temperature
    log_p = logits.log_softmax(-1)
    return log_p.gather(1, torch.tensor(tokens)[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def plain_update_loss(model, old_model, reference, groups, config):
    """Eq. 2, token by token, with the default correction: explorer rows π/μ, learner rows min(π_old/μ, 2) · π/π_old."""
    loss_config, temperature = config.loss, config.rollout.temperature
    rows = [(group, i) for group in groups for i in range(len(group.rows))]
    num_tokens = sum(len(group.rows[i].completion.tokens) for group, i in rows)
    total = torch.zeros((), dtype=torch.float64)
    for group, i in rows:
        completion, advantage = group.rows[i].completion, group.advantages[i]
        tokens, mu = completion.tokens.tolist(), torch.tensor(completion.logprobs).double()
        logprob, entropy = plain_logprob(model, group.prompt.token_ids, tokens, temperature)
        old = plain_logprob(old_model, group.prompt.token_ids, tokens, temperature)[0].detach()
        ref = plain_logprob(reference, group.prompt.token_ids, tokens, temperature)[0].detach()
        is_learner = completion.key.source is Source.LEARNER
        anchor = old if is_learner else mu
        weight = (old - mu).exp().clamp(max=2.0) if is_learner else torch.ones_like(mu)
        log_ratio = logprob - anchor
        if loss_config.ratio == "sequence":
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - loss_config.clip_low, 1 + loss_config.clip_high)
        if loss_config.ratio == "cispo":
            policy = -clipped.detach() * advantage * logprob
        else:
            policy = -torch.minimum(ratio * advantage, clipped * advantage)
            if advantage < 0:
                policy = torch.minimum(policy, torch.full_like(policy, -advantage * loss_config.dual_clip))
        d = ref - logprob
        k3 = d.exp() - d - 1
        has_kl = is_learner or loss_config.kl_rows == "all"
        per_token = weight * policy + loss_config.kl_coef * has_kl * k3 - loss_config.entropy_coef * entropy
        factor = {
            "token_mean": 1 / num_tokens,
            "sequence_mean": 1 / (len(rows) * len(tokens)),
            "dr_grpo": 1 / (len(rows) * config.rollout.max_response_tokens),
        }[loss_config.aggregation]
        total = total + factor * per_token.sum()
    return total


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"loss.aggregation": "sequence_mean", "loss.entropy_coef": 0.01, "rollout.temperature": 1.5},
        {"loss.aggregation": "dr_grpo", "loss.ratio": "sequence"},
        {"loss.ratio": "cispo", "loss.kl_rows": "all"},
    ],
)
def test_a_second_update_equals_plain_autograd(tiny_config, made_up_groups, learner_dir, explorer_dir, overrides):
    config = tiny_config({"learner.grad_clip": 1e9, "loss.kl_coef": 0.1, "learner.warmup_updates": 0, **overrides})
    learner, plain, start = (load(config, learner_dir, explorer_dir) for _ in range(3))
    groups = near_policy(made_up_groups(explorer=1, learner=3), start.model, config.rollout.temperature)
    batch = pack_step(groups, config)
    assert any(len(micro.sources) == 2 for mini in batch.mini_batches for micro in mini.micro_batches)
    learner.begin_step(batch)
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for mini_batch, members in zip(batch.mini_batches, (groups[:2], groups[2:])):
        found = learner.update(mini_batch)
        expected = plain_update_loss(plain.model, start.model, start.model, members, config)
        optimizer.zero_grad()
        expected.backward()
        gradient = torch.cat([p.grad.flatten() for p in plain.model.parameters()])
        assert found["loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
        assert (learner.backend.optimizer.gradient - gradient).norm() <= 1e-5 * gradient.norm()
        assert found["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
        optimizer.step()
        # The same gradient from here on: AdamW turns tiny gradients into full-sized steps.
        for ours, theirs in zip(learner.model.parameters(), plain.model.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        plain.model.load_state_dict(learner.model.state_dict())


@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_padding_never_changes_loss_or_gradient(tiny_config, made_up_groups, learner_dir, explorer_dir, kernels):
    config = tiny_config({"learner.kernels": kernels})
    learner = load(config, learner_dir, explorer_dir)
    batch = pack_step(made_up_groups(), config)
    learner.begin_step(batch)
    results = []
    for pad in (0, 17):
        learner.backend.optimizer.zero_gradient()
        losses = []
        for micro in batch.mini_batches[0].micro_batches:
            lengths = torch.tensor(
                [int(micro.state_T[end - 1]) % micro.inputs["input_ids"].shape[1] + 2 for end in micro.start_R1[1:]]
            )
            is_pad = torch.arange(micro.inputs["input_ids"].shape[1])[None] >= lengths[:, None]
            ours, scores = learner._scored[micro.index]
            ours = replace(ours, inputs={"input_ids": ours.inputs["input_ids"].masked_fill(is_pad, pad)})
            loss = policy_objective(learner.backend.forward, ours, scores, config).loss
            learner.backend.backward(loss, last=False)
            losses.append(loss.detach())
            assert is_pad.any() or len(lengths) == 1 or lengths.unique().numel() == 1
        results.append((torch.stack(losses), learner.backend.optimizer.gradient.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].norm() > 0


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_micro_batch_size_and_ranks_do_not_change_the_gradient(
    tiny_config, made_up_groups, learner_dir, explorer_dir, rows
):
    groups = made_up_groups(prompts=2, explorer=1, learner=2)
    gradients = []
    for micro_rows, world_size in ((6, 1), (rows, 1), (rows, 2), (rows, 4)):
        config = tiny_config({"learner.micro_batch_rows": micro_rows})
        learner = load(config, learner_dir, explorer_dir)
        for rank in range(world_size):  # the ranks' gradients add up in one buffer, as the all-reduce would
            batch = pack_step(groups, config, rank=rank, world_size=world_size)
            learner.begin_step(batch)
            for micro in batch.mini_batches[0].micro_batches:
                loss = policy_objective(learner.backend.forward, *learner._scored[micro.index], config).loss
                learner.backend.backward(loss, last=False)
        gradients.append(learner.backend.optimizer.gradient.clone())
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


def test_a_sampler_log_prob_of_minus_ten_thousand_stays_finite(tiny_config, made_up_groups, learner_dir, explorer_dir):
    config = tiny_config()
    learner = load(config, learner_dir, explorer_dir)
    groups = made_up_groups(prompts=2)
    row = groups[0].rows[0]
    extreme = pack_logprobs([-1e4] * len(row.completion.tokens))
    row = msgspec.structs.replace(row, completion=msgspec.structs.replace(row.completion, logprob_bytes=extreme))
    groups[0] = msgspec.structs.replace(groups[0], rows=(row, *groups[0].rows[1:]))
    batch = pack_step(groups, config)
    learner.begin_step(batch)
    found = learner.update(batch.mini_batches[0])
    assert math.isfinite(found["loss"])
    assert math.isfinite(found["grad_norm"])
    assert learner.skipped_updates == 0


@pytest.mark.parametrize("explorer_anchor", ["sampler", "learner"])
@pytest.mark.parametrize("learner_anchor", ["sampler", "learner"])
def test_each_row_takes_the_anchor_and_weight_of_its_source(tiny_config, explorer_anchor, learner_anchor, mixed_batch):
    config = tiny_config(
        {
            "correction.explorer.anchor": explorer_anchor,
            "correction.explorer.weight": "luffy",
            "correction.learner.anchor": learner_anchor,
            "correction.learner.weight": "token_tis",
            "correction.learner.cap": 1e6,
        }
    )
    batch = mixed_batch(config)
    old, ref = batch.sampler_T - 0.5, batch.sampler_T - 1
    scores = fix_scores(batch, config, old_T=old, explorer_T=None, ref_T=ref)
    from_learner = batch.source_T == 1
    for selected, anchor in ((~from_learner, explorer_anchor), (from_learner, learner_anchor)):
        expected = old if anchor == "learner" else batch.sampler_T
        assert torch.equal(scores.anchor_T[selected], expected[selected])
    torch.testing.assert_close(scores.is_weight_T[from_learner], torch.full_like(old, math.exp(-0.5))[from_learner])
    luffy = 0.1 * old.exp() / (old.exp() + 0.1) ** 2
    torch.testing.assert_close(scores.is_weight_T[~from_learner], luffy[~from_learner])
    assert scores.kl_weight_T.tolist() == from_learner.float().tolist()


def test_uncorrected_rows_have_no_weight_and_the_sampler_as_anchor(tiny_config, mixed_batch):
    config = tiny_config({"correction.learner.anchor": "sampler", "correction.learner.weight": "none"})
    batch = mixed_batch(config)
    scores = fix_scores(batch, config, old_T=None, explorer_T=None, ref_T=None)
    assert torch.equal(scores.anchor_T, batch.sampler_T)
    assert scores.is_weight_T is None
    assert scores.kl_weight_T is None


@pytest.fixture
def mixed_batch(made_up_groups):
    """One micro-batch of explorer and learner rows."""

    def pack(config):
        (mini_batch,) = pack_step(made_up_groups(prompts=1), config).mini_batches
        (batch,) = mini_batch.micro_batches
        assert batch.sources == frozenset(Source)
        return batch

    return pack
