"""The chapters as web pages: links lead somewhere, formulas are drawn, nothing is fetched."""

import json
import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
import site_pages
import site_render

NBS = site_pages.NBS
NAMES = [str(p.relative_to(NBS).with_suffix("")) for p in NBS.rglob("*.ipynb")]
NAMES = sorted(name for name in NAMES if ".ipynb_checkpoints" not in name)


def cells(name):
    return json.loads((NBS / f"{name}.ipynb").read_text())["cells"]


def markdown(name):
    return "\n".join("".join(c["source"]) for c in cells(name) if c["cell_type"] == "markdown")


def as_seen_from(name, link):
    """The chapter to which a link on the page of a chapter leads."""
    return os.path.normpath(os.path.join(os.path.dirname(name), link)).removesuffix(".html")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Path of the page below the site -> its HTML."""
    folder = tmp_path_factory.mktemp("site")
    site_pages.build(folder)
    found = {str(p.relative_to(folder)): p.read_text("utf-8") for p in folder.rglob("*.html")}
    return found, folder


def test_every_notebook_is_a_page(pages):
    assert set(pages[0]) == {f"{name}.html" for name in [*NAMES, site_pages.CONTRIBUTING]}


def test_every_internal_link_leads_to_a_page_of_the_site_and_a_heading(pages):
    found, folder = pages
    for name, text in found.items():
        ids = re.findall(r' id="([^"]+)"', text)
        assert len(ids) == len(set(ids)), f"{name} has an id twice"
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            if re.match(r"https?:|data:|mailto:", link):
                continue
            page, _, anchor = link.partition("#")
            page = os.path.normpath(os.path.join(os.path.dirname(name), page)) if page else name
            assert not page.startswith("..") and (folder / page).exists(), f"{name}: {link}"
            if anchor:
                assert f' id="{unquote(anchor)}"' in found[page], f"{name} links to {link}"


def slug(heading, lower):
    """The anchor of a heading: GitHub's for Markdown files, Jupyter's for notebooks."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    if lower:
        return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
    return text.replace(" ", "-")


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def broken_links(path, text):
    """Relative links of a Markdown text whose file or heading does not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = path.parent / file if file else path
        if not target.exists():
            broken.append(link)
        elif anchor:
            book = target.suffix == ".ipynb"
            other = (
                markdown(target.relative_to(NBS).with_suffix("")) if book else target.read_text()
            )
            headings = re.findall(r"(?m)^#+ +(.+?) *$", re.sub(r"(?s)```.*?```", "", other))
            if anchor not in [slug(heading, lower=not book) for heading in headings]:
                broken.append(link)
    return broken


def test_a_broken_link_is_found(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("# The loss, in ten lines\n")
    text = "[x](a.md) [y](a.md#the-loss-in-ten-lines) [z](b.md) [w](#the-los) `[v](c.md)` [u](https://x.y)"
    assert broken_links(path, text) == ["b.md", "#the-los"]
    tour = NBS / "00_tour.ipynb"
    assert not broken_links(tour, "[x](05_loss.ipynb) [y](#Fifty-training-steps)")
    assert broken_links(tour, "[x](05_los.ipynb) [y](#fifty)") == ["05_los.ipynb", "#fifty"]


@pytest.mark.parametrize("name", [*NAMES, "README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files_and_headings(name):
    if name.endswith(".md"):
        path = NBS.parent / name
        assert not broken_links(path, path.read_text("utf-8"))
    else:
        assert not broken_links(NBS / f"{name}.ipynb", markdown(name))


def test_links_of_the_index_are_rewritten_for_the_readme():
    def links(text):
        return re.findall(r"\]\(((?!https?:|mailto:)[^)\s]+)\)", without_code(text))

    def seen_from_the_top(link):
        return link if link.startswith("#") else os.path.normpath(os.path.join("nbs", link))

    readme = (NBS.parent / "README.md").read_text("utf-8")
    assert links(readme) == [seen_from_the_top(link) for link in links(markdown("index"))]


def rewritten(text):
    """The text after the rewriting of links in readme.sh."""
    script = Path(__file__).with_name("readme.sh").read_text()
    rules = re.findall(r"-e '([^']+)'", script)
    command = ["sed", "-E", *(part for rule in rules for part in ("-e", rule))]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def test_any_relative_link_is_rewritten_and_nothing_else():
    for link in ("31_is_my_loss_normal.ipynb", "a-b/c.d_e.ipynb#Two-words", "images/x.png"):
        assert rewritten(f"see [x]({link}).") == f"see [x](nbs/{link})."
    assert rewritten("[a](../X.md) [b](y.ipynb)") == "[a](X.md) [b](nbs/y.ipynb)"
    for text in ("[x](https://a.b/c.html)", "[x](#train)", "pairs[i](x)", "f(images/2)", "a(../b)"):
        assert rewritten(text) == text


def test_the_contents_have_the_chapters_titles_and_each_chapter_has_a_summary():
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\.ipynb\)", markdown("index").split("## Contents")[1])
    assert len(links) == len(NAMES) - 1
    for title, name in links:
        first = re.match(r"# (.+)\n\n> \S.+", "".join(cells(name)[0]["source"]))
        assert first and first[1] == title, name


def test_nothing_is_fetched_and_no_formula_is_left_as_text(pages):
    for name, text in pages[0].items():
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', text), name
        for tag in ("script", "pre", "code", "annotation"):
            text = re.sub(f"<{tag}.*?</{tag}>", "", text, flags=re.DOTALL)
        assert not re.search(r"\$[^$<]+\$|\\[a-z]{3,}", re.sub(r"<[^>]+>", "", text)), name


def test_every_figure_has_an_alternative_text(pages):
    alt = re.compile(r"""alt=("[^"]{15,}"|'[^']{15,}')""")
    missing = [
        name
        for name, text in pages[0].items()
        for tag in re.findall(r"<img[^>]*>", text)
        if not alt.search(tag) or "No description" in tag
    ]
    assert not missing, f"figures without a caption in italics right below them: {missing}"


