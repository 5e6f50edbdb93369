"""The chapters as web pages: every link leads somewhere, every formula is drawn, nothing is fetched from outside."""
import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import site_pages


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Name of the page -> its HTML."""
    folder = tmp_path_factory.mktemp("site")
    site_pages.build(folder)
    return {p.name: p.read_text(encoding="utf-8") for p in folder.glob("*.html")}, folder


def test_every_notebook_is_a_page(pages):
    assert set(pages[0]) == {f"{p.stem}.html" for p in site_pages.NBS.glob("*.ipynb")}


def test_every_internal_link_leads_to_a_page_and_a_heading(pages):
    found, folder = pages
    for name, text in found.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            if re.match(r"https?:|data:|mailto:", link): continue
            page, _, anchor = link.partition("#")
            page = page or name
            assert (folder/page).exists() or (site_pages.NBS/page).resolve().exists(), f"{name} links to {link}"
            if anchor: assert f'id="{unquote(anchor)}"' in found[page], f"{name} links to {link}"


def test_nothing_is_fetched_and_no_formula_is_left_as_text(pages):
    for name, text in pages[0].items():
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', text), name
        shown = re.sub(r"<script.*?</script>|<pre.*?</pre>|<code.*?</code>|<annotation.*?</annotation>", "", text, flags=re.S)
        assert not re.search(r"\$[^$<]+\$|\\[a-z]{3,}", re.sub(r"<[^>]+>", "", shown)), name


def test_every_picture_has_words_for_those_who_cannot_see_it(pages):
    missing = [name for name, text in pages[0].items() for tag in re.findall(r"<img[^>]*>", text)
               if not re.search(r"""alt=("[^"]{15,}"|'[^']{15,}')""", tag) or "No description" in tag]
    assert not missing, f"pictures without a caption in italics right below them: {missing}"


def test_the_quarto_sidebar_lists_every_chapter_in_order():
    listed = re.findall(r"- (\w+)\.ipynb", (site_pages.NBS/"sidebar.yml").read_text())
    assert listed == ["index", *sorted(p.stem for p in site_pages.NBS.glob("[0-9]*.ipynb"))]


def test_every_chapter_says_where_on_the_map_it_is():
    stops = set()
    for path in sorted(site_pages.NBS.glob("[0-9]*.ipynb")):
        here = re.findall(r"^You are here: (.*)$", "".join(json.loads(path.read_text())["cells"][0]["source"]), re.M)
        assert len(here) == 1 and len(re.findall(r"\*\*\[\w+\]", here[0])) == 1, path.name
        stops.add(here[0].replace("*", ""))
    assert len(stops) == 1
