"""The executed analysis notebook as report.md and a self-contained report.html, without code."""

import shutil
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter, MarkdownExporter
from traitlets.config import Config

from helpers.core.file_writing import write_atomically
from helpers.core.plain_text import one_line
from helpers.study.loading import load_study

HIDDEN = "hide-in-report"
# A page of reading width. In a wider table the interval wraps below its number; a table that is
# still too wide scrolls.
STYLE = """<style>
main { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
.jp-RenderedHTMLCommon table { display: block; width: fit-content; max-width: 100%;
  overflow-x: auto; margin-left: 0; font-size: 0.86em; }
.jp-RenderedHTMLCommon :is(td, th) { max-width: 30rem; text-align: left; vertical-align: top;
  overflow-wrap: break-word; }
.jp-RenderedHTMLCommon :is(td, th) code { white-space: normal; }
.jp-RenderedHTMLCommon :is(td, th)[style*="right"] { min-width: 4.6em; box-sizing: content-box; }
</style>
"""
# The page has no scripts and forbids the browser to run any, because its text comes from models
# and data sets. Opening it fetches nothing.
NOTHING_RUNS = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:"
TEMPLATE = f"""
{{%- extends 'lab/index.html.j2' -%}}
{{%- block html_head_js -%}}
<meta http-equiv="Content-Security-Policy" content="{NOTHING_RUNS}">
{{%- endblock html_head_js -%}}
{{%- block jupyter_widgets -%}}{{%- endblock jupyter_widgets -%}}
{{%- block html_head_js_mathjax -%}}{{%- endblock html_head_js_mathjax -%}}
{{%- block html_head_js_mermaidjs -%}}{{%- endblock html_head_js_mermaidjs -%}}
"""


def export_report(notebook: Path, study: str, folder: Path) -> None:
    """Write report.md, report_files/ and report.html of an executed notebook to a folder."""
    content = _without_stderr(nbformat.read(notebook, as_version=4))
    resources = {"metadata": {"name": one_line(load_study(study, with_sources=False).title)}}
    html, _ = HTMLExporter(config=_config(), raw_template=TEMPLATE).from_notebook_node(
        content, resources
    )
    html = html.replace("</head>", f"{STYLE}</head>", 1)
    markdown, extracted = MarkdownExporter(config=_config()).from_notebook_node(
        content, resources | {"unique_key": "report", "output_files_dir": "report_files"}
    )
    shutil.rmtree(folder / "report_files", ignore_errors=True)
    for name, data in extracted.get("outputs", {}).items():
        write_atomically(folder / name, lambda path, data=data: path.write_bytes(data))
    write_atomically(folder / "report.html", lambda p: p.write_text(html, encoding="utf-8"))
    write_atomically(folder / "report.md", lambda p: p.write_text(markdown, encoding="utf-8"))


def _config() -> Config:
    config = Config()
    config.TemplateExporter.exclude_input = True
    config.TemplateExporter.exclude_input_prompt = True
    config.TemplateExporter.exclude_output_prompt = True
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_cell_tags = {HIDDEN}
    return config


def _without_stderr(notebook):
    """The notebook without output to stderr."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook
