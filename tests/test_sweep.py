"""The vocabulary sweep, plain and compiled: an fp64 oracle, edges, equal bits, and the build."""

from __future__ import annotations

import functools
import logging
import os
import stat
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_drpo.vocab_parallel import sweep, sweep_c
from megatron_drpo.vocab_parallel.sweep import LOWEST, PLAIN, Sweep

POISON = 3e4
"""Logit of padding columns and skipped rows: any mass that they receive shows."""


@functools.cache
def compiled() -> Sweep | str:
    """The compiled sweep, or why this machine has none."""
    try:
        found = sweep_c.load()
    except sweep_c.BuildError as error:
        return str(error)
    return Sweep("compiled C", found.partials, found.gradient)


@pytest.fixture(params=["plain", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Sweep:
    if request.param == "plain":
        return PLAIN
    found = compiled()
    return pytest.skip(found) if isinstance(found, str) else found


@dataclass(frozen=True, eq=False)
class Case:
    logits: Tensor
    ids: Tensor
    temperature: Tensor
    real: int
    mask: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        return torch.ones(len(self.logits), dtype=torch.bool) if self.mask is None else self.mask

    @property
    def upstream(self) -> tuple[Tensor, Tensor]:
        """Random gradients [T, K] of log-probs and [T] of entropies; 0 for another rank's ids."""
        generator = torch.Generator().manual_seed(5)
        slopes = 3 * torch.randn(self.ids.shape, generator=generator)
        return slopes, 3 * torch.randn(len(self.ids), generator=generator)


def case(
    rows: int = 12,
    columns: int = 101,
    *,
    real: int | None = None,
    num_ids: int = 3,
    spread: float = 4.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    real = columns if real is None else real
    logits = spread * torch.randn((rows, columns), generator=generator)
    logits[:, real:] = POISON
    ids = torch.randint(max(real, 1), (rows, num_ids), generator=generator)
    ids[::3, 1:2] = -1  # another rank's
    ids[1::3, -1:] = ids[1::3, :1]  # twice in a row
    temperature = 0.5 + torch.rand(rows, generator=generator)
    return Case(logits.to(dtype), ids if real else ids.fill_(-1), temperature, real)


def run(kernels: Sweep, made: Case) -> Tensor:
    return kernels.partials(made.logits, made.ids, made.temperature, made.real, made.mask)


def slope(
    kernels: Sweep,
    made: Case,
    out: Tensor | None = None,
    *,
    with_entropy: bool = True,
    sums: Tensor | None = None,
) -> Tensor:
    """The gradient, from the sweep's own partials, as one rank of one."""
    sums = run(kernels, made) if sums is None else sums
    log_total = sums[1].log().where(made.kept, 0)
    entropy = (sums[1].log() - sums[2] / sums[1]).where(made.kept, 0)
    grad_logprobs, grad_entropy = made.upstream
    out = torch.full_like(made.logits, POISON) if out is None else out
    kernels.gradient(
        *(made.logits, made.ids, made.temperature, made.real, made.mask),
        *(sums[0].contiguous(), log_total, entropy),
        *(grad_logprobs, grad_entropy if with_entropy else None, out),
    )
    return out


def oracle(made: Case, *, with_entropy: bool = True) -> tuple[Tensor, Tensor]:
    """fp64: partials, and the gradient by autograd through torch's own log_softmax."""
    logits = made.logits.double().where(made.kept[:, None], 0).requires_grad_()
    z = logits[:, : made.real] / made.temperature.double()[:, None]
    top = z.max(-1).values.clamp(min=LOWEST)
    own = made.ids >= 0
    picked = z.gather(-1, made.ids.clamp(min=0)).where(own, 0)
    # exp(-1e9) is an exact 0 in fp64, and unlike -inf leaves autograd without 0 * inf.
    d = (z - top[:, None]).clamp(min=-1e9)
    sums = torch.stack([top, d.exp().sum(-1), (d * d.exp()).sum(-1), *picked.T])
    log_p = z.clamp(min=-1e9).log_softmax(-1)
    # Of another rank's id, the slope lowers every id of this one.
    logprobs = log_p.gather(-1, made.ids.clamp(min=0)).where(own, -z.logsumexp(-1)[:, None])
    grad_logprobs, grad_entropy = (x.double() for x in made.upstream)
    objective = (grad_logprobs * logprobs).sum(-1)
    if with_entropy:
        objective = objective - grad_entropy * (log_p.exp() * log_p).sum(-1)
    (gradient,) = torch.autograd.grad(objective.where(made.kept, 0).sum(), logits)
    return sums.detach().where(made.kept, 0), gradient


def check(kernels: Sweep, made: Case, rtol: float = 3e-6, atol: float = 3e-6) -> None:
    expected, expected_slope = oracle(made)
    sums = run(kernels, made)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), expected, rtol=rtol, atol=atol)
    found = slope(kernels, made)
    limit = max(rtol, torch.finfo(found.dtype).eps / 2)
    torch.testing.assert_close(found.double(), expected_slope, rtol=limit, atol=atol)
    assert not found[:, made.real :].any(), "padding received a gradient"
    assert not found[~made.kept].any(), "a skipped row received a gradient"
    assert not found[:, : made.real][made.logits[:, : made.real] == -torch.inf].any()


# Values and gradients.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 7, 16, 64, 65, 2048, 2049, 5000])
def test_equal_to_the_fp64_oracle(kernels: Sweep, columns: int, dtype: torch.dtype) -> None:
    """Below, at and beyond the vectors and blocks of the compiled one."""
    check(kernels, case(columns=columns, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_is_served(dtype: torch.dtype) -> None:
    made = case(dtype=dtype)
    check(sweep.sweep_for(made.logits), made)


def test_fp64_logits_are_served_in_fp64() -> None:
    made = case()
    made = replace(made, logits=made.logits.double(), temperature=made.temperature.double())
    sums = run(sweep.sweep_for(made.logits), made)
    torch.testing.assert_close(sums, oracle(made)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("real", [1, 37, 64, 100])
def test_columns_from_real_on_do_not_exist(kernels: Sweep, real: int) -> None:
    check(kernels, case(real=real))
    garbage = case(real=real)
    garbage.logits[:, real:] = torch.nan
    check(kernels, garbage)


def test_shard_of_padding_only(kernels: Sweep) -> None:
    made = case(real=0)
    sums = run(kernels, made)
    assert (sums[0] == LOWEST).all() and not sums[1:].any()
    out = torch.full_like(made.logits, torch.nan)
    # What the other ranks found; this one has no column that could tell.
    others = torch.stack([torch.zeros(12), torch.ones(12), torch.zeros(12)])
    assert not slope(kernels, made, out, sums=others).any()


def test_no_rows_and_no_ids(kernels: Sweep) -> None:
    none = case(rows=0)
    assert run(kernels, none).shape == (6, 0) and slope(kernels, none).shape == (0, 101)
    check(kernels, case(num_ids=0))


def test_skipped_rows_are_inert_whatever_they_hold(kernels: Sweep) -> None:
    made = case()
    mask = torch.arange(12) % 4 != 1
    made.logits[1] = torch.nan
    made.logits[5] = torch.inf
    made.logits[9] = -torch.inf
    check(kernels, replace(made, mask=mask))
    assert not run(kernels, replace(made, mask=mask))[:, ~mask].any()


def test_minus_infinity_has_no_mass(kernels: Sweep) -> None:
    made = case(columns=5000)
    generator = torch.Generator().manual_seed(3)
    made.logits[torch.rand(made.logits.shape, generator=generator) < 0.4] = -torch.inf
    made.logits[0, :4990] = -torch.inf  # no mass in the first blocks
    made.logits[1, 10:] = -torch.inf  # nor in the last ones
    made.logits[2] = -torch.inf  # one id holds everything
    columns = made.ids.clamp(min=0)
    made.logits.scatter_(-1, columns, 1.5)  # ids with mass: others have no finite log-prob
    check(kernels, made)


def test_picked_logit_of_minus_infinity(kernels: Sweep) -> None:
    made = case()
    made.logits[4, made.ids[4, 0]] = -torch.inf
    assert run(kernels, made)[3, 4] == -torch.inf
    assert slope(kernels, made).isfinite().all()


def test_row_without_mass(kernels: Sweep) -> None:
    """It may have its mass on another rank: its sums are 0, not NaN."""
    made = case()
    made.logits[3] = -torch.inf
    sums = run(kernels, made)
    assert sums[:3, 3].tolist() == [LOWEST, 0, 0]
    sums[:3, 3] = torch.tensor([2.0, 1.5, -0.5])  # as merged with another rank
    found = slope(kernels, made, sums=sums)[3]
    # A one-hot term remains for the ids that are this rank's.
    others = torch.ones(101, dtype=torch.bool)
    others[made.ids[3].clamp(min=0)] = False
    assert found.isfinite().all() and not found[others].any()


@pytest.mark.parametrize("column", [0, 77, 4999])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, (torch.inf, torch.nan)])
def test_nan_and_infinity_are_never_hidden(kernels: Sweep, bad: object, column: int) -> None:
    made = case(columns=5000)
    values = bad if isinstance(bad, tuple) else (bad,)
    for place, value in enumerate(values):
        made.logits[2, (column + 9 * place) % 5000] = value
    sums = run(kernels, made)
    top = torch.nan if torch.nan in values else torch.inf
    torch.testing.assert_close(sums[0, 2], torch.tensor(top), equal_nan=True)
    assert sums[1:3, 2].isnan().all()
    others = torch.arange(12) != 2
    assert sums[:, others].isfinite().all()
    found = slope(kernels, made)
    assert found[2].isnan().all() and found[others].isfinite().all()


def test_every_bit_pattern_of_nan_stays_nan_in_bf16(kernels: Sweep) -> None:
    """Rounding to 16 bits by carrying into the upper half turns some of them into 0."""
    made = case(rows=3, columns=40)
    patterns = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32)
    made.logits[:, 6] = patterns.view(torch.float32)
    out = torch.empty(3, 40, dtype=torch.bfloat16)
    healthy = run(kernels, case(rows=3, columns=40))
    assert slope(kernels, made, out, sums=healthy)[:, 6].isnan().all()


def test_large_logits_keep_their_precision(kernels: Sweep) -> None:
    """Only differences to the maximum count, and those are exact at a temperature of 1."""
    made = replace(case(columns=3000), temperature=torch.ones(12))
    made.logits[:4] += 1e4
    made.logits[4:8] -= 1e4
    check(kernels, made)
    ends = torch.tensor([[-3e38, 3e38, 0.0, 1.0]])
    extreme = Case(ends, torch.tensor([[1]]), torch.ones(1), 4)
    assert run(kernels, extreme).tolist() == [[torch.tensor(3e38).item()], [1], [0], [ends[0, 1]]]
    assert slope(kernels, extreme).isfinite().all()


def test_rising_and_falling_rows(kernels: Sweep) -> None:
    """The maximum rises with every block, in the first row; in the second it comes first."""
    rise = torch.linspace(-300, 300, 20000)
    logits = torch.stack([rise, rise.flip(0), rise.abs(), -rise.abs()])
    ids = torch.tensor([[19990, 3], [5, 19000], [0, 10000], [10000, 0]])
    check(kernels, Case(logits, ids, torch.tensor([1.0, 0.5, 1.0, 2.0]), 20000))


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_error_at_a_large_vocabulary(kernels: Sweep, spread: float) -> None:
    """A few 1e-7, relative, where a running fp32 sum would have lost 1e-5."""
    made = replace(case(2, 151936, spread=spread), temperature=torch.ones(2))
    check(kernels, made, rtol=6e-7, atol=2e-7)


def test_gradient_without_one_for_the_entropy(kernels: Sweep) -> None:
    made = case()
    _, expected = oracle(made, with_entropy=False)
    found = slope(kernels, made, with_entropy=False)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-6)


