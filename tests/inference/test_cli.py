"""`plinth generate` and `plinth chat` through the real command line."""

import io
import json
import sys

import pytest

from plinth.cli.main import main
from plinth.models.hub import save_model


@pytest.fixture(scope="module")
def folder(make_model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "model"
    save_model(make_model(vocab_size=tokenizer.vocab_size, max_seq_len=96), tokenizer, path)
    return path


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_json_is_one_object_and_seeded(folder, capsys):
    argv = ("generate", str(folder), "--prompt", "def", "café", "--max-tokens", "9", "--seed", "3", "--logprobs", "2", "--json")
    code, out, err = run(capsys, *argv)
    result = json.loads(out)
    assert code == 0 and len(result["completions"]) == 2
    first = result["completions"][0]
    assert first["prompt"] == "def" and len(first["tokens"]) <= 9
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in first["tokens"])
    assert json.loads(run(capsys, *argv)[1])["completions"] == result["completions"]
    alone = json.loads(run(capsys, *argv[:3], "def", *argv[5:])[1])["completions"]
    assert alone == [first]


def test_generate_prints_text_and_table(folder, capsys):
    argv = ("generate", str(folder), "--prompt", "def", "--max-tokens", "5", "--temperature", "0")
    code, out, _ = run(capsys, *argv)
    text = json.loads(run(capsys, *argv, "--json")[1])["completions"][0]["text"]
    assert code == 0 and out.rstrip("\n") == text.rstrip("\n")
    assert "alternatives" in run(capsys, *argv, "--logprobs", "2")[1]
    assert "alternatives" in run(capsys, *argv, "--logprobs", "2", "--chat", "--system", "[bold]")[1]


def test_generate_reads_a_pipe(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("café"))
    code, out, _ = run(capsys, "generate", str(folder), "--max-tokens", "4", "--seed", "1", "--json")
    assert code == 0 and json.loads(out)["completions"][0]["prompt"] == "café"


@pytest.mark.parametrize(
    "argv, says",
    [
        (("--prompt", "x", "--top-p", "2"), "top_p=2"),
        (("--prompt", "x", "--system", "y"), "--system needs --chat"),
        (("--prompt", "long " * 100), "tokens; the context of 96 tokens"),
    ],
)
def test_generate_names_mistakes_in_one_line(folder, capsys, argv, says):
    code, out, err = run(capsys, "generate", str(folder), *argv)
    assert code == 1 and says in err and err.count("\n") == 1 and out == ""


def test_generate_without_a_model(tmp_path, capsys):
    code, _, err = run(capsys, "generate", str(tmp_path / "none"), "--prompt", "x")
    assert code == 1 and "none" in err and err.count("\n") == 1


def chat(folder, capsys, monkeypatch, lines: str, *argv: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return run(capsys, "chat", str(folder), "--max-tokens", "8", "--seed", "5", *argv)


def test_chat_streams_answers_of_piped_messages(folder, capsys, monkeypatch):
    code, out, _ = chat(folder, capsys, monkeypatch, "hello\n\nagain\n")
    code_json, conversation, _ = chat(folder, capsys, monkeypatch, "hello\n\nagain\n", "--json")
    messages = json.loads(conversation)["messages"]
    assert code == code_json == 0
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert out == "".join(message["content"] + "\n" for message in messages if message["role"] == "assistant")


def test_chat_reset_and_quit(folder, capsys, monkeypatch):
    code, out, err = chat(folder, capsys, monkeypatch, "hello\n/reset\nagain\n/quit\nunread\n", "--json", "--system", "s")
    messages = json.loads(out)["messages"]
    assert code == 0 and "(forgotten)" in err
    assert [message["content"] for message in messages if message["role"] == "user"] == ["again"]
    assert messages[0] == {"role": "system", "content": "s"}
    assert "/nonsense is no command" in chat(folder, capsys, monkeypatch, "/nonsense\n")[2]


def test_chat_forgets_the_oldest_when_the_context_is_full(folder, capsys, monkeypatch):
    code, out, err = chat(folder, capsys, monkeypatch, "some text\n" * 6 + "x " * 200 + "\nlast\n", "--json")
    messages = json.loads(out)["messages"]
    assert code == 0 and "messages are forgotten" in err and "Shorten it" in err
    assert messages[-2]["content"] == "last" and len(messages) < 14
    assert json.loads(out)["dropped_messages"] + len(messages) == 2 * 7


def test_kept_answers_are_given_again(folder, capsys, tmp_path):
    base = (
        "generate",
        str(folder),
        "--prompt",
        "def",
        "--max-tokens",
        "10",
        "--seed",
        "1",
        "--json",
        "--answer-cache",
        str(tmp_path / "a.db"),
    )
    first, again = (json.loads(run(capsys, *base)[1]) for _ in range(2))
    assert first["completions"] == again["completions"] and (first["known_answers"], again["known_answers"]) == (0, 1)
    assert "needs --answer-cache" in run(capsys, *base[:-2], "--min-likeness", "0.9")[2]


def test_generate_under_a_grammar(folder, capsys, tmp_path):
    (tmp_path / "s.json").write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2, "uniqueItems": true}')
    (tmp_path / "g.gbnf").write_text('root ::= "a" | "b"')
    base = ("generate", str(folder), "--prompt", "def", "--max-tokens", "60", "--seed", "1", "--json")

    def first(*argv):
        code, out, err = run(capsys, *base, *argv)
        assert code == 0, err
        return json.loads(out)["completions"][0], err

    assert first("--choice", "yes", "no")[0]["text"] in ("yes", "no")
    assert first("--regex", "[0-9]{3}")[0]["text"].isdigit()
    assert first("--grammar", str(tmp_path / "g.gbnf"))[0]["text"] in ("a", "b")
    completion, err = first("--json-schema", str(tmp_path / "s.json"), "--lenient")
    assert "not enforced" in err and "uniqueItems" in err
    document = json.loads(completion["text"])
    assert completion["valid"] == (len(set(document)) == 2)
    code, _, err = run(capsys, *base, "--json-schema", str(tmp_path / "s.json"))
    assert code == 1 and "uniqueItems" in err
    assert "say two things" in run(capsys, *base, "--regex", "a", "--choice", "b")[2]
    assert "needs --json-schema" in run(capsys, *base, "--lenient")[2]
    assert "does not exist" in run(capsys, *base, "--grammar", "none.lark")[2]
    code, out, err = run(capsys, *base[:-1], "--regex", "[0-9]{90}", "--max-tokens", "4")
    assert "not valid: cut off by length" in err


