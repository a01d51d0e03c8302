"""Run the lessons, prove their exercises, and derive the student notebooks from the solutions.

    python notebooks/make.py            # run every solution in place, derive the students' copies
    python notebooks/make.py 1 4        # lessons 1 and 4 only
    python notebooks/make.py --derive   # run nothing: derive from the solutions as they are

Edit `solutions/*.ipynb` only. What stands there between `# solution` and `# end` is taken out of
the student's copy (in a text cell: between `<!-- solution -->` and `<!-- end -->`). In its place
the student finds the lines that start with `# blank: `, or, inside a function, one line that raises
NotImplementedError.

Raw cells below an exercise hold other answers to it, which the student's copy loses: one that
begins with `# also right` must pass the check, and one that begins with `# wrong: words` must fail
it with a message that contains these words.

The first line of a cell may be a mark. `# check` tests an answer; `# try` shows what was to be
predicted. Both lose their outputs in the student's copy, as exercises do. The first picture that a
`# picture` cell draws becomes `pictures/LESSON.png`, with which the lesson opens.

Every run proves each exercise: the blank fails its check; the wrong answers fail, each with its
message; the other right answers pass, and so does the solution after all of them, twice in a row.
A cell that prints a warning stops the run.
"""

import argparse
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
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
CODE_BLANK = re.compile(r"^( *)# solution\n(.*?)^ *# end$", re.MULTILINE | re.DOTALL)
TEXT_BLANK = re.compile(r"<!-- solution -->\n.*?<!-- end -->", re.DOTALL)
SHOWN = re.compile(r"^ *# blank: (.*)\n", re.MULTILINE)  # what the student finds in a blank
RIGHT, WRONG = "# also right", "# wrong: "
WIDGET = "application/vnd.jupyter.widget-view+json"


def lessons(numbers=()):
    """The solution notebooks, in order; with numbers, only those."""
    files = sorted((HERE / "solutions").glob("*.ipynb"))
    return [file for file in files if not numbers or int(file.name[0]) in numbers]


def blank(source):
    """A code cell with its solutions taken out."""

    def empty(found):
        indent, shown, lines = (
            found[1],
            SHOWN.findall(found[2]),
            found[2].strip("\n").count("\n") + 1,
        )
        if not shown and not indent:
            raise ValueError(f"a blank outside of a function needs `# blank: ` lines: {found[2]}")
        size = "1 line" if lines == 1 else f"{lines} lines"
        shown = shown or [f'raise NotImplementedError("your turn")  # {size} in the solution']
        return "\n".join(indent + line for line in shown)

    return CODE_BLANK.sub(empty, source)


def student(notebook):
    """The student's copy of a solution notebook."""
    copied = copy.deepcopy(notebook)
    copied.cells = [cell for cell in copied.cells if cell.cell_type != "raw"]
    for i, cell in enumerate(copied.cells):
        cell.id = f"cell-{i}"
        if cell.cell_type == "markdown":
            cell.source = TEXT_BLANK.sub("*Your answer:*", cell.source).replace("](../", "](")
            continue
        has_blank = CODE_BLANK.search(cell.source)
        if has_blank or cell.source.startswith(("# check", "# try")):
            cell.outputs, cell.execution_count = [], None
        cell.source = blank(cell.source)
    return copied


def clean(notebook):
    """Keep what a reader needs: no metadata of the run, no progress bars, and no widgets, which
    need a kernel."""
    notebook.metadata, count = nbformat.from_dict(KERNEL), 0
    for i, cell in enumerate(notebook.cells):
        cell.metadata, cell.id = nbformat.from_dict({}), f"cell-{i}"
        if cell.cell_type == "code":
            outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            cell.outputs = [o for o in outputs if WIDGET not in o.get("data", {})]
            count += 1
            cell.execution_count = count if cell.outputs or cell.execution_count else None
            for output in cell.outputs:
                output.pop("transient", None)
                if "metadata" in output:
                    output.metadata = nbformat.from_dict({})
                if "execution_count" in output:
                    output.execution_count = count
    return notebook


