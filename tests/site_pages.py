"""All chapters as plain web pages that work offline: `make site` calls `site_pages.py OUT`. Formulas become MathML, which browsers draw themselves."""
import html
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

NBS = Path(__file__).parents[1]/"nbs"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · densecl</title><link rel="stylesheet" href="style.css"></head>
<body><input type="checkbox" id="menu" aria-label="chapters"><header><label for="menu">☰</label><a href="index.html">densecl</a></header>
<nav>{nav}</nav><main>{body}<footer>{footer}</footer></main>
<script>document.querySelector("nav .here").scrollIntoView({{block: "center"}})</script></body></html>
"""
STYLE = """
:root { --ink: #1d2228; --soft: #5b6570; --line: #e3e6ea; --blue: #1f5fa8; --paper: #f7f8fa }
* { box-sizing: border-box } body { margin: 0; color: var(--ink); font: 16px/1.6 system-ui, sans-serif }
header { display: none } #menu { display: none } a { color: var(--blue); text-decoration: none } a:hover { text-decoration: underline }
nav { position: fixed; inset: 0 auto 0 0; width: 17rem; overflow-y: auto; padding: 1.2rem; background: var(--paper); border-right: 1px solid var(--line); font-size: .9rem }
nav a { display: block; padding: .16rem .5rem; border-radius: .3rem; color: var(--soft) } nav a.here { background: #dce8f6; color: var(--ink) }
main { max-width: 58rem; margin: 0 auto 4rem calc(17rem + max(0rem, (100vw - 17rem - 58rem)/2)); padding: 1rem 1.5rem } main p, main ul { max-width: 50rem }
h1, h2, h3 { line-height: 1.25; margin: 2em 0 .6em } h1 { margin-top: .6em } blockquote { margin: 0; padding: .2em 1em; border-left: 3px solid var(--blue); color: var(--soft) }
pre { margin: .6em 0; padding: .7em .9em; overflow-x: auto; font: .82rem/1.5 ui-monospace, Menlo, Consolas, monospace }
pre { background: var(--paper); border-radius: .4rem } .output pre { background: none; border-radius: 0 } .export div.highlight pre { border-left: 3px solid #86b58a }
.output pre { color: var(--soft); border-left: 3px solid var(--line) } code { font: .88em ui-monospace, Menlo, Consolas, monospace }
pre code { font: inherit } math { font-family: "STIX Two Math", "Cambria Math", "Latin Modern Math", math }
img, svg { max-width: 100%; height: auto } .output_area img { display: block } table { border-collapse: collapse; display: block; margin-bottom: 1em; overflow-x: auto; font-size: .92rem }
th, td { padding: .3em .8em; border-bottom: 1px solid var(--line); text-align: left } math { font-size: 1.05em } math[display=block] { overflow-x: auto; margin: .8em 0 }
td code { overflow-wrap: anywhere } td:first-child { min-width: 7rem } code.short { white-space: nowrap } .output_area { overflow-x: auto }
footer { display: flex; gap: 2rem; justify-content: space-between; margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line) } .anchor-link { display: none } footer :last-child { text-align: right }
@media (min-width: 60rem) { .output pre { white-space: pre-wrap } }
@media (max-width: 60rem) { header { display: flex; gap: .8rem; position: sticky; top: 0; padding: .6rem 1rem; background: white; border-bottom: 1px solid var(--line); z-index: 2 }
  nav { display: none; top: 2.9rem; width: auto; right: 0; z-index: 2 } #menu:checked ~ nav { display: block } main { margin: 0 auto; padding: .5rem 1rem } body { font-size: 15px }
  th, td { padding: .25em .4em } main { padding-bottom: 2rem }
  .output_area img { max-width: max(100%, 34rem) } }
"""


def mathml(text):
    """Markdown with its formulas as MathML; code is left alone."""
    def one(m):
        if m["code"]: return m[0]
        tex = (m["block"] or m["line"]).replace(r"\arg", r"\operatorname{arg}")      # the converter does not know it
        return re.sub(r"\s+", " ", convert(tex.strip(), display="block" if m["block"] else "inline"))
    return re.sub(r"(?P<code>```.*?```|`[^`\n]*`|^    .*?$)|\$\$(?P<block>.+?)\$\$|(?<![\\$])\$(?P<line>[^$]+?)\$", one, text, flags=re.S | re.M)


def title(nb):
    """The first heading of a notebook."""
    return next(m[1].strip() for c in nb.cells if c.cell_type == "markdown" if (m := re.search(r"^# (.+)$", c.source, re.M)))


def describe(cells):
    """Give each picture the caption below it, in italics, as the text for those who cannot see it."""
    for cell, below in zip(cells, cells[1:]):
        caption = re.match(r"\*(.+?)\*(\n\n|\Z)", below.source, re.S) if below.cell_type == "markdown" else None
        for o in cell.get("outputs", []):
            if caption and any(k.startswith("image/") for k in o.get("data", {})): o["metadata"]["alt"] = re.sub(r"[*`]|\s+", " ", caption[1])


def joined(outputs):
    """What a cell printed bit by bit as one block a stream."""
    out = []
    for o in outputs:
        if out and o.output_type == out[-1].output_type == "stream" and o.name == out[-1].name: out[-1].text += o.text
        else: out.append(o)
    return out


def body(nb, names):
    """A notebook's cells as HTML: hidden ones left out, names of chapters as links."""
    cells = [c for c in nb.cells if not re.match(r"#\|\s*(hide|default_exp)", c.source)]
    describe(cells)
    for c in cells:
        if c.cell_type == "markdown": c.source = mathml(c.source)
        elif c.source.startswith("#| export"): c.metadata["tags"] = ["export"]
        c.source = re.sub(r"\A(#\|.*\n)+", "", c.source)
        if "outputs" in c: c.outputs = joined(c.outputs)
    nb = nbformat.from_dict(dict(nb, cells=cells))
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True)
    out = exporter.from_notebook_node(nb)[0].replace("celltag_export", "export")
    out = re.sub(r'(<h\d) id="[^>]*>', r"\1>", out)                                  # nbconvert's ids break on quotes, and nothing links there
    out = re.sub(r'\n+(</pre>)', r'\1', out)
    out = re.sub(r'(href="[\w.-]+)\.ipynb', r"\1.html", out)
    out = re.sub(r"<code>([^<\n]{1,30})</code>", r'<code class="short">\1</code>', re.sub(r"(\d) ± (\d)", "\\1\u00a0±\u00a0\\2", out))   # not broken over two lines
    return re.sub(r'<code class="short">(\d\d[a-z]?_\w+)</code>', lambda m: f'<a href="{m[1]}.html">{m[1]}</a>' if m[1] in names else m[0], out)


def build(out):
    """Write every page, the style and the pictures."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [NBS/"index.ipynb", *sorted(NBS.glob("[0-9]*.ipynb"))]
    books = {p.stem: nbformat.read(p, 4) for p in paths}
    titles = {n: title(nb) for n, nb in books.items()}
    label = lambda n: html.escape(titles[n] if n == "index" else f"{n.split('_')[0]} {titles[n]}")
    for i, (name, nb) in enumerate(books.items()):
        nav = "\n".join(f'<a href="{n}.html"{" class=here" if n == name else ""}>{label(n)}</a>' for n in books)
        around = [list(books)[j] if 0 <= j < len(books) else None for j in (i - 1, i + 1)]
        footer = "".join(f'<a href="{n}.html">{arrow.format(label(n))}</a>' if n else "<span></span>" for n, arrow in zip(around, ("← {}", "{} →")))
        (out/f"{name}.html").write_text(PAGE.format(title=html.escape(titles[name]), nav=nav, body=body(nb, books), footer=footer), encoding="utf-8")
    (out/"style.css").write_text(STYLE + HtmlFormatter(style="friendly").get_style_defs(".highlight"), encoding="utf-8")
    shutil.copytree(NBS/"images", out/"images", dirs_exist_ok=True)
    print(json.dumps(dict(pages=len(books), start=str(out/"index.html"))))


if __name__ == "__main__": build(*sys.argv[1:])
