"""Two processes draw, curate and sample what one does, each picture once, and write the same files."""

import os
import subprocess
import sys

from conftest import ROOT

STEPS = """
import sys
sys.path.insert(0, {root!r})
import curate, dsd, generate_grids, sample
times = {{}}
for module, method in ((generate_grids, "draw_grids"), (curate, "cut"), (sample, "save")):
    def counted(*args, whole=getattr(module, method), name=module.__name__):
        times[name] = times.get(name, 0) + 1
        return whole(*args)
    setattr(module, method, counted)
for module, *args in {commands!r}:
    sys.argv = [module, *args]
    dsd.run({{"generate_grids": generate_grids, "curate": curate, "sample": sample}}[module].main)
    dsd.processes().wait_for_everyone()  # the main process writes last; a launcher waits for it too
open({out!r} + f"/counts_{{dsd.processes().process_index}}.txt", "w").write(str(sorted(times.items())))
"""


def commands(flux, vlm, out):
    return [
        ["generate_grids", "--model", flux, "--count", "5", "--batch_size", "1", "--steps", "1", "--out", f"{out}/grids"],
        ["curate", "--vlm", vlm, "--grids", f"{out}/grids", "--out", f"{out}/pairs", "--batch_size", "6", "--tolerance", "9"],
        ["sample", "--model", flux, "--adapter", str(ROOT / "miniature" / "adapter"), "--image", f"{out}/grids/000000.png",
         "--prompt", "a critter", "--seed", "0", "1", "2", "--steps", "1", "--batch_size", "1", "--out", f"{out}/samples"]]


def run(folder, flux, vlm, *launcher):
    folder.mkdir()
    script = folder / "steps.py"
    script.write_text(STEPS.format(root=str(ROOT), commands=commands(str(flux), str(vlm), folder.name), out=str(folder)))
    done = subprocess.run([sys.executable, *launcher, str(script)], cwd=folder.parent, capture_output=True, text=True,
                          timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_write_what_one_writes_and_share_the_work(flux, vlm, tmp_path):
    run(tmp_path / "run", flux, vlm)
    (tmp_path / "run").rename(tmp_path / "alone")
    run(tmp_path / "run", flux, vlm, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--main_process_port", "0")
    alone, shared = ({f.relative_to(tmp_path / name): f.read_bytes() for f in (tmp_path / name).rglob("*.*")
                      if f.is_file() and f.name not in (".lock", "steps.py") and "counts" not in f.name}
                     for name in ("alone", "run"))
    assert len(alone) > 30 and shared == alone
    counts = [(tmp_path / name).read_text() for name in ("alone/counts_0.txt", "run/counts_0.txt", "run/counts_1.txt")]
    assert counts == [f"[('curate', {c}), ('generate_grids', {g}), ('sample', {s})]" for c, g, s in
                      ((5, 5, 3), (3, 3, 2), (2, 2, 1))]
