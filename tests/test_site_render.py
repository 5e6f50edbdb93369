"""How a notebook becomes a web page: code, outputs, formulas, links, sections."""

import base64
import io
import re

import pytest
import site_pages
import site_render
from nbformat import v4
from PIL import Image
from site_render import Chapter


def chapter(*cells):
    title = v4.new_markdown_cell("# A chapter\n\n> Its summary.")
    return Chapter(v4.new_notebook(cells=[title, *cells]))


def code(source, *outputs):
    return v4.new_code_cell(source, outputs=list(outputs))


def printed(text, name="stdout"):
    return v4.new_output("stream", name=name, text=text)


def shown(**data):
    return v4.new_output("execute_result", data={k.replace("_", "/"): v for k, v in data.items()})


def test_hidden_cells_and_directives_are_left_out():
    sources = "#| hide\nsecret = 1", "#| default_exp x", "#| slow\nopen_ = 1"
    page = chapter(*map(code, sources))
    assert "secret" not in page.html and "#|" not in page.html and "open_" in page.html


def test_outputs_of_one_stream_are_one_block_and_a_carriage_return_writes_over_the_line():
    page = chapter(code("f()", printed("10 %\r20 %\n"), printed("a <b>\n"), printed("!", "stderr")))
    assert page.html.count('<div class="output">') == 2
    assert "<pre>20 %\na &lt;b&gt;</pre>" in page.html


def test_a_figure_has_the_caption_below_as_its_alternative_text():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    figure = code("plot()", shown(image_png=data + "\n", text_plain="<Figure>"))
    page = chapter(figure, v4.new_markdown_cell('*A "curve" of `x`.*\n\nMore text.'))
    (image,) = re.findall("<img[^>]*>", page.html)
    assert 'alt="A &quot;curve&quot; of  x ."' in image and 'width="40" height="30"' in image
    assert f'src="data:image/png;base64,{data}"' in image
    assert "&lt;Figure&gt;" not in page.html


def test_html_and_markdown_outputs_are_shown_as_such_and_an_error_is_refused():
    table = "| a |\n|---|\n| 1 |"
    outputs = shown(text_html="<b>x</b>", text_plain="x"), shown(text_markdown=table)
    page = chapter(code("x", *outputs))
    assert "<b>x</b>" in page.html and "<td>1</td>" in page.html
    with pytest.raises(ValueError, match="KeyError"):
        chapter(code("x", v4.new_output("error", ename="KeyError", evalue="", traceback=[])))


def test_formulas_are_drawn_in_text_and_tables_and_not_in_code():
    text = "$a_1$ and `$b$` cost \\$5\n\n$$\\arg\\max_j |x_j|$$\n\n"
    table = "| $|v|$ |\n|---|\n| $w$ |\n\n    echo $HOME"
    page = chapter(v4.new_markdown_cell(text + table))
    assert page.html.count("<math") == 4 and page.html.count('display="block"') == 1
    assert "$b$" in page.html and "$HOME" in page.html and "$5" in page.html


def test_a_formula_stays_with_the_punctuation_beside_it():
    page = chapter(v4.new_markdown_cell("the loss ($a$), $b$ and $c$."))
    found = re.findall(r'<span class="together">(\(?)<math.*?</math>(.*?)</span>', page.html)
    assert found == [("(", "),"), ("", ".")]
    assert ".together { white-space: nowrap }" in site_pages.style()


def test_a_number_stays_with_its_unit_in_text_but_not_in_code():
    page = chapter(v4.new_markdown_cell("4.2 % of 3 ± 1, `7 % 3`"))
    assert (
        "4.2\u00a0% of 3\u00a0±" in page.html and "±\u00a01" in page.html and "7 % 3" in page.html
    )


def test_links_to_notebooks_become_links_to_pages():
    for url, there in (
        ("31_is_my_loss_normal.ipynb", "31_is_my_loss_normal.html"),
        ("../a-b/c.ipynb#The-loss,-again", "../a-b/c.html#the-loss-again"),
        ("../CONTRIBUTING.md", "CONTRIBUTING.html"),
        ("images/map.png", "images/map.png"),
        ("https://example.org/x.ipynb#A", "https://example.org/x.ipynb#A"),
    ):
        page = chapter(v4.new_markdown_cell(f"[x]({url})"))
        assert f'<a href="{there}">x</a>' in page.html


def test_sections_have_anchors_their_text_and_the_names_that_they_export():
    text = "Before.\n\n## The *loss*, `x`\n\nOne & two $x$.\n\n## The loss, x\n\nThree."
    exported = "#| export\ndef f(): ...\ndef _p(): ...\n"
    exported += "class A:\n    def g(self): ...\n    def _h(self): ..."
    exported = code(exported, printed("  --queue-len N\n"))
    page = chapter(v4.new_markdown_cell(text), code("#| default_exp loss"), exported)
    first, one, two = page.sections
    assert (first.heading, first.prose) == ("A chapter", "Its summary. Before.")
    assert (one.heading, one.anchor, one.prose) == ("The loss, x", "the-loss-x", "One & two .")
    assert (two.anchor, two.prose) == ("the-loss-x-1", "Three.")
    assert [name for name, _ in two.names] == ["f", "A", "A.g"]
    assert '<span id="densecl.loss.A.g"></span>' in page.html
    assert {"--queue-len", "class", "self"} <= two.words and not one.words


def test_three_headings_make_a_table_of_contents_below_the_summary():
    two, three = "## One\n\n## Two", "\n\n## Three"
    page = site_pages.body(chapter(v4.new_markdown_cell(two + three)))
    assert page.index("</blockquote>") < page.index('href="#one"') < page.index('id="one"')
    assert 'class="contents"' not in site_pages.body(chapter(v4.new_markdown_cell(two)))


def test_a_language_that_is_not_known_is_shown_without_colors():
    assert site_render.code_html("<a>", "no-such-language") == "<pre>&lt;a&gt;</pre>\n"
    assert '<span class="k">' in site_render.code_html("def f(): ...")
