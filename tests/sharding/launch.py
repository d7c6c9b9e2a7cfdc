"""Run a script on several processes of this machine, which talk over gloo. Imported by path: see `launch` in conftest."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def launch(script, world, *args, timeout=300, env=None):
    """Run ``script RANK WORLD STORE *args`` once for each rank; what a rank says is in the error if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        processes = []
        for rank in range(world):
            log = open(Path(folder) / f"log{rank}", "w+")
            command = [sys.executable, str(script), str(rank), str(world), str(store), *map(str, args)]
            processes.append((subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment), log))
        failed = []
        try:
            for rank, (process, _) in enumerate(processes):
                if process.wait(timeout) != 0:
                    failed.append(rank)
                    break
        finally:
            for process, _ in processes:
                if process.poll() is None and failed:
                    try:
                        process.wait(5)  # it may be about to say why
                    except subprocess.TimeoutExpired:
                        pass
                process.kill()
                process.wait()
            logs = []
            for _, log in processes:
                log.seek(0)
                logs.append(log.read())
                log.close()
        text = "\n".join(f"--- rank {rank}\n{log[-4000:]}" for rank, log in enumerate(logs))
        assert not failed, f"{Path(script).name} {' '.join(map(str, args))}: rank {failed[0]} failed\n{text}"
        return logs
