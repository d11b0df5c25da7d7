"""Files to samples: policies, counts, and what is refused; and real conversations (GSM8K)."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data import chat
from tests.data.chat import byte_tokenizer
from torchsft.config import Data, InputError
from torchsft.data.packing import pack
from torchsft.data.template import FileReport, answer_prompts, prepare

TOKENIZER = byte_tokenizer(chat.DEEPSEEK_V3)
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is not there: GSM8K is not part of the project")


def write(path, *talks):
    """One line for each tuple of user and assistant turns."""
    lines = [{"messages": chat.conversation(*talk).messages} for talk in talks]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# Tokens: <bos> <|User|> h i <|Assistant|> <answer, a token for each digit> <eos>
def talk(digits):
    return "42", "7" * digits


def test_counts_and_the_line_that_is_shown(tmp_path):
    first = write(tmp_path / "first.jsonl", talk(1), talk(20), talk(3))
    second = write(tmp_path / "second.jsonl", talk(2))
    prepared = prepare([first, str(second)], TOKENIZER, Data(seq_len=16))
    assert [sample.id for sample in prepared.samples] == ["first.jsonl:1", "first.jsonl:3", "second.jsonl:1"]
    assert prepared.report.files == {
        str(first): FileReport(3, 2, (6 + 1) + (6 + 3), 2 + 4, dropped_too_long=1),
        str(second): FileReport(1, 1, 6 + 2, 3),
    }
    assert str(prepared.report) == (
        "2 files: 4 conversations, 3 samples, 24 tokens (37.5 % supervised);"
        " dropped 1 too long and 0 without targets, truncated 0"
    )
    assert str(prepare([second], TOKENIZER, Data(seq_len=16)).report).startswith("second.jsonl: 1 conversations")


def test_samples_are_compact_arrays(tmp_path):
    [sample] = prepare([write(tmp_path / "a.jsonl", talk(5))], TOKENIZER, Data(seq_len=16)).samples
    assert (sample.tokens.dtype, sample.weights.dtype) == (np.int32, np.float32)
    assert TOKENIZER.decode(sample.tokens[sample.weights > 0]) == "77777<eos>"


def test_truncation_right_cuts_the_end_and_drops_what_has_no_target_left(tmp_path):
    path = write(tmp_path / "a.jsonl", talk(3), talk(20), ("4" * 20, "7"))
    prepared = prepare([path], TOKENIZER, Data(seq_len=16, truncation="right"))
    assert [(s.id, len(s.tokens), int(s.weights.sum())) for s in prepared.samples] == [
        ("a.jsonl:1", 9, 4),
        ("a.jsonl:2", 16, 11),
    ]
    assert prepared.report.total == FileReport(3, 2, 25, 15, truncated=2, dropped_no_targets=1)


def test_a_sample_of_exactly_seq_len_tokens_is_kept_whole(tmp_path):
    for truncation in ("drop", "right", "raise"):
        data = Data(seq_len=16, truncation=truncation)
        prepared = prepare([write(tmp_path / "a.jsonl", talk(10))], TOKENIZER, data)
        assert prepared.report.total == FileReport(1, 1, 16, 11)


def test_truncation_raise_names_the_sample_and_both_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", talk(3), talk(20))
    with pytest.raises(InputError, match=r"a\.jsonl:2 has 26 tokens, but --data\.seq-len is 16"):
        prepare([path], TOKENIZER, Data(seq_len=16, truncation="raise"))


def test_a_data_set_without_a_supervised_token_is_refused_with_its_counts(tmp_path):
    with pytest.raises(InputError, match=r"no supervised token is left: .* dropped 1 too long .*seq-len 8"):
        prepare([write(tmp_path / "a.jsonl", talk(20))], TOKENIZER, Data(seq_len=8))
    path = write(tmp_path / "b.jsonl", ("4" * 20, "7"))
    with pytest.raises(InputError, match=r"no supervised token is left: .* and 1 without targets"):
        prepare([path], TOKENIZER, Data(seq_len=8, truncation="right"))


def test_an_empty_file_a_file_given_twice_and_foreign_token_ids_are_refused(tmp_path):
    empty, path = tmp_path / "empty.jsonl", write(tmp_path / "a.jsonl", talk(2))
    empty.write_text("\n\n")
    with pytest.raises(InputError, match=r"empty\.jsonl holds no conversations"):
        prepare([path, empty], TOKENIZER, Data())
    with pytest.raises(InputError, match=r"a\.jsonl is given twice"):
        prepare([path, path], TOKENIZER, Data())
    largest = max(prepare([path], TOKENIZER, Data(), vocab_size=len(TOKENIZER)).samples[0].tokens)
    with pytest.raises(InputError, match=rf"a\.jsonl:1 has token id {largest}, but the model's vocabulary has {largest};"):
        prepare([path], TOKENIZER, Data(), vocab_size=largest)


def test_files_of_one_name_in_two_directories_keep_distinct_ids(tmp_path):
    paths = []
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
        paths.append(write(tmp_path / directory / "chat.jsonl", talk(2)))
    assert [s.id for s in prepare(paths, TOKENIZER, Data()).samples] == [f"{path}:1" for path in paths]


def test_a_bad_line_and_a_refusing_template_name_file_and_line(tmp_path):
    path = write(tmp_path / "a.jsonl", talk(2), ("hi", "<think>me</think>you"))
    with pytest.raises(InputError, match=r"^a\.jsonl:2: the chat template leaves out"):
        prepare([path], byte_tokenizer(chat.DEEPSEEK_R1), Data())
    path.write_text(path.read_text() + "{]\n")
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: not JSON"):
        prepare([path], TOKENIZER, Data())


def test_progress_is_shown_on_a_terminal_only_when_asked_for(tmp_path, capfd, monkeypatch):
    path = write(tmp_path / "a.jsonl", talk(2))
    prepare([path], TOKENIZER, Data(), progress=True)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    prepare([path], TOKENIZER, Data())
    assert capfd.readouterr().err == ""
    prepare([path], TOKENIZER, Data(), progress=True)
    assert "tokenising a.jsonl" in capfd.readouterr().err


@needs_gsm8k
@pytest.mark.parametrize("template", [chat.DEEPSEEK_V3, chat.CHATML, chat.LLAMA3_GENERATION])
def test_gsm8k_trains_every_answer_with_its_end_and_nothing_else(tmp_path, template):
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:60]]
    path = write(tmp_path / "train.jsonl", *[(row["question"], row["answer"]) for row in rows])
    tokenizer = byte_tokenizer(template)
    prepared = prepare([path], tokenizer, Data(seq_len=4096), vocab_size=len(tokenizer))
    assert len(prepared.samples) == len(rows)
    for row, sample in zip(rows, prepared.samples, strict=True):
        [(prompt, answer)] = answer_prompts(sample)
        messages = [{"role": "user", "content": row["question"]}]
        assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        target = tokenizer.decode(answer)
        assert target.startswith(row["answer"])
        assert target.removeprefix(row["answer"]) in ("<eos>", "<|im_end|>", "<|eot_id|>")


@needs_gsm8k
def test_gsm8k_fills_rows_of_4096_tokens_to_99_percent():
    """All 7,473 rows; about four characters a token, as large vocabularies have it."""
    lengths = []
    for line in GSM8K.read_text().splitlines():
        row = json.loads(line)
        lengths.append(6 + (len(row["question"]) + len(row["answer"])) // 4)
    rows = pack(lengths, np.random.default_rng(0).permutation(len(lengths)), 4096)
    assert sum(lengths) / (len(rows) * 4096) >= 0.99