def test_the_sections_list_every_chapter_once_and_the_pages_show_them(pages):
    sections = site_pages.sections()
    listed = [name for names in sections.values() for name in names]
    assert sorted(listed) == NAMES and listed[:2] == ["index", "00_tour"]
    for page, text in pages[0].items():
        menu = text.split("<main>")[0]
        assert re.findall(r"<summary>(.*?)</summary>", menu) == list(sections)[1:]
        name = page.removesuffix(".html")
        here = [name] if name in listed else []
        marked = re.findall(r'<a href="([^"]+)" aria-current="page">', menu)
        assert [as_seen_from(name, link) for link in marked] == here
        opened = re.findall(r"<details open><summary>(.*?)</summary>", menu)
        assert opened == [s for s, names in sections.items() if s and name in names]


def test_the_foot_of_a_page_links_to_the_chapters_before_and_after(pages):
    order = [name for names in site_pages.sections().values() for name in names]
    for i, name in enumerate(order):
        foot = pages[0][f"{name}.html"].split("<footer>")[1]
        for rel, other in (("prev", order[:i][-1:]), ("next", order[i + 1 :][:1])):
            found = re.findall(rf'<a href="([^"]+)" rel="{rel}">', foot)
            assert [as_seen_from(name, link) for link in found] == other


def test_a_page_begins_with_the_list_of_its_headings(pages):
    for name, text in pages[0].items():
        headings = re.findall(r'<h2 id="([^"]+)"', text)
        listed = re.findall(r'<nav class="contents".*?</nav>', text, re.DOTALL)
        assert len(listed) == (len(headings) > 2), name
        if listed:
            assert re.findall(r'href="#([^"]+)"', listed[0]) == headings


def test_the_search_finds_every_section_and_every_exported_name(pages):
    found, folder = pages
    text = (folder / "search-index.js").read_text("utf-8")
    assert text.startswith("const SEARCH = {") and len(text) < 1_000_000
    index = json.loads(text.removeprefix("const SEARCH = ").removesuffix(";\n"))
    assert {page[0] for page in index["pages"]} == set(found)
    names = {}
    for number, anchor, heading, exported, *_ in index["sections"]:
        page, _, _, module = index["pages"][number]
        assert heading and f' id="{anchor}"' in found[page]
        for name in exported:
            assert f' id="{module}.{name}"' in found[page]
            names.setdefault(module, set()).add(name)
    for path in (NBS.parent / "densecl").rglob("*.py"):
        module = ".".join(path.relative_to(NBS.parent).with_suffix("").parts)
        public = site_render.public_names(path.read_text("utf-8"))
        assert set(public) == names.get(module.removesuffix(".__init__"), set()), module
    matching = next(s for s in index["sections"] if "best_match" in s[3])
    assert "cosine" in matching[4] and "promote_types" in matching[5].split()


def test_the_readme_lists_the_chapters_in_the_same_order_and_sections():
    text, last = markdown("index").split("## Contents")[1], 0
    for section, names in site_pages.sections().items():
        for name in names:
            if name == "index":
                continue
            at = text.find(f"]({name}.ipynb)", last)
            assert at >= last, f"{name} is not listed, or not in the order of the sidebar"
            last = at
        if section:
            assert f"**{section}**" in text, section


@pytest.mark.parametrize("name", [n for n in NAMES if n != "index"])
def test_every_chapter_says_where_it_belongs(name):
    section = next(s for s, names in site_pages.sections().items() if name in names) or "Start"
    first = "".join(cells(name)[0]["source"])
    title = re.match(r"# (.+)", first)[1]
    index = os.path.relpath("index.ipynb", os.path.dirname(name) or ".")
    here = f"You are here: [densecl]({index}) › {section} › **{title}**"
    assert re.findall(r"(?m)^You are here: .*$", first) == [here]


@pytest.mark.parametrize("name", NAMES)
def test_chapters_are_named_by_links_not_by_file_names(name):
    text = re.sub(r"\]\([^)]*\)", "]()", markdown(name))
    files = {Path(n).name for n in NAMES} - {"index", "gallery", "results", "ablations", "cluster"}
    assert not re.findall(rf"`?\b({'|'.join(files)})\b`?", text)


def test_the_last_sentence_of_a_chapter_names_the_next_one():
    order = [name for names in site_pages.sections().values() for name in names]
    for name, after in pairwise(order[1:]):
        last = next(c for c in reversed(cells(name)) if c["cell_type"] == "markdown")
        where = r"\b(?:Next\b|Where to go next)[^\[]*\[[^\]]*\]\(([^)]+)\.ipynb\)"
        link = re.search(where, "".join(last["source"]))
        folder = os.path.dirname(name)
        assert link and os.path.normpath(os.path.join(folder, link[1])) == after, name
