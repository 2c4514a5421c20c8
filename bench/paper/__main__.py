"""Every experiment of the paper by one command: runs, plots, and a page that says what reproduces and what does not.

    python -m bench.paper                          the tiny scale, one seed, about 25 minutes on two cores
    python -m bench.paper --seeds 8 --only fig5    more seeds (the main arms), one experiment
    python -m bench.paper --page                   the page again, from the runs that are on record
    python -m bench.paper --scale paper --models DIR --data DIR --gpus 8 [--dry-run]

Every run is a real one, in a process of its own. What was done is kept in --work and not done again.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import RESULTS
from bench.paper.experiments import ARMS, EXPERIMENTS, Experiment, find
from bench.paper.measures import measure_models, measure_other, parameters_of
from bench.paper.page import verdict_lines, write_page
from bench.paper.results import Row, summarise
from bench.paper.runs import Finished, Job, RunFailed, Runner
from bench.paper.scale import Scale, paper, tiny

ROWS = "runs.jsonl"


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 a run failed, 2 bad input."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _end)  # so that the runs in work end as well
    try:
        experiments = find(options.only)
        if options.seeds < 1 or options.other_seeds < 0 or options.jobs < 1:
            raise ValueError("--seeds and --jobs must be at least 1, --other-seeds at least 0")
        if options.page:
            print(write_page(options.out, *_kept(options.out)))
            return 0
        scale = _scale(options)
        if options.dry_run:
            print("\n".join(commands(scale, experiments, options.seeds, _rest(options))))
            return 0
        carry_out(scale, experiments, options)
    except ValueError as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"paper: {error}", file=sys.stderr)
        return 1
    return 0


def carry_out(scale: Scale, experiments: Sequence[Experiment], options: argparse.Namespace) -> None:
    """Search, run, measure, and write the page."""
    needed = {ARMS[name].tuned for experiment in experiments for name in experiment.arms}
    earlier, facts = _kept(options.out) if options.recorded else ([], {})
    have = {(row["arm"], row["seed"]) for row in earlier}
    with Runner(options.work, jobs=options.jobs, launcher=scale.launcher) as runner:
        if options.recorded:
            tuned, search = facts["tuned"], facts["search"]
        else:
            tuned, search = choose(scale, runner, needed, options.search_seeds)
        jobs = plan(scale, experiments, tuned, options.seeds, _rest(options))
        jobs = [job for job in jobs if (job.arm, job.seed) not in have]
        done = runner.known(jobs) if options.collect else runner.run(jobs)
    sizes = {arm.setting: parameters_of(scale, arm) for arm in ARMS.values()}
    self_sizes = {role: sizes["main"]["learner"] for role in ("learner", "explorer")}

    def row(run: Finished) -> Row:
        arm = ARMS[run.job.arm]
        other = measure_other(scale, run) if arm.name in TABLE2 else None
        return summarise(run, self_sizes if arm.name.startswith("self") else sizes[arm.setting], other)

    rows = [row(run) for run in done]
    models = facts.get("models", {})
    if scale.name == "tiny" and not options.recorded:
        models = measure_models(scale, options.work)
    facts = {"scale": scale.name, "steps": scale.steps, "tuned": tuned, "search": search, "models": models}
    _keep(options.out, rows, facts)
    kept = _kept(options.out)
    print("\n".join(verdict_lines(*kept)))
    print(write_page(options.out, *kept))


TABLE2 = tuple(dict.fromkeys(name for one in EXPERIMENTS if one.key == "table2" for name in one.arms))


def choose(
    scale: Scale, runner: Runner, needed: set[str], seeds: int
) -> tuple[dict[str, str], dict[str, dict[str, list[float]]]]:
    """The learning rate of each search with the best mean pass@1 on the validation problems, and all that it saw."""
    searches = {name: rates for name, rates in scale.searches(seeds).items() if name in needed}
    runner.run([job for rates in searches.values() for jobs in rates.values() for job in jobs])
    seen = {
        name: {rate: [run.evaluations[-1]["eval/pass@1"] for run in runner.run(jobs)] for rate, jobs in rates.items()}
        for name, rates in searches.items()
    }
    tuned = {name: max(rates, key=lambda rate: sum(rates[rate])) for name, rates in seen.items()}
    return tuned, seen


def plan(scale: Scale, experiments: Sequence[Experiment], tuned: dict[str, str], seeds: int, rest: int) -> list[Job]:
    """All runs, the main arms first, then the others seed by seed: a command that is cut short has whole seeds."""
    names = dict.fromkeys(name for experiment in experiments for name in experiment.arms)
    arms = [ARMS[name] for name in names]
    main_jobs = [scale.job(arm, seed, tuned) for seed in range(seeds) for arm in arms if arm.main]
    return main_jobs + [scale.job(arm, seed, tuned) for seed in range(rest) for arm in arms if not arm.main]


def commands(scale: Scale, experiments: Sequence[Experiment], seeds: int, rest: int) -> list[str]:
    """What would be run; the learning rates of a search are known after it."""
    jobs = [job for rates in scale.searches(1).values() for group in rates.values() for job in group]
    jobs += plan(scale, experiments, {}, seeds, rest)
    return [
        shlex.join([*scale.launcher, "trainer/main.py", *job.arguments, f"run.seed={job.seed}"]) + f"  # {job.arm}"
        for job in jobs
    ]


def _rest(options: argparse.Namespace) -> int:
    return min(options.seeds, options.other_seeds)


def _scale(options: argparse.Namespace) -> Scale:
    if options.scale == "tiny":
        return tiny(options.work)
    return paper(options.override, models=options.models, data=options.data, gpus=options.gpus)


def _keep(out: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Rows of runs that are not among these stay, and so do the searches: --only adds to the page."""
    out.mkdir(parents=True, exist_ok=True)
    earlier, before = _kept(out) if (out / ROWS).exists() else ([], {})
    kept = {(row["arm"], row["seed"]): row for row in [*earlier, *rows]}
    facts |= {name: before.get(name, {}) | facts[name] for name in ("tuned", "search")}
    (out / ROWS).write_text("".join(json.dumps(row) + "\n" for row in kept.values()))
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def _kept(out: Path) -> tuple[list[Row], dict[str, Any]]:
    if not (out / ROWS).exists():
        raise ValueError(f"{out} holds no results: run python -m bench.paper without --page first")
    rows = [json.loads(line) for line in (out / ROWS).read_text().splitlines()]
    return rows, json.loads((out / "facts.json").read_text())


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scale", choices=["tiny", "paper"], default="tiny", help="the embedded models, or the paper's (tiny)")
    add("--only", nargs="+", default=[], metavar="KEY", help=", ".join(one.key for one in EXPERIMENTS))
    add("--seeds", type=int, default=1, help="seeds of the main arms (1)")
    add("--other-seeds", type=int, default=3, help="at most so many seeds of the other arms (3)")
    add("--search-seeds", type=int, default=1, help="runs per learning rate of the search (1)")
    add("--jobs", type=int, default=2, help="runs at a time (2)")
    add("--out", type=Path, default=RESULTS / "paper", help="results, plots and page (bench/results/paper)")
    add("--work", type=Path, default=Path("runs/paper"), help="runs, models and data (runs/paper)")
    add("--collect", action="store_true", help="take the runs that are done, start none but the search's")
    add(
        "--recorded", action="store_true", help="take learning rates, models and finished runs from --out, run the rest"
    )
    add("--page", action="store_true", help="write the page from the results in --out, run nothing")
    add("--dry-run", action="store_true", help="print the commands, run nothing")
    add("--models", type=Path, default=Path("models"), help="scale paper: folder of the models")
    add("--data", type=Path, default=Path("data"), help="scale paper: folder of the data")
    add("--gpus", type=int, default=8, help="scale paper: trainer ranks (8)")
    add("--override", nargs="+", default=[], metavar="KEY=VALUE", help="scale paper: for every run")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
