"""A small text, instructions and pairs of one's own, and a build made from them through the real command line."""

import pytest

from e2e.command import SMALL, plinth, write_jsonl

TOPICS = ["harbour", "lantern", "orchard", "granite", "willow", "copper", "meadow", "falcon", "ribbon", "cellar"]


@pytest.fixture(scope="session")
def own_data(tmp_path_factory):
    """A folder of 60 short text files, sft.jsonl and pairs.jsonl."""
    root = tmp_path_factory.mktemp("own")
    (root / "texts").mkdir()
    for i in range(60):
        a, b, c = TOPICS[i % 10], TOPICS[(i * 3 + 1) % 10], TOPICS[(i * 7 + 2) % 10]
        lines = [f"Note {i}, line {j}: the {a} stands by the {b}, and {j * i} steps away lies a {c}." for j in range(12)]
        (root / "texts" / f"note_{i:02}.txt").write_text("\n".join(lines))
    ask = [{"role": "user", "content": ""}]
    questions = [f"Where is the {topic}?" for topic in TOPICS]
    messages = [[{**ask[0], "content": q}, {"role": "assistant", "content": f"By the {t}."}] for q, t in zip(questions, TOPICS)]
    write_jsonl(root / "sft.jsonl", [{"messages": m} for m in messages] * 4)
    write_jsonl(
        root / "pairs.jsonl",
        [{"prompt": q, "chosen": f"By the {t}.", "rejected": "Far away."} for q, t in zip(questions, TOPICS)],
    )
    return root


@pytest.fixture(scope="session")
def built(own_data, tmp_path_factory):
    """The directory of a finished build of the own text, and what the command printed."""
    out = tmp_path_factory.mktemp("runs") / "own"
    output, errors = plinth(
        "build", own_data / "texts", "--budget", "60000tokens", "--out", out, "--sft", own_data / "sft.jsonl",
        "--pairs", own_data / "pairs.jsonl", "--json", *SMALL,
    )  # fmt: skip
    return out, output, errors
