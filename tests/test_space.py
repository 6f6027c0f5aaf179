"""The page that shows a run while it generates: in a real browser, laid out as its README says for a Space of the Hub."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import gradio
import pytest
import torch
from browser import browser  # noqa: F401
from playwright.sync_api import expect

from diffusers_geometry import GeometryTrace
from diffusers_geometry.loading import UsageError

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "examples" / "space"
STATES = """() => {
  window.seen = [];
  setInterval(() => {
    const state = [document.querySelector('#now textarea')?.value ?? '', document.querySelector('#figure img')?.src ?? ''];
    if (state.join() !== (window.seen.at(-1) ?? []).join()) window.seen.push(state);
  }, 20);
}"""


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of a server of its own, from a folder that holds what a Space would."""
    folder = tmp_path_factory.mktemp("space")
    shutil.copytree(SPACE, folder, dirs_exist_ok=True)
    (folder / "diffusers_geometry").symlink_to(ROOT / "diffusers_geometry")
    (folder / "zoo").symlink_to(ROOT / "examples" / "zoo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(folder / "served"),
    }
    command = [sys.executable, "-u", "-W", "ignore", "app.py", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if "Running on local URL" in line:
                break
        assert server.poll() is None, "".join(lines)
        threading.Thread(target=server.stdout.read, daemon=True).start()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def page(browser, address):  # noqa: F811
    """The page, with what its console said; closing asserts that there was no error."""
    page, errors = browser.new_page(viewport={"width": 1400, "height": 2000}), []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
    page.on(
        "request", lambda request: errors.append(request.url) if not request.url.startswith((address, "data:", "blob:")) else None
    )
    page.goto(address)
    page.get_by_role("button", name="Generate").wait_for()
    yield page
    page.close()
    assert errors == []


def generate(page, **fields):
    """Fills fields, generates, and returns the last line."""
    for name, value in fields.items():
        field = page.locator(f"#{name} textarea, #{name} input").first
        field.fill(str(value))
        field.press("Tab")
    page.evaluate("document.querySelector('#now textarea').value = ''")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("/^(Done|Cannot)/.test(document.querySelector('#now textarea').value)", timeout=60_000)
    return page.locator("#now textarea").input_value()


def test_the_figure_changes_while_it_generates(page, tmp_path):
    page.evaluate(STATES)
    last = generate(page, steps=8, recorded=4)
    assert re.fullmatch(r"Done: .*; 256 Jacobian products \(dense\)\.", last)
    seen = page.evaluate("window.seen")
    before = [(line, image) for line, image in seen if line.startswith("Recorded step")]
    assert {line.split(":")[0] for line, _ in before} >= {f"Recorded step {k} of 4" for k in (1, 2, 3)}
    assert len({image for _, image in before if image}) >= 3
    expect(page.locator("#table")).to_contain_text(re.compile("(.*(trivial|coverage|consolidation)){4}", re.DOTALL))
    page.locator("#image img").wait_for()
    with page.expect_download() as download:
        page.locator("#archive").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path)
    trace = GeometryTrace.from_pretrained(tmp_path / "geometry")
    assert [step.index for step in trace.steps] == [0, 2, 5, 7]
    assert f"{trace.steps[-1].effective_dimension.value[0]:.4g}" in page.locator("#table").inner_text()


def test_bad_input_is_said_in_the_page_and_markup_is_text(page):
    assert generate(page, steps=1) == "Cannot run: Steps is 1. Expected a whole number from 2 to 200."
    assert generate(page, steps=4, prompt="a seven").startswith("Cannot run: Prompt is 'a seven', but this model (DDPMPipeline)")
    hostile = "<img src=x onerror=alert(1)>"
    said = generate(page, prompt="", model=hostile)
    assert said.startswith("Cannot run: ")
    assert hostile in said
    assert generate(page, model="digits").startswith("Done: ")


def test_leaving_early_ends_the_run_and_leaves_the_pipeline_as_it_was(app):
    pipe = app.loaded("digits")
    traces = app.watch(pipe, num_inference_steps=6, record_steps=4, generator=torch.Generator().manual_seed(0))
    assert [len(next(traces).steps), len(next(traces).steps)] == [1, 2]
    traces.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "geometry"]
    assert "step" not in pipe.scheduler.__dict__
    assert [len(t.steps) for t in app.watch(pipe, num_inference_steps=4, record_steps=2)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("model", "prompt", "label", "said"),
    [
        ("sd-mnist", "", "", "Prompt is empty. Expected one for this model"),
        ("sd-mnist", "a seven", "3", "Class is '3', but this model"),
        ("dit-mnist", "", "", "Class is empty. Expected one for this model"),
        ("dit-mnist", "", "seven", "Class is 'seven'. Expected a whole number"),
        ("dit-mnist", "", "99", "Class is 99. Expected one of 0 ("),
    ],
)
def test_fields_that_do_not_fit_the_model_are_refused(app, model, prompt, label, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        app.call_of(app.loaded(model), prompt, label, 10, 0)


def test_a_space_installs_what_the_package_needs():
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r'"(.*?)"', re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)[1])
    assert (SPACE / "requirements.txt").read_text().splitlines() == needed
    header = (SPACE / "README.md").read_text().split("---")[1]
    assert f"sdk_version: {gradio.__version__}\n" in header
    assert f"gradio=={gradio.__version__}\n" in (ROOT / ".ci" / "constraints.txt").read_text() + "\n"
    assert (SPACE / re.search(r"app_file: (.*)", header)[1]).is_file()
