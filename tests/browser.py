"""Debian's Chromium, headless, for tests of pages; `.ci/run` installs it."""

import shutil

import pytest
from playwright.sync_api import sync_playwright


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:  # in CI it is there: .ci/run installs it or stops
        pytest.skip("pages are not tested, there is no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
