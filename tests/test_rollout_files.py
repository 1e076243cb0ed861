"""Rollouts files: what is written comes back, and what cannot be trained on is refused."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_drpo.config import Config, DataConfig, ModelConfig, RolloutConfig
from megatron_drpo.errors import DataError
from megatron_drpo.rollout.engine import Sampling
from megatron_drpo.rollout.files import (
    FileHeader,
    RolloutWriter,
    check_header,
    make_header,
    read_header,
    read_rollouts,
    shard_name,
    tokenizer_sha256,
    write_rollouts,
)
from megatron_drpo.types import KeptIds, Prompt, Rollout, Trajectory

LINE = {
    "id": "a",
    "prompt": "1+",
    "prompt_ids": [5, 6],
    "sample": 0,
    "response": "x",
    "response_ids": [8, 2],
    "behaviour_logprobs": [-0.5, -0.25],
    "finish_reason": "stop",
    "policy_version": 4,
}


def line(**changes) -> dict:
    return LINE | changes


def group(**changes) -> list[dict]:
    return [line(sample=0, **changes), line(sample=1, **changes)]


def write(path, lines):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def read(path, samples: int = 2):
    return read_rollouts(path, vocab_size=10, max_length=6, samples_per_prompt=samples)


def trajectories() -> list[Trajectory]:
    generator = torch.Generator().manual_seed(0)
    prompts = [
        Prompt("f.jsonl:1", "1+\n\u00e9", torch.tensor([5, 6]), "3", {"level": 2, "tags": ["x"]}),
        Prompt("f.jsonl:2", "2+", torch.tensor([7]), None),
    ]
    return [
        Trajectory(
            Rollout(
                prompt=prompt,
                sample=sample,
                response_ids=torch.randint(0, 10, (3,), generator=generator),
                behaviour_logprobs=torch.rand(3, generator=generator).log(),
                finish_reason=("stop", "length")[sample],
                policy_version=4,
                response_text=f"r{sample}\u2028",
                topk_ids=torch.tensor([[1, 2], [3, 4], [9, 0]]),
                topk_logprobs=torch.tensor([[-0.1, -4.0], [-0.7, -1.3], [-0.3, -2.0]]),
                loss_mask=torch.tensor([True, True, False]) if sample else None,
            ),
            reward=0.1 * sample,
            advantage=0.0,
        )
        for prompt in prompts
        for sample in range(2)
    ]


def test_a_batch_comes_back_as_it_was(tmp_path):
    path = tmp_path / "rollouts" / "step-1.jsonl"
    batch = trajectories()
    write_rollouts(path, batch)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    back = read(path)
    assert len(back) == len(batch)
    for (rollout, reward), item in zip(back, batch, strict=True):
        want = item.rollout
        assert reward == item.reward
        assert rollout.behaviour_logprobs.dtype == torch.float32
        trained = slice(None) if want.loss_mask is None else want.loss_mask
        for name in ("behaviour_logprobs", "topk_ids", "topk_logprobs"):
            assert getattr(rollout, name)[trained].equal(getattr(want, name)[trained])
        assert (rollout.loss_mask is None) == (want.loss_mask is None)
        assert want.loss_mask is None or rollout.loss_mask.equal(want.loss_mask)
        assert rollout.response_ids.equal(want.response_ids)
        assert rollout.response_ids.dtype == rollout.prompt.token_ids.dtype == torch.int64
        for name in ("sample", "finish_reason", "policy_version", "response_text"):
            assert getattr(rollout, name) == getattr(want, name)
        assert rollout.prompt.token_ids.equal(want.prompt.token_ids)
        for name in ("id", "text", "answer", "metadata"):
            assert getattr(rollout.prompt, name) == getattr(want.prompt, name)


@settings(deadline=None)
@given(st.floats(max_value=0, allow_nan=False, allow_infinity=False, width=32))
def test_every_fp32_logprob_comes_back_bit_for_bit(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "bits.jsonl"
    source = torch.tensor([value, -0.0])
    item = trajectories()[0]
    rollout = Rollout(
        item.rollout.prompt,
        0,
        torch.tensor([1, 2]),
        source,
        "stop",
        0,
        "",
    )
    write_rollouts(path, [Trajectory(rollout, 0.0, 0.0)])
    ((back, _),) = read(path, samples=1)
    assert back.behaviour_logprobs.view(torch.int32).equal(source.view(torch.int32))


def test_what_a_masked_token_holds_is_not_looked_at(tmp_path):
    masked = group(
        loss_mask=[False, True],
        behaviour_logprobs=[None, -0.5],
        topk_ids=[None, [1, 2]],
        topk_logprobs=["nothing", [-0.5, -3.0]],
    )
    (rollout, _), _ = read(write(tmp_path / "r.jsonl", masked))
    assert rollout.loss_mask.tolist() == [False, True] and rollout.num_loss_tokens == 1
    assert rollout.behaviour_logprobs[1] == -0.5 and rollout.topk_ids[1].tolist() == [1, 2]


TOPK = {"topk_ids": [[1, 2], [3, 4]], "topk_logprobs": [[-0.5, -3.0], [-0.2, -2.0]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_mask": [True]}, "`response_ids` has 2 entries, but `loss_mask` 1"),
        ({"loss_mask": [True, 1]}, "`loss_mask` holds 1 at index 1; must be true or false"),
        ({"loss_mask": [False, False]}, "`loss_mask` is false everywhere"),
        ({"topk_ids": TOPK["topk_ids"]}, "has `topk_ids` alone"),
        (TOPK | {"topk_ids": [[1, 2]]}, "`response_ids` has 2 entries, but `topk_ids` 1"),
        (TOPK | {"topk_ids": [[1, 2], [3]]}, "`topk_ids` has 1 entries at index 1, 2 elsewhere"),
        (TOPK | {"topk_ids": [[1, 2], [3, 3]]}, "names an id twice at index 1"),
        (TOPK | {"topk_ids": [[1, 2], [3, 10]]}, "holds 10 at index 1; the model's token ids are"),
        (TOPK | {"topk_ids": [[1, 2], None]}, "`topk_ids` holds null at index 1; must be a list"),
        (TOPK | {"topk_logprobs": [[-0.5, 0.1], [-1, -2]]}, "`topk_logprobs` holds 0.1"),
        (TOPK | {"topk_logprobs": [[-0.1, -0.1], [-1, -2]]}, "exceed 1 together"),
    ],
)
def test_topk_and_mask_that_cannot_be_used_are_refused(tmp_path, changes, message):
    path = write(tmp_path / "r.jsonl", group(**changes))
    with pytest.raises(DataError) as caught:
        read(path)
    assert message in str(caught.value) and f"{path}:1" in str(caught.value)


def test_one_file_has_one_k(tmp_path):
    one = group(**TOPK)
    two = [x | {"id": "b"} for x in group()]
    with pytest.raises(DataError, match="r.jsonl:4: has 0 `topk_ids` per token, .*r.jsonl:2 2;"):
        read(write(tmp_path / "r.jsonl", one + two))


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, trajectories())
    before = path.read_bytes()
    good, bad = trajectories()[:2]
    prompt = Prompt("x", "x", torch.tensor([1]), None, {"unwritable": object()})
    broken = Rollout(
        prompt,
        0,
        *[
            getattr(bad.rollout, n)
            for n in (
                "response_ids",
                "behaviour_logprobs",
                "finish_reason",
                "policy_version",
                "response_text",
            )
        ],
    )
    with pytest.raises(TypeError):
        write_rollouts(path, [good, Trajectory(broken, 0.0, 0.0)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_rewards_are_read_where_they_are(tmp_path):
    path = write(tmp_path / "r.jsonl", group())
    assert [reward for _, reward in read(path)] == [None, None]
    path = write(tmp_path / "r.jsonl", group(reward=1))
    assert [reward for _, reward in read(path)] == [1.0, 1.0]
    path = write(tmp_path / "r.jsonl", [line(sample=0, reward=0.5), line(sample=1)])
    with pytest.raises(DataError, match=r"r.jsonl:2: .*`reward`.* 1 of 2"):
        read(path)


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        ('{"id": ', ["malformed JSON"]),
        ("[]", ["JSON object"]),
        ({k: v for k, v in LINE.items() if k not in ("response", "sample")}, ["`sample`, `resp"]),
        (line(rewards=1.0), ["unknown field `rewards`", "`metadata`"]),
        (line(response=None), ["`response` is null", "text"]),
        (line(id=3), ["`id` is 3", "text"]),
        (line(sample=True), ["`sample` is true", "whole number"]),
        (line(metadata=[1]), ["`metadata` is [1]", "object"]),
        (line(reward="1"), ['`reward` is "1"', "number"]),
        (line(reward=math.nan), ["`reward` is nan"]),
        (line(finish_reason="eos"), ["'eos'", "stop or length"]),
        (line(finish_reason="abort"), ["broken off"]),
        (line(policy_version=-1), ["`policy_version` is -1"]),
        (line(behaviour_logprobs=[-0.5]), ["2 entries", "`behaviour_logprobs` 1"]),
        (line(behaviour_logprobs=[-0.5, 0.125]), ["0.125 at index 1", "at most 0"]),
        (line(behaviour_logprobs=[math.nan, -0.5]), ["NaN at index 0"]),
        (line(behaviour_logprobs=[-0.5, -math.inf]), ["-Infinity at index 1"]),
        (line(behaviour_logprobs=[-0.5, -1e39]), ["-1e+39 at index 1"]),
        (line(behaviour_logprobs=[-0.5, "-1"]), ['"-1" at index 1']),
        (line(behaviour_logprobs=[None, -0.5]), ["null at index 0"]),
        (line(response_ids=[8, 10]), ["`response_ids` holds 10 at index 1", "0 to 9"]),
        (line(prompt_ids=[-1, 2]), ["`prompt_ids` holds -1 at index 0"]),
        (line(prompt_ids=[1, 2.0]), ["`prompt_ids` holds 2.0 at index 1"]),
        (line(response_ids=[], behaviour_logprobs=[]), ["`response_ids` is empty"]),
        (line(prompt_ids=[]), ["`prompt_ids` is empty"]),
        (line(prompt_ids=[1] * 5), ["7 tokens", "context 6"]),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path, bad, parts):
    path = write(tmp_path / "r.jsonl", [line(), bad])
    with pytest.raises(DataError) as caught:
        read(path)
    (text,) = str(caught.value).splitlines()
    assert text.startswith(f"{path}:2: ")
    assert all(part in text for part in parts), text


def test_all_bad_lines_are_named_at_once(tmp_path):
    path = write(tmp_path / "r.jsonl", [line(id=n) for n in range(14)])
    with pytest.raises(DataError) as caught:
        read(path)
    lines = str(caught.value).splitlines()
    assert [text.split(": ")[0] for text in lines[:10]] == [f"{path}:{n}" for n in range(1, 11)]
    assert len(lines) == 11 and "4 more" in lines[10]


@pytest.mark.parametrize("content", ["", "\n\n", None])
def test_missing_and_empty_files_are_named(tmp_path, content):
    path = tmp_path / "r.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"r.jsonl: .*--rollouts-file"):
        read(path)


@pytest.mark.parametrize(
    ("lines", "number", "parts"),
    [
        (group() + group(id="b"), None, []),
        (group() + [line(id="b")], 3, ["'b' has 1 samples", "--rollout-samples-per-prompt is 2"]),
        ([line(sample=n) for n in range(3)], 1, ["'a' has 3 samples", "is 2"]),
        ([line(), line()], 1, ["[0, 0]", "0 to 1"]),
        ([line(sample=1), line(sample=0)], 1, ["[1, 0]"]),
        ([line(sample=0), line(sample=1, prompt_ids=[5, 7])], 1, ["different `prompt_ids`"]),
        (group() + group(id="b") + group(), 5, ["begins again", "line 1"]),
    ],
)
def test_groups_are_complete_and_together(tmp_path, lines, number, parts):
    path = write(tmp_path / "r.jsonl", lines)
    if number is None:
        assert len(read(path)) == len(lines)
        return
    with pytest.raises(DataError) as caught:
        read(path)
    (text,) = str(caught.value).splitlines()
    assert text.startswith(f"{path}:{number}: ")
    assert all(part in text for part in parts), text


# Failed rewards, kept ids, version spans.


def test_a_reward_that_failed_is_null_and_one_that_was_not_computed_is_absent(tmp_path):
    path = write(tmp_path / "r.jsonl", [line(sample=0, reward=0.5), line(sample=1, reward=None)])
    (_, first), (_, second) = read(path)
    assert first == 0.5 and second is not None and math.isnan(second)
    one, other = trajectories()[:2]
    write_rollouts(path, [one, replace(other, reward=math.nan)])
    assert [json.loads(text).get("reward", "absent") for text in path.open()] == [0.0, None]
    (_, first), (_, second) = read(path)
    assert first == 0.0 and second is not None and math.isnan(second)


def kept(*lists: list[int]) -> KeptIds:
    ids = torch.tensor([i for each in lists for i in each], dtype=torch.int32)
    return KeptIds(ids, torch.tensor([len(each) for each in lists]))


def plain_group(name: str = "f.jsonl:1", **changes) -> list[tuple[Rollout, float | None]]:
    """Two samples without top-K fields, with rewards."""
    found = []
    for number, item in enumerate(trajectories()[:2]):
        rollout = replace(
            item.rollout,
            prompt=replace(item.rollout.prompt, id=name),
            topk_ids=None,
            topk_logprobs=None,
            loss_mask=None,
            **changes,
        )
        found.append((rollout, float(number)))
    return found


def test_kept_ids_and_versions_come_back(tmp_path):
    path = tmp_path / "r.jsonl"
    (one, _), (other, _) = plain_group()
    a, b, c = one.response_ids.tolist()
    one = replace(one, kept_ids=kept([a, (a + 1) % 10], [], [c]), version_spans=((2, 4), (1, 6)))
    other = replace(
        other,
        kept_ids=kept([], other.response_ids[1:2].tolist(), []),
        loss_mask=torch.tensor([False, True, True]),
    )
    write_rollouts(path, [Trajectory(one, 0.0, 0.0), Trajectory(other, 0.0, 0.0)])
    (first, _), (second, _) = read(path)
    for found, wanted in ((first, one), (second, other)):
        assert found.kept_ids is not None and wanted.kept_ids is not None
        assert found.kept_ids.ids.equal(wanted.kept_ids.ids)
        assert found.kept_ids.ids.dtype == torch.int32
        assert found.kept_ids.counts.equal(wanted.kept_ids.counts)
        assert found.version_spans == wanted.version_spans
    assert first.spans == ((2, 4), (1, 6)) and second.spans == ((3, 4),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept_ids": [[8]]}, "`response_ids` has 2 entries, but `kept_ids` 1"),
        ({"kept_ids": [[8], 2]}, "`kept_ids` holds 2 at index 1; must be a list"),
        ({"kept_ids": [[8], [2, 10]]}, "`kept_ids` holds 10 at index 1; the model's token ids"),
        ({"kept_ids": [[8], [2, True]]}, "`kept_ids` holds true at index 1"),
        ({"kept_ids": [[8, 8], [2]]}, "`kept_ids` names an id twice at index 0"),
        ({"kept_ids": [[8], [3, 4]]}, "`kept_ids` at index 1 lacks the token 2"),
        (TOPK | {"kept_ids": [[8], [2]]}, "has `kept_ids` and `topk_ids`"),
        ({"version_spans": [[1, 4], [2]]}, "`version_spans` holds [2] at index 1"),
        ({"version_spans": [[0, 4], [2, 4]]}, "`version_spans` holds [0, 4] at index 0"),
        ({"version_spans": [[1, 4]]}, "`version_spans` covers 1 tokens, `response_ids` has 2"),
        ({"version_spans": [[1, 3], [1, 4]]}, "begin with `policy_version`, which is 4"),
        ({"version_spans": [[1, 4], [1, 3]]}, "the versions [4, 3]"),
    ],
)
def test_kept_ids_and_versions_that_cannot_be_used_are_refused(tmp_path, changes, message):
    path = write(tmp_path / "r.jsonl", group(**changes))
    with pytest.raises(DataError) as caught:
        read(path)
    assert message in str(caught.value) and f"{path}:1" in str(caught.value)


# Headers, compression, directories.

SAMPLING = Sampling(1.0, 1.0, 0, 256, stop_ids=(2,), seed=7, stop_strings=("\n\n",))
HEADER = make_header(
    SAMPLING, engine="test", tokenizer_sha256="aa" * 32, weights_sha256=None, policy="tiny"
)
HEADER_LINE = {
    "rollouts": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "max_response_length": 256,
    "stop_ids": [2],
    "stop_strings": ["\n\n"],
    "seed": 7,
    "engine": "test",
    "tokenizer_sha256": "aa" * 32,
    "weights_sha256": None,
    "policy": "tiny",
}


def test_a_header_is_the_first_line_and_comes_back(tmp_path):
    path = tmp_path / "r.jsonl"
    write_rollouts(path, [Trajectory(r, 0.0, 0.0) for r, _ in plain_group()], HEADER)
    with path.open() as file:
        assert json.loads(file.readline()) == HEADER_LINE
    assert read_header(path) == HEADER and len(read(path)) == 2
    packed = tmp_path / "r.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_header(packed) == HEADER and len(read(packed)) == 2
    write_rollouts(path, trajectories())
    assert read_header(path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": 2}, "`rollouts` is 2; this program reads headers of format 1"),
        ({"temperature": -1}, "`temperature` is -1; must be a number, 0 or more"),
        ({"top_p": 0}, "`top_p` is 0; must be above 0"),
        ({"top_k": 1.5}, "`top_k` is 1.5"),
        ({"stop_ids": ["2"]}, '`stop_ids` is ["2"]'),
        ({"seed": None}, "`seed` is null"),
        ({"more": 1}, "unknown field `more`"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(tmp_path, changes, message):
    path = write(tmp_path / "r.jsonl", [HEADER_LINE | changes, *group()])
    for reader in (read, read_header):
        with pytest.raises(DataError) as caught:
            reader(path)
        assert f"{path}:1: " in str(caught.value) and message in str(caught.value)


def test_a_header_without_a_field_or_in_another_line_is_refused(tmp_path):
    short = {name: value for name, value in HEADER_LINE.items() if name != "seed"}
    with pytest.raises(DataError, match="r.jsonl:1: the header has no `seed`"):
        read(write(tmp_path / "r.jsonl", [short, *group()]))
    with pytest.raises(DataError, match="r.jsonl:3: a header stands in the first line"):
        read(write(tmp_path / "r.jsonl", [*group(), HEADER_LINE]))
    with pytest.raises(DataError, match="has a header and no rollouts"):
        read(write(tmp_path / "r.jsonl", [HEADER_LINE]))


def test_kept_ids_and_the_header_must_agree(tmp_path):
    cut = HEADER_LINE | {"top_p": 0.9}
    with pytest.raises(DataError, match=r"r.jsonl:2: has no `kept_ids`, .* top_p 0.9, top_k 0"):
        read(write(tmp_path / "r.jsonl", [cut, *group()]))
    kept_ids = {"kept_ids": [[8], [2, 3]]}
    assert len(read(write(tmp_path / "r.jsonl", [cut, *group(**kept_ids)]))) == 2
    with pytest.raises(DataError, match=r"r.jsonl:2: has `kept_ids`, .* cuts nothing"):
        read(write(tmp_path / "r.jsonl", [HEADER_LINE, *group(**kept_ids)]))


def config(**rollout) -> Config:
    return Config(
        model=ModelConfig(hf_model="m"),
        data=DataConfig(),
        rollout=RolloutConfig(rollouts_file="R", **rollout),
    )


def test_a_header_is_held_against_the_run():
    assert check_header(HEADER, config(), "aa" * 32) == []
    own = config(rollout_temperature=0.7, rollout_top_p=0.9, rollout_top_k=5)
    temperature, top_p, top_k, tokenizer = check_header(HEADER, own, "bb" * 32)
    assert "--rollouts-file R: was sampled with temperature 1.0" in temperature
    assert "--rollout-temperature 0.7" in temperature and "use --rollout-temperature 1.0" in (
        temperature
    )
    assert "top_p 1.0" in top_p and "--rollout-top-p 0.9" in top_p
    assert "top_k 0" in top_k and "--rollout-top-k 5" in top_k
    assert "aaaaaaaaaaaa" in tokenizer and "bbbbbbbbbbbb" in tokenizer


def tokenizer(**vocab: int) -> PreTrainedTokenizerFast:
    words = models.WordLevel(vocab, unk_token="a")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))


def test_a_tokenizer_is_known_by_what_its_ids_mean():
    first = tokenizer_sha256(tokenizer(a=0, b=1))
    assert first == tokenizer_sha256(tokenizer(b=1, a=0))
    assert first != tokenizer_sha256(tokenizer(a=1, b=0))
    assert first != tokenizer_sha256(tokenizer(a=0, b=1, c=2))


def shards(directory: Path, count: int = 2, *, header: bool = True) -> None:
    for number in range(count):
        lines = [x | {"id": f"p{number}"} for x in group()]
        write(directory / shard_name(number, count, compress=False), [HEADER_LINE] * header + lines)


def test_a_directory_is_read_in_the_order_of_its_files(tmp_path):
    shards(tmp_path)
    last = tmp_path / "rollouts-00001-of-00002.jsonl"
    last.with_name(last.name + ".gz").write_bytes(gzip.compress(last.read_bytes()))
    last.unlink()
    (tmp_path / "notes.txt").write_text("not rollouts")
    assert [rollout.prompt.id for rollout, _ in read(tmp_path)] == ["p0", "p0", "p1", "p1"]
    assert read_header(tmp_path) == HEADER


def test_a_directory_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds neither \*.jsonl nor"):
        read(tmp_path)
    shards(tmp_path, 3)
    (tmp_path / "rollouts-00001-of-00003.jsonl").rename(tmp_path / "aside")
    with pytest.raises(DataError, match=r"rollouts-00001-of-00003 is missing \(1 of 3"):
        read(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "rollouts-00001-of-00003.jsonl.partial")
    with pytest.raises(DataError, match="00001-of-00003.jsonl.partial: is not finished"):
        read(tmp_path)
    assert len(read(tmp_path / "rollouts-00001-of-00003.jsonl.partial")) == 2


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "tokenizer_sha256"])
def test_files_of_different_laws_are_refused(tmp_path, field):
    shards(tmp_path)
    value = {"top_k": 3, "tokenizer_sha256": "cc"}.get(field, 0.5)
    changed = [HEADER_LINE | {field: value}, *group(**{"kept_ids": [[8], [2]]})]
    if field not in ("top_p", "top_k"):
        changed = [changed[0], *group()]
    path = write(tmp_path / "rollouts-00001-of-00002.jsonl", changed)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert f"{path}: has {field} {json.dumps(value)}" in str(caught.value)
    assert json.dumps(HEADER_LINE[field])[:30] in str(caught.value)


def test_a_file_without_header_beside_one_with_is_refused(tmp_path):
    shards(tmp_path)
    path = write(tmp_path / "rollouts-00001-of-00002.jsonl", group())
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert f"{path}: has no header" in str(caught.value)


def test_problems_of_all_files_are_told_at_once(tmp_path):
    shards(tmp_path)
    for number in range(2):
        path = tmp_path / shard_name(number, 2, compress=False)
        with path.open("a") as file:
            file.write("{\n")
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert str(caught.value).count("malformed JSON") == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "head"])
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "r.jsonl.gz"
    content = bytearray(gzip.compress(b"".join(json.dumps(x).encode() + b"\n" for x in group())))
    if damage == "cut":
        del content[-20:]
    else:
        content[len(content) // 2 if damage == "flip" else 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="r.jsonl.gz: is damaged or not complete"):
        read(path)


# Writing over hours.

SUFFIXES = pytest.mark.parametrize("suffix", ["", ".gz"])
NAMES = ["a", "b", "c"]


def write_all(path: Path, names: list[str] = NAMES, *, resume: bool = True) -> None:
    with RolloutWriter(path, HEADER, samples_per_prompt=2, resume=resume) as writer:
        for name in names:
            if name not in writer.done:
                writer.write(plain_group(name))


@SUFFIXES
def test_a_finished_file_is_read_like_any_other(tmp_path, suffix):
    path = tmp_path / "new" / f"r.jsonl{suffix}"
    with RolloutWriter(path, HEADER, samples_per_prompt=2) as writer:
        writer.write(plain_group("a"))
        assert [p.name for p in path.parent.iterdir()] == [path.name + ".partial"]
        # Whatever a call was given is there for others already.
        assert len(read(path.with_name(path.name + ".partial"))) == 2
        writer.write([(rollout, None) for rollout, _ in plain_group("b")][:0])
        writer.write(plain_group("b") + plain_group("c"))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert [(r.prompt.id, reward) for r, reward in read(path)] == [
        (name, reward) for name in NAMES for reward in (0.0, 1.0)
    ]
    assert read_header(path) == HEADER
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == bool(suffix)
    before = path.read_bytes()
    with RolloutWriter(path, HEADER, samples_per_prompt=2, resume=True) as writer:
        assert writer.finished and [*writer.done] == NAMES
        assert writer.done["a"] == [5, 6]
    assert path.read_bytes() == before


@SUFFIXES
def test_wherever_it_was_torn_it_continues_to_the_same_bytes(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # it has a test of its own, and takes long
    whole = tmp_path / f"whole.jsonl{suffix}"
    write_all(whole, resume=False)
    content = whole.read_bytes()
    torn = tmp_path / f"torn.jsonl{suffix}"
    for size in range(0, len(content), 1 if suffix else 3):
        torn.with_name(torn.name + ".partial").write_bytes(content[:size])
        write_all(torn)
        assert torn.read_bytes() == content, size
        torn.unlink()


@SUFFIXES
def test_sigkill_at_any_moment_loses_at_most_the_group_under_way(tmp_path, suffix):
    """A child writes without pause, and is killed again and again."""
    path, names = tmp_path / f"r.jsonl{suffix}", [f"p{number}" for number in range(10_000)]
    partial = path.with_name(path.name + ".partial")
    draw, done = random.Random(5), []
    for _ in range(15):
        child = os.fork()
        if child == 0:
            try:
                write_all(path, names)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.005, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert not path.exists()
        if not partial.exists():
            continue
        before = done
        with (
            pytest.raises(KeyboardInterrupt),
            RolloutWriter(path, HEADER, samples_per_prompt=2, resume=True) as writer,
        ):
            done = [*writer.done]
            raise KeyboardInterrupt
        assert done == names[: len(done)] and done[: len(before)] == before
        if done:
            assert [r.prompt.id for r, _ in read(partial)] == [n for n in done for _ in "12"]
    assert len(done) >= 10
    names = names[: len(done) + 2]
    write_all(path, names)
    whole = tmp_path / f"whole.jsonl{suffix}"
    write_all(whole, names)
    assert path.read_bytes() == whole.read_bytes()


def test_what_was_written_is_on_the_disk(tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    path = tmp_path / "r.jsonl"
    with RolloutWriter(path, HEADER, samples_per_prompt=2) as writer:
        writer.write(plain_group("a"))
        assert synced[-1] == path.with_name("r.jsonl.partial").stat().st_size > 500


def test_what_is_there_is_not_overwritten(tmp_path):
    path = tmp_path / "r.jsonl"
    write_all(path, resume=False)
    with pytest.raises(DataError, match="r.jsonl: is there already; continue it with --resume"):
        write_all(path, resume=False)
    path.rename(path.with_name("r.jsonl.partial"))
    with pytest.raises(DataError, match="r.jsonl.partial: is there already"):
        write_all(path, resume=False)


def test_an_exception_leaves_the_file_to_be_continued(tmp_path):
    path = tmp_path / "r.jsonl"
    with (
        pytest.raises(KeyError),
        RolloutWriter(path, HEADER, samples_per_prompt=2) as writer,
    ):
        writer.write(plain_group("a"))
        raise KeyError
    assert not path.exists()
    write_all(path)
    assert len(read(path)) == 6


def test_it_continues_under_the_same_header_only(tmp_path):
    path = tmp_path / "r.jsonl"
    write_all(path, ["a"])
    other = replace(HEADER, temperature=0.5, seed=8, engine="another")
    with pytest.raises(DataError) as caught:
        RolloutWriter(path, other, samples_per_prompt=2, resume=True)
    message = str(caught.value)
    assert "temperature 1.0, this run has 0.5" in message and "seed 7, this run has 8" in message
    assert "engine" not in message
    write(path, group())
    with pytest.raises(DataError, match="r.jsonl:1: `rollouts` is null"):
        RolloutWriter(path, HEADER, samples_per_prompt=2, resume=True)


def test_two_writers_do_not_share_a_file(tmp_path):
    path = tmp_path / "r.jsonl"
    with (
        RolloutWriter(path, HEADER, samples_per_prompt=2),
        pytest.raises(DataError, match="another process is writing it"),
    ):
        RolloutWriter(path, HEADER, samples_per_prompt=2, resume=True)


@SUFFIXES
def test_damage_in_the_middle_is_no_torn_end(tmp_path, suffix):
    path = tmp_path / f"r.jsonl{suffix}"
    write_all(path, resume=False)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 9] = b"\0" * 9
    partial = path.with_name(path.name + ".partial")
    path.unlink()
    partial.write_bytes(content)
    with pytest.raises(DataError, match="is damaged .*; delete the file"):
        write_all(path)
    assert partial.read_bytes() == content


def test_the_header_of_a_file_is_its_samplings():
    assert isinstance(HEADER, FileHeader)
    assert HEADER.truncated is SAMPLING.truncated is False
    cut = replace(SAMPLING, top_p=0.5)
    assert replace(HEADER, top_p=0.5).truncated is cut.truncated is True
