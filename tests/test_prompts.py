"""Prompts files, the order of prompts, and what is read from a tokenizer's directory."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_drpo.errors import ConfigError, DataError
from megatron_drpo.prompts import (
    PromptSampler,
    load_tokenizer,
    parse_lines,
    read_jsonl,
    read_prompts,
    stop_ids,
)

VOCAB = ["<unk>", "<s>", "</s>", "[", "]", *"0123456789+=abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no role bad') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def ids_of(*pieces: str) -> list[int]:
    """Ids of special tokens given whole and of text by its characters."""
    return [
        VOCAB.index(token)
        for piece in pieces
        for token in ([piece] if piece in ("<s>", "</s>") else piece)
    ]


def make_tokenizer(
    *, wrap: str | None = None, template: str | None = None, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """A tokenizer of characters; `wrap` such as "<s> $A </s>" is what it adds by default."""
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCAB)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.add_special_tokens(["<s>", "</s>"])
    if wrap:
        backend.post_processor = processors.TemplateProcessing(
            single=wrap, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join(x + "\n" if isinstance(x, str) else json.dumps(x) + "\n" for x in lines)
    )
    return path


def read(path: Path, tokenizer=None, *, chat: bool = False, room: int = 30):
    return read_prompts(
        path,
        tokenizer or make_tokenizer(),
        apply_chat_template=chat,
        max_prompt_length=room,
        context_flag="--rollout-max-response-length 256",
    )


def test_fields_of_a_line(tmp_path):
    path = write(
        tmp_path / "train.jsonl",
        {"prompt": "1+2=", "answer": 3, "level": 2, "tags": ["a"]},
        "",
        {"prompt": "b=", "answer": "x y", "id": "mine"},
        {"prompt": "c=", "answer": 2.5, "id": 7},
        {"prompt": "d=", "answer": None},
    )
    one, two, three, four = read(path)
    assert (one.id, one.text, one.answer) == ("train.jsonl:1", "1+2=", "3")
    assert one.token_ids.tolist() == ids_of("1+2=")
    assert one.metadata == {"level": 2, "tags": ["a"]}
    assert (two.id, two.answer, two.metadata) == ("mine", "x y", {})
    assert (three.id, three.answer) == ("7", "2.5")
    assert (four.id, four.answer) == ("train.jsonl:5", None)


@pytest.mark.parametrize("wrap", [None, "<s> $A", "<s> $A </s>", "$A </s>"])
def test_text_gets_the_tokenizers_bos_once_and_never_an_eos(tmp_path, wrap):
    path = write(tmp_path / "p.jsonl", {"prompt": "ab"}, {"prompt": "<s>ab"}, {"prompt": "ab</s>"})
    bos = ["<s>"] if wrap and "<s>" in wrap else []
    plain, own_bos, own_eos = (p.token_ids.tolist() for p in read(path, make_tokenizer(wrap=wrap)))
    assert plain == ids_of(*bos, "ab")
    assert own_bos == ids_of("<s>", "ab")
    assert own_eos[: len(bos) + 3] == ids_of(*bos, "ab", "</s>")


def test_chat_messages_always_and_text_on_demand_go_through_the_template(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    path = write(tmp_path / "p.jsonl", {"prompt": messages}, {"prompt": "hi"})
    tokenizer = make_tokenizer(wrap="<s> $A </s>", template=TEMPLATE)
    chat, text = read(path, tokenizer, room=50)
    assert chat.text == "[system]s</s>[user]hi</s>[assistant]"
    assert chat.token_ids.tolist() == ids_of("[system]s", "</s>", "[user]hi", "</s>", "[assistant]")
    assert text.token_ids.tolist() == ids_of("<s>", "hi")
    _, text = read(path, tokenizer, chat=True, room=50)
    assert text.token_ids.tolist() == ids_of("[user]hi", "</s>", "[assistant]")


def test_all_problems_are_reported_at_once_with_file_and_line(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "ok", "id": "a"},
        '{"prompt": "x"',
        [1],
        {"answer": "3"},
        {"prompt": "  "},
        {"prompt": 5},
        {"prompt": "x", "answer": ["3"]},
        {"prompt": "x", "id": "a"},
        {"prompt": "0123456789" * 4},
        {"prompt": [{"role": "user"}]},
        {"prompt": [{"role": "bad", "content": "x"}]},
    )
    with pytest.raises(DataError) as caught:
        read(path, make_tokenizer(template=TEMPLATE))
    expected = [
        (2, "malformed JSON", "column"),
        (3, "must be a JSON object", "a list"),
        (4, "`prompt`", "missing"),
        (5, "`prompt`", "empty"),
        (6, "`prompt`", "a number"),
        (7, "`answer`", "a list"),
        (8, "'a'", "line 1"),
        (9, "40 tokens", "30", "--rollout-max-response-length 256"),
        (10, "message 0", "`content`"),
        (11, "no role bad"),
    ]
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected)
    for line, (number, *parts) in zip(lines, expected, strict=True):
        assert line.startswith(f"{path}:{number}: ")
        assert all(part in line for part in parts), line


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_line_is_read_alike_however_it_ends_and_is_packed(tmp_path, pack, end):
    path = tmp_path / "p.jsonl"
    lines = [b'\xef\xbb\xbf{"n": 1}', b"", b'{"n": "\xc2\x85"}', b'{"n": 3}']
    path.write_bytes(pack(end.join(lines)))  # the last one without an end
    found = read_jsonl(path, lambda number, line: (number, line["n"]), "numbers")
    assert found == [(1, 1), (3, "\x85"), (4, 3)]
    path.write_bytes(pack(end.join([*lines, b'{"n": 4', b""])))
    with pytest.raises(DataError, match=r"p\.jsonl:5: malformed JSON in column 8: "):
        read_jsonl(path, lambda number, line: line, "numbers")


def test_lines_are_parsed_as_they_come_and_their_problems_told_at_the_end():
    come = []

    def lines():
        for line in (b'{"n": 1}', b"x", b'{"n": 3}'):
            come.append(line)
            yield line

    found = parse_lines("p.jsonl", lines(), lambda number, line: line["n"])
    assert (next(found), len(come)) == (1, 1)
    assert (next(found), len(come)) == (3, 3)
    with pytest.raises(DataError, match=r"^p\.jsonl:2: malformed JSON in column 1"):
        next(found)


def test_a_packed_file_that_is_torn_is_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(gzip.compress(b'{"n": 1}\n' * 100)[:-5])
    with pytest.raises(DataError, match=r"p\.jsonl: is damaged or not complete"):
        read_jsonl(path, lambda number, line: line, "numbers")


def test_ten_problems_are_listed_and_the_rest_is_counted(tmp_path):
    path = write(tmp_path / "p.jsonl", *[{"question": "x"}] * 14)
    with pytest.raises(DataError) as caught:
        read(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and lines[9].startswith(f"{path}:10: ") and "4 more" in lines[10]


def test_only_this_program_speaks_of_a_prompt_that_is_too_long(tmp_path, caplog):
    tokenizer = make_tokenizer(template=TEMPLATE)
    tokenizer.model_max_length = 20  # transformers would warn beyond it
    path = write(tmp_path / "p.jsonl", {"prompt": "a" * 40})
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        for chat in (False, True):
            with pytest.raises(DataError):
                read(path, tokenizer, chat=chat)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records


def test_a_prompt_that_just_fits_is_accepted(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "a" * 30})
    assert read(path, room=30)[0].token_ids.numel() == 30
    with pytest.raises(DataError, match=r"30 tokens.* 29"):
        read(path, room=29)


@pytest.mark.parametrize("content", [b"", b"\n  \n", b'{"prompt": "\xff"}\n', None, "directory"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "p.jsonl"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "--prompts" in str(caught.value) or "malformed JSON" in str(caught.value)


def test_without_a_chat_template_there_is_no_chat(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": [{"role": "user", "content": "x"}]})
    with pytest.raises(ConfigError, match="--apply-chat-template"):
        read(path, chat=True)
    with pytest.raises(DataError, match="p.jsonl:1: .*chat template"):
        read(path)


def test_steps_run_across_epochs_in_file_order_without_shuffling():
    sampler = PromptSampler(5, 2, seed=0, shuffle=False)
    steps = [sampler.indices(step) for step in range(5)]
    assert steps == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 40), st.integers(0, 2**40), st.booleans())
def test_no_step_repeats_a_prompt_and_every_epoch_has_each_once(data, num_prompts, seed, shuffle):
    per_step = data.draw(st.integers(1, num_prompts))
    sampler = PromptSampler(num_prompts, per_step, seed, shuffle)
    steps = [sampler.indices(step) for step in range(3 * num_prompts // per_step + 3)]
    assert all(len(set(step)) == len(step) == per_step for step in steps)
    stream = [index for step in steps for index in step]
    for epoch in range(len(stream) // num_prompts):
        window = stream[epoch * num_prompts : (epoch + 1) * num_prompts]
        assert sorted(window) == list(range(num_prompts))
    # A resumed run asks a new sampler for a late step first.
    late = len(steps) - 1
    assert PromptSampler(num_prompts, per_step, seed, shuffle).indices(late) == steps[late]


def test_epochs_and_seeds_have_orders_of_their_own():
    def epoch(seed: int, number: int) -> list[int]:
        return PromptSampler(50, 50, seed, shuffle=True).indices(number)

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0), epoch(1, 1), list(range(50))]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_more_prompts_per_step_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"--rollout-prompts-per-step 8: .*\b7 prompts"):
        PromptSampler(7, 8, seed=0, shuffle=True)


def test_tokenizer_loads_if_the_model_has_a_row_for_every_id(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, vocab_size=len(VOCAB))
    assert loaded("1+2=").input_ids == ids_of("1+2=")
    with pytest.raises(DataError, match=rf"{len(VOCAB) - 1}\b.*{len(VOCAB) - 1}\b"):
        load_tokenizer(tmp_path, vocab_size=len(VOCAB) - 1)


def test_missing_or_damaged_tokenizer_names_the_directory(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        load_tokenizer(tmp_path / "none", 10)
    directory = tmp_path / "damaged"
    make_tokenizer().save_pretrained(directory)
    whole = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=str(directory)):
        load_tokenizer(directory, 100)


def test_a_model_without_tokenizer_files_is_refused(tmp_path):
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=rf"{tmp_path}.*no usable tokenizer.*tokenizer\.json"):
        load_tokenizer(tmp_path, 100)


@pytest.mark.parametrize(
    ("generation", "model", "extra", "expected"),
    [
        ({"eos_token_id": [7, 5]}, {"eos_token_id": 9}, (), (5, 7)),
        ({"eos_token_id": 7}, {"eos_token_id": 9}, (8, 7), (7, 8)),
        ({}, {"eos_token_id": 9}, (), (9,)),
        (None, {"eos_token_id": 0}, (), (0,)),
        (None, {}, (3,), (2, 3)),
    ],
)
def test_stop_ids_come_from_the_first_file_that_names_them(
    tmp_path, generation, model, extra, expected
):
    for name, content in (("generation_config.json", generation), ("config.json", model)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert stop_ids(tmp_path, make_tokenizer(), extra) == expected


def test_stop_ids_outside_the_vocabulary_or_absent_are_refused(tmp_path):
    tokenizer = make_tokenizer(eos=None)
    with pytest.raises(ConfigError, match="--rollout-stop-ids: .*eos_token_id"):
        stop_ids(tmp_path, tokenizer, ())
    assert stop_ids(tmp_path, tokenizer, (4,)) == (4,)
    for value in (len(VOCAB), -1):
        with pytest.raises(ConfigError, match=f"--rollout-stop-ids {value}: .*{len(VOCAB) - 1}"):
            stop_ids(tmp_path, tokenizer, (value,))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5000}')
    with pytest.raises(ConfigError, match=r"5000.*generation_config.json"):
        stop_ids(tmp_path, tokenizer, ())
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match=r"generation_config.json: malformed"):
        stop_ids(tmp_path, tokenizer, ())


def test_replacements_depend_on_seed_and_step_only_and_never_repeat():
    sampler = PromptSampler(10, 4, seed=7, shuffle=True)
    first = sampler.indices(3)
    more = sampler.replacements(3, 4, first)
    assert len({*first, *more}) == 8
    assert more == PromptSampler(10, 4, seed=7, shuffle=True).replacements(3, 4, first)
    assert more[:2] == sampler.replacements(3, 2, first)
    rest = sampler.replacements(3, 4, [*first, *more])
    assert sorted([*first, *more, *rest]) == list(range(10)), "two are left, and no more"
    orders = {tuple(sampler.replacements(step, 10, [])) for step in range(5)}
    assert len(orders) == 5
    assert tuple(PromptSampler(10, 4, 8, True).replacements(0, 10, [])) not in orders
