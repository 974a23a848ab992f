"""The page in a real browser: Debian's chromium, headless; `apt-get install chromium` where it is missing."""

import json
import re
import shutil
from pathlib import Path

import pytest
from saved_run import save_run
from servers import MARKS, serving
from tiny import run_config

PAGE = Path("llm_jax/serve/page")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Opens the page in a context of its own; nothing may be reported on the console, or asked from elsewhere."""
    contexts, problems = [], []

    def open_page(url=server.url, expected=(), ready="h1:has-text('tiny')", **options):
        context = browser.new_context(**{"locale": "en-US", **options})
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda m: (
                m.type == "error"
                and not any(e in m.text for e in expected)
                and problems.append(m.text)
            ),
        )
        page.on("request", lambda r: r.url.startswith(url) or problems.append(f"asked {r.url}"))
        page.goto(url)
        page.wait_for_selector(ready)
        if page.locator("#as-question").is_visible():
            page.locator("#question").evaluate("box => { box.checked = false; }")  # keeps the focus
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert server.is_idle()


def generate(page, text="def main(", count=12, **fields):
    page.fill("#prompt", text)
    page.locator("#sampling").evaluate("node => { node.open = true; }")
    for name, value in {"max_tokens": count, "temperature": 0, "top_p": "", **fields}.items():
        page.fill(f"#{name}", str(value))
    page.click("#go")
    finished(page)
    page.wait_for_selector(".token.given:nth-child(2)[aria-label$='%']")  # what was typed is scored


def finished(page):
    page.wait_for_selector("#status:not(:empty)")
    page.wait_for_selector("#tokens:not(.running)")


def ids(page) -> list[str]:
    return page.locator(".token").evaluate_all(
        "nodes => nodes.map(node => node.getAttribute('aria-label'))"
    )


def test_from_typing_to_an_alternative(open_page):
    page = open_page()
    generate(page)
    assert page.locator(".token").count() == 1 + 9 + 12
    assert page.locator(".token.given").count() == 10
    text = page.locator("#tokens").text_content()
    assert "def main(" in text
    assert "12 new tokens" in page.text_content("#status")
    shades = page.locator(".token:not(.given)").evaluate_all(
        "nodes => nodes.map(node => +node.style.getPropertyValue('--shade'))"
    )
    labels = ids(page)
    assert all(0 <= shade <= 1 for shade in shades)
    assert len(set(shades)) > 3
    page.wait_for_selector(
        ".token.given:nth-child(3)[aria-label$='%']"
    )  # the prompt's are told too

    page.hover(".token:nth-child(14)")
    page.wait_for_selector("#card .alternative")
    rows = page.locator("#card .alternative")
    assert rows.count() == 8
    chances = [
        float(t.strip("<%")) for t in page.locator("#card .alternative .chance").all_text_contents()
    ]
    assert chances == sorted(chances, reverse=True)
    assert labels[13].endswith(page.locator("#card .mine .chance").text_content())

    other = page.locator("#card .alternative:not(.mine)").first
    piece = other.locator(".piece").text_content()
    other.click()
    page.wait_for_selector("#card", state="hidden")
    finished(page)
    page.wait_for_selector(".token:nth-child(26)")
    after = ids(page)
    assert after[:13] == labels[:13]
    assert after[13].split(", ")[0].replace(" ", "␣") == piece
    assert len(after) == 14 + 12
    assert "".join(page.locator(".token").all_text_contents()[:10]) == text[: len("<s>def main(")]

    page.click("#on")
    page.wait_for_selector(".token:nth-child(38)")
    assert ids(page)[:26] == after


def test_what_the_panel_shows(open_page, server):
    page = open_page()
    generate(page)
    page.click(".token:nth-child(14)")
    page.wait_for_selector("#lens tbody tr")
    assert page.locator("#heads .cell").count() == 2 * 4
    assert page.locator("#lens tbody tr").count() == 2
    assert page.locator(".token.from").count() == 1
    # The last layer is the model itself: its best guess is what greedy decoding took.
    assert (
        page.locator("#lens tbody tr:last-child .piece").first.get_attribute("class")
        == "piece mine"
    )
    assert page.text_content("#lens tbody tr:last-child .chance") == page.text_content(
        "#chosen-chance"
    )
    looks = "nodes => nodes.map(node => +node.style.getPropertyValue('--look'))"
    mean = page.locator(".token").evaluate_all(looks)
    assert max(mean) == 1
    assert mean[14:] == [0] * 8  # nothing that comes later
    page.hover("#heads .cell >> nth=5")
    page.wait_for_selector("#head-now:has-text('Layer 2, head 2')")
    assert page.locator(".token").evaluate_all(looks) != mean
    _, _, content = server.post("/api/attention", {"tokens": prompt_ids(page, 14)})
    weights = json.loads(content)["weights"][1][1]
    most = max(range(14), key=weights.__getitem__)
    assert page.locator("#most .chance").first.text_content() == percent(weights[most] / 1000)
    page.click("#views button[value=before]")
    for _ in range(
        200
    ):  # the other view is asked for; the mean of the old one stays until it comes
        if page.locator(".token").evaluate_all(looks)[13] == 0:
            break
        page.wait_for_timeout(50)
    assert page.locator(".token").evaluate_all(looks)[13] == 0
    assert "Mean" in page.text_content("#head-now")
    page.keyboard.press("Escape")
    page.wait_for_selector("#chosen", state="hidden")
    assert page.locator(".looking").count() == 0


def prompt_ids(page, count):
    """The ids behind the first tokens, from what the server says of the text again."""
    labels = [label.rsplit(", ", 1)[0] for label in ids(page)[:count]]
    return [256 if label == "<s>" else piece_id(label) for label in labels]


def piece_id(label: str) -> int:
    if label in MARKS:
        return 259 + MARKS.index(label)
    if found := re.fullmatch(r"<0x(..)>", label):
        return int(found[1], 16)
    return label.encode("ascii").decode("unicode_escape").encode("latin-1")[0]


def percent(value: float) -> str:
    value *= 100
    return (
        f"{value:.0f}%" if value >= 9.95 else f"{value:.1f}%" if value >= 0.995 else f"{value:.2f}%"
    )


def test_with_the_keyboard_alone(open_page):
    page = open_page()
    page.keyboard.type("def main(")  # the field has the focus
    page.keyboard.press("Control+Enter")
    finished(page)
    page.wait_for_selector(".token.given:nth-child(2)[aria-label$='%']")
    page.keyboard.press("Tab")
    for _ in range(12):
        if page.locator(".token:focus").count():
            break
        page.keyboard.press("Tab")
    assert page.locator(".token:first-child:focus").count() == 1
    page.keyboard.press("End")
    assert page.locator(".token:last-child:focus").count() == 1
    page.keyboard.press("Home")
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    assert page.locator(".token:nth-child(13):focus").count() == 1
    page.wait_for_selector("#card .alternative")
    before = ids(page)
    page.keyboard.press("Enter")
    page.wait_for_selector("#card", state="hidden")
    assert page.locator("#instead .alternative:focus").count() == 1
    page.keyboard.press("Escape")
    page.wait_for_selector("#chosen", state="hidden")
    assert page.locator(".token:nth-child(13):focus").count() == 1
    page.keyboard.press("Enter")
    page.keyboard.press("Home")
    if page.locator("#instead .mine:focus").count():
        page.keyboard.press("ArrowDown")
    piece = page.locator("#instead .alternative:focus .piece").text_content()
    page.keyboard.press("Enter")
    page.wait_for_selector("#chosen", state="hidden")
    finished(page)
    assert ids(page)[:12] == before[:12]
    assert ids(page)[12].split(", ")[0].replace(" ", "␣") == piece
    assert page.locator(".token:nth-child(13):focus").count() == 1


def test_a_wrong_field_in_what_is_closed_is_shown(open_page):
    page = open_page()
    page.fill("#prompt", "def main(")
    page.locator("#temperature").evaluate("node => { node.value = 3; }")
    for submit in (lambda: page.click("#go"), lambda: page.press("#prompt", "Control+Enter")):
        page.locator("#sampling").evaluate("node => { node.open = false; }")
        submit()
        page.wait_for_selector("#sampling[open]")
    assert page.locator("#work").is_hidden()
    generate(page, temperature=0.123)


def test_while_a_token_loads_the_heads_of_the_one_before_are_gone(open_page):
    page = open_page()
    generate(page)
    page.click(".token:nth-child(8)")
    page.wait_for_selector("#heads .cell")
    page.wait_for_selector("#lens td")
    held = []
    page.route(re.compile("/api/(attention|lens)"), lambda route: held.append(route))
    page.click(".token:nth-child(9)")
    page.wait_for_selector("#chosen-piece")
    assert page.locator("#heads .cell, #most li, #lens td").count() == 0
    while len(held) < 2:
        page.wait_for_timeout(10)
    for route in held:
        route.continue_()
    page.hover("#heads .cell >> nth=1")
    assert page.text_content("#head-now") == "Layer 1, head 2"


def test_heads_by_the_keyboard(open_page):
    page = open_page()
    generate(page)
    page.click(".token:nth-child(8)")
    page.wait_for_selector("#heads .cell")
    page.focus("#heads .cell >> nth=0")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.locator("#heads .cell:focus").get_attribute("aria-label") == "Layer 2, head 2"
    page.keyboard.press("Enter")
    assert page.text_content("#head-now") == "Layer 2, head 2"


def test_on_a_phone_in_chinese(open_page):
    page = open_page(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, locale="zh-CN"
    )
    assert page.text_content("#go") == "生成"
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    generate(page, text="你好吗", count=30)
    assert "你好吗" in page.locator("#tokens").text_content()
    assert "30 个新词元" in page.text_content("#status")
    assert page.locator(".token.part").count() >= 6  # two bytes of each are in tokens of their own
    width = page.locator("html").evaluate("node => node.scrollWidth")
    assert width <= 390
    page.locator(".token").nth(14).tap()
    page.wait_for_selector("#card .alternative")
    card, token = (
        page.locator("#card").bounding_box(),
        page.locator(".token").nth(14).bounding_box(),
    )
    assert card["width"] == 390
    assert round(card["y"] + card["height"]) == 844
    page.wait_for_timeout(300)
    assert page.locator(".token").nth(14).bounding_box()["y"] + token["height"] <= card["y"]
    page.wait_for_selector("#lens tbody tr:has-text('第 1 层')")
    before = ids(page)
    page.locator("#card .alternative:not(.mine)").first.tap()
    page.wait_for_selector("#card", state="hidden")
    finished(page)
    assert ids(page)[:14] == before[:14]
    page.tap("#languages button[value=en]")
    assert page.text_content("#go") == "Generate"
    page.reload()
    assert page.text_content("#go") == "Generate"  # it is remembered


def test_text_is_never_html(open_page):
    page = open_page()
    text = '<img src=x onerror="document.title=1"><script>document.title=2</script>&amp;'
    generate(page, text=text, count=3)
    assert text in page.locator("#tokens").text_content()
    assert page.locator("#tokens img, #tokens script").count() == 0
    page.hover(".token:nth-child(2)")
    page.wait_for_selector("#card .alternative")
    assert page.title() == "tiny · llm_jax"


@pytest.mark.slow
def test_why_a_text_ended(open_page):
    page = open_page()
    generate(page, text="a", count=400, temperature=2, seed=5)
    assert page.locator(".token").count() > 3
    assert "; " in page.text_content("#status")  # whichever way it ended, the page says why


def test_stop(open_page):
    page = open_page()
    generate(page, count=1)
    page.fill("#max_tokens", "150")
    # In the page itself: by the time that this process had seen a token, all would be there.
    page.locator("#go").evaluate(
        """go => new Promise(done => {
          const box = document.getElementById('tokens');
          new MutationObserver((_, observer) => {
            if (box.children.length < 20) return;
            observer.disconnect();
            go.click();
            done();
          }).observe(box, { childList: true });
          go.click();
        })"""
    )
    page.wait_for_selector("#status:has-text('stopped')")
    assert 20 <= page.locator(".token").count() < 160


def test_a_chat_and_errors(open_page):
    page = open_page(expected=("400",))
    page.locator("#question").check()
    generate(page, text="hi", count=4)
    assert [label.split(",")[0] for label in ids(page)[:6]] == [
        "<s>",
        "<|user|>",
        "h",
        "i",
        "<|end|>",
        "<|assistant|>",
    ]
    page.locator("#question").uncheck()
    page.fill("#prompt", "x" * 600)
    page.click("#go")
    page.wait_for_selector("#problem:not([hidden])")
    assert "512" in page.text_content("#problem")


@pytest.mark.slow
def test_a_key(open_page, chat_run):
    with serving("--workdir", chat_run, LLM_JAX_API_KEY="sesame") as server:
        page = open_page(server.url, expected=("401",), ready="#key-field:not([hidden])")
        assert "API key" in page.text_content("#problem")
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        page.wait_for_selector("h1:has-text('tiny')")
        page.locator("#question").uncheck()
        generate(page, count=3)
        assert page.locator(".token").count() == 13


def test_every_word_is_there_in_both_languages():
    source = (PAGE / "words.js").read_text(encoding="utf-8")
    english, chinese = source.split("  zh: {")
    keys = [set(re.findall(r"(\w+): (?:'|`|count|\(|\{)", part)) for part in (english, chinese)]
    assert keys[0] - {"en", "WORDS"} == keys[1] - {"zh"}
    used = set(re.findall(r'data-(?:word|label)="(\w+)"', (PAGE / "index.html").read_text()))
    assert used <= keys[0]


def test_no_file_asks_for_another_site():
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", text
        ), file


@pytest.mark.slow
def test_an_encoder_decoder(open_page, tmp_path):
    model = {"name": "encoder_decoder", "vocab_size": 264, "embed_dim": 32, "num_layers": 2, "num_heads": 4,
             "mlp_dim": 64, "max_length": 64}  # fmt: skip
    run = run_config(
        model=model,
        data={
            "tokenizer": {"name": "raw_bytes"},
            "sources": [{"name": "jsonl", "path": "unread.jsonl"}],
        },
        objective={"name": "seq2seq"},
    )
    save_run(tmp_path / "answers", run)
    with serving("--workdir", tmp_path / "answers") as server:
        page = open_page(server.url, ready="h1:has-text('answers')")
        assert page.text_content("label[for=prompt]") == "Text that the model answers"
        page.fill("#prompt", "a question")
        page.click("#go")
        finished(page)
        page.locator(".token:not(.given)").first.click()
        page.wait_for_selector("#instead .alternative")
        assert page.locator("#lens").is_hidden()
        assert page.locator("#on").is_hidden()
        body = {"prompt": "a", "echo": True}
        assert server.post("/v1/completions", body)[0] == 400
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 3, "n": 2})[0] == 200
        assert server.post("/api/attention", {"tokens": [1]})[0] == 400
