import re

import pytest

from core.configfile import ConfigError, parse_command
from core.confighints import ALIASES, key_hint
from core.configkeys import all_keys


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("algorithm.learning_rate", "learner.learning_rate"),  # the same key of another table
        ("algorithm.kl_coef", "loss.kl_coef"),
        ("temperature", "explorer.temperature or rollout.temperature or evaluation.temperature"),
        ("correction.explorr.weight", "correction.explorer.weight"),
        ("learner.lr", "learner.learning_rate"),  # other trainers' names
        ("rollout.n", "algorithm.group_size"),
        ("num_generations", "algorithm.group_size"),
        ("data.train_batch_size", "algorithm.prompts_per_step"),
        ("learner.batch_size", "algorithm.prompts_per_step or algorithm.mini_batch_prompts"),
        ("actor_rollout_ref.actor.optim.lr", "learner.learning_rate"),
        ("loss.clip_ratio", "loss.clip_low or loss.clip_high"),
        ("data.path", "data.train"),
        ("actor_rollout_ref.model.path", "learner.model"),
        ("algorithm.stpes", "algorithm.steps"),  # near spellings
        ("algoritm.stpes", "algorithm.steps"),
        ("algoritm", "[algorithm]"),
        ("correction.explorr", "[correction.explorer]"),
    ],
)
def test_a_key_that_is_not_there_leads_to_the_one_that_is_meant(name, meant):
    assert key_hint(name, all_keys()) == f"; did you mean {meant}?"


@pytest.mark.parametrize(
    "name", ["foo", "algorithm.banana", "correction.explorer.x", "learner.path", "rollout.speed", "loss.magic", "a.b.c"]
)
def test_nothing_is_suggested_for_nonsense(name):
    assert key_hint(name, all_keys()) == ""


def test_every_alias_is_no_key_and_leads_to_keys():
    keys = all_keys()
    leaves = {key.rpartition(".")[2] for key in keys}
    assert len(ALIASES) >= 20
    for word, meant in ALIASES.items():
        assert set(meant) <= keys.keys(), word
        assert word not in leaves | keys.keys(), word


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algorithm.steps", "=", "3"], "algorithm.steps has no value: write algorithm.steps=VALUE, without blanks"),
        (["loss.kl_coef"], "loss.kl_coef has no value"),
        (["configs/tinny.toml"], "did you mean configs/tiny.toml?"),
        (["configs/zebra.toml"], "no configuration file configs/zebra.toml; expected FILE.toml"),
        (["--rabbit"], "unknown option --rabbit\nusage"),
        (["algorithm.stpes = 3"], "unknown key algorithm.stpes; did you mean algorithm.steps?"),
    ],
)
def test_words_that_cannot_be_read(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_command(words)


def test_blanks_around_an_equals_sign_are_part_of_nothing():
    config = parse_command(["algorithm.steps = 90", " run.dir  =  runs/x ", 'data.suffix = " /no_think"']).config
    assert (config.algorithm.steps, config.run.dir, config.data.suffix) == (90, "runs/x", " /no_think")
