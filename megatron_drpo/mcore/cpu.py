"""megatron-core on a CPU: where its source says ``cuda``, this process reads ``cpu``.

megatron-core names CUDA in many places: streams, events, random states, ``device="cuda"``,
``Tensor.type()`` strings. Patching ``torch.cuda`` would be seen by every other library of the
process (transformers was seen to build garbage RoPE tables under such a patch). So nothing of torch
is touched: an import hook compiles the modules of ``megatron`` from their own source with these
names replaced, and of nobody else. It is installed only where no GPU is used, before the first
import of megatron; on a GPU megatron-core runs exactly as it was shipped.

In: the name of a megatron module. Out: the same module, with ``torch.cuda`` meaning `CpuCuda`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import logging
import sys
import time
import types
import warnings
from typing import Any

import torch

_SHIM = "__megatron_drpo_cpu_cuda__"
_PACKAGE = "megatron"


class Stream:
    """A CPU has one order of execution: all streams are the same one, and always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")
        self.cuda_stream = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return hash(Stream)

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True


class Event:
    """Marks the time of its recording; always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`, as `torch.cuda.Event` gives them."""
        return (end._time - self._time) * 1e3


class _CpuCuda(types.ModuleType):
    """What ``torch.cuda`` means to megatron-core here; anything unlisted fails by its own name."""

    Stream = ExternalStream = Stream
    Event = Event
    # Classes that megatron names in annotations and isinstance tests only.
    FloatTensor, HalfTensor = torch.FloatTensor, torch.HalfTensor
    BFloat16Tensor = torch.BFloat16Tensor
    OutOfMemoryError = torch.OutOfMemoryError

    class CUDAGraph: ...

    class MemPool: ...

    class device(contextlib.nullcontext): ...  # noqa: N801

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 0

    @staticmethod
    def set_device(device: Any) -> None: ...

    @staticmethod
    def synchronize(device: Any = None) -> None: ...

    @staticmethod
    def empty_cache() -> None: ...

    @staticmethod
    def current_stream(device: Any = None) -> Stream:
        return Stream()

    default_stream = current_stream

    @staticmethod
    def set_stream(stream: Any) -> None: ...

    @staticmethod
    def stream(stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        return 0

    max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated

    @staticmethod
    def memory_stats(device: Any = None) -> dict[str, int]:
        return {}

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state.cpu())

    @staticmethod
    def _lazy_call(call: Any, **kwargs: Any) -> None:
        call()

    @staticmethod
    def _lazy_init() -> None: ...

    @property
    def default_generators(self) -> Any:
        return _OneGenerator()

    @property
    def random(self) -> _CpuCuda:
        return self

    @property
    def nvtx(self) -> Any:
        return _Nvtx

    @property
    def amp(self) -> Any:
        return torch.cuda.amp

    @property
    def memory(self) -> _CpuCuda:
        return self


class _OneGenerator:
    """``torch.cuda.default_generators[i]``: the CPU has one generator, whatever the index."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


class _Nvtx:
    @staticmethod
    def range_push(message: str) -> None: ...

    @staticmethod
    def range_pop() -> None: ...

    @staticmethod
    def range(message: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _CudaToCpu(ast.NodeTransformer):
    """``torch.cuda`` -> the shim; ``"cuda"`` -> ``"cpu"``; ``x.cuda(...)`` -> ``x.cpu()``;
    ``x.is_cuda`` -> ``x.is_cpu``.

    Line numbers stay, so that tracebacks and debuggers show megatron's own source.
    """

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name(_SHIM, ast.Load()), node)
        if node.attr == "is_cuda":
            node.attr = "is_cpu"
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            func = ast.copy_location(ast.Attribute(node.func.value, "cpu", ast.Load()), node.func)
            return ast.copy_location(ast.Call(func, [], []), node)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            if node.value == "cuda":
                return ast.copy_location(ast.Constant("cpu"), node)
            if node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
                return ast.copy_location(ast.Constant(node.value.replace(".cuda", "")), node)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.AST]:
        if node.module not in ("torch.cuda", "torch.cuda.random"):
            return node
        return [
            ast.copy_location(
                ast.Assign(
                    [ast.Name(alias.asname or alias.name, ast.Store())],
                    ast.Attribute(ast.Name(_SHIM, ast.Load()), alias.name, ast.Load()),
                ),
                node,
            )
            for alias in node.names
        ]


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles megatron's source anew each time: a cached .pyc would leak into GPU processes."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        with warnings.catch_warnings():
            # Python would say once what it thinks of megatron's source; here it would every time.
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(self.get_data(path), path)
            tree = ast.fix_missing_locations(_CudaToCpu().visit(tree))
            return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__[_SHIM] = CPU_CUDA
        super().exec_module(module)
        if module.__name__ == "megatron.core.jit":
            # torch.compile would spend minutes compiling small elementwise functions.
            module.disable_jit_fuser()
        if module.__name__ == "megatron.core.transformer.moe.moe_utils":
            # 0.16 asks whether Transformer Engine's GEMM is None, and does not say so without it.
            module.__dict__.setdefault("te_general_gemm", None)
        if module.__name__ == "megatron.core.tensor_parallel.mappings":
            module.__dict__["_gather_along_first_dim"] = _unevenly(module._gather_along_first_dim)


def _unevenly(gather: Any) -> Any:
    """Megatron's gather along the first dim, also where the ranks have different numbers of rows:
    tokens for an expert that is split over ranks. gloo gathers parts of one shape only."""

    def gathered(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        size = group.size()
        if output_split_sizes is None or size == 1:
            return gather(input_, group, output_split_sizes, *args, **kwargs)
        output = input_.new_empty((sum(output_split_sizes), *input_.shape[1:]))
        copies = input_.repeat(size, *[1] * (input_.dim() - 1))
        torch.distributed.all_to_all_single(
            output, copies, output_split_sizes, [len(input_)] * size, group=group
        )
        return output

    return gathered


class _Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] != _PACKAGE:
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


CPU_CUDA = _CpuCuda("megatron_drpo.mcore.cpu.cuda")


def install() -> None:
    """Give megatron-core its CPU meaning in this process; call before it is first imported.

    Raises:
        RuntimeError: megatron.core is imported already, so its modules could not be replaced.
    """
    if any(isinstance(finder, type) and issubclass(finder, _Finder) for finder in sys.meta_path):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before megatron_drpo.mcore.cpu.install(): "
            "import megatron_drpo.mcore first"
        )
    sys.meta_path.insert(0, _Finder)
    # megatron's warnings are advice for GPUs, and about what it misses without one.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # megatron warns when drawing for the GPU moved the CPU's generator; here they are one.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
