"""Runs the lessons and derives the student notebooks: the solutions are written once, in `solutions/`.

    python notebooks/make.py            # run every solution in place, then derive every student notebook
    python notebooks/make.py 1 4        # only lessons 1 and 4
    python notebooks/make.py --derive   # run nothing: derive the student notebooks from the solutions as they are

Edit `solutions/*.ipynb` only. What stands there between `# solution` and `# end` (in a text cell: `<!-- solution -->`
and `<!-- end -->`) becomes a blank. The first line of a cell may be a mark: `# check` (tests an answer) and `# try`
(shows what was to be predicted) lose their outputs in the student's copy, as the exercises do; the first picture that a
`# picture` cell draws becomes `pictures/LESSON.png`, which the lesson opens with.

A check that a blank would pass is worth nothing, so every run tries that as well: before a check, the exercise is run as
the student gets it, and the check must fail.
"""

import argparse
import ast
import base64
import copy
import os
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).resolve().parent
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
          "language_info": {"name": "python"}}
CODE_BLANK = re.compile(r"^( *)# solution\n(.*?)^ *# end$", re.MULTILINE | re.DOTALL)
TEXT_BLANK = re.compile(r"<!-- solution -->\n.*?<!-- end -->", re.DOTALL)


def lessons(numbers=()):
    """The solution notebooks, in order; with numbers, only those."""
    files = sorted((HERE / "solutions").glob("*.ipynb"))
    return [file for file in files if not numbers or int(file.name[0]) in numbers]


def blank(source):
    """A code cell with its solutions taken out."""
    def empty(found):
        indent, lines = found[1], found[2].strip("\n").count("\n") + 1
        size = "1 line" if lines == 1 else f"{lines} lines"
        return f'{indent}raise NotImplementedError("your turn")  # {size} in the solution'
    return CODE_BLANK.sub(empty, source)


def student(notebook):
    """The student's copy of a solution notebook."""
    copied = copy.deepcopy(notebook)
    for cell in copied.cells:
        if cell.cell_type == "markdown":
            cell.source = TEXT_BLANK.sub("*Your answer:*", cell.source).replace("](../", "](")
            continue
        has_blank = CODE_BLANK.search(cell.source)
        if has_blank or cell.source.startswith(("# check", "# try")):
            cell.outputs, cell.execution_count = [], None
        cell.source = blank(cell.source)
    return copied


def clean(notebook):
    """Keep what a reader needs: no run's own metadata, no progress bars and warnings of the libraries."""
    notebook.metadata, count = nbformat.from_dict(KERNEL), 0
    for i, cell in enumerate(notebook.cells):
        cell.metadata, cell.id = nbformat.from_dict({}), f"cell-{i}"
        if cell.cell_type == "code":
            cell.outputs, count = [o for o in cell.outputs if o.get("name") != "stderr"], count + 1
            cell.execution_count = count if cell.outputs or cell.execution_count else None
            for output in cell.outputs:
                output.pop("transient", None)
                if "metadata" in output:
                    output.metadata = nbformat.from_dict({})
                if "execution_count" in output:
                    output.execution_count = count
    return notebook


# ---- running ---------------------------------------------------------------------------------------------------------
def execute(notebook):
    """Runs a solution notebook in place, in `notebooks/` and without progress bars.

    Returns how many blanks it tried and the seconds of processor time that all of it took."""
    os.environ["TQDM_DISABLE"] = "1"
    client = NotebookClient(notebook, timeout=3600, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(HERE)}})
    exercise, tried = None, 0
    with client.setup_kernel():
        for i, cell in enumerate(notebook.cells):
            if cell.cell_type == "code" and CODE_BLANK.search(cell.source):
                exercise = cell
            if exercise and cell.source.startswith("# check"):
                try_blank(client, i, exercise.source, cell.source)
                notebook.cells[i], exercise, tried = cell, None, tried + 1
            client.execute_cell(cell, i)
        clock = nbformat.v4.new_code_cell("import time; print(time.process_time())")
        last, seconds = notebook.cells[-1], client.execute_cell(clock, len(notebook.cells) - 1).outputs[0].text
        notebook.cells[-1] = last
    return tried, float(seconds)


def try_blank(client, i, solution, check):
    """Runs an exercise as the student gets it, then its check, which must fail; then the solution again."""
    if not runs(client, i, blank(solution)):  # a blank outside of a function: what it should set is not set
        for name in assigned(solution):
            runs(client, i, f"del {name}")
    if runs(client, i, check):
        raise ValueError(f"the check in cell {i} passes without a solution")
    if not runs(client, i, solution):
        raise ValueError(f"the exercise before cell {i} cannot be run twice")


def runs(client, i, source):
    """Whether some code runs without an error."""
    try:
        client.execute_cell(nbformat.v4.new_code_cell(source), i)
        return True
    except CellExecutionError:
        return False


def assigned(solution):
    """The names that the solution parts of a cell set at the cell's own level."""
    parts = ast.parse("\n".join(found[2] for found in CODE_BLANK.finditer(solution) if not found[1]))
    return [node.id for node in ast.walk(parts) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def keep_picture(notebook, path):
    """The first picture of the cell marked `# picture`."""
    cell, = [c for c in notebook.cells if c.cell_type == "code" and c.source.startswith("# picture")]
    png = next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(base64.b64decode(png))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", nargs="*", type=int, help="numbers of lessons (default: all)")
    parser.add_argument("--derive", action="store_true", help="run nothing, only derive the student notebooks")
    args = parser.parse_args()
    for file in lessons(args.lessons):
        notebook, begun = nbformat.read(file, 4), time.time()
        if not args.derive:
            tried, seconds = execute(notebook)
            clean(notebook)
            keep_picture(notebook, HERE / "pictures" / f"{file.stem}.png")
            nbformat.write(notebook, file)
        nbformat.write(student(notebook), HERE / file.name)
        done = "derived" if args.derive else (f"{time.time() - begun:.0f} s, {seconds:.0f} s of processor time, "
                                              f"{tried} blanks tried")
        print(f"{file.stem}: {done}, {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
