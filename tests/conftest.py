"""Fixtures that several folders share."""

import shutil

import pytest

from plinth.ops import kernels

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


LONGEST = ("test_docs.py", "test_lifecycle.py")  # they begin first, so that no process is left alone with one of them


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open the page; fail at the end on any script error, console error or request to another machine."""
    pages, problems = [], []

    def open_page(url, **options):
        page = browser.new_page(**options)
        pages.append(page)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: None if request.url.startswith((url, "data:")) else problems.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not problems


@pytest.fixture
def torch_kernels(monkeypatch):
    """Run every operation on PyTorch's own kernels, as on a processor or system that ours do not fit."""
    monkeypatch.setenv("PLINTH_KERNELS", "torch")
    for cached in (kernels.library, kernels.why_not):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (kernels.library, kernels.why_not):
        cached.cache_clear()
