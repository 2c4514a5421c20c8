"""bench.kernels at a toy size: every contender computes the loss it was asked for, or says that it cannot."""

import os
from dataclasses import replace

import pytest
import torch

from bench import kernels
from bench.contenders import contenders
from bench.kernel_problem import Objective, Problem, log_normal_lengths
from bench.rivals import ours

SIZE = (2, 8, 16, 257)


def make(packed: bool = False, objective: Objective | None = None) -> Problem:
    return Problem.make(*SIZE, dtype=torch.float32, device="cpu", packed=packed, objective=objective)


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
    """What torch.compile wraps runs as it is: the compiler takes seconds for each option."""
    with torch.compiler.set_stance("force_eager"):
        yield


def runnable() -> list[kernels.Rival]:
    return [c for c in contenders("cpu") if not c.cuda_only]


def test_every_contender_runs_or_says_why_it_does_not():
    problem, chosen = make(), contenders("cpu")
    rows, absent = kernels.compare(problem, chosen, rounds=1)
    ran = {row["case"]: row for row in rows}
    assert ran.keys() | absent.keys() == {c.name for c in chosen}
    assert {"ours torch", "torch eager", "torch.compile", "bare products"} <= ran.keys()
    assert "CUDA" in absent["CCE exact"]
    for row in rows:
        assert row["repeats"]
        if row["case"] != "bare products":
            assert row["d_weight_error"] < 1e-5
            assert row["d_hidden_error"] < 1e-5


def test_a_contender_that_fails_is_named_with_its_reason():
    problem = make()

    def explode(_):
        raise RuntimeError("V % 256 != 0")

    broken = [*contenders("cpu")[:1], kernels.Rival("broken", explode, cuda_only=False)]
    rows, absent = kernels.compare(problem, broken, rounds=1)
    assert [row["case"] for row in rows] == ["ours torch"]
    assert absent == {"broken": "failed: RuntimeError: V % 256 != 0"}


@pytest.mark.parametrize(("share", "said"), [(100.0, "0.10"), (250.0, "0.25")])
def test_the_verdict_compares_with_eager(share, said):
    eager = {"case": "torch eager", "beyond_dw_mb": 1000.0, "ratio": 1.5}
    rows = [{"case": "ours torch", "beyond_dw_mb": share, "ratio": 1.0}, eager]
    text = " ".join(kernels.verdict(rows))
    assert "1.50x" in text
    assert said in text


@pytest.mark.parametrize(("packed", "objective"), kernels.OPTIONS, ids=str)
def test_every_contender_computes_every_option_it_offers(packed, objective):
    """Errors are far below what leaving the option out would change, so that each was really applied."""
    problem = make(packed, objective)
    rows, absent = kernels.compare(problem, runnable(), rounds=1)
    assert {"ours torch", "torch eager", "torch.compile", "bare products"} <= {row["case"] for row in rows}
    assert not [reason for reason in absent.values() if reason.startswith("failed")]
    for row in rows:
        errors = [row[name] for name in kernels.ERRORS[objective.mode] if name in row]
        assert len(errors) == (0 if row["case"] == "bare products" else len(kernels.ERRORS[objective.mode]))
        assert all(error < 5e-6 for error in errors)
    if objective.options and objective.mode == "train":
        exact = kernels._exact(problem)
        truth, without = ours("torch")(exact)(), ours("torch")(replace(exact, objective=kernels.BASE))()
        assert max(kernels._relative(a, b) for a, b in zip(without, truth)) > 1e-3


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs Triton kernels on CPU tensors")
@pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
@pytest.mark.parametrize(
    "objective", [Objective(temperature=0.7, kl_coef=0.04, ratio="sequence"), Objective(0.7, mode="score")], ids=str
)
def test_triton_contenders_compute_what_they_offer(objective):
    chosen = [c for c in contenders("cuda") if c.name in ("ours triton", "Liger Triton GRPO on logits")]
    rows, absent = kernels.compare(make(True, objective), chosen, rounds=1, device="cuda")
    assert not [reason for reason in absent.values() if reason.startswith("failed")]
    assert all(row[name] < 5e-6 for row in rows for name in kernels.ERRORS[objective.mode])


@pytest.mark.parametrize(
    ("objective", "lacking"),
    [
        (Objective(entropy_coef=0.001), {"Liger fused GRPO", "Liger Triton GRPO on logits", "CCE exact"}),
        (Objective(temperature=0.7), {"CCE exact", "CCE filtered"}),
        (Objective(mode="score"), {"Liger fused GRPO", "ours triton main_grad"}),
        (Objective(ratio="sequence"), set()),
    ],
)
def test_a_contender_without_the_option_is_missing_with_that_reason(objective, lacking):
    found = {
        rival.name
        for rival in contenders("cuda")
        if "has no option" in (replace(rival, needs=()).missing("cuda", objective) or "")
    }
    assert lacking | {"QuACK plain CE"} <= found
    assert not {"ours triton", "torch eager", "verl torch", "TRL chunked"} & found


def test_the_uniform_problem_is_the_one_of_the_rows_recorded_before_there_were_options():
    problem = make()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(257, 16, generator=generator) * (3 / 4)
    assert torch.equal(problem.weight, weight)
    assert problem.uniform
    assert problem.select(problem.hidden) is problem.hidden
    assert problem.rows().mask is None


def test_packed_lengths_are_log_normal_with_the_tokens_of_as_many_equal_ones():
    lengths = torch.tensor(log_normal_lengths(64, 1024))
    assert lengths.sum() == 64 * 1024
    assert lengths.max() <= 8 * 1024 * 1.1  # the scale after the cut
    assert lengths.log().std() == pytest.approx(1, abs=0.1)


def test_prompt_rows_carry_no_label_and_padding_is_undone():
    problem = make(packed=True)
    every, labelled = problem.rows(), problem.labelled_rows()
    assert 0 < problem.labels < problem.tokens
    assert every.mask is not None
    assert torch.equal(every.targets[every.mask], labelled.targets)
    assert torch.equal(problem.select(problem.hidden), problem.hidden[every.mask])
    assert every.share.sum() == pytest.approx(1)
    assert labelled.bounds.diff().tolist() == list(problem.answers)
    padded = problem.padded(problem.hidden)
    assert padded.shape == (problem.sequences, max(problem.answers), SIZE[2])
    assert torch.equal(problem.unpadded(padded), problem.hidden * every.mask[:, None])


def test_the_command_takes_options_and_refuses_a_loss_for_scoring(capsys):
    chosen = ["--packed", "--temperature", "0.7", "--kl-coef", "0.04", "--ratio", "sequence", "--only", "torch eager"]
    assert kernels.main(["--dry", *chosen]) == 0
    assert "packed, temperature 0.7, kl_coef 0.04, sequence ratio" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        kernels.main(["--dry", "--mode", "score", "--kl-coef", "0.04"])
    with pytest.raises(SystemExit):
        kernels.main(["--dry", "--options", "--packed"])


def test_rows_are_recorded_with_the_words_of_their_options(tmp_path):
    kernels.tabulate(make(True, Objective(mode="frozen")), runnable()[:1], rounds=1, folder=tmp_path)
    assert '"options": "packed, frozen head"' in (tmp_path / "kernels.jsonl").read_text()
