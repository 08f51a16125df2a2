"""Labelled examples: what is read, what is refused and why, and where words and answers stand among the tokens."""

import json

import pytest
import torch

from plinth.config import UserError
from plinth.data.features import NO_ANSWER, answer_rows, pad_rows, targets, text_rows, word_rows
from plinth.data.labelled import Answer, QuestionExample, TextExample, WordExample, label_names, read_examples
from plinth.tokenizer.encoder_tokens import encoder_tokens, with_encoder_tokens
from plinth.tokenizer.train import train_tokenizer

TEXT = "Ada Lovelace wrote to Charles Babbage in London, and he answered from Cambridge. "


@pytest.fixture(scope="module")
def tokenizer():
    return with_encoder_tokens(train_tokenizer([TEXT * 10], 300))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_texts_pairs_and_labels(tmp_path):
    lines = [
        {"text": "good", "label": "pos"},
        {"text": "bad", "pair": "worse", "label": 0},
        {"text": "no label"},
        {"txt": "x", "label": "pos"},
    ]
    path = write(tmp_path / "a.jsonl", lines)
    examples, rejects = read_examples(path, "classify", labelled=True)
    assert examples == [TextExample("good", None, "pos"), TextExample("bad", "worse", "0")]
    assert rejects.count == 2 and "no 'text', a text. Did you mean txt?" in rejects.describe()
    assert read_examples(path, "classify", labelled=False)[0][2] == TextExample("no label")
    assert label_names(examples, "classify") == ("0", "pos")


def test_words_from_json_and_from_columns_are_the_same(tmp_path):
    columns = "-DOCSTART- -X- O O\n\nAda NNP B-PER\nLovelace NNP I-PER\nwrote VBD O\n\nLondon NNP B-LOC\n"
    (tmp_path / "a.conll").write_text(columns)
    sentences = [
        {"words": ["Ada", "Lovelace", "wrote"], "tags": ["B-PER", "I-PER", "O"]},
        {"words": ["London"], "tags": ["B-LOC"]},
    ]
    examples, _ = read_examples(tmp_path / "a.conll", "tag", labelled=True)
    assert examples == read_examples(write(tmp_path / "a.jsonl", sentences), "tag", labelled=True)[0]
    assert label_names(examples, "tag") == ("O", "B-LOC", "B-PER", "I-PER")
    (tmp_path / "words.txt").write_text("Ada\nwrote\n")
    assert read_examples(tmp_path / "words.txt", "tag", labelled=False)[0] == [WordExample(("Ada", "wrote"))]


def test_questions_from_lines_and_from_squad_are_the_same(tmp_path):
    context = "Ada wrote to Charles."
    lines = [
        {"id": "1", "question": "Who wrote?", "context": context, "answers": [{"text": "Ada", "start": 0}]},
        {"id": "2", "question": "Who slept?", "context": context, "answers": []},
    ]
    asked = [
        {"id": "1", "question": "Who wrote?", "answers": [{"text": "Ada", "answer_start": 0}]},
        {"id": "2", "question": "Who slept?", "answers": [{"text": "Ada", "answer_start": 0}], "is_impossible": True},
    ]
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"version": "v2", "data": [{"paragraphs": [{"context": context, "qas": asked}]}]}))
    examples, _ = read_examples(squad, "answer", labelled=True)
    assert examples == read_examples(write(tmp_path / "a.jsonl", lines), "answer", labelled=True)[0]
    assert examples[0].answers == (Answer("Ada", 0),) and examples[1].answers == ()


@pytest.mark.parametrize(
    "task, record, told",
    [
        ("classify", {"text": "x", "lable": "a"}, "no 'label'. Did you mean lable"),
        ("classify", {"text": "x", "label": None}, "'label' is empty"),
        ("classify", {"text": " ", "label": "a"}, "'text' is empty"),
        ("classify", {"text": 5, "label": "a"}, "'text' is of type int, no text"),
        ("tag", {"words": ["a", "b"], "tags": ["O"]}, "2 words with 1 tags"),
        ("tag", {"tokens": ["a"]}, "no 'words', a list of words"),
        ("answer", {"question": "q", "context": "abc", "answers": [{"text": "abd", "start": 0}]}, "'abd' does not stand at character 0"),
        ("answer", {"question": "q", "context": "abc"}, "no 'answers'"),
    ],
)
def test_what_is_no_example_is_told_with_its_line(tmp_path, task, record, told):
    with pytest.raises(UserError, match="line 1") as refused:
        read_examples(write(tmp_path / "a.jsonl", [record]), task, labelled=True)
    assert told in str(refused.value) and f"Task {task} takes" in str(refused.value)


