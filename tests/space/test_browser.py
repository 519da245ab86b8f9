"""The page in a real browser, on the embedded miniature."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from vlv.miniature.world import OBJECTS

from ..interpreter import PythonProcess

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright runs the browser tests")
pytest.importorskip("gradio", reason="pip install 'vlv[space]' runs the browser tests")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `apt-get install chromium` runs the browser tests"),
]
EXAMPLES = Path(__file__).parents[2] / "space" / "examples"
SECONDS = 1000  # playwright counts in milliseconds


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a running `vlv demo`."""
    log = tmp_path_factory.mktemp("demo") / "log"
    log.touch()
    code = "import sys; from vlv.cli.main import main; sys.exit(main())"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    server = PythonProcess(code, ["demo", "--port", "0"], stdout=log, stderr=log, env=environment)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield found.group()
    finally:
        server.kill_group()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address, request):
    """A new page. Its last state is saved as an image in the folder VLV_SCREENSHOTS, if that variable is set."""
    opened = browser.new_page(viewport=getattr(request, "param", {"width": 1100, "height": 900}))
    opened.set_default_timeout(60 * SECONDS)
    opened.goto(address)
    opened.get_by_role("tab", name="Caption").wait_for()
    yield opened
    if folder := os.environ.get("VLV_SCREENSHOTS"):
        opened.wait_for_timeout(0.5 * SECONDS)
        opened.screenshot(path=Path(folder) / f"{request.node.originalname.removeprefix('test_')}.png")
    opened.close()


def field(page, label: str):
    """The block with this label in the open tab."""
    return page.locator("[role=tabpanel]:visible .block").filter(has=page.get_by_text(label, exact=True))


def shown_image(page, label: str):
    return field(page, label).locator(".image-frame img")


def upload(page, path: Path, label: str = "Image") -> None:
    """Uploads an image and waits until the page shows it."""
    field(page, label).locator("input[type=file]").set_input_files(path)
    shown_image(page, label).wait_for()


def expect_no_bare_error(page) -> None:
    """The outputs say "No result" in place of gradio's "Error"."""
    labels = page.locator("[role=tabpanel]:visible .wrap > .error")
    labels.first.wait_for()
    style = (
        "labels => labels.map(label => [getComputedStyle(label).fontSize, getComputedStyle(label, '::after').content])"
    )
    shown = labels.evaluate_all(style)
    assert shown and all(label == ["0px", '"No result"'] for label in shown)


def test_caption(page):
    upload(page, EXAMPLES / "test-1.png")
    page.get_by_role("button", name="Caption", exact=True).click()
    box = page.get_by_label("Caption", exact=True).and_(page.locator("textarea"))
    playwright.expect(box).to_have_value(re.compile("|".join(OBJECTS)), timeout=60 * SECONDS)


def test_reconstruct(page):
    page.get_by_role("tab", name="Reconstruct").click()
    page.locator("[role=tabpanel]:visible .gallery button, [role=tabpanel]:visible .gallery-item").first.click()
    shown_image(page, "Image").wait_for()
    page.get_by_role("button", name="Reconstruct", exact=True).click()
    shown_image(page, "Reconstruction").wait_for(timeout=120 * SECONDS)
    assert shown_image(page, "Original, resized").is_visible()


def test_compose(page):
    page.get_by_role("tab", name="Compose").click()
    upload(page, EXAMPLES / "test-1.png", "First image")
    upload(page, EXAMPLES / "combo-1.png", "Second image")
    page.get_by_role("button", name="Compose", exact=True).click()
    shown_image(page, "Composed").wait_for(timeout=120 * SECONDS)


def test_a_file_that_is_not_an_image_gives_a_message(page, tmp_path):
    fake = tmp_path / "notes.png"
    fake.write_text("this is text")
    field(page, "Image").locator("input[type=file]").set_input_files(fake)
    field(page, "Image").get_by_label("Remove Image").wait_for()  # the upload is complete
    page.get_by_role("button", name="Caption", exact=True).click()
    page.get_by_text("cannot be read as an image").first.wait_for()
    expect_no_bare_error(page)


def test_what_the_model_knows_is_on_the_first_screen(page):
    for tab, result in (("Caption", "Caption"), ("Reconstruct", "Reconstruction"), ("Compose", "Composed")):
        page.get_by_role("tab", name=tab).click()
        sentence = page.locator("[role=tabpanel]:visible").get_by_text("It knows sixteen objects")
        box, output = sentence.bounding_box(), field(page, result).last.bounding_box()
        assert box["y"] + box["height"] <= 900
        assert 0 <= box["y"] - (output["y"] + output["height"]) <= 40  # just below the output
    page.get_by_role("tab", name="Caption").click()


def test_an_empty_seed_gives_a_message(page):
    page.get_by_role("tab", name="Reconstruct").click()
    page.locator("[role=tabpanel]:visible .gallery button, [role=tabpanel]:visible .gallery-item").first.click()
    shown_image(page, "Image").wait_for()
    page.get_by_label("Seed").and_(page.locator(":visible")).fill("")
    page.get_by_role("button", name="Reconstruct", exact=True).click()
    page.get_by_text("Seed must be a whole number").wait_for()
    expect_no_bare_error(page)


def test_a_file_that_is_too_large_gives_a_message(page, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(bytes(11 * 2**20))
    field(page, "Image").locator("input[type=file]").set_input_files(large)
    page.get_by_text("maximum allowed size").first.wait_for()


@pytest.mark.parametrize("page", [{"width": 390, "height": 844}], indirect=True)
def test_phone(page):
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    upload(page, EXAMPLES / "test-1.png")
    button = page.get_by_role("button", name="Caption", exact=True)
    button.scroll_into_view_if_needed()
    box = button.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 32
    button.click()
    field = page.get_by_label("Caption", exact=True).and_(page.locator("textarea"))
    playwright.expect(field).to_have_value(re.compile("|".join(OBJECTS)), timeout=60 * SECONDS)


def test_the_examples_have_the_size_of_the_miniature_s_images():
    assert all(Image.open(path).size == (64, 64) for path in EXAMPLES.glob("*.png"))
    assert len(list(EXAMPLES.glob("*.png"))) >= 4
