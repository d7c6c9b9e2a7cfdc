"""The notebook of examples/notebooks, executed from its first cell to its last."""

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebooks" / "adamw_to_cs_adam.ipynb"


def test_it_is_ten_cells_without_outputs():
    """Outputs are not in the repository: they come from whoever runs it."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) == 10
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_it_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: it is in the extra docs")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: it is in the extra docs")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: it is in the extra docs")
    import nbformat
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    class This(KernelSpecManager):
        """The Python of the tests, whatever kernels the machine knows."""

        def get_kernel_spec(self, kernel_name):
            return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "integrations")]))
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    manager = AsyncKernelManager(kernel_spec_manager=This())
    nbclient.NotebookClient(
        notebook, km=manager, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "CSAdam" in said and "AdamW all the way" in said
    # What the text promises: less state, at a loss that is not far from AdamW's.
    line = next(line for line in said.splitlines() if "AdamW all the way" in line)
    whole, converted = (float(part.split()[-1]) for part in line.split(": ", 1)[1].split(", "))
    assert abs(whole - converted) < 0.15 * whole, line
