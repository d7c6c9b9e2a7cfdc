"""``make compare``: thousands of generated cases compare every backend with the definition; prints a table.

python tests/compare/run.py --cases 6000 --only numba/sm3
"""

import argparse
import importlib.util
import multiprocessing
import os
import queue
import sys
import time
import traceback
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

# Triton's interpreter takes ten times as long for a case.
SHARE = {"numba": 5 / 6, "triton": 1 / 6}
WEIGHT = {"cs_adam": 2.0}
_SAID = None


def shares(cases, names, backends):
    """(backend, optimizer) -> number of cases; together at least ``cases``."""
    out = {}
    whole = sum(SHARE[backend] for backend in backends)
    weights = {name: WEIGHT.get(name, 1.0) for name in names}
    for backend in backends:
        for name in names:
            out[backend, name] = -int(-cases * SHARE[backend] / whole * weights[name] // sum(weights.values()))
    return out


def seed_of(name, backend, seed=15):
    """The seed of an optimizer's cases for a backend."""
    return zlib.crc32(f"{seed}/{backend}/{name}".encode())


def generated(name, backend, cases, seed, counts, quick=False, each=None, shrink=True):
    """Compare ``cases`` cases; raises with the smallest one that differs (with the first one, unless ``shrink``)."""
    import comparison
    import hypothesis
    import strategies

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, *[hypothesis.Phase.shrink] * shrink],
        report_multiple_bugs=False,
    )
    @hypothesis.given(strategies.cases(name, backend, quick))
    def compare(case):
        try:
            comparison.run(case, backend, counts)
        finally:
            if each is not None:
                each()

    compare()


def _begin(said):
    global _SAID
    _SAID = said


def _work(backend, name, cases, seed):
    import numpy

    numpy.seterr(all="ignore")  # the interpreter computes with NaN and infinities as a GPU does
    import torch

    torch.set_num_threads(1)
    counts, begin = Counter(), time.monotonic()
    try:
        generated(name, backend, cases, seed, counts, each=lambda: _SAID.put((backend, name)))
        found = None
    except BaseException as error:  # the notes contain the smallest case
        found = "\n".join([str(error), *getattr(error, "__notes__", ())])
        if not isinstance(error, AssertionError):
            found = f"{traceback.format_exc()}\n{found}"  # an error, not a difference
    return backend, name, counts, found, time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=int(os.environ.get("COMPARE_CASES") or 6000))
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", default="", help="a part of BACKEND/OPTIMIZER")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from sketch_plugins import registry

    console = Console(width=None if sys.stdout.isatty() else 120)
    backends = [backend for backend in SHARE if importlib.util.find_spec(backend)]
    jobs = {key: n for key, n in shares(args.cases, registry.names(), backends).items() if args.only in "/".join(key)}
    if not jobs:
        sys.exit(f"nothing to compare: --only {args.only!r}, backends {', '.join(backends) or 'none'}")
    context = multiprocessing.get_context("spawn")
    results = []
    with context.Manager() as manager:
        said = manager.Queue()
        columns = TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with (
            ProcessPoolExecutor(args.processes, context, _begin, (said,)) as pool,
            Progress(*columns, console=console) as progress,
        ):
            bars = {key: progress.add_task("/".join(key), total=n, start=False) for key, n in jobs.items()}
            # The longest cases first.
            order = sorted(jobs, key=lambda key: -jobs[key] / SHARE[key[0]] ** 1.2)
            waiting = [pool.submit(_work, *key, jobs[key], seed_of(key[1], key[0], args.seed)) for key in order]
            while waiting or not said.empty():
                try:
                    key = said.get(timeout=0.5)
                    progress.start_task(bars[key])
                    progress.advance(bars[key])
                except queue.Empty:
                    pass
                for one in [one for one in waiting if one.done()]:
                    waiting.remove(one)
                    results.append(one.result())
                    backend, name, counts, found, seconds = results[-1]
                    ended = "a case DIFFERS" if found else "no difference"
                    console.print(f"{backend}/{name}: {counts['cases']} cases in {seconds:.0f} s, {ended}")
    table = Table("backend", "optimizer", "cases", "steps", "by kernels", "eagerly", "refused", "seconds", "result")
    for backend, name, counts, found, seconds in sorted(results):
        table.add_row(
            backend, name, *(str(counts[key]) for key in ("cases", "steps", "kernel", "eager", "refused")),
            f"{seconds:.0f}", "DIFFERS" if found else "same",
        )  # fmt: skip
    table.add_section()
    total = sum((counts for _, _, counts, _, _ in results), Counter())
    table.add_row("all", "", *(str(total[key]) for key in ("cases", "steps", "kernel", "eager", "refused")))
    console.print(table)
    failed = [(backend, name, found) for backend, name, _, found, _ in results if found]
    for backend, name, found in failed:
        console.rule(f"{backend}/{name}")
        console.print(found, markup=False, highlight=False)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
