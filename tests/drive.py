"""Runs several scripts in one process, for tests that want a fresh process (or several) but not seconds of imports for
each script. Takes one JSON argument: {"commands": [[script, argument, ...], ...], "counts": file}. In this file it
counts how many batches this process did, {script: number}."""

import collections
import importlib
import json
import sys
from pathlib import Path

from accelerate import PartialState
from conftest import dsd  # which lets Python find the scripts

BATCHES = {
    "generate_grids": "draw_grids",
    "curate": "curate_batch",
    "finetune": "draw_batch",
    "sample": "draw_pictures",
}
task, counts = json.loads(sys.argv[1]), collections.Counter()
for script, *args in task["commands"]:
    module = importlib.import_module(script)
    if script in BATCHES:

        def counted(*args, script=script, real=getattr(module, BATCHES[script])):
            counts[script] += 1
            return real(*args)

        setattr(module, BATCHES[script], counted)
    if PartialState._shared_state:  # the main process of the step before writes last
        PartialState().wait_for_everyone()
    sys.argv = [script, *map(str, args)]
    try:
        dsd.run_main(module.main)
    except SystemExit as stop:  # --help ends so
        assert stop.code == 0
Path(f"{task['counts']}_{PartialState().process_index}.json").write_text(json.dumps(counts))