def test_a_words_tag_stands_at_its_first_token(tokenizer):
    tokens = encoder_tokens(tokenizer)
    example = WordExample(("Lovelace", "zebras", "in", "London,"), ("B-PER", "O", "O", "B-LOC"))
    (row,) = word_rows([example], tokenizer, tokens, {"O": 0, "B-LOC": 1, "B-PER": 2}, 64)
    assert row.tokens == tokens.single(tokenizer.encode(" ".join(example.words)))
    starts = [place for _, place in row.words] + [len(row.tokens) - 1]
    spelled = [tokenizer.decode(row.tokens[a:b]).strip() for a, b in zip(starts, starts[1:])]
    assert spelled == list(example.words) and row.labels == (2, 0, 0, 1)
    labels = targets([row], "tag", len(row.tokens))[0]
    assert labels[[place for _, place in row.words]].tolist() == [2, 0, 0, 1] and int((labels >= 0).sum()) == 4


def test_long_sentences_are_cut_between_words_and_keep_every_word(tokenizer):
    tokens, words = encoder_tokens(tokenizer), tuple(TEXT.split())
    rows = word_rows([WordExample(words)], tokenizer, tokens, {}, 12)
    assert len(rows) > 2 and max(len(row.tokens) for row in rows) <= 12
    assert [word for row in rows for word, _ in row.words] == list(range(len(words)))
    with pytest.raises(UserError, match="alone has more than 2 tokens"):
        word_rows([WordExample(("zebras",))], tokenizer, tokens, {}, 4)


def test_long_texts_are_refused_or_cut_from_the_longer_side(tokenizer):
    tokens = encoder_tokens(tokenizer)
    example = TextExample(TEXT, "London and Cambridge", "a")
    with pytest.raises(UserError, match="more than 20. Shorten it, or pass --truncate"):
        text_rows([example], tokenizer, tokens, {"a": 0}, 20, truncate=False)
    (row,) = text_rows([example], tokenizer, tokens, {"a": 0}, 20, truncate=True)
    assert len(row.tokens) == 20 and row.tokens.count(tokens.sep) == 2
    assert row.segments == sorted(row.segments) and row.segments[-1] == 1 and row.label == 0
    with pytest.raises(UserError, match="label 'b', which the model does not know"):
        text_rows([TextExample("x", None, "b")], tokenizer, tokens, {"a": 0}, 20, truncate=True)


def test_an_answers_tokens_spell_it_and_windows_without_it_have_none(tokenizer):
    tokens, context = encoder_tokens(tokenizer), TEXT * 3
    start = context.rindex("Cambridge")
    example = QuestionExample("Where from?", context, (Answer("Cambridge", start),))
    rows = answer_rows([example], tokenizer, tokens, 40, stride=8)
    assert len(rows) > 2 and max(len(row.tokens) for row in rows) <= 40
    found = [row for row in rows if row.span != NO_ANSWER]
    assert found and len(found) < len(rows)
    for row in found:
        first, last = row.span
        assert tokenizer.decode(row.tokens[first : last + 1]).strip() == "Cambridge"
        assert row.spans[first][0] <= start and row.spans[last][1] == start + len("Cambridge")
    seen = [span for row in rows for span in row.spans if span is not None]
    assert min(a for a, _ in seen) == 0 and max(b for _, b in seen) == len(context)
    for row in rows:
        assert [segment for segment, span in zip(row.segments, row.spans) if span is not None].count(0) == 0


def test_rows_are_padded_on_the_right(tokenizer):
    rows = text_rows([TextExample("Ada"), TextExample(TEXT)], tokenizer, encoder_tokens(tokenizer), {}, 64, False)
    tokens, mask, segments = pad_rows(rows, 1, 64)
    assert tokens.shape[1] % 8 == 0 and mask.sum(1).tolist() == [len(row.tokens) for row in rows]
    assert (tokens[~mask] == 1).all() and torch.equal(tokens[0, : len(rows[0].tokens)], torch.tensor(rows[0].tokens))
    assert not segments.any()