@given(
    st.integers(1, 300), st.integers(0, 70), st.integers(1, 4), st.integers(0, 99), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_compiled_equals_the_oracle_for_any_shape(
    real: int, padding: int, num_ids: int, seed: int, half: bool
) -> None:
    found = compiled()
    if isinstance(found, str):
        pytest.skip(found)
    dtype = torch.bfloat16 if half else torch.float32
    check(found, case(3, real + padding, real=real, num_ids=num_ids, seed=seed, dtype=dtype))


# Storage.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_strided_and_not_aligned(kernels: Sweep, dtype: torch.dtype) -> None:
    made = case(columns=333, dtype=dtype)
    whole, whole_slope = run(kernels, made), slope(kernels, made)
    for left, step in ((1, 1), (3, 1), (0, 2), (5, 3)):
        storage = torch.full((12 * step, 333 + left + 2), POISON, dtype=dtype)
        view = storage[::step, left : left + 333]
        view.copy_(made.logits)
        apart = replace(made, logits=view)
        assert torch.equal(run(kernels, apart), whole)
        out = torch.full_like(storage, POISON)
        slope(kernels, apart, out[::step, left : left + 333])
        assert torch.equal(out[::step, left : left + 333], whole_slope)
        out[::step, left : left + 333] = POISON
        assert (out == POISON).all(), "written beside the columns"
        assert torch.equal(view, made.logits), "the input was changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_may_be_the_logits(kernels: Sweep, dtype: torch.dtype) -> None:
    made = case(columns=2100, real=2090, dtype=dtype)
    expected = slope(kernels, made)
    version = made.logits._version
    found = slope(kernels, made, made.logits)
    assert found.data_ptr() == made.logits.data_ptr() and torch.equal(found, expected)
    assert made.logits._version > version, "autograd cannot see that the logits are gone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_out_of_another_type_is_rounded_once(
    kernels: Sweep, dtype: torch.dtype, other: torch.dtype
) -> None:
    made = case(columns=2100, dtype=dtype)
    precise = slope(kernels, made, torch.empty(made.logits.shape))
    found = slope(kernels, made, torch.empty(made.logits.shape, dtype=other))
    assert torch.equal(found, precise.to(other))