@pytest.mark.parametrize("how", ["prompt-lookup", "model"])
def test_speculation_changes_no_answer_and_says_what_it_gave(folder, capsys, how):
    argv = ("generate", str(folder), "--prompt", "def def def", "--max-tokens", "40", "--temperature", "0.2", "--seed", "1", "--json")
    plain = json.loads(run(capsys, *argv)[1])
    guessed = json.loads(run(capsys, *argv, "--speculate", how if how != "model" else str(folder), "--draft-tokens", "3")[1])
    assert guessed["completions"] == plain["completions"] and "drafted" not in plain
    assert 0 <= guessed.get("accepted", 0) <= guessed.get("drafted", 0)
    if how == "model":
        assert guessed["acceptance"] > 0


def test_draft_tokens_without_a_drafter_and_a_draft_model_of_another_tokenizer(folder, capsys, make_model, tmp_path):
    from plinth.tokenizer.train import train_tokenizer

    code, _, err = run(capsys, "generate", str(folder), "--prompt", "x", "--draft-tokens", "3")
    assert code == 1 and "--draft-tokens needs --speculate" in err
    other = train_tokenizer(["quite another text " * 50], vocab_size=300)
    save_model(make_model(vocab_size=other.vocab_size), other, tmp_path / "model")
    code, _, err = run(capsys, "generate", str(folder), "--prompt", "x", "--speculate", str(tmp_path / "model"))
    assert code == 1 and "another tokenizer" in err


def test_beams_and_best_of_n_through_the_command_line(folder, capsys):
    base = ("generate", str(folder), "--prompt", "def main", "x", "--max-tokens", "8", "--json", "--seed", "2")
    beams = [json.loads(run(capsys, *base, "--beams", str(width))[1])["completions"] for width in (1, 4)]
    greedy = json.loads(run(capsys, *base, "--temperature", "0")[1])["completions"]
    assert [one["text"] for one in beams[0]] == [one["text"] for one in greedy]
    assert all(one["logprob"] <= 0 and one["score"] >= other["score"] - 1e-6 for one, other in zip(beams[1], beams[0]))
    chosen = json.loads(run(capsys, *base, "--best-of", "3")[1])["completions"]
    singles = [json.loads(run(capsys, *base[:3], "def main", *base[5:-1], str(2 + i))[1])["completions"][0] for i in range(3)]
    mean = [sum(token["logprob"] for token in one["tokens"]) / max(1, len(one["tokens"])) for one in singles]
    assert chosen[0]["text"] == singles[mean.index(max(mean))]["text"]
    assert chosen[0]["cost"]["prompt_tokens"] == chosen[0]["prompt_tokens"] and chosen[0]["cost"]["flops"] > 0
    assert 0 < json.loads(run(capsys, *base, "--best-of", "3", "--select", "vote")[1])["completions"][0]["share"] <= 1
    for argv, says in (
        (("--beams", "2", "--best-of", "2"), "two ways"),
        (("--length-penalty", "2"), "--length-penalty needs --beams"),
        (("--beams", "0"), "num_beams=0"),
        (("--best-of", "2", "--regex", "a"), "take no grammar"),
    ):
        code, _, err = run(capsys, *base, *argv)
        assert code == 1 and says in err
