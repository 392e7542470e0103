"""The executed notebook as it is kept, and its HTML page: streams in one piece, no bars of loading, no dead widgets."""

import html
import re
from copy import deepcopy
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from llm_finetuning.files.atomic import write_text
from llm_finetuning.runner.progress import read_bar

MOVES = re.compile(r"(\n|\r|\x1b\[A)")
"""What moves the cursor: to the next line, to the beginning of the line, and to the line above."""
PNG, WIDGET = "image/png", "application/vnd.jupyter.widget-view+json"
LONG_LINES = "<style>.jp-InputArea-editor pre { white-space: pre-wrap; overflow-wrap: anywhere; }</style>"
"""Wraps code in a narrow window, where nbconvert's page cuts it off."""
INSTEAD_OF_WIDGET = "Interactive: it works while the notebook runs. Open it in Jupyter or Colab and run all cells."


def write(executed: Path, target: Path) -> Path:
    """Writes the notebook `executed` to `target`, tidied, with its HTML page beside it; returns the page.

    Everything but MathJax is in the one page, which is light or dark as its reader's system is.
    """
    notebook = tidy(nbformat.read(executed, 4))
    write_text(target, nbformat.writes(notebook))
    exporter = HTMLExporter(exclude_anchor_links=True)
    page, _ = exporter.from_notebook_node(_with_described_pictures(notebook))
    colours, _, _ = exporter.environment.loader.get_source(exporter.environment, "static/theme-dark.css")
    dark = f'<style media="(prefers-color-scheme: dark)">{colours}</style>'
    return write_text(target.with_suffix(".html"), page.replace("</head>", f"{dark}{LONG_LINES}</head>", 1))


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Brings the outputs into the form in which they are read afterwards; changes and returns the notebook."""
    notebook.metadata.pop("widgets", None)  # their state: without a kernel they do nothing
    for output in _outputs(notebook):
        if WIDGET in output.get("data", {}):
            output.data = {"text/plain": INSTEAD_OF_WIDGET, "text/html": f"<p><em>{INSTEAD_OF_WIDGET}</em></p>"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _in_one_piece(cell.outputs)
    return notebook


def _outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def _in_one_piece(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Joins what follows on one another in a stream, as it stands on a screen in the end; what is empty goes.

    A bar that goes on below a figure leaves no half line above it.
    """
    joined: list[NotebookNode] = []
    newest: dict[str, NotebookNode] = {}
    for output in outputs:
        before = newest.get(output.get("name"))
        if before and output.text.startswith("\r"):
            before.text = before.text[: before.text.rfind("\n") + 1]
        if before and joined[-1] is before:
            before.text += output.text
            continue
        joined.append(output)
        if output.output_type == "stream":
            newest[output.name] = output
    for output in joined:
        if output.output_type == "stream":
            output.text = on_screen(output.text, loading=output.name == "stderr")
    return [output for output in joined if output.get("text", "text").strip()]


def on_screen(text: str, loading: bool) -> str:
    """Returns a stream as it stands on a screen in the end: bars that were drawn over are gone.

    loading: bars that are finished are gone too, as on stderr, where those of loading are drawn.
    """
    lines, row, afresh = [""], 0, False
    for piece in MOVES.split(text):
        if piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif piece == "\x1b[A":
            row = max(0, row - 1)
        elif piece and piece != "\r":
            lines[row] = piece if afresh else lines[row] + piece
        afresh = piece == "\r" or (afresh and not piece)
    kept = [line for line in lines if not (loading and "100%|" in line and read_bar(line))]
    return "\n".join(kept)


def _with_described_pictures(notebook: NotebookNode) -> NotebookNode:
    """Returns a copy whose figures carry their description as alt text, which nbconvert's page leaves out."""
    described = deepcopy(notebook)
    for output in _outputs(described):
        if PNG in output.get("data", {}) and "alt" in output.metadata.get(PNG, {}):
            picture = output.metadata[PNG]
            alt, width = html.escape(picture.alt), picture.get("width", "")
            source = f"data:{PNG};base64,{output.data[PNG].strip()}"
            output.data["text/html"] = f'<img alt="{alt}" width="{width}" style="max-width:100%" src="{source}">'
    return described
