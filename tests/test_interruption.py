"""Each script is killed in each of its phases and started again: the same command ends with the same bytes.

The scripts run in processes of their own (server.py), which SIGKILL ends with no chance to clean up: just before they
touch a chosen file, in every phase of the work, and at random times. How many kills there were is printed last."""

import dsd  # first: see its head

import contextlib
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import COUNTS, ROOT, critter, written

if not hasattr(os, "fork"):
    pytest.skip("this system cannot fork processes", allow_module_level=True)


class Server:
    """Starts processes of the scripts without their seconds of imports."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("server.py")], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def start(self, folder, script, *args, **stop):
        """Start a script in `folder`; returns its process's number."""
        self.err = folder / "stderr.txt"
        request = {"script": script, "args": list(map(str, args)), "folder": str(folder), "err": str(self.err), **stop}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["pid"]

    def wait(self):
        """Its exit code, -9 if it was killed, and what it did to files, in order."""
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["touched"]

    def run(self, folder, script, *args, **stop):
        self.start(folder, script, *args, **stop)
        return self.wait()


@pytest.fixture(scope="session")
def server():
    server = Server()
    yield server
    server.process.kill()
    server.process.wait()


# what the steps draw is of no matter here: as little work as touches every kind of file
PHASES = {  # script -> the files of each phase, in the order of the work, and how often it touches them at least
    "generate_grids": [("settings", r"settings\.json", 4), ("records", r"grids/grids\.jsonl", 4),
                       ("grids", r"00000\d\.png\.part", 9), ("overview", r"overview\.png", 4)],
    "curate": [("panels", r"images/\d+_\d\.png\.part", 40), ("transcripts", r"transcripts/00000\d", 8),
               ("metadata", r"metadata\.jsonl", 4), ("summary", r"summary\.json", 4),
               ("sheets", r"(accepted|rejected)\.png", 4)],
    "finetune": [("cache", r"cache/.*\.part", 4), ("log", r"log\.jsonl", 4),
                 ("first checkpoint", r"checkpoint/.*\.part", 4),
                 ("validation", r"validation/step_000003", 4), ("state", r"training_state\.pt", 4),
                 ("last validation", r"validation/step_000006", 4), ("adapter", r"adapter/pytorch_lora_weights", 1),
                 ("loss", r"loss\.png", 4)],
    "sample": [("details", r"details\.json", 3), ("pictures", r"000\d\.png\.part", 12),
               ("contact sheet", r"contact_sheet\.png", 4)],
    "evaluate": [("pictures", r"rows/.*000\d\.png\.part", 4), ("scores", r"rows/.*000\d\.json", 4),
                 ("table", r"table\.md", 4),
                 ("summary", r"scores\.json", 4), ("scatter", r"scatter\.png", 4), ("sheet", r"contact_sheet\.png", 4)],
    "pretrain": [("log", r"judge/log\.jsonl", 4), ("checkpoint", r"judge/checkpoint\.pt", 6),
                 ("export", r"models/judge", 4)],
}
OUT = {"generate_grids": "grids", "curate": "pairs", "finetune": "adapter", "sample": "samples",
       "evaluate": "evaluation",
       "pretrain": "models"}


@pytest.fixture(scope="session")
def whole(tmp_path_factory, server, flux, vlm, pairs):
    """Uninterrupted runs: {script: (arguments without --out, the files of its output folder, seconds)}."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    judge, critters = ROOT / "miniature" / "judge", [folder / f"critter {i}.png" for i in (0, 1)]
    for i, file in enumerate(critters):
        critter(4000, [i, 0, 0]).save(file)
    arguments = {
        "generate_grids": ["--model", flux, "--count", 5, "--steps", 1, "--batch_size", 2],
        "curate": ["--vlm", vlm, "--grids", folder / "grids", "--tolerance", 9, "--batch_size", 12],
        # two grids at a time
        "finetune": ["--model", flux, "--pairs", pairs, "--steps", 6, "--rank", 2, "--batch_size", 1, "--save_every", 2,
                     "--validate_every", 3, "--image_guidance", 1, "--text_guidance", 1],
        "sample": ["--model", flux, "--adapter", folder / "adapter", "--enhance", vlm, "--image", *critters, "--steps",
                   1,
                   "--prompt", "a critter in space", "a {name} in a cave", "--seed", 0, 1, "--batch_size", 3],
        "evaluate": ["--model", flux, "--vlm", vlm, "--judge", judge, "--rows", "prompt alone", "reference copied",
                     "--references", 1, "--prompts", 1, "--steps", 1],
        "pretrain": ["judge", "--steps", 6, "--batch_size", 4, "--save_minutes", 0]}  # its checkpoints are in runs/
    for script, args in arguments.items():
        out = folder / OUT[script]
        server.start(folder, script, *args, "--out", out)
        begun, (code, touched) = time.time(), server.wait()
        said = server.err.read_text()
        assert code == 0 or "pairs was accepted" in said, said  # a VLM of random weights accepts nothing
        half = [line for line in touched if line.startswith(f"write {out}/") and not re.search(r"\.lock$|\.part", line)]
        assert not half  # files are written aside and renamed: they are whole or absent
        found[script] = args, written(out), time.time() - begun
    return found


@pytest.mark.parametrize("script", PHASES)
def test_killed_twice_in_each_phase_the_same_command_ends_with_the_same_bytes(script, server, whole, tmp_path):
    (args, wanted, _), out, draw = whole[script], tmp_path / OUT[script], random.Random(script)
    for name, pattern, times in PHASES[script]:
        for nth in (draw.randint(1, (times + 1) // 2), 1):  # the second time just where the work is taken up again
            code, touched = server.run(tmp_path, script, *args, "--out", out, signal=signal.SIGKILL, match=pattern,
                                       nth=nth)
            assert code == -signal.SIGKILL and re.search(pattern,
                                                         touched[-1]), f"{name}: {code}\n{server.err.read_text()}"
            COUNTS["interruptions"] += 1
    assert written(out) != wanted  # there was something left to do
    server.run(tmp_path, script, *args, "--out", out)
    assert written(out) == wanted, server.err.read_text()


@pytest.mark.parametrize("script", PHASES)
def test_killed_at_random_times_the_same_command_ends_with_the_same_bytes(script, server, whole, tmp_path):
    """A kill may come while a file is being written, or after the end: then nothing may change any more."""
    (args, wanted, seconds), out, draw = whole[script], tmp_path / OUT[script], random.Random(script)
    for _ in range(3):
        process = server.start(tmp_path, script, *args, "--out", out)
        time.sleep(draw.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        COUNTS["interruptions"] += server.wait()[0] == -signal.SIGKILL
    server.run(tmp_path, script, *args, "--out", out)
    assert written(out) == wanted, server.err.read_text()


@pytest.mark.parametrize("script", PHASES)
def test_a_second_process_on_the_same_folder_is_refused_and_the_first_goes_on(script, server, whole, tmp_path, call,
                                                                                         monkeypatch):
    monkeypatch.chdir(tmp_path)
    (args, wanted, _), out = whole[script], tmp_path / OUT[script]
    process = server.start(tmp_path, script, *args, "--out", out, signal=signal.SIGSTOP, match=PHASES[script][1][1],
                           nth=1)
    try:
        while psutil.Process(process).status() != psutil.STATUS_STOPPED:
            time.sleep(.01)
        code, _, err = call(importlib.import_module(script), *args, "--out", out)
        assert code == 2 and "is in use by another process" in err
    finally:
        os.kill(process, signal.SIGCONT)
    server.wait()
    assert written(out) == wanted, server.err.read_text()