# ---- running -----------------------------------------------------------------------------------
def execute(notebook, **environment):
    """Run a solution notebook in place, in `notebooks/` and without progress bars, and prove its
    exercises. The kernel gets these environment variables too.

    Returns how many answers were tried, and the seconds of processor time that all of it took."""
    environment = os.environ | {"TQDM_DISABLE": "1"} | environment
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
    )
    exercise, others, tried = None, [], 0
    with client.setup_kernel(env=environment):
        for i, cell in enumerate(notebook.cells):
            if cell.cell_type == "raw":
                others.append(cell.source)
            elif cell.cell_type == "code" and CODE_BLANK.search(cell.source):
                exercise, others = cell.source, []
            check = exercise and cell.source.startswith("# check")
            if check:
                try_answers(client, i, exercise, others, cell.source)
            client.execute_cell(cell, i)
            refuse_warnings(cell, i)
            if check:
                expect(client, i, cell.source, None, "the check, run a second time,")
                exercise, tried = None, tried + len(others) + 2
            notebook.cells[i] = cell
        clock = nbformat.v4.new_code_cell("import time; print(time.process_time())")
        last, seconds = (
            notebook.cells[-1],
            client.execute_cell(clock, len(notebook.cells) - 1).outputs[0].text,
        )
        notebook.cells[-1] = last
    return tried, float(seconds)


def refuse_warnings(cell, i):
    """Stop at a cell that printed a warning; the scripts' progress bars are no warnings."""
    for output in cell.get("outputs", []):
        if output.get("name") == "stderr" and "Warning" in output.text:
            raise ValueError(f"cell {i} prints a warning: {output.text}")


def try_answers(client, i, exercise, others, check):
    """Try an exercise's blank, its wrong and its other right answers on the check, and leave the
    solution in place."""
    run(client, i, blank(exercise))
    expect(client, i, check, "your turn", "the blank")
    for answer in others:
        expect(client, i, answer, None, answer)
        mark, words = answer.split("\n")[0], None
        if mark.startswith(WRONG):
            words = mark.removeprefix(WRONG)
        elif mark != RIGHT:
            raise ValueError(f"cell {i}: a raw cell begins with `{RIGHT}` or `{WRONG}words`")
        expect(client, i, check, words, answer)
    expect(client, i, exercise, None, "the solution, run again,")


def expect(client, i, source, words, what):
    """Run some code: without `words` it must pass, else it must fail and say these words."""
    error = run(client, i, source)
    if words is None and error:
        raise ValueError(
            f"cell {i}: {what} should pass, but stopped with {error.ename}: {error.evalue}"
        )
    if words is not None and not error:
        raise ValueError(f"cell {i}: {what} passes the check")
    if words is not None and words not in error.evalue:
        said = f"{error.ename}: {error.evalue!r}"
        raise ValueError(f"cell {i}: {what} fails with {said}, which does not say {words!r}")


def run(client, i, source):
    """Run some code that is in no notebook; returns the error, or None if there is none."""
    try:
        client.execute_cell(nbformat.v4.new_code_cell(source), i)
    except CellExecutionError as error:
        return error


def keep_picture(notebook, path):
    """The first picture of the cell marked `# picture`."""
    (cell,) = [
        c for c in notebook.cells if c.cell_type == "code" and c.source.startswith("# picture")
    ]
    png = next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(base64.b64decode(png))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lessons", nargs="*", type=int, help="numbers of lessons (default: all)")
    parser.add_argument(
        "--derive", action="store_true", help="run nothing, only derive the student notebooks"
    )
    args = parser.parse_args()
    for file in lessons(args.lessons):
        notebook, begun = nbformat.read(file, 4), time.time()
        if not args.derive:
            tried, seconds = execute(notebook)
            clean(notebook)
            keep_picture(notebook, HERE / "pictures" / f"{file.stem}.png")
            nbformat.write(notebook, file)
        nbformat.write(student(notebook), HERE / file.name)
        done = (
            "derived"
            if args.derive
            else (
                f"{time.time() - begun:.0f} s, {seconds:.0f} s of processor time, "
                f"{tried} answers tried"
            )
        )
        print(f"{file.stem}: {done}, {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
