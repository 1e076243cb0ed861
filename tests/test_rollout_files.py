"""Rollouts files: what is written comes back, and what cannot be trained on is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.errors import DataError
from megatron_drpo.rollout.files import read_rollouts, write_rollouts
from megatron_drpo.types import Prompt, Rollout, Trajectory

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
    with pytest.raises(DataError, match="has 0 `topk_ids` per token, line .* 2"):
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
    path = write(tmp_path / "r.jsonl", [line(sample=0, reward=0.5), line(sample=1, reward=None)])
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
