"""The English of the chapters: the field's words, plain constructions, headings, narrow code.

Markdown cells, docstrings, help texts and comments are read; code, formulas, addresses and stored
keys in backticks are not.
"""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

NBS = Path(__file__).parents[1] / "nbs"
NAMES = sorted(
    str(p.relative_to(NBS).with_suffix(""))
    for p in NBS.rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)

# chapters whose code is read without scrolling on a screen of 1280 pixels
NARROW = [name for name in NAMES if re.match(r"0[1-7]_", name)]
COLUMNS = 88

OBJECTS = (
    "argmax|backbone|cell|chapter|class|checkpoint|command|config|convolution|curve|encoder|error|"
    "figure|file|folder|function|grid|head|image|line|loader|loss|map|message|model|module|"
    "network|number|option|position|process|queue|run|script|table|test|trainer|vector|weight"
)
# "a row a step": what is counted, and per what
COUNTED = (
    "batch|byte|cell|chunk|column|copy|entry|epoch|file|hour|image|key|label|line|minute|negative|"
    "number|panel|pixel|point|position|query|row|second|step|token|value|vector|view|word"
)
UNIT = f"{COUNTED}|class|day|GPU|layer|page|process|rank|run|shard|stage|worker"
PLURAL = "batches|bytes|copies|entries|queries|kB|MB|GB|s|ms"
# pattern -> better; letters match in both cases
WORDS = {
    r"pictures?": "image",
    r"(?:each|every|which|same|other|its) places?": "position, grid cell",
    r"strangers?": "negative",
    r"partners?": "positive",
    r"(?<!what is )(?<!go )(?<!goes )(?<!went )wrong(?:ly)?": "incorrect, invalid",
    r"right (?:match(?:es)?|position|cell)s?": "correct",
    r"blind guess(?:es)?": "chance level",
    r"sea levels?": "baseline",
    r"rotten|bad images?": "corrupt image",
    r"asked by number": "random access, indexed",
    r"hand-?over": "geometry warm-up",
    r"whole(?! (?:numbers?|pixels?|levels?|points?))": "complete, full",
    r"(?<!standard )deviations?": "standard deviation",
    r"(?:the|an?|its|their|what|large|small|larger|smaller|same) shares?|shares? of": "fraction",
    r"(?:the|a|its|this|high|higher|low|lower) rate(?! of)": "learning rate",
    r"company": "baselines, networks compared",
    r"at rest": "eval mode",
    r"stage-cut": "truncated after a stage",
    r"so many": "N",
    r"(?:\d|points?|times|pixels?|better|worse|lower|higher) in the mean": "on average",
    r"no-?body|somebody|whoever|anybody|everybody": "you, we, or the thing",
    r"shall": "should, must",
    r"lies|stands(?! for)|carries": "is, has, contains",
    r"desks?|doors?|staircases?|painters?|ladders?": "the thing's own name",
    r"as far as we (?:remember|know)": "a source, or nothing",
    r"half of the reports|most failed reproductions": "a count, or nothing",
    r"becomes? a better start for": "gives a better initialization for",
    r"the (?:two|three|four|five) things that": "the thing's own name",
    r"(?:is|are) loud": "fails on",
    r"in which a run can live": "attainable range",
    r"worth a word": "a warning",
    r"with answers": "labeled",
    rf"(?:{OBJECTS})s? (?:says?|asks?|knows?|wants?|sees?|likes|thinks?)": "returns, raises, has",
}
RULES = [(re.compile(rf"\b(?:{word})\b", re.IGNORECASE), better) for word, better in WORDS.items()]
DISTRIBUTIVE = re.compile(
    rf"\b(?:(?:an?|one) (?:[\w-]+ )?(?:{COUNTED})|(?:{PLURAL}|(?:{COUNTED})s)) an? (?:{UNIT})\b"
)
RULES.append((DISTRIBUTIVE, "one X per Y"))
NEGATIVE_HEADING = re.compile(r"(?m)^#+ .*(?:\bnot\b|n't\b|\bnever\b).*$", re.IGNORECASE)


def read_cells(name):
    return json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def strip_markdown(text):
    """Markdown without code, formulas, addresses and the line that names the section."""
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    text = re.sub(r"(?m)^(?: {4,}|You are here:).*$", "", text)
    return strip_inline(text)


