import base64
import html
import json
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import synthetic_audit
from conftest import optional_import
from PIL import Image

from jaxmem import cli
from jaxmem.detectors import Setting, choose, columns
from jaxmem.report.audit.figures import counts
from jaxmem.report.audit.page import amount, duration, interval, number, render, write_report
from jaxmem.report.audit.pictures import Sparkline, thumbnail
from jaxmem.report.audit.view import AuditView
from jaxmem.runs.directory import Run

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


@pytest.fixture(scope="module")
def result():
    return synthetic_audit.audit()


@pytest.fixture(scope="module")
def page(result):
    return render(result)


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without figures, which take most of the time."""
    monkeypatch.setattr("jaxmem.report.audit.page._figures", lambda view: {})


def text_of(page):
    """What a reader sees: no markup, style or script, spaces as one."""
    inside, words = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag in ("style", "script"):
                inside.append(tag)

        def handle_endtag(self, tag):
            if inside and tag == inside[-1]:
                inside.pop()

        def handle_data(self, data):
            if not inside:
                words.append(data)

    Reader().feed(page)
    text = " ".join(" ".join(words).split())
    assert not (glued := re.findall(r"\S+[a-z)][.;:][A-Z][a-z]\S*", text)), glued  # a template ate the space
    return text


def test_nothing_is_loaded_from_anywhere(page):
    addresses = re.findall(r"(?:src|href|action|data|poster)=\"([^\"]*)\"", page)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "default-src 'none'" in page
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_prompts_are_text(page):
    assert page.count("<script>") == 1
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2
    assert synthetic_audit.HOSTILE in text_of(page)


def test_the_summary_has_the_numbers_of_the_result(result, page):
    words = text_of(page)
    assert "was given 18 prompts, each from 3 random starting points" in words
    assert "6 of 18 prompts leave the model no freedom : at timestep 281" in words
    # six of nine directions on average: none (9) and template (2), in equal numbers
    assert "the others keep 5.50 free directions on average" in words
    assert (
        "12 of 18 prompts stand out from the 40 reference captions by the 6 measures of the ranking together" in words
    )
    # two of 41 places have p ≤ 5 %: 2/41, and 18 times that
    assert "at most 4.9 % of them would be listed on average, which is 0.88 of these" in words
    assert "Of the list as a whole, 0.88 prompts or fewer are expected by chance, were none memorized" in words
    assert "Of the 40 reference captions, none does so" in words
    # one of 41 places is beyond all of 40: 18/41
    assert "by chance each measure marks about 0.44 of these prompts" in words
    # made up: nothing at t = 981
    assert "p = 0.024; no free direction ; beyond all 40 reference captions by 5 of 6 measures" in words
    assert "not finished" not in words


def test_the_list_is_what_the_rule_lists(result, undrawn):
    """Prompts without freedom are listed for that alone only where no reference says how often it comes by chance."""
    listed = text_of(render(result)).count("p = 0.")
    assert listed == 12  # matching and template prompts; six of them have no freedom
    for few in (result.reference[:18], []):
        cut = replace(result, reference=few, reference_scores=result.reference_scores[: len(few)])
        words = text_of(render(cut))
        assert words.count("no free direction") == 6
        assert "nothing says how many are here by chance" in words
        assert ("too short to say of any prompt that it stands out" in words) == bool(few)
        assert "p = 0." not in words
    # references without freedom make that no evidence
    zeros = np.zeros_like(result.reference_scores[:, :, [i.is_count for i in result.detectors]])
    same = result.reference_scores.copy()
    same[:, :, [i.is_count for i in result.detectors]] = zeros
    words = text_of(render(replace(result, reference_scores=same)))
    assert "Of the 40 reference captions, 40 do so" in words


def labelled(result, number):
    """The result with so many memorized prompts and others that have a label, the rest without one."""
    kinds = [[i for i, prompt in enumerate(result.prompts) if prompt.label is kind][:number] for kind in (True, False)]
    known = {i for members in kinds for i in members}
    prompts = [prompt if i in known else prompt._replace(label=None) for i, prompt in enumerate(result.prompts)]
    again = replace(result, prompts=prompts)
    evaluation = {
        name: {group: one._asdict() for group, one in again[name].evaluations.items()} for name in ("wen-1", "jeon")
    }
    return replace(again, metrics=result.metrics | {"evaluation": evaluation, "held_out": {}})


@pytest.mark.parametrize("number", [1, 2, 4, 5])
def test_few_labels_are_no_figure_of_detection(result, number):
    page = render(labelled(result, number))
    words = text_of(page)
    for part in ("AUC", "TPR", "ROC", "of 100 cases"):
        assert (part in words) == (number >= 5), part
    assert ("it takes 5 that are memorized and 5 that are not" in words) == (number < 5)


def test_the_ranking_is_by_the_leads(result):
    view = AuditView(result)
    names = [result.detectors[d].name for d in view.leads]
    assert names == ["positive-count@t281", "wen-1", "jeon", "largest-sum@t981", "anisotropy", "tiled-l2"]
    kinds = [result.prompts[i].category for i in view.order]
    assert kinds == ["matching verbatim"] * 6 + ["template verbatim"] * 6 + ["none"] * 6
    assert [group.name for group in view.groups] == ["none", "template verbatim", "matching verbatim"]
    # mean over noises of the first detector, by hand
    np.testing.assert_allclose(view.scores[:, 0], result.scores[:, :, 0].sum(1) / 3)
    assert view.ranks[view.scores[:, 0].argmax(), 0] == 1
    low = [d.name for d in result.detectors].index("tiled-l2")
    assert view.ranks[view.scores[:, low].argmin(), low] == 1


def test_missing_scores_do_not_count(result):
    scores = result.scores.copy()
    scores[3, 1:], scores[5] = np.nan, np.nan
    view = AuditView(replace(result, scores=scores))
    np.testing.assert_array_equal(view.scores[3], result.scores[3, 0])
    assert view.order[-1] == 5
    assert np.isnan(view.places[5])


def test_the_page_of_a_partial_run_says_so(result):
    words = text_of(render(synthetic_audit.partial(result, 7)))
    assert "This run is not finished. 22 of 54 samples" in words
    assert "The reference captions are not measured yet" in words
    assert "TPR" not in words
    assert "NaN" not in words
    assert "–" in words


def test_a_spectrum_that_is_to_come_is_no_freedom(result):
    values, noise = result.eigenvalues.copy(), result.noise.copy()
    values[:, :, 1:], noise[:, :, 1:] = np.nan, np.nan  # one timestep of four is done
    words = text_of(render(synthetic_audit.partial(replace(result, eigenvalues=values, noise=noise), 17)))
    assert "No spectrum at timestep 281, which tells whether the picture is free to vary, is measured yet" in words
    assert "freedom :" not in words
    assert "some freedom" not in words


def test_what_was_run_leads(page):
    words = text_of(page)
    for name, item in (
        ("Model", "the synthetic one"),
        ("Guidance", "7.5"),
        ("Seed", "7"),
        ("Eigenvalues below -1/σ², which no density has", "0.0% at t = 981, 12.5% at t = 41"),
    ):
        assert f"{name} {item}" in words


def test_the_page_of_a_run_that_has_done_nothing(result):
    words = text_of(render(replace(synthetic_audit.partial(result, 0), scores=np.full_like(result.scores, np.nan))))
    assert "0 of 54 samples" in words
    assert "nothing to draw" in words


@pytest.mark.parametrize(
    ("options", "says", "does_not"),
    [
        (
            {"labels": False, "reference": 0},
            ["no categories, so all prompts are one group", "There was no reference list"],
            ["AUC", "Stands out"],
        ),
        (
            {"images": False, "steps": 1},
            ["timesteps 981 to 981", "took the first steps", "No spectrum was taken late enough to tell"],
            ["Where a picture can go", "Tiled distance", "no freedom", "no free direction"],
        ),
        (
            {"method": "lanczos"},
            ["they cannot prove that there is none", "Free directions, at least"],
            ["some freedom", "no freedom"],
        ),
        ({"method": "none"}, ["No spectrum was taken"], ["Free directions", "Sorted spectra"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_other_runs(options, says, does_not):
    words = text_of(render(synthetic_audit.audit(**{"per_category": 2, "noises": 2, "reference": 3} | options)))
    assert all(part in words for part in says)
    assert not any(part in words for part in does_not)


def test_one_prompt(result):
    one = {
        name: getattr(result, name)[:1, :1] if name != "prompts" else result.prompts[:1]
        for name in ("prompts", "scores", "eps_difference", "eigenvalues", "noise", "images", "sampled")
    }
    metrics = {"prompts": result.metrics["prompts"][:1], "evaluation": {}}
    words = text_of(render(replace(result, **one, metrics=metrics, directions=None)))
    assert "Which of 1 prompt has this" in words
    assert "one is a single look" in words
    assert "All 1 prompts leave the model some freedom" in words


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ([(0.48, 0.9), (0.4, 0.8)], "so does the interval of every other: on this list no measure is shown to detect"),
        (
            [(0.48, 0.9), (0.6, 0.8)],
            "That includes 50, a coin; the interval of another measure does not. It is",
        ),
        ([(0.7, 0.9), (0.4, 0.8)], "(95 % interval 70.0 to 90.0). It is the best of 2, picked after the fact"),
    ],
)
def test_a_wide_interval_of_the_best_is_no_verdict_on_all(result, undrawn, ends, says):
    found = dict(list(result.metrics["evaluation"].items())[:2])
    evaluation = {
        name: {"all": values["all"] | {"auc": auc, "auc_interval": interval}}
        for (name, values), auc, interval in zip(found.items(), (0.75, 0.7), ends, strict=True)
    }
    words = text_of(render(replace(result, metrics=result.metrics | {"evaluation": evaluation})))
    assert says in words


@pytest.mark.parametrize("kept", [[0, 17], [0, 1, 17]])
def test_too_few_prompts_prove_nothing(result, undrawn, kept):
    """One memorized prompt above one that is not is an AUC of 1, and no evidence."""
    cut = {
        name: getattr(result, name)[kept] for name in ("scores", "eps_difference", "eigenvalues", "noise", "sampled")
    }
    prompts, images = [result.prompts[i] for i in kept], result.images[kept]
    few = replace(result, **cut, prompts=prompts, images=images, directions=None, metrics=None, truncated=[False] * 3)
    total = few["wen-1"].evaluation
    assert total.auc == 1
    assert total.auc_interval is None
    evaluation = {"wen-1": {"all": total._asdict()}}
    metrics = result.metrics | {"evaluation": evaluation, "prompts": result.metrics["prompts"][: len(kept)]}
    words = text_of(render(replace(few, metrics=metrics)))
    assert "Too few prompts whose answer is known to say whether any measure detects anything" in words
    assert "of 100 cases" not in words
    assert "It is the best of" not in words


def test_estimates_are_called_so(result, undrawn):
    setting = Setting((281,), spectral_timesteps=(281,), count_products=40, estimates_counts=True)
    chosen = columns(choose(["positive-count", "tangent-count"]), setting)
    found = replace(
        result,
        detectors=chosen, scores=result.scores[..., :2], reference_scores=result.reference_scores[..., :2],
        method="none", spectral_timesteps=np.array([], int), eigenvalues=result.eigenvalues[:, :, :0],
        noise=result.noise[:, :, :0], directions=None, metrics=None, costs=[],
    )  # fmt: skip
    ends = np.broadcast_to([[1.0, 77], [1.25, 78], [1.5, 77.5]], (len(result.prompts), 3, 2)).copy()
    ends[3] = np.nan
    found = replace(found, intervals={chosen[0].name: ends})
    words = text_of(render(found))
    assert "Positive eigenvalues (estimate), t = 281" in words
    assert "Numbers of directions are estimates" in words
    assert words.count("[1.25 to 77.5]") == len(result.prompts) - 1
    assert "ends are means over the starting noises" in words
    words = text_of(render(replace(found, intervals={})))
    assert "are estimates from" not in words
    assert "In brackets" not in words
    assert "No spectrum was taken, so" not in words


@pytest.mark.parametrize("method", ["none", "lanczos"])
def test_exact_counts_tell_freedom_as_whole_spectra_do(result, undrawn, method):
    """A budget of one product more than the 48 dimensions is exact; one of 48 is an estimate, which proves nothing."""
    ritz = synthetic_audit.audit(method=method)
    whole = {detector.name: d for d, detector in enumerate(result.detectors)}
    names = [f"{kind}-count@t{t}" for t in synthetic_audit.SPECTRAL for kind in ("positive", "tangent")]
    setting = Setting((981,), spectral_timesteps=synthetic_audit.SPECTRAL, count_products=49)
    chosen = columns(choose(["positive-count", "tangent-count"]), setting)
    assert [detector.name for detector in chosen] == names
    places = [whole[name] for name in names]
    found = replace(
        ritz,
        detectors=chosen, scores=result.scores[..., places], reference_scores=result.reference_scores[..., places],
        spectral_timesteps=result.spectral_timesteps, costs=[], metrics=None,
    )  # fmt: skip
    if method == "none":  # there is no spectrum at the timesteps of counts
        shape = (*found.scores.shape[:2], 4)
        found = replace(found, eigenvalues=np.zeros((*shape, 0)), noise=np.full(shape, np.nan))

    def given(budget):
        return replace(found, manifest=result.manifest | {"plan": {"count_budget": budget, "latent_shape": [4, 4, 3]}})

    view, exact = AuditView(given(49)), AuditView(result)
    for kind in ("positive", "tangent"):
        np.testing.assert_array_equal(view.counts[kind], exact.counts[kind])
    assert view.judges
    words = text_of(render(given(49)))
    assert "6 of 18 prompts leave the model no freedom : at timestep 281" in words
    assert "the others keep 5.50 free directions on average" in words
    assert "at least as many" not in words
    assert "Free directions, at least" not in words
    assert counts(view)
    assert not AuditView(given(48)).exact
    assert "no freedom" not in text_of(render(given(48)))
    later = replace(given(49), scores=np.full_like(found.scores, np.nan))
    assert not AuditView(later).exact


def test_rates_that_cannot_be_estimated_are_named(page):
    words = text_of(page)
    # 18 negatives cannot resolve 1 % nor 3 %
    assert "not estimable" in words
    assert "1.000 [1.000, 1.000]" in words


def test_a_label_is_enough_for_groups(result):
    prompts = [prompt._replace(category=None) for prompt in result.prompts]
    assert [group.name for group in AuditView(replace(result, prompts=prompts)).groups] == [
        "not memorized",
        "memorized",
    ]
    prompts[0] = prompts[0]._replace(label=None)
    assert "no label" in [group.name for group in AuditView(replace(result, prompts=prompts)).groups]


def test_many_categories_are_six_groups(result):
    prompts = [prompt._replace(category=f"kind {i} $") for i, prompt in enumerate(result.prompts)]
    view = AuditView(replace(result, prompts=prompts))
    assert len(view.groups) == 6
    assert sum(group.members.sum() for group in view.groups) == 18
    assert "other categories" in [group.name for group in view.groups]


def test_long_prompts_are_folded(result, undrawn):
    prompts = [prompt._replace(text="word " * 2000) if i == 4 else prompt for i, prompt in enumerate(result.prompts)]
    page = render(replace(result, prompts=prompts))
    assert "10,000 characters" in page


def test_equal_results_give_equal_pages(result, undrawn):
    assert render(result) == render(result)
    assert len({counts(AuditView(result))[0].svg for _ in range(2)}) == 1


def test_thumbnails_are_small_and_exact_where_they_can_be():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (32, 32, 3), np.uint8)
    kind, _, content = thumbnail(small).partition(";base64,")
    assert kind == "data:image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(base64.b64decode(content)))), small)
    large = thumbnail(rng.integers(0, 256, (512, 384, 3), np.uint8))
    assert large.startswith("data:image/jpeg")
    assert Image.open(BytesIO(base64.b64decode(large.partition(",")[2]))).size == (84, 112)
    assert len(large) < 20_000  # noise, the worst case


def test_long_lists_have_pictures_of_the_first_prompts(result, undrawn, monkeypatch):
    whole = render(result)
    monkeypatch.setattr("jaxmem.report.audit.page.MOST_PICTURES", 4)
    few = render(result)
    shown = "Pictures are shown of the first 4 prompts"
    assert shown in text_of(few)
    ranking = few.split('id="ranking-table"')[1].split("</table>")[0].split("<tr")[2:]
    assert ["data:image" in row for row in ranking] == [True] * 4 + [False] * 14
    assert shown not in text_of(whole)


def test_sparklines_share_a_scale():
    line = Sparkline(np.array([[0.1, -0.5, -1.0], [0.2, np.nan, np.nan]]))
    assert line.points(np.array([np.nan])) == ""
    heights = [float(pair.split(",")[1]) for pair in line.points(np.array([0.2, -0.5, -1.1])).split()]
    assert heights == sorted(heights)
    assert (heights[0], heights[-1]) == (1, 31)
    assert len(line.points(np.linspace(0.2, -1, 2000)).split()) == 40


@pytest.mark.parametrize(
    ("x", "shown"),
    [
        (float("nan"), "–"),
        (None, "–"),
        (0.0, "0"),
        (12.0, "12"),
        (-0.1234, "−0.123"),
        (0.9999, "1"),
        (1234.5, "1,234"),
        (5.6789, "5.68"),
        (-4.5e7, "−4.50·10^7"),
        (2e-5, "2.00·10^−5"),
        (float("-inf"), "−∞"),
    ],
)
def test_numbers_for_people(x, shown):
    assert number(x) == shown


def test_units():
    assert [amount(x) for x in (None, 12, 1500, 2.5e9)] == ["–", "12 B", "1.5 kB", "2.5 GB"]
    assert [duration(x) for x in (None, 3, 180, 9000)] == ["–", "3.0 s", "3.0 min", "2.5 h"]
    assert [interval(x) for x in (None, (0.5, 1.0))] == ["", "[0.500, 1.000]"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless browser, or a skip; `.ci/run` installs one."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver brings them")
    webdriver = optional_import("selenium.webdriver")
    service = optional_import("selenium.webdriver.chrome.service").Service(DRIVER)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=service)
    driver.get("about:blank")  # away from the browser's own first page, which loads much
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page, tmp_path):
    """The page in the browser, at the width of a desktop."""
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    resize(browser, 1280)
    browser.get(path.as_uri())
    return browser


def resize(browser, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def places(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('#ranking-table tbody tr')].map(row => row.cells[0].dataset.value)"
    )


def test_the_browser_finds_no_fault_and_asks_nobody(opened, tmp_path):
    assert opened.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert opened.execute_script(broken) == 0
    picture = tmp_path / "report.png"
    opened.save_screenshot(str(picture))
    assert np.asarray(Image.open(picture)).std() > 10


def test_a_script_in_a_prompt_is_text(opened):
    cells = opened.execute_script(
        "return [...document.querySelectorAll('#ranking-table .prompt')].map(c => c.innerText)"
    )
    assert any(synthetic_audit.HOSTILE in cell for cell in cells)
    assert opened.execute_script("return document.scripts.length") == 1
    # an alert would have stopped the call above; and one that is smuggled in later is refused by the page's policy
    opened.execute_script(
        "const s = document.createElement('script'); s.text = 'window.bad = 1'; document.body.append(s)"
    )
    assert opened.execute_script("return window.bad === undefined")
    opened.get_log("browser")


def test_headings_sort(opened, result):
    view = AuditView(result)
    column = 4 + view.leads.index([d.name for d in result.detectors].index("wen-1"))
    assert places(opened) == [str(i + 1) for i in range(18)]

    def click():
        opened.execute_script(f"document.querySelectorAll('#ranking-table thead button')[{column}].click()")
        rows = "[...document.querySelectorAll('#ranking-table tbody tr')]"
        values = opened.execute_script(f"return {rows}.map(row => +row.cells[{column}].dataset.value)")
        return values, opened.execute_script(
            f"return document.querySelectorAll('#ranking-table th[scope=col]')[{column}].getAttribute('aria-sort')"
        )

    scores = sorted(view.scores[:, [d.name for d in result.detectors].index("wen-1")])
    assert click() == (scores[::-1], "descending")  # high is memorized: the most memorized first
    assert click() == (scores, "ascending")


def test_rows_without_a_score_stay_last(browser, result, undrawn, tmp_path):
    path = tmp_path / "partial.html"
    path.write_text(render(synthetic_audit.partial(result, 7)), encoding="utf-8")
    browser.get(path.as_uri())
    for _ in range(2):
        browser.execute_script("document.querySelectorAll('#ranking-table thead button')[0].click()")
        assert places(browser)[8:] == [""] * 10
        assert "" not in places(browser)[:8]


def test_prompts_are_found_by_their_words(opened):
    script = """const input = document.querySelector('input[type=search]'); input.value = 'TEMPLATE';
        input.dispatchEvent(new Event('input'));
        return [...document.querySelectorAll('#ranking-table tbody tr')].filter(row => !row.hidden).length"""
    found = []
    while found[-1:] != [6] and len(found) < 200:  # once it was too early on a busy machine
        found.append(opened.execute_script(script))
        time.sleep(0.05)
    assert found[-1] == 6


WIDER = """const wide = document.documentElement.clientWidth;
    return [...document.querySelectorAll(arguments[0])].filter(e => e.getBoundingClientRect().right > wide + 1)
        .map(e => e.tagName + ' ' + e.className + ' ' + e.getBoundingClientRect().right)"""


@pytest.mark.parametrize("width", [400, 800, 1280])
def test_the_page_fits_its_screen(opened, width):
    resize(opened, width)
    # tables and figures that are wider scroll in a box of their own
    cards = ", #ranking-table *" if width == 400 else ""
    assert opened.execute_script(WIDER, "body > *, main > *, main > * > *, figure" + cards) == []
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width


def test_paper_cuts_nothing_off(opened, tmp_path):
    resize(opened, 688)  # A4 less two margins of 14 mm, at 96 dots per inch
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert opened.execute_script(WIDER, "table, td, th, figure, img, dl, p") == []
    document = base64.b64decode(opened.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    assert document.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", document)) >= 3


@pytest.fixture
def written(tmp_path):
    return synthetic_audit.write_run(tmp_path / "run")


def test_the_command_writes_the_page_of_a_run(written, tmp_path, capsys):
    assert cli.main(["report", str(written)]) == 0
    path = written / "report.html"
    assert re.fullmatch(rf"{re.escape(str(path))} \(\d+\.\d MB\)", capsys.readouterr().out.strip())
    words = text_of(path.read_text(encoding="utf-8"))
    assert all(part in words for part in ("the cat", "a bird", "cut to the tokens"))
    assert synthetic_audit.HOSTILE in words
    assert Run.read(written).manifest["model"]["sha256"] in words
    assert "not finished" not in words
    # means over noises, by the run's own metrics
    for row in Run.read(written).metrics()["prompts"]:
        assert number(row["scores"]["wen-1"]) in words
    size = re.search(r"One file of (\d+\.\d) MB", html.unescape(path.read_text(encoding="utf-8")))
    assert abs(float(size[1]) - path.stat().st_size / 1e6) < 0.1
    assert write_report(written, tmp_path / "elsewhere.html") == tmp_path / "elsewhere.html"


def test_a_killed_run_has_a_page(written):
    (written / "metrics.json").unlink()
    results = written / "results-0.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:1]) + b'{"key": "torn')
    assert "4 of 8 samples" in text_of(write_report(written).read_text(encoding="utf-8"))
    results.write_bytes(b"")
    assert "0 of 8 samples" in text_of(write_report(written).read_text(encoding="utf-8"))


def damage_manifest(run):
    (run / "manifest.json").write_text('{"experiment": "audit"')


def damage_metrics(run):
    (run / "metrics.json").write_bytes(b"\x00" * 10)


def damage_rows(run):
    (run / "results-0.jsonl").write_bytes(b"nonsense\n")


def damage_array(run):
    path = sorted((run / "arrays").glob("path-*"))[0]
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (damage_manifest, r"manifest\.json: expected JSON, got a damaged file"),
        (damage_metrics, r"metrics\.json: expected JSON, got a damaged file"),
        (damage_rows, r"results-0\.jsonl, line 1: expected a JSON object"),
        (damage_array, r"path-.*: expected a whole \.npz file, got a damaged file"),
    ],
)
def test_a_damaged_run_is_named_and_the_old_page_stays(written, damage, match, capsys):
    (written / "report.html").write_text("the page of before")
    damage(written)
    with pytest.raises(ValueError, match=match):
        write_report(written)
    assert cli.main(["report", str(written)]) == 2
    assert re.search(match, capsys.readouterr().err)
    assert (written / "report.html").read_text() == "the page of before"


def test_other_runs_and_folders_are_refused(tmp_path):
    Run.open(tmp_path / "run", {}, experiment="mnist")
    with pytest.raises(ValueError, match=r"expected the run of an audit, got 'mnist'.*figures.draw` draws"):
        write_report(tmp_path / "run")
    with pytest.raises(ValueError, match="expected a run directory"):
        write_report(tmp_path / "nothing")
    assert not (tmp_path / "run" / "report.html").exists()
