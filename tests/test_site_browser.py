"""The pages in a browser, from file://: widths, images, errors, the search, the hover map.

They need Chromium and take minutes: `pytest --long`.
"""

import html
import json
import re
import shutil
import subprocess

import pytest
import site_pages

pytestmark = pytest.mark.long
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]
OPTIONS += ["--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom"]
# pages in a frame of a given width, one after the other; the script looks at each
HARNESS = """<!doctype html><meta charset="utf-8">
<iframe style="border:0;width:{width}px;height:900px"></iframe><pre id="result"></pre>
<script>
const frame = document.querySelector("iframe"), result = {{}};
const pause = time => new Promise(done => setTimeout(done, time));
const look = async (page, root) => {{ {script} }};
(async () => {{
  for (const name of {names}) {{
    const loaded = new Promise(done => frame.onload = done);
    frame.src = name;
    await loaded;
    result[name] = await look(frame.contentDocument, frame.contentDocument.documentElement);
  }}
  document.querySelector("#result").textContent = JSON.stringify(result);
}})();
</script>"""
LAYOUT = """
  const scrolls = e => e
    && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const right = e => e.getBoundingClientRect().right;
  const images = [...page.images].filter(image => image.getAttribute("style") !== "display: none;");
  return {
    wide: root.scrollWidth - root.clientWidth,
    cut: [...page.querySelectorAll("main :is(p, pre, table, img, li)")]
      .filter(e => right(e) > root.clientWidth + 1 && !scrolls(e))
      .map(e => e.outerHTML.slice(0, 50)),
    broken: images.filter(i => !i.complete || !i.naturalWidth).map(i => i.alt),
    code: [...page.querySelectorAll(".highlight pre")].filter(e => e.scrollWidth > e.clientWidth)
      .map(e => e.textContent),
  };"""
SEARCH = """
  const type = async (field, text) => {
    field.value = text;
    page.querySelector("#search ol").replaceChildren();
    field.dispatchEvent(new Event("input"));
    for (let i = 0; i < 100 && !page.querySelector("#search li"); i++) await pause(50);
    return [...page.querySelectorAll("#search li a")].map(a => [a.href, a.innerText]);
  };
  const press = (key, at) => at.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  press("/", page.body);
  const field = page.activeElement, found = {};
  for (const text of TEXTS) found[text] = await type(field, text);
  press("ArrowDown", field);
  return {found, focused: field.tagName, then: page.activeElement.tagName};"""
HOVER = """
  const element = page.querySelector("[id^=hover-]"), [a, b] = element.querySelectorAll("canvas");
  const picture = () => b.toDataURL(), text = () => element.querySelector("p").innerText;
  for (let i = 0; i < 100 && !text(); i++) await pause(50);
  const box = a.getBoundingClientRect(), before = picture(), line = text();
  const at = {clientX: box.left + .2*box.width, clientY: box.top + .3*box.height};
  a.dispatchEvent(new PointerEvent("pointermove", at));
  return {line, shown: box.width, changed: before !== picture(), after: text()};"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    folder = tmp_path_factory.mktemp("site")
    site_pages.build(folder)
    return folder


def browse(site, script, names, width=1280):
    """What the script returns for each page, and the errors in the console."""
    page = HARNESS.format(width=width, script=script, names=json.dumps(names))
    (site / "harness.html").write_text(page)
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={site}/profile"]
    command += ["--virtual-time-budget=1000000", f"file://{site}/harness.html"]
    got = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
    found = re.search(r'<pre id="result">(.*?)</pre>', got.stdout, re.DOTALL)
    assert found and found[1], got.stderr[-2000:]
    return json.loads(html.unescape(found[1])), re.findall(r".*CONSOLE.*", got.stderr)


@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_is_wider_than_its_window_and_nothing_is_missing(site, width):
    names = sorted(str(p.relative_to(site)) for p in site.rglob("*.html") if p.stem != "harness")
    pages, errors = browse(site, LAYOUT, names, width)
    assert not errors and set(pages) == set(names)
    for name, page in pages.items():
        assert page["wide"] <= 0 and not page["cut"] and not page["broken"], f"{name}: {page}"
        for text in page["code"] if width == 1280 else []:
            longest = max(text.splitlines(), key=len)
            assert len(longest) > 120, f"{name}: {longest!r} does not fit"


def test_the_search_finds_titles_headings_and_names_before_text(site):
    page = (site / "03_correspondence.html").read_text("utf-8")
    headings = re.findall(r'<li><a href="#([^"]+)">([^<]+)</a>', page)  # its table of contents
    anchor, heading = max(headings, key=lambda found: len(found[1]))
    texts = [
        "InfoNCE",
        "best_match",
        html.unescape(heading).lower(),
        "--queue-len",
        "xyzzy",
        "lmdb",
    ]
    pages, errors = browse(site, SEARCH.replace("TEXTS", json.dumps(texts)), ["data/02_lmdb.html"])
    got = pages["data/02_lmdb.html"]
    assert not errors and (got["focused"], got["then"]) == ("INPUT", "A")
    title, name, section, option, nothing, format_ = (got["found"][text] for text in texts)
    assert title[0][0].endswith("/05_loss.html")
    assert name[0][0].endswith("/03_correspondence.html#densecl.correspondence.best_match")
    assert name[0][1].startswith("best_match\nMethod › Dense correspondence › ")
    assert section[0][0].endswith(f"/03_correspondence.html#{anchor}")
    assert option and not nothing and format_[0][1].startswith("The LMDB format\nData")


def test_the_hover_map_follows_the_pointer(site):
    pages, errors = browse(site, HOVER, ["00_tour.html", "guides/gallery.html"])
    assert not errors
    for page in pages.values():
        assert page["shown"] > 100 and page["changed"] and page["line"] != page["after"]
        assert "best cosine" in page["after"]