def strip_inline(text):
    text = re.sub(r"``[^`]*``|`[^`]*`", "", text)
    text = re.sub(r"(?s)\$\$.*?\$\$", "", text)
    text = re.sub(r"\$[^$\n]+\$", "", text)
    return re.sub(r"\]\([^)\s]*\)|https?://\S+", "]", text)


def find_docstrings(tree):
    """Docstrings, help texts below the fields of a class, and `help=` of calls."""
    for node in ast.walk(tree):
        value = getattr(node, "value", None)
        if isinstance(node, ast.keyword) and node.arg != "help":
            continue
        if isinstance(node, (ast.Expr, ast.keyword)) and isinstance(value, ast.Constant):
            lines = str(value.value).splitlines()
            yield "\n".join(line for line in lines if not line.lstrip().startswith(">>>"))


def find_comments(source):
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(\||noqa|type:)", token.string):
            yield re.sub(r"#\s*noqa.*", "", token.string)


def code_texts(source):
    source = re.sub(r"(?m)^[%!].*$", "", source)
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell of another language, or with a magic
        return
    yield from map(strip_inline, find_docstrings(tree))
    yield from map(strip_inline, find_comments(source))


def find_faults(text, headings=False):
    """(phrase, better) of each fault in a text."""
    line = re.sub(r"\s+", " ", text)
    for pattern, better in RULES:
        for match in pattern.finditer(line):
            yield match[0], better
    if headings:
        for match in NEGATIVE_HEADING.finditer(text):
            yield match[0], "a heading that names the subject"


def chapter_faults(name):
    faults = []
    for cell in read_cells(name):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found = list(find_faults(strip_markdown(source), headings=True))
        else:
            found = [fault for text in code_texts(source) for fault in find_faults(text)]
        faults += [f"{cell['id']}: {phrase!r}; better: {better}" for phrase, better in found]
    return faults


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ("Each picture is cropped.", "image"),
        ("the same place of both views", "position, grid cell"),
        ("It is wrong.", "incorrect, invalid"),
        ("the right match", "correct"),
        ("the whole image", "complete, full"),
        ("The deviation is 1.", "standard deviation"),
        ("the rate falls", "learning rate"),
        ("one row a step", "one X per Y"),
        ("256 images a GPU", "one X per Y"),
        ("400 MB a rank", "one X per Y"),
        ("keys a chunk", "one X per Y"),
        ("Nobody counted them.", "you, we, or the thing"),
        ("the box lies in the image", "is, has, contains"),
        ("This becomes a better start for it.", "gives a better initialization for"),
        ("The network knows it.", "returns, raises, has"),
    ],
)
def test_a_fault_is_found(text, better):
    assert [found for _, found in find_faults(text)] == [better]


@pytest.mark.parametrize(
    "text",
    [
        "The standard deviation is 1, the learning rate 0.3.",
        "The update happens in place and takes place once per step.",
        "One row per step; a function of a row.",
        "K stands for the length; the left and the right image.",
        "A step has a batch. One file takes an hour. The loss of a run after a step.",
        "What is wrong, and what can go wrong. Rounded to whole pixels.",
    ],
)
def test_plain_sentences_pass(text):
    assert not list(find_faults(text))


def test_code_formulas_and_addresses_are_not_read():
    text = "`whole` $whole$ [images](whole.ipynb)\n\n    whole()\n\n```\nwhole\n```\n"
    assert not list(find_faults(strip_markdown(text)))
    code = 'def f(whole):\n    """A whole."""\n    return "whole"  # a picture\n'
    found = [phrase for text in code_texts(code) for phrase, _ in find_faults(text)]
    assert found == ["whole", "picture"]
    field = 'class A:\n    x: int = 0\n    """The whole."""\n'
    assert any(list(find_faults(text)) for text in code_texts(field))


def test_headings_with_not_are_found():
    assert list(find_faults("## What is not here", headings=True))
    assert not list(find_faults("## Pitfalls\n\nThis is not a heading.", headings=True))


@pytest.mark.parametrize("name", NAMES)
def test_prose_is_plain(name):
    faults = chapter_faults(name)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", NARROW)
def test_code_fits_without_scrolling(name):
    for cell in read_cells(name):
        if cell["cell_type"] == "code":
            for line in "".join(cell["source"]).splitlines():
                assert len(line) <= COLUMNS, f"{cell['id']}: {line}"
