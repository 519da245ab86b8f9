"""The page of `vlv evaluate report`: what it shows, what it leaves out, and that it loads nothing."""

import json
import re
import shutil
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vlv.cli.main import main
from vlv.evaluation.caption_sets import CaptionSet, Measured, measure_captions
from vlv.evaluation.compare import CaptionerRun, compare
from vlv.evaluation.report import ReportSettings, write_report

IMAGES = Path(__file__).parent.parent.parent / "examples" / "images"
NAMES = [f"test-{number}.png" for number in range(1, 7)]
HOSTILE = '<script>alert("x")</script> & $x^2$ </svg>'


def figure(label: str, value: float, *interval: float) -> dict:
    return {"label": label, "value": value} | ({"interval": list(interval)} if interval else {})


def save(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Results of each kind, in the forms in which the commands write them; of the captions, the command's own."""
    root = tmp_path_factory.mktemp("runs")
    images = root / "images"
    shutil.copytree(IMAGES, images)
    captions = {name: f"a large dog, number {number}" for number, name in enumerate(NAMES)}
    captions[NAMES[2]] = HOSTILE
    references = {name: ["a large dog, number 3", "a cat"] for name in NAMES}
    save(root / "captions.json", captions)
    save(root / "references.json", references)
    command = ["evaluate", "captions", "--captions", str(root / "captions.json"), "--bootstrap", "20"]
    command += ["--references", str(root / "references.json"), "--output", str(root / "caption_metrics.json")]
    assert main(command) == 0
    versions, scores = {"vlv": "1"}, dict(zip(NAMES, [0.1, 0.5, -0.2, 0.3, 0.0, 0.4], strict=True))
    generated = {"1": {name: f"pictures/{name}" for name in NAMES}, "2": {name: f"pictures/{name}" for name in NAMES}}
    shutil.copytree(IMAGES, root / "cycle" / "pictures")
    by_guidance = {g: {"frechet_distance": figure("FID", 9.5, 8, 11), "cosine": figure("cosine", 0.5)} for g in "12"}
    mean = {"mean": 3.5, "low": 2.5, "high": 4.5}
    judged = {
        "value": mean,
        "failed": {"x.png": HOSTILE},
        "verdicts": dict(zip(NAMES, [0, 1, 2, 4, 5, 6], strict=True)),
    }
    judge = {
        "metrics": judged,
        "config": {"captions": str(root / "captions.json"), "images": str(images), "against": None},
    }
    share = {"mean": 0.625, "low": 0.5, "high": 0.75}
    answered = {"questions": 8, "failed": {}, "without_caption": 0, "accuracy": share, "exact_match": share}
    longer = {name: f"other of {name}" + " and more" * 4 * (name == NAMES[4]) for name in NAMES}
    captioners = {
        "ours": CaptionerRun("a", "vlv", {name: f"ours of {name}" for name in NAMES}, images_per_second=7.25),
        HOSTILE: CaptionerRun("b", "file", longer, {"x.png": HOSTILE}),
        "broken": CaptionerRun("c", error="it does not load"),
    }

    def measure(names: list[str], sets: Mapping[str, CaptionSet]) -> dict[str, Measured]:
        return {label: measure_captions(own) for label, own in sets.items()}

    (root / "compare").mkdir()
    compare(captioners, [*NAMES, "x.png"], measure, {"images": str(images)}, 20, root / "compare")
    return {
        "images": images,
        "captions.json": root / "captions.json",
        "captions": root / "caption_metrics.json",
        "cycle": save(
            root / "cycle" / "results.json",
            {
                "metrics": by_guidance,
                "per_image": {g: {"cosine": scores} for g in "12"},
                "files": generated,
                "config": {"images": str(images), "captions": str(root / "captions.json")},
                "versions": versions,
            },
        ).parent,
        "judge": save(root / "judge" / "results.json", judge).parent,
        "second": save(root / "second" / "results.json", judge).parent,
        "vqa": save(root / "vqa.json", {"metrics": {"0 shots": answered}, "config": {"questions": "q.json"}}),
        "score": save(root / "scores.json", scores | {NAMES[0]: [0.1, 0.05]}),
        "compare": root / "compare",
        "parts": save(root / "evaluation.json", {"captions": {"f1": 0.9}, "pictures": {"f1": 0.8, "test": {"g": 1}}}),
    }


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("report") / "report.html"
    results = [str(path) for name, path in runs.items() if name not in ("images", "captions.json")]
    options = ["--images", str(runs["images"]), "--captions", str(runs["captions.json"]), "--cases", "2"]
    assert main(["evaluate", "report", *results, *options, "--output", str(output), "--title", HOSTILE]) == 0
    return output


class Reader(HTMLParser):
    """The elements of a page with their attributes, and the words of each part."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_the_page_has_the_figures_of_every_kind_of_run(page):
    words = " ".join(Reader(page.read_text()).words)
    for expected in ("CIDEr-D", "9.5 (8 to 11)", "62.50", "3.5", "score, 0 to 6", "7.25", "-1.333 (-", "f1"):
        assert expected in words, expected
    for said in ("weighted kappa 1.00", "broken: it does not load", "no verdict on x.png", "71.4%", "guidance 1, 2"):
        assert said in words, said


def test_the_page_loads_nothing_and_runs_nothing(page):
    reader = Reader(page.read_text())
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in reader.elements}
    for tag, attributes in reader.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                assert value.startswith(("#", "data:image/")), (tag, name, value[:80])
            assert not re.search(r"url\((?!#)", value) and not name.startswith("on"), (tag, name, value)
    assert not re.search(r"url\(|@import", page.read_text().split("</style>")[0])
    assert sum(tag == "img" for tag, _ in reader.elements) >= 20
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for _, own in reader.elements for name, value in own.items() if name.endswith("href")]
    assert targets and set(targets) <= set(ids)


def test_texts_are_escaped(page):
    words = " ".join(Reader(page.read_text()).words)
    assert words.count('<script>alert("x")</script> & $x^2$ </svg>') >= 5  # title, note, column, caption, reason
    assert "<script" not in page.read_text()


def test_the_best_and_the_worst_images_are_shown_with_their_captions(runs, tmp_path):
    settings = ReportSettings(str(runs["images"]), str(runs["captions.json"]), cases=2)
    scores, cycle, compared = write_report(
        [runs["score"], runs["cycle"], runs["compare"]], tmp_path / "r.html", settings=settings
    )
    best, worst = scores.grids
    assert [case.name for case in best.cases] == [NAMES[1], NAMES[5]]
    assert [case.name for case in worst.cases] == [NAMES[2], NAMES[4]]
    assert worst.cases[0].texts == [("", HOSTILE)] and worst.cases[0].values == [("score", "-0.2")]
    assert [title for title, _ in cycle.grids[0].cases[0].pictures] == ["original", "guidance 1", "guidance 2"]
    assert all(data for _, data in cycle.grids[0].cases[0].pictures)
    assert compared.grids[0].cases[0].name == NAMES[4]  # where the captioners differ most


def test_figures_where_less_is_better_put_the_lowest_first(runs, tmp_path):
    values = dict(zip(NAMES, [0.1, 0.5, 0.2, 0.3, 0.9, 0.4], strict=True))
    for kind in ("images", "captions"):
        metrics = {"metrics": {"lpips": figure("LPIPS", 0.4)}, "per_image": {"lpips": values}}
        save(tmp_path / f"{kind}.json", metrics | {"config": {"captions": "c.json"} if kind == "captions" else {}})
    sections = write_report(
        [tmp_path / "images.json", tmp_path / "captions.json"], tmp_path / "r.html", settings=ReportSettings(cases=2)
    )
    assert [case.name for case in sections[0].grids[0].cases] == [NAMES[0], NAMES[2]]
    assert sections[0].grids[1].cases[0].name == NAMES[4]
    assert any("--images gives their folder" in note for note in sections[0].notes)
    assert any("c.json is not there" in note for note in sections[1].notes)


def generation(values: dict, **config: object) -> dict:
    """Results of `vlv evaluate cycle` or `reconstruction`: FID by guidance."""
    metrics = {guidance: {"frechet_distance": figure("FID", value)} for guidance, value in values.items()}
    return {"metrics": metrics, "config": config}


def test_runs_of_a_kind_stand_side_by_side_with_the_papers_figures(tmp_path):
    share = {"mean": 0.5, "low": 0.25, "high": 0.75}
    answered = {"accuracy": share, "exact_match": share}
    contents = {
        "cycle": generation({"1": 12, "2": 8}, paper="table1/vlv"),
        "other": generation({"2": 7, "3": 9}, paper="table1/vlv"),
        "model": generation({"2": 6.5}, paper="table5/40m"),
        "vqa": {"metrics": {"4 shots, captions": answered}, "config": {"questions": "q", "benchmark": "vqav2"}},
        "vqa2": {"metrics": {"4 shots, captions": answered, "4 shots, blind": answered}, "config": {"questions": "q"}},
        "judge": {
            "metrics": {"value": share, "verdicts": {"a": 1}},
            "config": {"captions": "c.json", "paper": "table2/vlv"},
        },
        "judge2": {"metrics": {"value": share, "verdicts": {"b": 1}}, "config": {"captions": "c.json"}},
    }
    files = [save(tmp_path / f"{name}.json", content) for name, content in contents.items()]
    sections = write_report(files, tmp_path / "r.html")
    cycle, after = "FID of the paper's VLV (Table 1)", "FID of the paper's VLV after 40 million images (Table 5)"
    own, together = {section.title: section for section in sections[:7]}, sections[7:]
    assert own["cycle"].tables[0].rows[1] == (cycle, "11.47", "6.64")
    assert own["model"].tables[0].rows[1] == (after, "7.22")
    assert own["vqa"].tables[0].header[-1] == "VLV, paper" and own["vqa"].tables[0].rows[0][-1] == "61.72"
    assert "VLV, paper" not in own["vqa2"].tables[0].header
    arena = "score, 0 to 6 of the paper's VLV (Table 2, mean of two judges)"
    assert (arena, "5.18", "") in own["judge"].tables[0].rows
    assert not any("paper" in row[0] for row in own["judge2"].tables[0].rows)
    generated, judged, answers = together
    names = [
        *("cycle, guidance 1", "cycle, guidance 2", "other, guidance 2", "other, guidance 3"),
        "model, guidance 2",
    ]
    assert generated.tables[0].header == ("figure", *names)
    assert generated.tables[0].rows == [
        ("FID", "12", "8", "7", "9", "6.5"),
        (cycle, "11.47", "6.64", "6.64", "8.56", ""),
        (after, "", "", "", "", "7.22"),
    ]
    assert len(generated.charts) == 1
    assert judged.tables[0].rows == [("score, 0 to 6", *["0.5 (0.25 to 0.75)"] * 2), (arena, "5.18", "")]
    accuracy = "accuracy, %, 4 shots, captions"
    assert answers.tables[0].header == ("figure", "vqa", "vqa2")
    assert answers.tables[0].rows == [
        (accuracy, *["50 (25 to 75)"] * 2),
        (f"{accuracy} of VLV in the paper", "61.72", ""),
    ]


def test_anchors_are_unique_and_a_run_given_twice_is_shown_once(tmp_path):
    files = [save(tmp_path / f"{name}.json", {"a.png": 0.5}) for name in ("cycle_1", "cycle-1")]
    write_report([*files, tmp_path / "." / "cycle_1.json"], tmp_path / "r.html")
    ids = [own["id"] for tag, own in Reader((tmp_path / "r.html").read_text()).elements if tag == "section"]
    assert len(ids) == len(set(ids)) == 2


def test_generated_images_are_ranked_by_the_figure_that_is_asked_for(tmp_path):
    content = generation({"1": 9, "2": 8}, images=str(IMAGES))
    content["per_image"] = {
        "1": {"cosine": {NAMES[0]: 0.9, NAMES[1]: 0.1}, "psnr": {NAMES[0]: 10, NAMES[1]: 20}},
        "2": {"cosine": {NAMES[0]: 0.9, NAMES[1]: 0.2}, "psnr": {}},  # where each image equals its original
    }
    content["metrics"]["2"]["psnr"] = figure("PSNR", float("inf"))
    content["files"] = {guidance: {name: name for name in NAMES[:2]} for guidance in "12"}
    file = save(tmp_path / "r.json", content)
    for rank_by, first in ((None, NAMES[0]), ("psnr", NAMES[1])):
        (section,) = write_report([file], tmp_path / "r.html", settings=ReportSettings(rank_by=rank_by))
        assert section.grids[0].cases[0].name == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give results of `vlv evaluate images`"),
        ("{", "is not JSON"),
        ("[1]", "is not the results of"),
        ('{"metrics": {"a": 1}}', None),
        ('{"a": "a dog"}', "is not the results of"),
        ("", "is not JSON"),
    ],
)
def test_other_files_are_refused_by_name(content, message, tmp_path, capsys):
    file = tmp_path / "r.json"
    if content is not None:
        file.write_text(content)
    code = main(["evaluate", "report", str(file), "--output", str(tmp_path / "r.html")])
    assert code == (0 if message is None else 2)
    if message is not None:
        error = capsys.readouterr().err
        assert "r.json" in error and message in error and not (tmp_path / "r.html").exists()


def test_settings_that_fit_no_run_are_refused(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for options, message in (
        ([str(tmp_path / "empty")], "empty has no results.json"),
        ([str(runs["score"]), "--rank-by", "ssim"], "rank_by is 'ssim'; the figures of each image are score"),
        ([str(runs["score"]), "--images", "none"], "images: none is not a folder"),
        ([str(runs["score"]), "--captions", "none"], "captions: none is not a file"),
        ([str(runs["score"]), "--output", "r.txt"], "--output r.txt must end in .html"),
    ):
        output = [] if "--output" in options else ["--output", str(tmp_path / "r.html")]
        assert main(["evaluate", "report", *options, *output]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_browser_shows_it_at_the_width_of_a_phone_without_a_request(page):
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright runs the browser tests")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: `apt-get install chromium` runs the browser tests")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        colours = []
        for width, scheme in ((390, "dark"), (1200, "light")):
            tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
            requests, messages = [], []
            tab.on("request", lambda request, found=requests: found.append(request.url))
            tab.on("console", lambda message, found=messages: found.append(message.text))
            tab.goto(page.as_uri())
            assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()] and not messages
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            drawn = tab.evaluate(
                "[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height)"
            )
            assert len(drawn) >= 8 and min(drawn) > 40
            colours.append(tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
            tab.close()
        browser.close()
    assert colours[0] != colours[1]  # charts are dark on light, and light on dark
