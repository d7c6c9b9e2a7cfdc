"""Worker processes that compare cases in parallel. A kernel that kills a process, or its device, costs only one row.

Compilation takes most of the time, and is distributed. An illegal address makes a GPU unusable for its process, and the
next process starts with a working one.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sketch_plugins.check.cases import Case, cases
from sketch_plugins.check.comparing import FAILS, LEFT_OUT, Row, compare

#: Seconds that one case may take, which includes several compilations.
PATIENCE = 120.0
_SOURCE = Path(__file__).resolve().parents[2]


def compare_all(
    chosen: Sequence[Case],
    device: torch.device,
    jobs: int,
    done: Callable[[Row], None],
    patience: float = PATIENCE,
    until: float = math.inf,
) -> list[Row]:
    """The rows of cases, in their order.

    Args:
        chosen: some of `cases`.
        device: device to compare them on.
        jobs: number of processes beside this one; 0: compare in this process.
        done: called in one thread at a time with each row as it is finished.
        patience: seconds that one case may take in another process.
        until: deadline, a time of `time.monotonic`; cases that have not begun by then are left out.
    """
    if jobs == 0:
        out = []
        for case in chosen:
            out.append(compare(case, device) if time.monotonic() < until else _too_late(case))
            done(out[-1])
        return out
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in chosen:
        waiting.put(case)
    rows: dict[str, Row] = {}
    lock = threading.Lock()

    def drain() -> None:
        worker = _Worker(device, patience)
        try:
            while True:
                try:
                    case = waiting.get_nowait()
                except queue.Empty:
                    return
                row = worker.compare(case) if time.monotonic() < until else _too_late(case)
                with lock:
                    rows[case.name] = row
                    done(row)
        finally:
            worker.end()

    threads = [threading.Thread(target=drain) for _ in range(min(jobs, len(chosen)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [rows[case.name] for case in chosen]


def _too_late(case: Case) -> Row:
    return Row(case.name, LEFT_OUT, note="no time was left")


class _Worker:
    """A process that reads names of cases, one a line, and answers with their rows."""

    def __init__(self, device: torch.device, patience: float) -> None:
        self._device, self._patience = device, patience
        self._process: subprocess.Popen[str] | None = None

    def compare(self, case: Case) -> Row:
        """The row of a case, even if the process dies."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Timer(self._patience, process.kill)
        late.start()
        try:
            process.stdin.write(case.name + "\n")
            process.stdin.flush()
            row = Row(**{**json.loads(process.stdout.readline()), "case": case.name})
            row.kernels = tuple(row.kernels)
        except (OSError, ValueError, TypeError):
            process.kill()
            code = process.wait()
            how = "took too long and was stopped" if not late.is_alive() else f"ended with code {code}"
            row = Row(case.name, FAILS, note=f"the process that compared it {how}", lost=True)
        finally:
            late.cancel()
        if row.lost:
            self.end()
        return row

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            path = os.pathsep.join([str(_SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "sketch_plugins.check.workers", str(self._device)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        return self._process


def main(device: str) -> None:
    """Run a worker process."""
    known = {case.name: case for case in cases()}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that the output of other code is not read as an answer
    for line in sys.stdin:
        found: dict[str, Any] = compare(known[line.rstrip("\n")], torch.device(device)).to_dict()
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
