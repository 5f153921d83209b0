"""What the figures and the page show, whatever the evaluation and the records are like."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from sklearn.datasets import make_classification

from mrl_rag import Record, TwoStageIndex, rotation
from mrl_rag.classification import AdaptiveClassifier
from mrl_rag.cli import main
from mrl_rag.errors import InvalidInput
from mrl_rag.evaluation import Evaluation, LostQuestion, Result
from mrl_rag.intervals import Estimate
from mrl_rag.report import (
    classifier_curve,
    collection_map,
    curve,
    first_two_numbers,
    index_records,
    pareto,
    render,
    sample,
    write_report,
)
from mrl_rag.report.findings import frontier, summary
from mrl_rag.report.groups import group, telling_key

QUESTIONS = ["what is a jib?", "when does the ferry leave?"]
HOSTILE = "<script>alert(1)</script><img src='https://example.org/x.png' onerror=alert(2)>\"'&{{ 7*7 }}$_\x00\ud800"


def result(method="plain cut", dim=64, score=0.5, **fields):
    """One way to search, in float32 and one stage unless said otherwise."""
    scores = {"nDCG@10": Estimate(score, score - 0.1, score + 0.1), "recall@10": Estimate(1.0, 1.0, 1.0)}
    given = {"shortlist_size": None, "precision": "float32", "bytes_per_record": 4 * dim, "milliseconds": dim / 100}
    given |= {"scores": scores, "per_question": {"nDCG@10": [score, score]}}
    return Result(method, dim, **given | fields)


RESULTS = [
    result(dim=192, score=0.78),
    result(dim=64, score=0.55, milliseconds=math.nan),
    result("fitted projection", 64, 0.795, precision="int8", bytes_per_record=68),
    result("fitted projection", 64, 0.7),
    result("two stages", 64, 0.8, shortlist_size=50, bytes_per_record=836),
    result("two stages", 64, 0.81, shortlist_size=200, bytes_per_record=836),
    result("two stages", 192, 0.8, shortlist_size=50, bytes_per_record=960),
]
LOST = [
    LostQuestion(QUESTIONS[0], 1.0, 0.25, [("boats-1", "A jib is a triangular sail.")]),
    LostQuestion(QUESTIONS[1], 0.9, 0.6, []),
]


def evaluation(results=RESULTS, **fields):
    """An evaluation of vectors of 384 numbers, whose reference scores 0.8."""
    given = {"name": "notes", "model": "minilm", "records": 40, "questions": QUESTIONS, "labels": "judgments"}
    given |= {"full_dim": 384, "reference": result(dim=384, score=0.8), "encode_rate": 12.0, "lost": LOST}
    return Evaluation(results=list(results), **given | fields)


def made(metadatas, full_dim=8, document="text"):
    """Records with these metadatas, and random vectors."""
    vectors = np.random.default_rng(0).normal(size=(len(metadatas), full_dim)).astype(np.float32)
    return [Record(f"id-{i}", document, m, v) for i, (m, v) in enumerate(zip(metadatas, vectors, strict=True))]


@pytest.fixture(scope="module")
def records(minilm):
    """Forty real texts on two subjects, with their vectors."""
    boats = [f"The {part} of a {boat}" for part in ("sail", "mast", "keel", "helm") for boat in BOATS]
    dishes = [f"{way} {dish} with rice" for way in ("Fried", "Boiled", "Baked", "Stewed") for dish in DISHES]
    texts, subjects = boats + dishes, ["boats"] * len(boats) + ["dishes"] * len(dishes)
    vectors = minilm.encode_documents(texts)
    return [
        Record(f"id-{i}", text, {"subject": subject, "length": len(text)}, vector)
        for i, (text, subject, vector) in enumerate(zip(texts, subjects, vectors, strict=True))
    ]


BOATS = ("schooner", "dinghy", "ferry", "yacht", "barge")
DISHES = ("fish", "beans", "carrots", "chicken", "tofu")


@pytest.fixture(scope="module")
def page(records):
    """A whole report."""
    classifier = [(32.0, 0.8, 0.5), (64.0, 0.9, 0.9)]
    return render(evaluation(), records, classifier=classifier, command="mrl-rag report ./db")


class Page(HTMLParser):
    """The elements and texts of a page; fails where an element isn't closed."""

    VOID = {"meta", "br", "img"}  # noqa: RUF012

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def labels_of(figure):
    (axes,) = figure.axes
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def lines_of(figure):
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}


