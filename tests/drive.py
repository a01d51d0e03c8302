"""Runs several scripts in one process, which saves seconds of imports for each of them.

    python tests/drive.py commands.json

The file holds a list of command lines, each a list that begins with a script's name. How many
batches of each kind this process did is written to batches_RANK.json: {name: number}."""

import collections
import importlib
import json
import sys
from pathlib import Path

from accelerate import PartialState
from conftest import dsd  # which lets Python find the scripts

COUNTS, BATCHES = collections.Counter(), dsd.batches


def counted_batches(items, size, name):
    for batch in BATCHES(items, size, name):
        COUNTS[name] += 1
        yield batch


dsd.batches = counted_batches
for script, *args in json.loads(Path(sys.argv[1]).read_text()):
    if PartialState._shared_state:  # the main process of the step before writes last
        PartialState().wait_for_everyone()
    sys.argv = [script, *args]
    try:
        dsd.run_main(importlib.import_module(script).main)
    except SystemExit as stop:  # --help ends so
        assert stop.code == 0
Path(f"batches_{PartialState().process_index}.json").write_text(json.dumps(COUNTS))
