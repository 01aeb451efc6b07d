"""Execute every notebook from start to end; a cell that fails, fails. Writes the executed copies to build/notebooks.

With ``--in-place`` the notebooks themselves get the outputs.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def main() -> None:
    folder = HERE if "--in-place" in sys.argv[1:] else HERE.parent / "build" / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(HERE.glob("*.ipynb")):
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": HERE}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of this machine
        nbformat.write(notebook, folder / path.name)
        print(f"{path.name}: passed, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
