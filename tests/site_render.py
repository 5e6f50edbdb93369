"""A notebook as the HTML of a web page, with its sections for the contents and the search.

Formulas become MathML, which browsers draw themselves. nbconvert, which is not used here, parses
and cleans each page several times: more than ten times the work.
"""

import ast
import base64
import functools
import html
import io
import re
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import unquote

import mistune
from latex2mathml.converter import convert
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer, get_lexer_by_name
from pygments.util import ClassNotFound

FORMATTER = HtmlFormatter()
CODE = r"(?P<code>```.*?```|`[^`\n]*`|^    .*?$)"
FORMULA = re.compile(
    rf"{CODE}|\$\$(?P<block>.+?)\$\$|(?<![\\$])\$(?P<line>[^$]+?)\$", re.DOTALL | re.MULTILINE
)


@dataclass
class Section:
    """A heading with what is below it: what the search finds."""

    heading: str
    level: int
    anchor: str
    names: list = field(default_factory=list)  # (exported name, its anchor)
    prose: str = ""
    words: set = field(default_factory=set)  # names and options in code and outputs


def plain(text):
    """HTML as text on one line, without formulas."""
    text = re.sub(r"<(math|a class=\"anchor\").*?</(math|a)>", " ", text, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\s+", " ", text).strip()


def slug(heading):
    """The anchor of a heading, as on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@functools.cache
def formula(tex, display):
    """A formula as MathML."""
    # the converter does not know \arg
    tex = tex.strip().replace(r"\arg", r"\operatorname{arg}")
    return re.sub(r"\s+", " ", convert(tex, display=display))


def code_html(source, language="python"):
    """Source text with its syntax in colors."""
    try:
        lexer = PythonLexer() if language == "python" else get_lexer_by_name(language)
    except ClassNotFound:
        return f"<pre>{html.escape(source)}</pre>\n"
    return highlight(source, lexer, FORMATTER)


def page_link(url):
    """The address of a notebook's page: x.ipynb#Some-heading -> x.html#some-heading."""
    file, mark, anchor = url.partition("#")
    if re.match(r"[a-z]+:", url):
        return url
    if file.endswith(".md"):  # in the folder above the notebooks, its page beside theirs
        file = file.removeprefix("../")
    return re.sub(r"\.(ipynb|md)$", ".html", file) + mark + slug(unquote(anchor))


class Markdown(mistune.HTMLRenderer):
    """Headings with anchors, code in colors, links between pages, tables that scroll."""

    def __init__(self):
        super().__init__(escape=False)
        self.sections = [Section("", 1, "")]

    def heading(self, text, level, **_):
        base = slug(plain(text))
        taken = {section.anchor for section in self.sections}
        anchor = next(a for a in [base, *(f"{base}-{i}" for i in range(1, 99))] if a not in taken)
        self.sections.append(Section(plain(text), level, anchor))
        mark = f'<a class="anchor" href="#{anchor}" aria-label="link to this section">#</a>'
        return f'<h{level} id="{anchor}">{mark}{text}</h{level}>\n'

    def text(self, text):
        # a number and its unit or error are not broken over two lines
        text = re.sub(r"(\d) ± (\d)", "\\1\u00a0±\u00a0\\2", super().text(text))
        return re.sub(r"(\d) %", "\\1\u00a0%", text)

    def block_code(self, code, info=None):
        return code_html(code, info.strip().split()[0]) if info else code_html(code, "text")

    def codespan(self, text):
        short = ' class="short"' if len(text) <= 30 else ""
        return f"<code{short}>{html.escape(text)}</code>"

    def link(self, text, url, title=None):
        return super().link(text, page_link(url), title)

    def table(self, text):
        return f'<div class="wide"><table>\n{text}</table></div>\n'


class Chapter:
    """The HTML of a notebook (`html`), its title and its sections.

    Args:
        nb: a notebook as nbformat reads it
    """

    def __init__(self, nb):
        self.renderer = Markdown()
        plugins = ["table", "strikethrough", "url"]
        self.to_html = mistune.create_markdown(renderer=self.renderer, plugins=plugins)
        sources = "\n".join(c.source for c in nb.cells if c.cell_type == "code")
        module = re.search(r"^#\|\s*default_exp\s+([\w.]+)", sources, re.MULTILINE)
        self.module = f"densecl.{module[1]}".removesuffix(".__init__") if module else ""
        cells = [c for c in nb.cells if not re.match(r"#\|\s*(hide|default_exp)", c.source)]
        self.html = "".join(
            self.cell(cell, caption(below)) for cell, below in pairwise([*cells, None])
        )
        self.sections = self.renderer.sections[1:]
        self.title = next(s.heading for s in self.sections if s.level == 1)

    def cell(self, cell, alt):
        """One cell; `alt` is the alternative text of its figures."""
        if cell.cell_type == "markdown":
            return self.markdown(cell.source)
        section = self.renderer.sections[-1]
        source = re.sub(r"\A(#\|.*\n?)+", "", cell.source)
        section.words |= words(source)
        kind, anchors = "code", ""
        if cell.source.startswith("#| export"):
            kind = "code export"
            found = [(name, f"{self.module}.{name}") for name in public_names(source)]
            section.names += found
            anchors = "".join(f'<span id="{anchor}"></span>' for _, anchor in found)
        outputs = "".join(self.output(output, alt) for output in joined(cell.outputs))
        return f'<div class="{kind}">{anchors}{code_html(source)}</div>\n{outputs}'

    def markdown(self, source):
        """Markdown with its formulas as HTML; the text of each heading joins its section."""
        formulas = []

        def store(m):
            if m["code"]:
                return m[0]
            display = "block" if m["block"] else "inline"
            formulas.append(formula(m["block"] or m["line"], display))
            return f"\ue000{len(formulas) - 1}\ue001"

        number = len(self.renderer.sections)
        out = self.to_html(FORMULA.sub(store, source))
        # a formula and the punctuation beside it are not broken over two lines
        out = re.sub(
            "\\(?\ue000\\d+\ue001[.,;:)]+|\\(\ue000\\d+\ue001",
            r'<span class="together">\g<0></span>',
            out,
        )
        out = re.sub("\ue000(\\d+)\ue001", lambda m: formulas[int(m[1])], out)
        parts = re.split(r"<h[1-6] id=.*?</h[1-6]>", out, flags=re.DOTALL)
        for section, part in zip(self.renderer.sections[number - 1 :], parts, strict=True):
            section.prose = f"{section.prose} {plain(part)}".strip()
        return out

    def output(self, output, alt):
        """One output of a cell: a figure, HTML, Markdown or text."""
        if output.output_type == "error":
            raise ValueError(f"an output is an error: {output.ename}")
        text = output.get("text")
        data = output.get("data", {"text/plain": text})
        for kind in ("image/png", "image/jpeg"):
            if kind in data:
                return f'<div class="output figure">{figure(kind, data[kind], alt)}</div>\n'
        if "text/html" in data:
            return f'<div class="output">{data["text/html"]}</div>\n'
        if "text/markdown" in data:
            return f'<div class="output">{self.markdown(data["text/markdown"])}</div>\n'
        # a carriage return writes over the line
        shown = re.sub(r"(?m)^.*\r(?!\n)", "", data["text/plain"].replace("\r\n", "\n")).rstrip(
            "\n"
        )
        self.renderer.sections[-1].words |= words(shown)
        return f'<div class="output"><pre>{html.escape(shown)}</pre></div>\n' if shown else ""


def figure(kind, data, alt):
    """An image of a notebook, with its size, which keeps the page still while it loads."""
    width, height = Image.open(io.BytesIO(base64.b64decode(data))).size
    size = f'width="{width}" height="{height}" style="--width: {width}px"'
    data = data.replace("\n", "")
    return f'<img {size} alt="{html.escape(alt)}" src="data:{kind};base64,{data}">'


def caption(cell):
    """The text in italics with which a Markdown cell begins: the caption of the figure above it."""
    if cell is None or cell.cell_type != "markdown":
        return ""
    found = re.match(r"\*(.+?)\*(\n\n|\Z)", cell.source, re.DOTALL)
    return re.sub(r"[*`]|\s+", " ", found[1]) if found else ""


def joined(outputs):
    """Consecutive outputs of one stream as one output."""
    out = []
    for output in outputs:
        last = out[-1] if out else None
        if last and last.output_type == output.output_type == "stream" and last.name == output.name:
            last.text += output.text
        else:
            out.append(output)
    return out


def words(text):
    """Names of at least three letters and options such as --queue-len, in code or in an output."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]+|[A-Za-z_]\w{2,}", text))


def public_names(source):
    """Functions, classes and their methods that a cell exports."""
    found = []
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in ast.parse(source).body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            found.append(node.name)
            members = node.body if isinstance(node, ast.ClassDef) else []
            methods = [m.name for m in members if isinstance(m, ast.FunctionDef)]
            found += [f"{node.name}.{m}" for m in methods if not m.startswith("_")]
    return found