def test_ties_round_to_even_in_bf16(kernels: Sweep) -> None:
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.0]])  # the ids' gradients are their slopes
    slopes = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8]])
    out = torch.empty(1, 3, dtype=torch.bfloat16)
    zero, one = torch.zeros(1), torch.ones(1)
    kernels.gradient(
        logits, torch.tensor([[0, 1]]), one, 3, None, zero, zero, zero, slopes, None, out
    )
    assert out[0, :2].tolist() == [1, 1 + 4 * 2**-8]


def test_slopes_that_autograd_expanded(kernels: Sweep) -> None:
    made = case()
    sums = run(kernels, made)
    results = []
    for one in (torch.tensor(1.0).expand(12, 3), torch.ones(12, 3)):
        out = torch.empty_like(made.logits)
        kernels.gradient(
            *(made.logits, made.ids, made.temperature, made.real, None),
            *(sums[0], sums[1].log(), sums[2], one, one[:, 0], out),
        )
        results.append(out)
    assert torch.equal(*results)


# Equal bits: the log-probs of generation and of training are those of the same function.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_beside_others(
    kernels: Sweep, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = case(rows=9, columns=4099, real=4090, dtype=dtype)
    together, together_slope = run(kernels, made), slope(kernels, made)
    grad_logprobs, grad_entropy = made.upstream
    for rows in ([4], [8, 4, 0], [4, 4], list(range(8, -1, -1))):
        part = Case(made.logits[rows], made.ids[rows], made.temperature[rows], made.real)
        assert torch.equal(run(kernels, part), together[:, rows])
        slopes = grad_logprobs[rows], grad_entropy[rows]
        with monkeypatch.context() as patch:
            patch.setattr(Case, "upstream", slopes)
            assert torch.equal(slope(kernels, part), together_slope[rows])


