"""The page of a study: what its text holds, and what a browser makes of it."""

import contextlib
import dataclasses
import html.parser
import json
import math
import shutil

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from tree import EVIL, Tree

from salsa.judges import openai
from salsa.report import formats, pages, reader, sections, study
from salsa.workflow import runs

ESCAPE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
OPTIONS = [  # a browser that works as root, writes nothing elsewhere and reaches nothing
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
JSON = st.recursive(
    st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


class Wicked(Tree):
    """A tree whose prompts and responses try to leave the text they are in."""

    def run(self, stage, label, parents, files, seed=0):
        """As it is; one judge, asked in words, was asked twice about the first prompt and answered with a script."""
        if label == "r1-salsa-kl_0.02-gold":
            lines = [json.loads(line) for line in files["verdicts.jsonl"].splitlines()]
            answers = [line | {"attempt": 0, "text": f"A beats B {ESCAPE}", "winner": None} for line in lines]
            answers.append(answers[0] | {"attempt": 1, "text": "[[A>B]]"})
            templates = {f"templates/{path.name}": path.read_text() for path in openai.TEMPLATES.glob("*.txt")}
            files = files | {"answers.jsonl": "".join(json.dumps(row) + "\n" for row in answers)} | templates
        return super().run(stage, label, parents, files, seed)

    def rows(self, model, reward, gold, text):
        rows = super().rows(model, reward, gold, text + ESCAPE)
        return [row | {"prompt": [f"write {row['prompt_id']} {ESCAPE}"]} for row in rows]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tree = Wicked(tmp_path_factory.mktemp("page"), kl_coefs=(0.05, 0.02), prompts=12)
        tree.settings.config["report"]["reader"] = 11
        yield tree, tree.build(monkeypatch, drawn=True)


@pytest.fixture(scope="module")
def text(built):
    return (built[1] / "report.html").read_text(encoding="utf-8")


class Parsed(html.parser.HTMLParser):
    """The tags of a page, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag == "script"
        self.scripts += [""] * self.inside

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_nothing_in_the_data_ends_the_script_that_holds_it(built, text):
    parsed = Parsed(text)
    assert len(parsed.scripts) == 2
    data = json.loads(parsed.scripts[0])
    texts = [r[0][0] for models in data["responses"] for benchmarks in models for rows in benchmarks for r in rows]
    assert set(texts) == {EVIL + ESCAPE} | {f"a {arm} story | {EVIL}{ESCAPE}" for arm in ("ppo", "salsa", "other")}
    assert "<script>alert" not in text and "onerror=" not in text.replace(parsed.scripts[0], "")


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_embedded_json_is_the_same_value(value):
    shown = reader.embedded(value)
    assert json.loads(shown) == value and not set("<>&") & set(shown)


def test_the_page_loads_nothing(built, text):
    parsed = Parsed(text)
    sources = [attributes.get("src") or attributes.get("href") for _, attributes in parsed.tags]
    outside = [source for source in sources if source and not source.startswith(("data:", "#"))]
    assert outside and all((built[1] / link).is_file() for link in outside)
    policy = next(attributes["content"] for tag, attributes in parsed.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in policy and pages.content_hash(parsed.scripts[1]) in policy


def test_equal_studies_give_equal_pages(built, text):
    tree, output = built
    found = study.read(tree.settings, tree.parents)
    values = pages.report(found, sections.tables_of(found), set(sections.sections()))
    assert pages.html(found, values, output / "figures") == text


def test_the_reader_holds_the_first_prompts_and_each_response_once(built):
    tree, _ = built
    found = study.read(tree.settings, tree.parents)
    data = reader.reader(found)
    assert data["models"] == ["sft0"] + [f"{a}, kl_coef {k}" for a in ("ppo", "salsa", "other") for k in (0.05, 0.02)]
    assert [b["name"] for b in data["benchmarks"]] == ["in_distribution", "out_of_distribution"]
    assert [p["id"] for p in data["benchmarks"][1]["prompts"]] == [f"out_of_distribution-{i}" for i in range(11)]
    # [replicate][model][benchmark][prompt]: the policy's gain plus the prompt's number; sft0's is the number alone
    gain, _ = tree.final(1, "other", 0.02)
    assert data["responses"][1][6][0][3][1:] == [[23], ["stop"], round(gain + 3, 3), round(3 - gain, 3)]
    assert data["responses"][0][0][1][10][1:] == [[30], ["stop"], 10, 10]
    assert len(data["responses"]) == 2 and {len(models) for models in data["responses"]} == {7}


def test_verdicts_name_models_and_the_run_that_holds_them(built):
    tree, _ = built
    data = reader.reader(study.read(tree.settings, tree.parents))
    found = [v for v in data["verdicts"] if v["pair"] == [0, 3] and v["replicate"] == 1 and v["benchmark"] == 0]
    assert len(found) == 1 and found[0]["judge"] == "gold"
    salsa = found[0]["lines"]  # every third prompt is lost to sft0
    lost, won = ([[None, 3, winner, None, []], [None, 0, winner, None, []]] for winner in (0, 3))
    assert salsa[0] == lost and salsa[1] == won and found[0]["asked"] is None
    words = [v for v in data["verdicts"] if v["asked"] is not None]
    assert {v["folder"] for v in words} == {"judge/r1-salsa-kl_0.02-gold-0123456789ab"} and len(data["templates"]) == 1
    said = next(v for v in words if v["pair"] == [0, 4] and v["benchmark"] == 0)["lines"]
    assert said[0][0][4] == [f"A beats B {ESCAPE}", "[[A>B]]"] and said[1][0][4] == [f"A beats B {ESCAPE}"]
    lines = runs.read_jsonl(tree.root / found[0]["folder"] / "verdicts.jsonl")
    assert {line["model_a"] for line in lines} == {"salsa-kl_0.05"} and {line["replicate"] for line in lines} == {1}


def test_a_verdict_given_again_counts_once_and_turns_and_grades_are_kept(built, tmp_path):
    tree, _ = built
    found = study.read(tree.settings, tree.parents)
    policy = found.of(arm="salsa", replicate=0)[0]
    line = {"prompt_id": "in_distribution-0", "benchmark": "in_distribution", "model_a": policy.name, "model_b": "sft0",
            "order": 0, "judge": "gold", "replicate": 0}  # fmt: skip
    lines = [line | {"turn": 1, "winner": "error"}, line | {"turn": 1, "winner": "model_a", "grade": "A>>B"},
             line | {"turn": 2, "winner": "tie"}, line | {"turn": 2, "order": 1, "winner": "error"}]  # fmt: skip
    runs.write_jsonl(tmp_path / "judge" / "own" / "verdicts.jsonl", lines)
    parents = tree.parents | {f"judge/gold/{policy.index}": tmp_path / "judge" / "own"}
    data = reader.reader(dataclasses.replace(found, parents=parents))
    (entry,) = [entry for entry in data["verdicts"] if entry["folder"] == "judge/own"]
    assert entry["lines"][0] == [[1, 3, 3, "A>>B", []], [2, 3, "tie", None, []], [2, 0, "error", None, []]]
    assert all(not rest for rest in entry["lines"][1:])


def test_columns_of_numbers_are_told_from_text():
    none = math.nan
    frame = pd.DataFrame(
        [["1", 0.5, 0.4, 0.6, none], ["2", none, none, none, none], ["3", -1.2e-05, none, none, none]],
        columns=["name", "mean", "mean_low", "mean_high", "none"],
    )
    table = formats.readable(frame)
    assert table.columns == ["name", "mean"] and table.numeric() == [False, True]
    assert table.rows == [["1", "0.5 [0.4, 0.6]"], ["2", ""], ["3", "-1.2e-05"]]
    assert formats.Table(["mean"], []).numeric() == [False]


def test_a_page_without_other_peoples_prompts(text):
    bare = reader.without_prompts(text)
    before, after = (json.loads(Parsed(t).scripts[0]) for t in (text, bare))
    assert {p["turns"][0] for b in after["benchmarks"] for p in b["prompts"]} == {"(not published)"}
    assert "write in_distribution-0" in text and "write in_distribution-0" not in bare
    quoted = [line[4] for entry in after["verdicts"] for lines in entry["lines"] for line in lines]
    assert {text for answers in quoted for text in answers} == {"(not published)"}
    assert after["responses"] == before["responses"] and len(Parsed(bare).scripts) == 2


def test_a_study_without_gold_judges_or_a_second_model(tmp_path, monkeypatch):
    tree = Tree(tmp_path, gold=False, replicates=(0,), arms={"ppo": "0"})
    del tree.parents["landscape/r0"]
    output = tree.build(monkeypatch)
    data = json.loads(Parsed((output / "report.html").read_text(encoding="utf-8")).scripts[0])
    assert data["verdicts"] == [] and data["responses"][0][0][0] == [None] * 12
    assert data["responses"][0][1][0][0][4] is None


# In a browser


@pytest.fixture(scope="module")
def browser(built, tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}", "--window-size=1300,900"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})  # as on a screen
    yield opened
    opened.quit()


@pytest.fixture
def opened(built, browser):
    browser.get((built[1] / "report.html").as_uri())
    return browser


def by_id(opened, name):
    return opened.find_element(By.ID, name)


def choose(opened, **wanted):
    for name, label in wanted.items():
        Select(by_id(opened, f"reader-{name}")).select_by_visible_text(label)


def column(table, place):
    return [
        row.find_elements(By.TAG_NAME, "td")[place].text for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")
    ]


def test_it_opens_with_every_figure_and_no_complaint(built, opened):
    assert opened.title == "A test" and opened.get_log("browser") == []
    widths = opened.execute_script("return Array.from(document.images, image => image.naturalWidth)")
    figures = [name for name, section in sections.sections().items() if section.figure]
    assert len(widths) == len(figures) - 1  # all but that of regimes, which the study has none of
    assert min(widths) > 500
    assert opened.execute_script(
        "return performance.getEntriesByType('resource').every(e => e.name.startsWith('data:'))"
    )


def test_columns_sort_both_ways_by_click_and_by_key(opened):
    table = opened.find_element(By.CSS_SELECTOR, "#win_rates table")
    headers = [header.text.strip() for header in table.find_elements(By.TAG_NAME, "th")]
    place = headers.index("adjusted win rate")
    button = table.find_elements(By.CSS_SELECTOR, "th button")[place]
    button.click()
    rates = [float(cell.split()[0]) for cell in column(table, place)]
    assert rates == sorted(rates) and len(set(rates)) > 2
    button.send_keys(Keys.ENTER)
    assert [float(cell.split()[0]) for cell in column(table, place)] == sorted(rates, reverse=True)
    assert table.find_elements(By.TAG_NAME, "th")[place].get_attribute("aria-sort") == "descending"
    table.find_elements(By.CSS_SELECTOR, "th button")[headers.index("candidate")].click()
    assert column(table, headers.index("candidate")) == sorted(column(table, headers.index("candidate")))
    assert len(table.find_elements(By.CSS_SELECTOR, "[aria-sort]")) == 1


def test_runs_are_filtered_and_unfold(built, opened):
    by_id(opened, "runs-filter").send_keys("ppo/ R1 salsa")
    shown = [row for row in opened.find_elements(By.CSS_SELECTOR, "#runs-table tbody tr") if row.is_displayed()]
    names = [row.find_element(By.TAG_NAME, "summary").text for row in shown]
    assert sorted(names) == [f"ppo/r1-salsa-kl_{kl_coef}-0123456789ab" for kl_coef in (0.02, 0.05)]
    assert by_id(opened, "runs-count").text.startswith("2 of ")
    shown[0].find_element(By.TAG_NAME, "summary").click()
    manifest = runs.manifest_of(built[0].root / names[0])
    unfolded = shown[0].find_element(By.TAG_NAME, "pre").text
    assert manifest["address"] in unfolded and '"seed": 0' in unfolded


def test_the_reader_shows_what_was_chosen(opened):
    choose(opened, benchmark="out_of_distribution", prompt="out_of_distribution-10", replicate="1",
           left="sft0", right="salsa, kl_coef 0.02")  # fmt: skip
    view = by_id(opened, "reader-view").text
    assert "write out_of_distribution-10" in view and "30 tokens, finish reason: stop" in view
    assert "sft0: proxy reward 10, gold reward 10" in view
    assert "salsa, kl_coef 0.02: proxy reward 11.3, gold reward 8.65" in view  # 1 + 0.2 + 0.1 + 0.05 beyond 10
    assert (
        "Judge gold. salsa, kl_coef 0.02 shown first: salsa, kl_coef 0.02 wins; sft0 shown first: salsa, kl_coef 0.02 "
        "wins. The prompt counts as a win of salsa, kl_coef 0.02. judge/r1-salsa-kl_0.02-gold-0123456789ab/"
    ) in view
    choose(opened, left="ppo, kl_coef 0.02")
    assert "counts as a tie" in by_id(opened, "reader-view").text
    choose(opened, right="other, kl_coef 0.05")
    assert (
        "No judge compared these two on this prompt. ppo, kl_coef 0.02 was compared with: sft0; salsa, kl_coef 0.02; "
        "other, kl_coef 0.02."
    ) in by_id(opened, "reader-view").text


def test_prompts_are_stepped_through_by_key_and_around_the_end(opened):
    following, previous = by_id(opened, "reader-next"), by_id(opened, "reader-previous")
    following.send_keys(Keys.ENTER)
    assert "write in_distribution-1" in by_id(opened, "reader-view").text
    previous.send_keys(Keys.SPACE)
    previous.send_keys(Keys.SPACE)
    assert "write in_distribution-10" in by_id(opened, "reader-view").text


def test_a_script_in_a_response_stays_text_and_runs_nothing(opened):
    choose(opened, left="sft0", right="ppo, kl_coef 0.05")
    texts = [box.text for box in opened.find_elements(By.CSS_SELECTOR, "#reader-view .text")]
    assert texts[1] == EVIL + ESCAPE and texts[2] == f"a ppo story | {EVIL}{ESCAPE}"
    assert opened.title == "A test" and len(opened.find_elements(By.TAG_NAME, "script")) == 2
    assert opened.find_elements(By.CSS_SELECTOR, "#reader-view img") == []


def test_no_other_script_may_run(opened):
    opened.execute_script(
        "const added = document.createElement('script'); added.textContent = 'document.title = \"owned\"';"
        "document.body.append(added)"
    )
    assert opened.title == "A test" and "Content Security Policy" in opened.get_log("browser")[0]["message"]


WIDER = """
const tooWide = element => element.scrollWidth > element.clientWidth + 1;
return [document.documentElement.scrollWidth - window.innerWidth,
        Array.from(document.querySelectorAll(".scroll")).filter(tooWide).map(place => place.ariaLabel)];
"""
SEEN = """
return Array.from(document.querySelectorAll("#claims tr[id] :is(.verdict-cell, [data-label=effect])"), cell => {
  const place = cell.getBoundingClientRect(), around = cell.closest(".scroll").getBoundingClientRect();
  return cell.textContent !== "" && place.width > 0 && place.left >= around.left - 1 && place.right <= around.right + 1;
});
"""
MEANINGS = """
return Array.from(document.querySelectorAll("abbr.word"), word => {
  word.focus();
  const place = word.querySelector(".meaning").getBoundingClientRect();
  return [place.left, place.right, place.top, place.bottom];
});
"""
FRAME = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"


@contextlib.contextmanager
def shown(opened, width=1300, medium="", scheme="light"):
    """The page at another width, on paper or in the dark."""
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": features})
    opened.execute_async_script(FRAME)
    try:
        yield
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_async_script(FRAME)


@pytest.mark.parametrize("width", [1400, 800, 400])
def test_nothing_is_wider_than_the_screen_and_every_verdict_is_seen(opened, width):
    with shown(opened, width):
        beyond, tables = opened.execute_script(WIDER)
        seen = opened.execute_script(SEEN)
        answer = opened.find_element(By.CSS_SELECTOR, ".answer").rect
    assert beyond <= 0 and tables == []
    assert len(seen) > 6 and all(seen)
    assert answer["y"] < 500 and answer["x"] + answer["width"] <= width


def test_a_narrow_table_names_each_value_and_a_wide_one_has_its_columns_again(opened):
    with shown(opened, 400):
        row = opened.find_element(By.CSS_SELECTOR, "#win_rates .stacked tbody tr")
        label = opened.execute_script("return getComputedStyle(arguments[0].cells[2], '::before').content", row)
        assert (
            label.strip('"') == "baseline" and not opened.find_element(By.CSS_SELECTOR, "#win_rates th").is_displayed()
        )
    assert opened.find_element(By.CSS_SELECTOR, "#win_rates th").is_displayed()


def test_the_first_stop_skips_to_the_report(opened):
    opened.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    skip = opened.switch_to.active_element
    assert skip.text == "Skip to the report" and skip.rect["x"] >= 0
    skip.send_keys(Keys.ENTER)
    assert opened.switch_to.active_element.get_attribute("id") == "main"


def test_words_explain_themselves_on_focus_at_every_width_and_by_number_on_paper(opened):
    marked = opened.find_elements(By.CSS_SELECTOR, "abbr.word")
    listed = opened.find_elements(By.CSS_SELECTOR, "ol.words li")
    assert {"sft0", "gold", "KL", "soup", "kl_coef", "proxy reward"} <= {li.text.split(":")[0] for li in listed}
    assert len(marked) == len(listed) and len(marked) > 10
    for width in (1400, 400):
        with shown(opened, width):
            places = opened.execute_script(MEANINGS)
        assert len(places) == len(marked)
        assert all(0 <= left < right <= width and bottom > top for left, right, top, bottom in places)
    number = marked[-1].find_element(By.TAG_NAME, "sup")
    assert not number.is_displayed()
    with shown(opened, 700, "print"):
        assert number.is_displayed() and number.text == str(len(listed))
        assert marked[-1].get_attribute("aria-describedby") == listed[-1].get_attribute("id")


def test_paper_has_whole_tables_and_neither_contents_nor_controls(opened):
    with shown(opened, 698, "print"):
        opened.execute_script("dispatchEvent(new Event('beforeprint'))")
        assert not opened.find_element(By.TAG_NAME, "nav").is_displayed()
        assert opened.find_elements(By.CSS_SELECTOR, ".stacked") == []
        heights = opened.execute_script(
            "return Array.from(document.querySelectorAll('td.time'), cell => cell.getBoundingClientRect().height)"
        )
        whole = opened.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        opened.execute_script("dispatchEvent(new Event('afterprint'))")
    assert min(heights) > 0 and whole <= 0


def test_the_dark_page_has_figures_on_white(opened):
    colour = "return getComputedStyle(arguments[0]).backgroundColor"
    with shown(opened, scheme="dark"):
        body, image = (opened.find_element(By.CSS_SELECTOR, name) for name in ("body", "figure img"))
        assert opened.execute_script(colour, body) == "rgb(21, 24, 27)"
        assert opened.execute_script(colour, image) == "rgb(255, 255, 255)"
    assert opened.execute_script(colour, body) == "rgb(255, 255, 255)"


def test_a_verdict_leads_to_the_judges_words_and_to_the_prompt_that_it_was_asked(built, opened):
    choose(opened, replicate="1", left="sft0", right="salsa, kl_coef 0.02")
    first, _ = opened.find_elements(By.CSS_SELECTOR, "#reader-view details")
    assert not first.find_element(By.TAG_NAME, "pre").is_displayed()
    first.find_element(By.TAG_NAME, "summary").click()
    assert [box.text for box in first.find_elements(By.CLASS_NAME, "said")] == [f"A beats B {ESCAPE}", "[[A>B]]"]
    assert "A is salsa, kl_coef 0.02, B is sft0 (sft0 wins)" in first.text and "asked again, 2 of 2" in first.text
    asked = (openai.TEMPLATES / "single.txt").read_text()
    texts = {"question": f"write in_distribution-0 {ESCAPE}", "answer_a": f"a salsa story | {EVIL}{ESCAPE}",
             "answer_b": EVIL + ESCAPE}  # fmt: skip
    for name, text in texts.items():
        asked = asked.replace(f"{{{name}}}", text)
    assert first.find_element(By.TAG_NAME, "pre").get_attribute("textContent") == asked
    assert opened.title == "A test"


def test_a_claim_leads_to_the_responses_that_it_compares(opened):
    link = opened.find_element(By.CSS_SELECTOR, "#hypothesis-preferred a.read")
    opened.execute_script("arguments[0].click()", link)
    chosen = {side: Select(by_id(opened, f"reader-{side}")).first_selected_option.text for side in ("left", "right")}
    assert chosen["left"].startswith("ppo, kl_coef ") and chosen["right"].startswith("salsa, kl_coef ")
    assert opened.current_url.endswith("#reader")
