"""Run by shell.py: imports modules once, and then runs commands of Python in forks of this process.

    python forks.py MODULE,MODULE,...

Each line of the input is a command as JSON: its words, its folder, variables of its environment, the file for its
output, and its time limit in seconds. Each line of the output is a command's exit status. The frameworks take seconds
to import, and a fork has them already. This process trains nothing itself, so a fork's threads work. It needs a machine
without a GPU, because a fork could not use one.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys


def become(words, folder, env, output, limit):
    """Turn this fork into the process of a command: session, folder, environment, input and output."""
    os.setsid()
    signal.alarm(limit)  # it ends a process that hangs
    os.chdir(folder)
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.stdin = open(0)
    if words[0] == "sketch-plugins":
        sys.argv = words
        sys.path[0] = os.path.dirname(sys.executable)  # as for a console script
        from sketch_plugins.cli import main

        sys.exit(main())
    sys.argv = words[1:]
    sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit(0)


def main():
    for name in sys.argv[1].split(","):
        with contextlib.suppress(ImportError):  # a framework that is not installed
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        command = json.loads(line)
        process = os.fork()
        if not process:
            become(**command)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with contextlib.suppress(ProcessLookupError):  # what the command has started and left
            os.killpg(process, signal.SIGKILL)
        print(status, flush=True)
    os._exit(0)  # the modules have nothing to finish, and some complain


if __name__ == "__main__":
    main()