def test_chunks_of_the_plain_sweep_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case()
    whole, whole_slope = run(PLAIN, made), slope(PLAIN, made)
    for rows in (0.5, 1, 5, 11, 12):
        monkeypatch.setattr(sweep, "_CHUNK_ELEMENTS", int(rows * 101))
        assert torch.equal(run(PLAIN, made), whole)
        assert torch.equal(slope(PLAIN, made), whole_slope)


def test_threads_change_no_bit(kernels: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(rows=31, columns=300)
    made = replace(made, mask=torch.arange(31) % 5 != 2)
    monkeypatch.setattr(sweep_c, "_THREAD_ELEMENTS", 1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append((run(kernels, made), slope(kernels, made)))
    finally:
        torch.set_num_threads(threads)
    for sums, found in results[1:]:
        assert torch.equal(sums, results[0][0]) and torch.equal(found, results[0][1])
    if kernels is not PLAIN:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        pools = []
        real_pool = sweep_c.ThreadPoolExecutor
        monkeypatch.setattr(
            sweep_c, "ThreadPoolExecutor", lambda n: pools.append(n) or real_pool(n)
        )
        run(kernels, made)
        assert pools == [3], "the threads that torch may use are not used"


# The build.


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Choose anew, as a fresh process with an empty cache would; returns the choice and the log."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, logger=sweep.__name__)

    def choose() -> tuple[Sweep, str]:
        sweep._choice.cache_clear()
        caplog.clear()
        found = sweep.sweep_for(torch.zeros(1))
        assert sweep.sweep_for(torch.zeros(2)) is found
        (record,) = caplog.records
        return found, record.getMessage()

    yield choose
    sweep._choice.cache_clear()


def script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


@pytest.fixture
def compiler() -> None:
    if isinstance(reason := compiled(), str):
        pytest.skip(reason)


@pytest.mark.usefixtures("compiler")
def test_built_once_for_its_user_alone(chosen, tmp_path: Path) -> None:
    found, message = chosen()
    assert found.name == "compiled C" and "compiled C" in message
    cache = tmp_path / "cache" / "megatron_drpo"
    (library,) = cache.iterdir()
    assert str(library) in message
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    built = library.stat().st_mtime_ns
    chosen()
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [built]


@pytest.mark.parametrize("missing", ["no-such-compiler --flag", "'", "broken"])
def test_plain_without_a_working_compiler(
    chosen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    reason = missing.split()[0].strip("'")
    if missing == "broken":
        broken = script(tmp_path / "cc", "echo 'licence expired' >&2; exit 1\n")
        missing, reason = str(broken), "licence expired"
    monkeypatch.setenv("CC", missing)
    found, message = chosen()
    assert found is PLAIN and "plain torch" in message and reason in message
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("compiler")
def test_plain_where_the_compiler_fails_late(
    chosen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It answers the question for its macros, then compiles nothing, or no library."""
    macros = 'case "$*" in *-dM*) exec cc "$@";; esac\n'
    fails = script(tmp_path / "fails", macros + "echo 'disk full' >&2; exit 1\n")
    lies = script(tmp_path / "lies", macros + "exit 0\n")
    for path, reason in ((fails, "disk full"), (lies, ".so")):
        monkeypatch.setenv("CC", str(path))
        found, message = chosen()
        assert found is PLAIN and reason in message
        assert not list((tmp_path / "cache").rglob("building-*")), "left-overs"


@pytest.mark.usefixtures("compiler")
def test_compiler_that_does_not_know_this_machine(
    chosen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refuse = 'case "$*" in *-march=native*) echo "no native" >&2; exit 1;; esac\nexec cc "$@"\n'
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", refuse)))
    found, _ = chosen()
    assert found.name == "compiled C"
    check(found, case(columns=5000))
    check(found, case(columns=5000, dtype=torch.bfloat16))


@pytest.mark.usefixtures("compiler")
def test_plain_where_the_library_computes_wrong_numbers(
    chosen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "sweep.c"
    text = sweep_c._SOURCE.read_text()
    for right, wrong in (("rise * s.exp", "rise"), ("exponential(d)", "d"), ("<< 23", "<< 22")):
        assert right in text
        source.write_text(text.replace(right, wrong))
        monkeypatch.setattr(sweep_c, "_SOURCE", source)
        found, message = chosen()
        assert found is PLAIN and "wrong numbers" in message


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("problem", ["others may write", "not a directory", "relative"])
def test_cache_that_others_could_write_is_not_used(
    chosen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, problem: str
) -> None:
    cache = tmp_path / "cache" / "megatron_drpo"
    if problem == "others may write":
        cache.mkdir(parents=True)
        cache.chmod(0o777)
    elif problem == "not a directory":
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    found, message = chosen()
    assert found.name == "compiled C" and str(scratch) in message
    check(found, case())
    assert not list(scratch.iterdir()) and not list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("compiler")
def test_cache_of_another_user_is_not_used(
    chosen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen()
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    found, message = chosen()
    assert found.name == "compiled C" and str(tmp_path / "cache") not in message


@pytest.mark.usefixtures("compiler")
def test_name_of_the_library_says_what_it_was_made_from(
    chosen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A home directory may be shared by nodes with other processors and compilers."""
    path, names = tmp_path / "cc", []
    for change in ("", "", "-D__VERSION__='\"next\"'", "-D__OTHER_SET__=1"):
        script(path, f'exec cc "$@" {change}\n')
        names.append(sweep_c._flags_and_name([str(path)])[1])
    assert names[0] == names[1]
    names.append(sweep_c._flags_and_name(["cc"])[1])
    source = tmp_path / "sweep.c"
    source.write_text(sweep_c._SOURCE.read_text() + "\n")
    monkeypatch.setattr(sweep_c, "_SOURCE", source)
    names.append(sweep_c._flags_and_name(["cc"])[1])
    assert len(set(names)) == 5


@pytest.mark.usefixtures("compiler")
def test_processes_that_start_together_build_together(tmp_path: Path) -> None:
    """Each sees a whole library or none, whoever is first."""
    slow = script(
        tmp_path / "cc",
        'case "$*" in *-dM*) exec cc "$@";; esac\n'
        f"echo x >> {tmp_path}/started\n"
        f'while [ "$(wc -l < {tmp_path}/started)" -lt 2 ]; do sleep 0.05; done\n'
        'exec cc "$@"\n',
    )
    program = (
        "import torch; from tests.test_sweep import case, check, sweep\n"
        "found = sweep.sweep_for(torch.zeros(1)); assert found.name == 'compiled C'\n"
        "check(found, case())"
    )
    environment = {
        **os.environ,
        "CC": str(slow),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    (library,) = (tmp_path / "cache" / "megatron_drpo").iterdir()
    assert library.suffix == ".so"
