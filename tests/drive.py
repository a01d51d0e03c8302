"""Runs several scripts in one process, for tests that want a fresh process (or several) but not seconds of imports for
each script. Takes one JSON argument: {"commands": [[script, argument, ...], ...], "counts": file}.

In the file it counts how many batches this process did, {script: number}. The project's own code must not use modules
that only some systems have: here, importing one is an error, and so is os.sysconf."""

import builtins
import importlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = {"fcntl", "resource", "pwd", "grp", "termios", "msvcrt", "winreg"}


def from_this_project(depth):
    """Whether the code that called is the project's and not a library's."""
    return Path(sys._getframe(depth + 1).f_code.co_filename).is_relative_to(ROOT)


def guarded(name, *args, real=builtins.__import__, **more):
    if name in FOREIGN and from_this_project(1):
        raise ImportError(f"{name} is not there on every system")
    return real(name, *args, **more)


def guarded_sysconf(name, real=getattr(os, "sysconf", None)):
    assert not from_this_project(1), "os.sysconf is not there on every system"
    return real(name)


builtins.__import__, os.sysconf = guarded, guarded_sysconf
sys.path[:0] = [str(ROOT), str(ROOT / "miniature")]
import dsd  # noqa: E402

import curate  # noqa: E402
import finetune  # noqa: E402
import generate_grids  # noqa: E402
import sample  # noqa: E402

from accelerate import PartialState  # noqa: E402

for script in ("evaluate", "ablations", "benchmark", "computed", "measure", "pretrain"):
    importlib.import_module(script)
BATCHES = {generate_grids: "draw_grids", curate: "curate_batch", finetune: "draw_batch", sample: "draw_pictures"}


def count(module, name, counts):
    """Count the calls of a module's function."""
    def counted(*args, real=getattr(module, name)):
        counts[module.__name__] = counts.get(module.__name__, 0) + 1
        return real(*args)
    setattr(module, name, counted)


def main():
    task, counts = json.loads(sys.argv[1]), {}
    for module, name in BATCHES.items():
        count(module, name, counts)
    for script, *args in task["commands"]:
        if PartialState._shared_state:  # the main process of the step before writes last
            PartialState().wait_for_everyone()
        sys.argv = [script, *args]
        try:
            dsd.run_main(vars(sys.modules[script])["main"])
        except SystemExit as stop:  # --help ends so; and a VLM of random weights accepts nothing
            assert stop.code == 0 or script == "curate" and stop.code == 2
    Path(f"{task['counts']}_{PartialState().process_index}.json").write_text(json.dumps(counts))


main()