def drawn(figure, gid):
    return next(artist for artist in figure.axes[0].get_children() if artist.get_gid() == gid)


# Figures


def test_every_search_stands_at_its_cost_and_quality():
    figure = pareto(evaluation())
    assert labels_of(figure) == ["plain cut", "fitted projection", "two stages", "exact, all 384 numbers"]
    points = lines_of(figure)
    assert points["fitted projection"] == [[68, 0.795], [256, 0.7]]
    assert points["plain cut"] == [[1536, 0.8], [768, 0.78], [256, 0.55]]
    assert drawn(figure, "frontier").get_xydata().tolist() == [[68, 0.795], [836, 0.81]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["64", "64 int8"]


def test_a_search_whose_time_is_not_known_is_left_out_of_the_picture_of_times():
    figure = pareto(evaluation(), "milliseconds", "recall@10")
    assert figure.axes[0].get_ylabel() == "recall@10"
    assert lines_of(figure)["plain cut"] == [[3.84, 1], [1.92, 1]]


def test_the_curve_goes_over_dimensions_in_the_best_precision_with_its_interval():
    figure = curve(evaluation())
    assert labels_of(figure) == [
        *("plain cut", "fitted projection", "two stages, 50 candidates", "two stages, 200 candidates"),
        "exact, all 384 numbers",
    ]
    lines = lines_of(figure)
    assert lines["plain cut"] == [[64, 0.55], [192, 0.78], [384, 0.8]]
    assert lines["fitted projection"] == [[64, 0.7]]
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.45, 0.9))


def test_the_curve_of_a_real_classifier_is_on_the_page():
    vectors, labels = make_classification(200, 16, n_informative=8, n_classes=3, random_state=0)
    points = AdaptiveClassifier(dims=[1]).fit(vectors, labels).curve(vectors, labels)
    assert len(classifier_curve(points).axes[0].lines[0].get_xdata()) == len(points)
    assert f"Accuracy of the adaptive classifier: {points[0][1]:.3f} at 1 numbers" in render(
        evaluation(), classifier=points
    )


def test_the_classifiers_curve():
    figure = classifier_curve([(64.0, 0.9, 0.9), (32.0, 0.8, 0.5)])
    assert labels_of(figure) == []
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[32, 0.8], [64, 0.9]]
    with pytest.raises(InvalidInput, match="points is empty"):
        classifier_curve([])


def test_on_the_map_texts_on_one_subject_are_neighbours(records):
    figure = collection_map(records, "subject")
    assert labels_of(figure) == ["boats", "dishes"]
    points = drawn(figure, "records")
    places, colours = points.get_offsets(), [to_hex(colour) for colour in points.get_facecolors()]
    assert [colours.count(colour) for colour in dict.fromkeys(colours)] == [20, 20]
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argmin(axis=1)
    assert sum(colours[row] == colours[near] for row, near in enumerate(nearest)) >= 36


def test_the_first_two_numbers_are_those_of_the_vectors_and_then_of_the_rotated_ones(records):
    vectors = np.array([record.vector for record in records])
    figure = first_two_numbers(records)
    labels_of(figure)
    np.testing.assert_allclose(drawn(figure, "records").get_offsets(), vectors[:, :2], atol=1e-6)
    rotated = vectors @ rotation.fit(vectors)
    places = drawn(first_two_numbers(records, rotated=True), "records").get_offsets()
    np.testing.assert_allclose(places, rotated[:, :2], atol=1e-5)


def test_a_notebook_shows_a_figure_as_it_is_returned():
    assert pareto(evaluation())._repr_png_().startswith(b"\x89PNG")


def test_a_sample_is_the_same_each_time_and_in_order():
    many = made([{}] * 300)
    few = sample(many, 50)
    assert few == sample(many, 50) != sample(many, 50, seed=1)
    assert few == sorted(few, key=many.index)
    assert sample(many) == many


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_picture_of_two_records_is_refused(count):
    for draw in (collection_map, first_two_numbers):
        with pytest.raises(InvalidInput, match=f"{count} records have vectors; a picture of records needs 3"):
            draw(made([{}] * count))


