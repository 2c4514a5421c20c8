"""Score functions and the statistics that bench.theory takes of them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.theory import answer, main
from bench.theory_scores import Gram, add_noise, alignment, correlation, gram, greedy_match, growth, lags, load
from core.schema import Prompt
from trainer.pretrain import Recipe, Shape, build_model, build_tokenizer, make_family

SMALL = Shape(layers=1, hidden=32, heads=1, intermediate=32, init_std=0.3)
PROMPT = Prompt(uid="u", token_ids=(4, 5, 6, 7, 8, 9, 58), text="", answer="7")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory")
    torch.manual_seed(0)
    build_model(SMALL, Recipe()).save_pretrained(folder)
    build_tokenizer(64).save_pretrained(folder)
    return load(folder)


def test_scores_are_the_gradients_of_the_tokens(model):
    row = [9, 10, 11]
    found = gram(model, PROMPT, [row, row], 3, ".")
    ids = torch.tensor([[*PROMPT.token_ids, *row]])
    expected = []
    for place, token in enumerate(row):
        logprob = F.log_softmax(model(ids).logits[0, len(PROMPT.token_ids) - 1 + place], -1)[token]
        grads = torch.autograd.grad(logprob, list(model.parameters()))
        expected.append(torch.cat([grad.flatten() for grad in grads]))
    scores = torch.stack(expected)
    np.testing.assert_allclose(found.inner, (scores @ scores.T).numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.means, found.inner, rtol=1e-4, atol=1e-4)  # equal rollouts have no variance


def test_scores_of_chosen_tensors_only(model):
    every, head = (gram(model, PROMPT, [[9, 10], [9, 11]], 2, pattern) for pattern in (".", r"norm\.weight"))
    assert 0 < head.inner[0, 0] < every.inner[0, 0]
    with pytest.raises(ValueError, match="matches no parameter"):
        gram(model, PROMPT, [[9, 10]] * 2, 2, "nothing")
    assert gram(model, PROMPT, [[9, 10], [9]], 2, ".") is None


def test_prefix_match_is_the_chance_of_the_greedy_trace(model):
    match = greedy_match(model, model, [PROMPT], 4, 1.0)
    logits = model(torch.tensor([PROMPT.token_ids])).logits[0, -1].detach()
    assert match[0] == pytest.approx(float(F.softmax(logits, -1).max()), rel=1e-5)
    assert all(np.diff(match) <= 0)
    assert (greedy_match(model, model, [PROMPT], 4, 3.0) < match).all()
    stop = int(logits.argmax())
    np.testing.assert_allclose(greedy_match(model, model, [PROMPT], 4, 1.0, (stop,)), match[0], rtol=1e-6)


def test_random_walk_and_coherent_sums_are_told_apart():
    walk = [Gram(np.eye(16), np.zeros((16, 16)), 8)] * 3
    coherent = [Gram(np.ones((16, 16)), np.zeros((16, 16)), 8)] * 3
    assert growth(walk).exponent == pytest.approx(1.0)
    assert growth(coherent).exponent == pytest.approx(2.0)
    assert growth(walk).low <= 1.0 <= growth(walk).high + 1e-9


def test_correlation_is_of_what_varies():
    generator = np.random.default_rng(0)
    common = generator.normal(size=(500, 1, 40))
    scores = 0.6 * common + 0.8 * generator.normal(size=(500, 6, 40)) + 5.0  # the 5 is a mean, not a covariance
    inner = np.einsum("ntp,nsp->ts", scores, scores) / 500
    found = correlation([Gram(inner, scores.mean(0) @ scores.mean(0).T, 500)])
    assert found[0] == pytest.approx(1.0)
    assert lags(found) == (pytest.approx(0.36, abs=0.02), pytest.approx(0.36, abs=0.02))
    still = [Gram(np.diag([1.0, 1e-9]), np.zeros((2, 2)), 8), Gram(np.full((2, 2), 0.5), np.zeros((2, 2)), 8)]
    assert correlation(still)[1] < 1.01  # a token without variance does not blow it up
    assert min(alignment([Gram(inner, inner, 500)])) > 0.9  # the cross terms see the mean


def test_noise_is_relative_and_repeatable(model, tmp_path):
    model.save_pretrained(tmp_path)
    one, other = load(tmp_path), load(tmp_path)
    add_noise(one, 0.1, 3)
    add_noise(other, 0.1, 3)
    before = dict(model.named_parameters())
    for (name, first), second in zip(one.named_parameters(), other.parameters()):
        assert torch.equal(first, second)
        shift = (first - before[name]).detach().square().mean().sqrt() / before[name].detach().square().mean().sqrt()
        assert float(shift) == pytest.approx(0.1, rel=0.5)


def test_the_command_measures_plots_and_answers(tmp_path, capsys):
    recipe = Recipe(learner=SMALL, explorer=SMALL, learner_steps=2, explorer_steps=2, threads=1)
    make_family(tmp_path / "family", 0, recipe, lambda text, fraction: None)
    places = [str(tmp_path / "family" / role) for role in ("learner", "explorer")]
    settings = ["--prompts-used", "3", "--samples", "3", "--tokens", "4", "--out", str(tmp_path / "out")]
    assert main([*places, *settings]) == 0
    assert "adds up coherently" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "theory.json").read_text())
    assert set(found["sources"]) == {
        "learner, T = 1", "learner, T = 1.5", "learner, T = 2", "explorer", "learner + weight noise"
    }  # fmt: skip
    assert len(found["sources"]["explorer"]["values"]) == 4
    assert (tmp_path / "out" / "theory.png").stat().st_size > 10_000
    assert main([*places, *settings, "--samples", "1"]) == 2


def test_the_answer_follows_the_exponents():
    def source(exponent):
        return {"match_last": 0.1, "far": 0.0, "exponent": exponent, "low": exponent - 0.1, "high": exponent + 0.1}

    def verdict(explorer, hot):
        sources = {"learner, T = 1": source(1.0), "learner, T = 2": source(hot), "explorer": source(explorer)}
        return answer({"sources": sources | {"learner + weight noise": source(1.0)}, "tokens": 4})[-1]

    assert "does not hold" in verdict(1.4, 1.8)
    assert " holds for" in verdict(1.9, 1.1)
