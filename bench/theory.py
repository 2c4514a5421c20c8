"""Does the paper's premise (section 3.1, Appendix E) hold for these models? Token noise against a policy's own shift.

Measured on the learner's score functions u_t, for rollouts of the learner at several temperatures, of the explorer, and
of the learner with Gaussian noise on its weights (the paper's abstract δ_θ):

    prefix match    Pr(M_t = 1), exactly, of staying on the learner's greedy trace     eq. 8 to 10
    cross-step      correlation of the score projections z_t by lag                    eq. 17 and 20
    growth          exponent of E‖Σ_{t≤l} u_t‖² in l: 1 random walk, 2 coherent        eq. 18, Appendix E.2

    python -m bench.theory                                      the embedded pair, a minute or two
    python -m bench.theory LEARNER EXPLORER --prompts FILE.parquet --tensors 'layers.35'
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.measure import RESULTS, environment, table
from bench.paper.charts import COLOURS, STYLE
from bench.theory_scores import (
    add_noise,
    alignment,
    correlation,
    gram,
    greedy_match,
    growth,
    lags,
    load,
    rollouts,
)
from core.config import Config, Data, Run
from core.schema import Prompt, Sampling
from rollout.prompting import load_prompts, stop_tokens
from rollout.worker import load_engine
from trainer.evaluate import model_directory
from trainer.models import load_tokenizer, require_same_tokenizer, save_model

EXPLORER, NOISE, BASE = "explorer", "learner + weight noise", "learner, T = 1"


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        if min(options.prompts_used, options.samples, options.tokens) < 2:
            raise ValueError("--prompts-used, --samples and --tokens must be at least 2")
        found = probe(options)
    except (ValueError, OSError) as error:
        print(f"theory: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    plot(options.out / "theory.png", found)
    kept = {**found, "answer": answer(found), **environment()}
    (options.out / "theory.json").write_text(json.dumps(kept, indent=1) + "\n")
    rows = [{"source": name, **values} for name, values in found["sources"].items()]
    print(table(rows, ["source", "match_4", "match_last", "near", "far", "exponent", "low", "high", "used"]))
    print("\n".join(answer(found)))
    return 0


def probe(options: argparse.Namespace) -> dict[str, Any]:
    """All three measurements of every source."""
    learner_dir = model_directory(options.learner, options.seed)
    explorer_dir = model_directory(options.explorer, options.seed)
    require_same_tokenizer(learner_dir, explorer_dir)
    tokenizer = load_tokenizer(learner_dir, key="LEARNER")
    data = Config(data=Data(train=options.prompts), run=Run(seed=options.seed))
    prompts = load_prompts(data, "train", tokenizer)[0][: options.prompts_used]
    learner, explorer, noisy = load(learner_dir), load(explorer_dir), load(learner_dir)
    add_noise(noisy, options.noise, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        save_model(noisy, tokenizer, Path(folder))
        places = {f"learner, T = {t:g}": (learner_dir, learner, t) for t in options.temperatures}
        places |= {EXPLORER: (explorer_dir, explorer, 1.0), NOISE: (Path(folder), noisy, 1.0)}
        stops = stop_tokens(learner_dir, tokenizer)
        sources = {
            name: _source(learner, sampler, place, prompts, temperature, stops, options)
            for name, (place, sampler, temperature) in places.items()
        }
    return {"sources": sources, "tokens": options.tokens, "prompts": len(prompts), "samples": options.samples}


def _source(
    learner: Any,
    sampler: Any,
    place: Path,
    prompts: Sequence[Prompt],
    temperature: float,
    stops: tuple[int, ...],
    options: argparse.Namespace,
) -> dict[str, Any]:
    sampling = Sampling(temperature=temperature, max_tokens=options.max_tokens, stop_token_ids=stops)
    engine = load_engine("torch", place, device="cpu", dtype="float32")
    drawn = rollouts(engine, prompts, sampling, options.samples)
    engine.close()
    match = greedy_match(sampler, learner, prompts, options.tokens, temperature, stops)
    made = [gram(learner, prompt, rows, options.tokens, options.tensors) for prompt, rows in zip(prompts, drawn)]
    grams = [one for one in made if one is not None]
    if len(grams) < 2:
        raise ValueError(f"fewer than two prompts have two rollouts of {options.tokens} tokens: lower --tokens")
    by_lag, grown = correlation(grams), growth(grams)
    near, far = lags(by_lag)
    return {
        "match": match.tolist(),
        "match_4": float(match[min(3, len(match) - 1)]),
        "match_last": float(match[-1]),
        "correlation": by_lag,
        "alignment": alignment(grams),
        "near": near,
        "far": far,
        **grown._asdict(),
        "used": sum(one.rollouts for one in grams) / sum(len(rows) for rows in drawn),
    }


def answer(found: Mapping[str, Any]) -> list[str]:
    """The three premises in plain words; the last line is the verdict.

    The growth premise holds where the explorer's exponent surely exceeds that of every temperature above 1.
    """
    sources = found["sources"]
    hot = {name: one for name, one in sources.items() if name.startswith("learner, T") and name != BASE}
    base, other = sources[BASE], sources[EXPLORER]
    sooner = all(one["match_last"] < base["match_last"] for one in hot.values())
    holds = all(other["low"] > one["high"] for one in hot.values())
    return [
        f"Prefix match after {found['tokens']} tokens: {_listed(sources, _share)}. Temperature "
        f"{'leaves' if sooner else 'does not leave'} the greedy trace sooner"
        f"{'; so does the explorer' if other['match_last'] < base['match_last'] else ''}.",
        f"Correlation of z_t and z_s at large lags: {_listed(sources, lambda one: format(one['far'], '+.3f'))}.",
        f"Exponent of growth: {_listed(sources, _exponent)}.",
        "That a policy's shift adds up coherently where temperature walks at random "
        f"{'holds' if holds else 'does not hold'} for these models.",
    ]


def _listed(sources: Mapping[str, Any], text: Callable[[Mapping[str, Any]], str]) -> str:
    return ", ".join(f"{text(one)} ({name})" for name, one in sources.items())


def plot(file: Path, found: Mapping[str, Any]) -> None:
    """The three measurements side by side."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.5), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for number, (name, values) in enumerate(found["sources"].items()):
            look = {"color": COLOURS[number], "label": name, "linewidth": 1.6}
            places = range(1, len(values["match"]) + 1)
            left.plot(places, values["match"], **look)
            middle.plot(range(1, len(values["correlation"])), values["correlation"][1:], **look)
            right.plot(places, values["values"], **{**look, "label": f"{name}: {values['exponent']:.2f}"})
        left.set_yscale("log")
        left.set(xlabel="t", title="Pr(M_t = 1), on the greedy trace")
        middle.axhline(0, color="#1d2126", linewidth=0.8)
        middle.set(xlabel="lag s − t", title="correlation of z_t and z_s")
        right.set_xscale("log")
        right.set_yscale("log")
        right.set(xlabel="l", title="E‖Σ u_t‖² over t ≤ l, with exponent")
        for axes in (left, right):
            axes.legend(fontsize=7)
        figure.savefig(file, format="png", metadata={"Software": None})


def _share(one: Mapping[str, Any]) -> str:
    return f"{100 * one['match_last']:.1f} %"


def _exponent(one: Mapping[str, Any]) -> str:
    return f"{one['exponent']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.theory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("learner", nargs="?", default="embedded:learner", help="Hugging Face directory (embedded:learner)")
    add("explorer", nargs="?", default="embedded:explorer", help="of the same family (embedded:explorer)")
    add("--prompts", default="embedded:countdown", help="parquet file as data.train takes it (embedded:countdown)")
    add("--prompts-used", type=int, default=24, help="the first ones (24)")
    add("--samples", type=int, default=12, help="rollouts per prompt and source (12)")
    add("--tokens", type=int, default=18, help="L: rollouts of fewer tokens are left out, longer ones cut (18)")
    add("--max-tokens", type=int, default=24, help="longest rollout (24)")
    add("--temperatures", type=float, nargs="+", default=[1.0, 1.5, 2.0], help="of the learner; 1 is the base")
    add("--noise", type=float, default=0.1, help="weight noise, of each tensor's root mean square (0.1)")
    add("--tensors", default=".", help="pattern of the parameters that scores are taken of (all)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS / "paper", help="theory.json and theory.png (bench/results/paper)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