def test_a_picture_of_records_that_are_all_alike(records):
    assert len(drawn(collection_map(records[:1] * 5), "records").get_offsets()) == 5


def test_vectors_of_one_number_are_refused():
    with pytest.raises(InvalidInput, match="vectors have 1 number"):
        first_two_numbers(made([{}] * 4, full_dim=1))


def test_an_unknown_measure_or_cost_is_refused():
    with pytest.raises(InvalidInput, match=r"'MAP'; this evaluation has nDCG@10, recall@10"):
        curve(evaluation(), "MAP")
    with pytest.raises(InvalidInput, match="'dollars'"):
        pareto(evaluation(), "dollars")


# Findings


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_nothing_beats_a_search_on_the_frontier_and_something_beats_each_other(pairs):
    searches = [result(score=score, bytes_per_record=cost) for cost, score in pairs]
    best = {(r.bytes_per_record, r.scores["nDCG@10"].mean) for r in frontier(searches, "bytes", "nDCG@10")}
    for cost, score in pairs:
        beaten = any((c <= cost and s > score) or (c < cost and s >= score) for c, s in pairs)
        assert ((cost, score) in best) is not beaten


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (RESULTS, "99.4% of nDCG@10 is kept (0.795 of 0.800; the difference is -0.005 to -0.005 with 95% confidence)"),
        (RESULTS, "with 68 instead of 1,536 bytes per record: fitted projection, 64 numbers, int8."),
        ([result(dim=64)], "Nothing cheaper keeps 99% of nDCG@10; the best keeps 62.5% of nDCG@10 (0.500 of 0.800"),
        ([], "Exact search of all 384 numbers reaches nDCG@10 0.800; nothing cheaper was tried."),
    ],
)
def test_one_sentence_says_what_the_cheapest_good_search_keeps(results, said):
    assert said in summary(evaluation(results), "nDCG@10")


# Groups


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["a", "b", None, "a"], {"a": 2, "b": 1, "no value": 1}),
        ([True, False, True], {"True": 2, "False": 1}),
        ([["x", "y"], ["x"], ["x", "y"]], {"['x', 'y']": 2, "['x']": 1}),
        ([1, 2, 2, None], {"2": 2, "1": 1, "no value": 1}),
        (
            [*range(100), None],
            {**dict.fromkeys(["0 to 19", "20 to 39", "40 to 59", "60 to 79", "80 to 99"], 20), "no value": 1},
        ),
        ([f"value {i}" for i in range(10_000)], {**{f"value {i}": 1 for i in range(8)}, "other values": 9992}),
        ([math.nan, *map(float, range(20))], {"nan": 1, **{f"{i}.0": 1 for i in range(7)}, "other values": 13}),
        ([" a\n\x00b\ud800 ", "漢" * 40], {"a \ufffdb\ufffd": 1, "漢" * 13 + "…": 1}),
    ],
)
def test_unusual_metadata_makes_a_few_groups(values, labels):
    of_records, shown = group(made([{} if value is None else {"key": value} for value in values]), "key")
    assert {label: of_records.count(label) for label in shown} == labels


def test_without_a_key_the_one_with_few_values_for_most_records_is_taken(records):
    assert telling_key(records) == "subject"
    assert telling_key(made([{"id": str(i), "one": "same", "number": i} for i in range(30)])) is None
    files = [{"hash": 20 * "0" + name, "path": name} for name in ("a.md", "b.md")]
    assert telling_key(made([files[i % 2] for i in range(30)])) == "path"


# The page


def test_the_page_is_whole_html_that_refers_to_nothing_outside(page):
    parsed = Page(page)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 5
    for _, attributes in parsed.elements:
        assert not {"src", "srcset", "data", "action", "xlink:href"} & set(attributes)
        assert attributes.get("href", "#").removeprefix("#") in {"", *ids}
        for used in re.findall(r"url\((.*?)\)", " ".join(filter(None, attributes.values()))):
            assert used.removeprefix("#") in ids
    assert not re.search(r"https?:|@import", page)


