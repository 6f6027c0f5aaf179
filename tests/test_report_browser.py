"""The page in a real browser (Debian's Chromium): what moves, sorts, prints and can be read; what foreign text cannot do."""

import contextlib
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pypdfium2
import pytest
from audit_folders import HOSTILE, audit_document, write_audit
from axe_playwright_python.sync_playwright import Axe
from browser import browser  # noqa: F401

from diffusers_geometry.report import write_report

PROMPTS = ["a thin seven", "a bold three", *HOSTILE]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    labels = [True, True, *[False] * len(HOSTILE)]
    document, spectra = audit_document(PROMPTS, (0, 1, 2), failed=(8,), memorised=(0, 1), labels=labels, reference=True)
    return write_report(write_audit(tmp_path_factory.mktemp("report"), document, spectra))


@pytest.fixture
def opened(browser, page_path):  # noqa: F811
    """Opens the page in a context of its own; whatever the console says, asks the user, or asks the network fails the test."""
    contexts, seen = [], []

    def one(path=page_path, **options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: seen.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: seen.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (seen.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: seen.append(f"request: {request.url}") if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    one.seen = seen
    yield one
    for context in contexts:
        context.close()
    assert seen == []


def data_of(page):
    return json.loads(page.text_content("#data"))


def drawn(page):
    """Singular values that the figure shows, read back from its coordinates by the grid's labels."""
    figure = page.evaluate("""() => ({
      path: document.querySelector('#spectrum').getAttribute('d'),
      ticks: [...document.querySelectorAll('#plot text[text-anchor=end]')].map((t) => [t.textContent, t.getAttribute('y') - 4]),
    })""")
    ticks = [(float(text.replace("−", "-")), y) for text, y in figure["ticks"]]
    slope, start = np.polyfit([y for _, y in ticks], [value for value, _ in ticks], 1)
    heights = [float(point.split()[1]) for point in figure["path"][1:].split("L")]
    return start + slope * np.array(heights)


def test_the_figure_shows_the_moment_of_the_slider(opened):
    page = opened()
    data = data_of(page)
    last = len(data["sigmas"]) - 1
    assert page.input_value("#step") == str(last)
    page.focus("#step")
    for step in (last, last - 1, last - 2):
        assert page.text_content("#moment").startswith(f"Moment {step + 1} of {last + 1}: noise σ = {data['sigmas'][step]}")
        assert page.get_attribute("#step", "aria-valuetext") == page.text_content("#moment")
        assert np.abs(drawn(page) - data["all"]["middle"][step]).max() < 0.004
        assert data["all"]["numbers"][step][0] in page.text_content("#numbers")
        page.keyboard.press("ArrowLeft")
    page.focus("#plot")
    page.keyboard.press("Home")
    assert page.text_content("#moment").startswith("Moment 1 of")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#moment").startswith("Moment 2 of")
    page.keyboard.press("End")
    page.select_option("#run", "4")
    unit = next(unit for unit in data["units"] if unit["index"] == 4)
    assert np.abs(drawn(page) - unit["values"][last]).max() < 0.004
    assert unit["numbers"][last][2] in page.text_content("#numbers")
    assert page.get_attribute("#picture", "src") == page.get_attribute("img[data-unit='4']", "src")
    page.check("#log")
    assert page.evaluate("document.querySelectorAll('#plot .grid').length") > 3
    page.click(".panels a >> nth=0")
    assert page.text_content("#moment").startswith("Moment 1 of")
    page.click("button[data-choose='0']")
    assert (page.input_value("#run"), page.evaluate("document.activeElement.id")) == ("0", "plot")


def test_play_runs_to_the_end_and_is_left_out_for_reduced_motion(opened):
    page = opened()
    page.clock.install()
    page.focus("#plot")
    page.keyboard.press("End")
    page.click("#play")
    assert page.text_content("#play") == "Stop"
    assert page.text_content("#moment").startswith("Moment 1 of")
    page.clock.run_for(1300)
    assert page.text_content("#moment").startswith("Moment 3 of")
    page.clock.run_for(5000)
    assert page.text_content("#moment").startswith("Moment 6 of")
    assert page.text_content("#play") == "Play"
    assert not opened(reduced_motion="reduce").is_visible("#play")


def test_tables_sort_by_mouse_and_keyboard_with_unknown_last(opened):
    page = opened()
    heads = page.eval_on_selector_all("#all-runs th", "all => all.map((h) => h.dataset.name)")
    column = heads.index("ψ (nats)")
    read = f"rows => rows.map((r) => r.cells[{column}].dataset.value ?? null)"
    before = [None if v is None else float(v) for v in page.eval_on_selector_all("#all-runs tbody tr", read)]
    known = sorted(v for v in before if v is not None)
    assert before != [*known, None]
    head, button = f"#all-runs th >> nth={column}", f"#all-runs th >> nth={column} >> button"
    for press, order, said in ((page.click, known, "ascending"), (lambda s: page.press(s, "Enter"), known[::-1], "descending")):
        press(button)
        after = [None if v is None else float(v) for v in page.eval_on_selector_all("#all-runs tbody tr", read)]
        assert after == [*order, None]
        assert page.get_attribute(head, "aria-sort") == said
        assert page.text_content("#said") == f"Sorted by ψ (nats), {said}."
    assert page.get_attribute("#all-runs th >> nth=0", "aria-sort") == "none"
    page.click("#all-runs th >> nth=1 >> button")
    names = page.eval_on_selector_all("#all-runs tbody tr", "rows => rows.map((r) => r.cells[1].textContent)")
    assert names == page.evaluate("names => [...names].sort((a, b) => a.trim().localeCompare(b.trim()))", names)


def test_foreign_text_is_shown_and_does_nothing(opened):
    page = opened()
    titles = [" ".join(title.split()) for title in page.locator(".prompts .title").all_inner_texts()]
    for prompt in HOSTILE[:5]:
        assert " ".join(prompt.split()) in titles
    options = page.eval_on_selector_all("#run option", "all => all.map((o) => o.textContent)")
    assert f"run 6: {HOSTILE[0]}, seed 0" in options
    for index in (6, 9, 12):
        page.select_option("#run", str(index))
    assert page.evaluate("document.querySelectorAll('main img:not([src^=\"data:\"])').length") == 0


@pytest.fixture
def spied():
    """A web server and what it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_the_policy_stops_what_an_escape_would_miss(browser, page_path, tmp_path, spied):  # noqa: F811
    address, asked = spied
    evil = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><svg onload='window.pwned = 3'></svg>"
    evil += f"<img src='{address}/image'><iframe src='{address}/frame'></iframe><style>main {{ display: none }}</style>"
    evil += f"<script src='{address}/script'></script><link rel=stylesheet href='{address}/style'>"
    send = f"fetch('{address}/fetch').then(() => 'sent', () => 'refused')"
    broken = tmp_path / "index.html"
    broken.write_text(page_path.read_text().replace("<main>", f"<main>{evil}"))
    page = browser.new_page()
    page.goto(broken.as_uri(), wait_until="load")
    assert page.evaluate(send) == "refused"
    assert page.evaluate("window.pwned") is None
    assert page.is_visible("#summary")
    page.keyboard.press("Tab")
    page.close()
    assert asked == []
    broken.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", broken.read_text()))  # the control: what it would do otherwise
    page = browser.new_page()
    page.goto(broken.as_uri(), wait_until="load")
    page.evaluate(send)
    assert page.evaluate("window.pwned") in (1, 2, 3)
    assert not page.is_visible("#summary")
    page.close()
    assert {"/image", "/frame", "/script", "/style", "/fetch"} <= set(asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_hard_to_read_or_to_reach(opened, scheme):
    page = opened(color_scheme=scheme)
    page.eval_on_selector_all("details", "all => { for (const one of all) one.open = true; }")
    found = Axe().run(page).response["violations"]
    assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in found] == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 28)"}[scheme]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for name, expected in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 22, 28)"), ("system", ground)):
        page.keyboard.press("Enter")
        assert page.text_content("#theme") == f"Theme: {name}"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == expected


@pytest.mark.parametrize("width", [360, 1600])
def test_it_fits_narrow_and_wide(opened, width):
    page = opened(viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wider = page.evaluate("""() => [...document.querySelectorAll('main *')].filter((e) =>
      !e.closest('.scroll, .hidden-text, select') &&
      e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 100))""")
    assert wider == []
    small = page.evaluate("""() => [...document.querySelectorAll('main svg.chart')].filter((e) => e.querySelector('text')
      && e.querySelector('text').getBoundingClientRect().height < 9).length""")
    assert small == 0
    data = data_of(page)
    assert np.abs(drawn(page) - data["all"]["middle"][-1]).max() < 0.008


def test_it_prints(opened, page_path):
    page = opened(color_scheme="dark")
    page.click("#theme")
    page.click("#theme")
    assert page.text_content("#theme") == "Theme: dark"  # and light on paper all the same
    paper = io.BytesIO(page.pdf(prefer_css_page_size=True, print_background=True))
    with contextlib.closing(pypdfium2.PdfDocument(paper)) as document:
        texts = [document[i].get_textpage().get_text_range() for i in range(len(document))]
        assert 5 <= len(texts) <= 14
        joined = " ".join(texts)
        assert "The run at a glance" in joined
        assert "Hashes" in joined
        assert "unet/diffusion_pytorch_model.safetensors" in "".join(joined.split())  # details are open on paper
        assert "Moment 6 of 6" not in joined
        corner = document[0].render(scale=1).to_pil().getpixel((3, 3))
        assert corner == (255, 255, 255)
        sizes = {tuple(round(s) for s in document[i].get_size()) for i in range(len(document))}
        assert sizes == {(595, 842), (842, 595)}
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 1  # closed again afterwards


def test_without_script_everything_but_the_slider_is_there(opened):
    page = opened(java_script_enabled=False)
    assert page.is_visible(".panels svg >> nth=0")
    assert page.locator("#all-runs tbody tr").count() == 3 * len(PROMPTS)
    assert not page.is_visible("#explorer")
    assert not page.is_visible("#theme")
    assert "hf-geometry audit --repeat audit" in page.inner_text("#repeat pre")


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((["a", "b"], (0,)), {"failed": (0, 1)}),
        (([None], (0,)), {"kind": "unconditional", "scores": False}),
        (([3], (0,)), {"size": 2}),
    ],
    ids=["failed", "unconditional", "two dimensions"],
)  # fmt: skip
def test_small_and_empty_pages_open_without_a_complaint(opened, tmp_path, arguments, options):
    document, spectra = audit_document(*arguments, **options)
    page = opened(write_report(write_audit(tmp_path, document, spectra)))
    assert page.is_visible("#summary")
    assert page.is_visible("#explorer") == (len(options.get("failed", ())) != 2)
