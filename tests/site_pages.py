"""All chapters as plain web pages that work offline: `make site` calls `site_pages.py OUT`.

The sections are those of nbs/sidebar.yml. Nothing is fetched when a page is read.
"""

import html
import json
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import yaml
from pygments.formatters import HtmlFormatter
from site_render import Chapter
from site_search import search_index

NBS = Path(__file__).parents[1] / "nbs"
HERE = Path(__file__).parent
CONTRIBUTING = "CONTRIBUTING"  # a page that is linked from the index, but no chapter
PAGE = """<!doctype html>
<html lang="en" data-top="{top}"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>{title} · densecl</title><link rel="stylesheet" href="{top}style.css"></head>
<body><input type="checkbox" id="menu" aria-label="list of chapters">
<header><label for="menu">☰</label><a href="{top}index.html">densecl</a>
<form id="search" role="search" hidden><input type="search" placeholder="Search  /"
autocomplete="off" aria-label="search the chapters"><ol hidden></ol></form></header>
<nav id="chapters" aria-label="chapters">
{nav}
</nav><main>
{body}<footer>{footer}</footer></main><script src="{top}site.js"></script></body></html>
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


def read_chapters():
    """Name of the page -> its Chapter, in reading order; the page for contributors is last."""
    names = [name for chapters in sections().values() for name in chapters]
    found = {name: Chapter(nbformat.read(NBS / f"{name}.ipynb", 4)) for name in names}
    text = (NBS.parent / f"{CONTRIBUTING}.md").read_text("utf-8")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    return found | {CONTRIBUTING: Chapter(book)}


def link(here, there, text, attributes=""):
    """A link from one page to another."""
    href = os.path.relpath(there, os.path.dirname(here) or ".")
    return f'<a href="{href}.html"{attributes}>{html.escape(text)}</a>'


def menu(here, chapters):
    """The chapters by section; the section of the current chapter is open, the chapter marked."""
    lines = []
    for section, names in sections().items():
        if section:
            mark = " open" if here in names else ""
            lines.append(f"<details{mark}><summary>{html.escape(section)}</summary>")
        for name in names:
            mark = ' aria-current="page"' if name == here else ""
            lines.append(link(here, name, chapters[name].title, mark))
        if section:
            lines.append("</details>")
    return "\n".join(lines)


def contents(chapter):
    """The headings of a page, for pages with at least three of them."""
    headings = [section for section in chapter.sections if section.level == 2]
    if len(headings) < 3:
        return ""
    items = [f'<li><a href="#{s.anchor}">{html.escape(s.heading)}</a></li>' for s in headings]
    return f'<nav class="contents" aria-label="on this page"><ul>{"".join(items)}</ul></nav>\n'


def body(chapter):
    """The HTML of a chapter with its table of contents below the title and the summary."""
    ends = r"<p>You are here: .*?</p>\n", r"</blockquote>\n", r"</h1>\n"
    found = [re.search(end, chapter.html, re.DOTALL) for end in ends]
    end = next(match.end() for match in found if match)
    page = chapter.html[:end] + contents(chapter) + chapter.html[end:]
    # the README's badges would have to be fetched
    return re.sub(r'<p>(?:(?!</p>).)*<img[^>]*src="https?:.*?</p>\n?', "", page, flags=re.DOTALL)


def footer(here, order, chapters):
    """Links to the chapters before and after."""
    if here not in order:
        return link(here, "index", "← densecl")
    i = order.index(here)
    before, after = order[:i][-1:], order[i + 1 :][:1]
    left = [link(here, n, f"← {chapters[n].title}", ' rel="prev"') for n in before]
    right = [link(here, n, f"{chapters[n].title} →", ' rel="next"') for n in after]
    return "".join(left or ["<span></span>"]) + "".join(right or ["<span></span>"])


def style():
    """site.css with the colors of code, for light and dark pages."""
    light, dark = (HtmlFormatter(style=name) for name in ("default", "github-dark"))
    rules = [
        f.get_style_defs(".highlight").replace("line-height: 125%;", "") for f in (light, dark)
    ]
    dark = f"@media (prefers-color-scheme: dark) {{\n{rules[1]}\n}}\n"
    own = (HERE / "site.css").read_text()
    return f"{rules[0]}\n{dark}{own}"


def build(out):
    """Write every page, the style, the script, the index of the search and the images."""
    out = Path(out)
    chapters = read_chapters()
    section_of = {name: section for section, names in sections().items() for name in names}
    order = list(section_of)
    for name, chapter in chapters.items():
        page = PAGE.format(
            title=html.escape(chapter.title),
            top="../" * name.count("/"),
            nav=menu(name, chapters),
            body=body(chapter),
            footer=footer(name, order, chapters),
        )
        path = out / f"{name}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    index = search_index(chapters, section_of | {CONTRIBUTING: ""})
    (out / "search-index.js").write_text(index, encoding="utf-8")
    (out / "style.css").write_text(style(), encoding="utf-8")
    shutil.copy(HERE / "site.js", out)
    shutil.copytree(NBS / "images", out / "images", dirs_exist_ok=True)
    print(json.dumps({"pages": len(chapters), "start": str(out / "index.html")}))


if __name__ == "__main__":
    build(*sys.argv[1:])
