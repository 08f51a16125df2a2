"""Driving the page of `plinth serve` in a browser, for tests."""


def set_slider(page, name: str, value) -> None:
    """Move a slider as a hand would: its value, then the event of it."""
    move = "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', { bubbles: true })); }"
    page.locator(f"#{name}").evaluate(move, value)


def ask(page, text: str, max_tokens: int = 12, seed: int = 3, temperature: float = 0.7) -> None:
    """Set what an answer depends on, send a message, and wait for the end of the answer. Top-k and top-p keep everything."""
    for name, value in {"max_tokens": max_tokens, "seed": seed}.items():
        page.evaluate("([id, value]) => { document.getElementById(id).value = value; }", [name, str(value)])
    set_slider(page, "temperature", temperature)
    set_slider(page, "top_p", 1)
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    settled(page)


def settled(page) -> None:
    """Wait until nothing is generated and the last answer has its note."""
    page.locator("#send:visible").wait_for(timeout=60_000)
    page.locator(".assistant .note").last.wait_for(timeout=60_000)


def answer_of(page, index: int = -1) -> str:
    """Return the text of an answer."""
    return page.locator(".assistant .body").nth(index).text_content()


def token_ids(page) -> list[int]:
    """Return the ids of the last answer."""
    read = "(bodies) => [...bodies.at(-1).children].flatMap((span) => span.tokens.map((token) => token.id))"
    return page.locator(".assistant .body").evaluate_all(read)