def test_the_page_states_each_result_and_how_it_was_made(page):
    text = Page(page).text
    for row in (
        "plain cut (reference) 384 numbers, float32 1,536 3.84 0.800 0.700 to 0.900 1.000 1.000 to 1.000",
        "plain cut 64 numbers, float32 256 not measured 0.550 0.450 to 0.650",
        "fitted projection 64 numbers, int8 68 0.64 0.795 0.695 to 0.895 1.000 1.000 to 1.000 ✓",
        "two stages 64 numbers, float32, 200 candidates 836 0.64 0.810 0.710 to 0.910",
        "what is a jib? 1.000 → 0.250 boats-1 A jib is a triangular sail.",
        "when does the ferry leave? 0.900 → 0.600 No right passage was lost; they moved down.",
        "records 40 searched, 40 drawn questions 2 right answers judgments",
        "encoding 12 passages per second",
        "command mrl-rag report ./db",
        "id-7: The mast of a ferry",
    ):
        assert row in text, row
    assert summary(evaluation(), "nDCG@10") in text


def test_figures_have_a_text_for_those_who_cannot_see_them_and_colours_of_the_theme(page):
    pictures = Page(page).all("svg")
    assert len(pictures) == 7
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 40 for picture in pictures)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
        assert "font-family" not in svg
        assert "<text" in svg


def test_only_the_pages_own_script_may_run(page):
    policy = next(meta["content"] for meta in Page(page).all("meta") if "http-equiv" in meta)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_hostile_text_stays_text(tmp_path):
    hostile = made([{HOSTILE: HOSTILE}, {HOSTILE: "_b"}, {HOSTILE: "$x^"}, {HOSTILE: HOSTILE}], document=HOSTILE)
    hostile[0] = Record(HOSTILE, HOSTILE, hostile[0].metadata, hostile[0].vector)
    write_report(
        tmp_path / "report.html",
        evaluation(
            [result(HOSTILE, precision=HOSTILE, bytes_per_record=9)],
            lost=[LostQuestion(HOSTILE, 1.0, 0.0, [(HOSTILE, HOSTILE)])],
            **dict.fromkeys(("name", "model", "labels"), HOSTILE),
            full_dim=8,
        ),
        hostile,
        command=HOSTILE,
    )
    parsed = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(parsed.all("script")) == 1
    assert parsed.all("img") == []
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)
    assert parsed.text.count("{{ 7*7 }}") >= 8


@pytest.mark.parametrize(
    "fields",
    [
        {"results": [], "lost": [], "encode_rate": math.nan},
        {"results": RESULTS[:1], "reference": result(dim=384, score=0.0, milliseconds=math.nan)},
        {"results": [result(f"way {i}", score=i / 20) for i in range(12)]},
    ],
    ids=["no results", "one result", "many ways"],
)
def test_a_page_of_an_unusual_evaluation(fields):
    parsed = Page(render(evaluation(**fields)))
    assert "0 records with vectors were given; a map needs 3." in parsed.text
    assert ("nothing was encoded" in parsed.text) is ("encode_rate" in fields)
    assert ("No question lost anything" in parsed.text) is ("lost" in fields)


def test_few_records_have_no_map_but_a_page():
    assert "2 records with vectors were given" in render(evaluation(full_dim=8), made([{}] * 2))


def test_records_of_other_vectors_or_without_the_key_are_refused(records):
    with pytest.raises(InvalidInput, match=r"'author'. There are: length, subject"):
        render(evaluation(), records, color_by="author")
    with pytest.raises(InvalidInput, match="384 numbers, and the records have 8"):
        render(evaluation(), made([{}] * 3))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"report.html can't be written"):
        write_report(tmp_path / "nowhere" / "report.html", evaluation())


# The command


