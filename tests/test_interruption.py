"""Each script is killed in each of its phases and started again: the same command ends with the same bytes.

The scripts run in processes of their own (server.py), which SIGKILL ends with no chance to clean up: just before they touch
a chosen file, in every phase of the work, and at random times. How many kills there were is printed after the tests."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import COUNTS, critter

import dsd


class Server:
    """Starts processes of the scripts without their seconds of imports."""

    def __init__(self):
        file = Path(__file__).with_name("server.py")
        self.process = subprocess.Popen([sys.executable, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True)

    def start(self, folder, script, *args, **stop):
        """Start a script in `folder`; returns its process's number."""
        self.err = folder / "stderr.txt"
        request = {"script": script, "args": list(map(str, args)), "folder": str(folder), "err": str(self.err), **stop}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["pid"]

    def wait(self):
        """Its exit code, -9 if it was killed, and the files it touched, in order."""
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["touched"]

    def run(self, folder, script, *args, **stop):
        self.start(folder, script, *args, **stop)
        return self.wait()


@pytest.fixture(scope="session")
def servers():
    both = Server(), Server()
    yield both
    for server in both:
        server.process.stdin.close()
        server.process.wait()


@pytest.fixture
def server(servers):
    return servers[0]


def files(folder):
    """Everything in an output folder but the locks and the measured times: {name: bytes}."""
    timed = {"adapter": ["summary.json"], "evaluation": ["seconds.jsonl", "table.md"]}.get(folder.name, [])
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (".lock", *timed)}


# ---- the scripts, their phases ---------------------------------------------------------------------------------------
# what the steps draw is of no matter here: as little work as touches every kind of file
GRIDS = ["--count", 5, "--steps", 1, "--batch_size", 2]
PAIRS = ["--tolerance", 9, "--batch_size", 12]  # two grids at a time; what the VLM says hardly matters
ADAPTER = ["--steps", 6, "--rank", 2, "--batch_size", 1, "--save_every", 2, "--validate_every", 3, "--ema", .9]
SAMPLES = ["--steps", 1, "--prompt", "a critter in space", "a {name} in a cave", "--seed", 0, 1, "--batch_size", 3]
SCORES = ["--rows", "prompt", "copied", "--references", 1, "--prompts", 1, "--steps", 1]
JUDGE = ["judge", "--steps", 6, "--batch_size", 4, "--save_minutes", 0]
PHASES = {  # script -> the files of each phase, in the order of the work, and how often it touches them at least
    "generate_grids": [("settings", r"settings\.json\.part", 2), ("grids", r"00000\d\.png\.part", 9),
                       ("records", r"open .*grids/grids\.jsonl", 3), ("overview", r"overview\.png", 4)],
    "curate": [("panels", r"images/\d+_\d\.png\.part", 40), ("transcripts", r"open .*transcripts\.jsonl", 4),
               ("metadata", r"metadata\.jsonl\.part", 3), ("summary", r"summary\.json\.part", 3),
               ("sheets", r"(accepted|rejected)\.png", 4)],
    "finetune": [("cache", r"cache/.*\.part", 2), ("log", r"open .*log\.jsonl", 12), ("validation", r"validation/step_000003", 4),
                 ("checkpoint", r"checkpoint\.safetensors\.part", 4), ("loss", r"loss\.png", 4),
                 ("last validation", r"validation/step_000006", 4), ("adapter", r"pytorch_lora_weights\.safetensors\.part", 2)],
    "sample": [("details", r"open .*details\.jsonl", 3), ("pictures", r"000\d\.png\.part", 12),
               ("contact sheet", r"contact_sheet\.png", 4)],
    "evaluate": [("pictures", r"rows/.*000\d\.png\.part", 4), ("scores", r"open .*scores\.jsonl", 4),
                 ("summary", r"scores\.json\.part", 4), ("scatter", r"scatter\.png", 4), ("sheet", r"contact_sheet\.png", 4)],
    "pretrain": [("checkpoint", r"judge/checkpoint\.safetensors\.part", 8), ("log", r"open .*log\.jsonl", 4),
                 ("export", r"models/judge", 4)],
}
OUT = {"generate_grids": "grids", "curate": "pairs", "finetune": "adapter", "sample": "samples", "evaluate": "evaluation",
       "pretrain": "models"}


