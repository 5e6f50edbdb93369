"""All chapters as plain web pages that work offline: `make site` calls `site_pages.py OUT`.

Formulas become MathML, which browsers draw themselves. The sections are those of nbs/sidebar.yml.
"""

import html
import json
import os
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import yaml
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

NBS = Path(__file__).parents[1] / "nbs"
STYLE = Path(__file__).with_name("site.css")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · densecl</title><link rel="stylesheet" href="{top}style.css"></head>
<body><input type="checkbox" id="menu" aria-label="chapters">
<header><label for="menu">☰</label><a href="{top}index.html">densecl</a></header>
<nav>{nav}</nav><main>{body}<footer>{footer}</footer></main>
<script>document.querySelector("nav .here").scrollIntoView({{block: "center"}})</script>
</body></html>
"""


def sections():
    """Section -> its chapters (paths below nbs/), in reading order; "" for the first ones."""
    listed = yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    found = {"": []}
    for entry in listed:
        if isinstance(entry, str):
            found[""].append(entry.removesuffix(".ipynb"))
        else:
            found[entry["section"]] = [name.removesuffix(".ipynb") for name in entry["contents"]]
    return found


def mathml(text):
    """Markdown with its formulas as MathML; code is left alone."""

    def one(m):
        if m["code"]:
            return m[0]
        # the converter does not know \arg
        tex = (m["block"] or m["line"]).replace(r"\arg", r"\operatorname{arg}")
        display = "block" if m["block"] else "inline"
        return re.sub(r"\s+", " ", convert(tex.strip(), display=display))

    code = r"(?P<code>```.*?```|`[^`\n]*`|^    .*?$)"
    formula = r"\$\$(?P<block>.+?)\$\$|(?<![\\$])\$(?P<line>[^$]+?)\$"
    return re.sub(f"{code}|{formula}", one, text, flags=re.DOTALL | re.MULTILINE)


def title(nb):
    """The first heading of a notebook."""
    for cell in nb.cells:
        heading = re.search(r"^# (.+)$", cell.source, re.MULTILINE)
        if cell.cell_type == "markdown" and heading:
            return heading[1].strip()
    raise ValueError("a notebook without a heading")


def describe(cells):
    """Use the caption below a figure, in italics, as its alternative text."""
    for cell, below in pairwise(cells):
        caption = None
        if below.cell_type == "markdown":
            caption = re.match(r"\*(.+?)\*(\n\n|\Z)", below.source, re.DOTALL)
        for output in cell.get("outputs", []):
            if caption and any(kind.startswith("image/") for kind in output.get("data", {})):
                output["metadata"]["alt"] = re.sub(r"[*`]|\s+", " ", caption[1])


def joined(outputs):
    """Consecutive outputs of one stream as one block."""
    out = []
    for output in outputs:
        last = out[-1] if out else None
        if last and last.output_type == output.output_type == "stream" and last.name == output.name:
            last.text += output.text
        else:
            out.append(output)
    return out


def body(nb):
    """A notebook's cells as HTML without the hidden ones."""
    cells = [c for c in nb.cells if not re.match(r"#\|\s*(hide|default_exp)", c.source)]
    describe(cells)
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = mathml(cell.source)
        elif cell.source.startswith("#| export"):
            cell.metadata["tags"] = ["export"]
        cell.source = re.sub(r"\A(#\|.*\n)+", "", cell.source)
        if "outputs" in cell:
            cell.outputs = joined(cell.outputs)
    nb = nbformat.from_dict(dict(nb, cells=cells))
    options = dict.fromkeys(("input_prompt", "output_prompt", "anchor_links"), True)
    options = {f"exclude_{name}": value for name, value in options.items()}
    exporter = HTMLExporter(template_name="basic", **options)
    out = exporter.from_notebook_node(nb)[0].replace("celltag_export", "export")
    # nbconvert's ids of headings break on quotes, and nothing links there
    out = re.sub(r'(<h\d) id="[^>]*>', r"\1>", out)
    out = re.sub(r"\n+(</pre>)", r"\1", out)
    out = re.sub(r'(href="[\w./-]+)\.ipynb', r"\1.html", out)
    # numbers and short code are not broken over two lines
    out = re.sub(r"(\d) ± (\d)", "\\1\u00a0±\u00a0\\2", out)
    return re.sub(r"<code>([^<\n]{1,30})</code>", r'<code class="short">\1</code>', out)


def link(here, there, text, attributes=""):
    """A link from one chapter to another."""
    href = os.path.relpath(there, os.path.dirname(here) or ".")
    return f'<a href="{href}.html"{attributes}>{text}</a>'


def menu(here, titles):
    """The chapters by section; the current one is marked."""
    lines = []
    for section, names in sections().items():
        if section:
            lines.append(f"<h2>{html.escape(section)}</h2>")
        for name in names:
            mark = ' class="here"' if name == here else ""
            lines.append(link(here, name, titles[name], mark))
    return "\n".join(lines)


def build(out):
    """Write every page, the style and the images."""
    out = Path(out)
    names = [name for chapters in sections().values() for name in chapters]
    books = {name: nbformat.read(NBS / f"{name}.ipynb", 4) for name in names}
    titles = {name: html.escape(title(nb)) for name, nb in books.items()}
    for i, name in enumerate(names):
        before, after = names[i - 1] if i else None, names[i + 1] if i + 1 < len(names) else None
        footer = link(name, before, f"← {titles[before]}") if before else "<span></span>"
        footer += link(name, after, f"{titles[after]} →") if after else "<span></span>"
        page = PAGE.format(
            title=titles[name],
            top="../" * name.count("/"),
            nav=menu(name, titles),
            body=body(books[name]),
            footer=footer,
        )
        path = out / f"{name}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    highlight = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    (out / "style.css").write_text(STYLE.read_text() + highlight, encoding="utf-8")
    shutil.copytree(NBS / "images", out / "images", dirs_exist_ok=True)
    print(json.dumps({"pages": len(books), "start": str(out / "index.html")}))


if __name__ == "__main__":
    build(*sys.argv[1:])