def test_the_command_shows_a_saved_evaluation_and_the_indexs_own_records(records, tmp_path, capsys):
    with TwoStageIndex(tmp_path / "db") as index:
        columns = zip(
            *[(record.id, record.vector, record.document, record.metadata) for record in records], strict=True
        )
        ids, vectors, documents, metadatas = map(list, columns)
        index.upsert(ids, np.array(vectors), documents, metadatas)
        assert {record.id for record in index_records(index, 9)} < set(ids)
    saved, page = tmp_path / "saved.json", tmp_path / "page.html"
    saved.write_text(evaluation().to_json())
    options = ["--evaluation", str(saved), "--color-by", "length", "--output", str(page)]
    assert main(["report", str(tmp_path / "db"), *options]) == 0
    assert capsys.readouterr().out == f"8 searches of 40 records in {page}\n"
    text = Page(page.read_text(encoding="utf-8")).text
    assert "id-7: The mast of a ferry" in text
    assert f"--evaluation {saved} --color-by length" in text

    saved.write_bytes(b"\xff")
    assert main(["report", str(tmp_path / "db"), *options]) == 2
    assert "this is not an evaluation" in capsys.readouterr().err


def test_the_command_evaluates_a_folder_in_the_beir_layout(records, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mrl_rag.encoder.encoder.pick_dtype", lambda device: torch.float32)
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"_id": record.id, "text": record.document}) for record in records[::5]]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    assert main(["report", "."]) == 0
    assert capsys.readouterr().out.endswith(" searches of 8 records in report.html\n")
    assert "id-5: The mast of a schooner" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def browser(folder):
    """A function that asks a real browser by its DevTools protocol."""
    connect = pytest.importorskip("websockets.sync.client").connect
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    with subprocess.Popen(
        [*command, f"--user-data-dir={folder}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            port_file = folder / "DevToolsActivePort"
            for _ in range(600):
                if port_file.is_file() and port_file.read_text().count("\n"):
                    break
                time.sleep(0.05)
            else:
                pytest.skip("Chromium doesn't start here")
            with urllib.request.urlopen(f"http://127.0.0.1:{port_file.read_text().split()[0]}/json") as listed:
                tab = next(tab for tab in json.load(listed) if tab["type"] == "page")
            with connect(tab["webSocketDebuggerUrl"], max_size=None) as socket:

                def ask(method, **parameters):
                    socket.send(json.dumps({"id": 1, "method": method, "params": parameters}))
                    while (answer := json.loads(socket.recv(timeout=60))).get("id") != 1:
                        pass
                    return answer["result"]

                yield ask
        finally:
            process.kill()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_on_a_phone_the_page_fits_follows_the_theme_and_the_map_zooms(page, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    with browser(tmp_path / "browser") as ask:

        def run(script):
            return ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

        def touch(kind, *points):
            ask("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x, y in points])

        def shown():
            return run("document.querySelector('.map svg').viewBox.baseVal.width")

        ask("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=True)
        ask("Emulation.setTouchEmulationEnabled", enabled=True)
        ask("Page.navigate", url=file.as_uri())
        while run("location.protocol + document.readyState") != "file:complete":
            time.sleep(0.02)
        assert run("document.documentElement.scrollWidth") == 360

        colours = []
        for theme in ("light", "dark"):
            ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
            text, paper = "getComputedStyle(document.querySelector('svg text')).fill", "getComputedStyle(document.body)"
            colours.append(run(f"[{text}, {paper}.color, {paper}.backgroundColor]"))
        assert all(light != dark for light, dark in zip(*colours, strict=True))

        whole = shown()
        run("document.querySelector('.map').scrollIntoView()")
        left, top = run("(r => [r.left, r.top])(document.querySelector('.frame').getBoundingClientRect())")
        x, y = left + 150, top + 150
        touch("touchStart", (x - 20, y), (x + 20, y))
        for apart in range(25, 90, 5):
            touch("touchMove", (x - apart, y), (x + apart, y))
        touch("touchEnd")
        assert shown() < whole / 3
        run("document.querySelector('.frame').focus()")
        ask("Input.dispatchKeyEvent", type="keyDown", key="0", text="0")
        assert shown() == whole
        run("document.querySelector('[data-zoom=\"2\"]').click()")
        assert shown() == whole / 2
        run("document.querySelector('[data-zoom=\"0\"]').click()")
        place = run("(r => [r.left, r.top])(document.querySelectorAll('.map use')[7].getBoundingClientRect())")
        touch("touchStart", tuple(place))
        touch("touchEnd")
        assert run("document.querySelector('output').textContent").startswith("id-")