@pytest.fixture(scope="session")
def commands(tmp_path_factory, servers, flux, vlm):
    """Uninterrupted runs of all scripts: {script: (arguments without --out, the files of its output folder)}."""
    folder, server, found = tmp_path_factory.mktemp("whole"), servers[0], {}
    for i in (0, 1):
        critter(4000, [i, 0, 0]).save(folder / f"critter {i}.png")
    dsd.append_records(folder / "metadata.jsonl", [{  # two pairs: fewer validation pictures
        "reference_file_name": f"critter {i}.png", "target_file_name": f"critter {1 - i}.png",
        "prompt": f"a critter {place}"} for i, place in enumerate(("in space", "in a cave"))])
    arguments = {
        "generate_grids": ["--model", flux, *GRIDS], "curate": ["--vlm", vlm, "--grids", folder / "grids", *PAIRS],
        "finetune": ["--model", flux, "--pairs", folder, *ADAPTER],
        "sample": ["--model", flux, "--adapter", folder / "adapter", "--enhance", vlm, "--image", folder / "critter 0.png",
                   folder / "critter 1.png", *SAMPLES],
        "evaluate": ["--model", flux, "--vlm", vlm, *SCORES], "pretrain": JUDGE}
    for script, args in arguments.items():
        code, _ = server.run(folder, script, *args, "--out", folder / OUT[script])
        assert code == 0 or "pairs was accepted" in server.err.read_text(), server.err.read_text()  # by whatever VLM is there
        found[script] = args, files(folder / OUT[script])
    return found


@pytest.mark.parametrize("script", PHASES)
def test_killed_twice_in_each_phase_the_same_command_ends_with_the_same_bytes(script, server, commands, tmp_path):
    args, whole = commands[script]
    out, draw = tmp_path / OUT[script], random.Random(script)
    for name, pattern, times in PHASES[script]:
        for nth in (draw.randint(1, (times + 1) // 2), 1):  # the second time just where the work is taken up again
            code, touched = server.run(tmp_path, script, *args, "--out", out, signal=signal.SIGKILL, match=pattern, nth=nth)
            assert code == -signal.SIGKILL, f"{name}: {code}\n{server.err.read_text()}"
            assert re.search(pattern, touched[-1])
            COUNTS["interruptions"] += 1
    assert files(out) != whole  # there was something left to do
    server.run(tmp_path, script, *args, "--out", out)
    assert files(out) == whole, server.err.read_text()


@pytest.mark.parametrize("script", PHASES)
def test_killed_at_random_times_the_same_command_ends_with_the_same_bytes(script, server, commands, tmp_path):
    """A kill may come while a file is being written, or after the end: then nothing may change any more."""
    args, whole = commands[script]
    out, draw = tmp_path / OUT[script], random.Random(script)
    for _ in range(4):
        process = server.start(tmp_path, script, *args, "--out", out)
        time.sleep(draw.uniform(.1, 3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        COUNTS["interruptions"] += server.wait()[0] == -signal.SIGKILL
    server.run(tmp_path, script, *args, "--out", out)
    assert files(out) == whole, server.err.read_text()


def test_a_line_that_was_half_written_is_written_again(server, commands, tmp_path):
    """SIGKILL cannot be made to come in the middle of a write, a loss of power can."""
    for script, file in (("generate_grids", "grids.jsonl"), ("curate", "transcripts.jsonl"), ("sample", "details.jsonl")):
        args, whole = commands[script]
        out = tmp_path / OUT[script]
        out.mkdir()
        (out / "settings.json").write_bytes(whole["settings.json"])
        (out / file).write_bytes(whole[file][:whole[file].index(b"\n") + 5])  # a line and a bit
        server.run(tmp_path, script, *args, "--out", out)
        assert "half-written" in server.err.read_text()
        assert files(out) == whole
        COUNTS["interruptions"] += 1


@pytest.mark.parametrize("script", [script for script in PHASES if script != "pretrain"])  # its lock is in runs/pretrain
def test_a_second_process_on_the_same_folder_is_refused_and_the_first_goes_on(script, servers, commands, tmp_path):
    (first, second), (args, whole), out = servers, commands[script], tmp_path / OUT[script]
    (tmp_path / "second").mkdir()
    process = first.start(tmp_path, script, *args, "--out", out, signal=signal.SIGSTOP, match=PHASES[script][1][1], nth=1)
    try:
        while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":  # until it has stopped itself
            time.sleep(.01)
        code, _ = second.run(tmp_path / "second", script, *args, "--out", out)
        assert code == 2 and "is in use by another process" in second.err.read_text()
    finally:
        os.kill(process, signal.SIGCONT)
    first.wait()
    assert files(out) == whole, first.err.read_text()
