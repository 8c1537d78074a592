"""Compile recorded kernel launches for GPUs this machine does not have, and read what the compiler used.

Launches are recorded by running an operation on CPU tensors with the launch itself replaced, so what is compiled is
what the operation would launch: argument types, alignment and constants included. Triton must not be interpreted.

As a script, with a compute capability and names of CASES, it compiles what these launch with the parameters that the
configuration table has for that GPU, and prints a line of JSON a kernel; with --keys, the keys of the compiled kernels
instead, for several sequence lengths.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from kernels import common
from kernels.hstu_attention import appended, cached, mma_layout
from kernels.hstu_attention import launch as attention_launch
from kernels.hstu_attention import op as hstu_attention
from kernels.layer_norm import triton_op as layer_norm
from kernels.linear_cross_entropy import triton_op as linear_cross_entropy
from kernels.norm_gate import triton_op as norm_gate
from kernels.projection import triton_op as projection
from kernels.rowwise_table import triton_op as rowwise_table
from kernels.sampled_softmax import triton_op as sampled_softmax
from kernels.tools.cases import attention_inputs

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Launch:
    """A kernel and what it was launched with: arguments and compiler options."""

    kernel: JITFunction
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.removeprefix('kernels.')}.{self.kernel.fn.__name__}"


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within: kernels are not launched, but added to the list."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | named))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


def specialise(launch: Launch, capability: int) -> tuple[dict[str, str], ASTSource, dict[str, Any]]:
    """What Triton makes of a launch, by its own rules: the key of the compiled kernel, the source, the options.

    The key has, for each argument, its type and what the kernel is specialised for: a value, divisibility by 16.
    """
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(**launch.arguments)
    key = dict(zip(kernel.arg_names, map(str, specialisation), strict=True)) | {"options": str(options)}
    options, *source = kernel._pack_args(backend, launch.arguments, bound, specialisation, options)
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    return key, language(kernel, *source), vars(options)


def compile_launch(launch: Launch, capability: int) -> dict[str, int]:
    """What a launch takes on sm_<capability>: registers of a thread, its stack (spills) and the block's shared memory
    in bytes, columns of tensor memory; and how many uniform registers it reads that nothing has set."""
    _, source, options = specialise(launch, capability)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return {**_resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared, "tensor_memory": tensor_memory}


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [str(_TOOLS / "nvdisasm"), "-c", "-ndf", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", output)
    return {
        "registers": max(int(r) for r, _ in found),
        "stack": max(int(s) for _, s in found),
        "unset": len(_unset_registers(code)),
    }


def _unset_registers(code: str) -> set[str]:
    """Uniform registers whose first mention in a program is an addition to themselves.

    ptxas 12.8 writes such programs for some shapes: it adds an offset to an address of shared memory that it forgot
    to copy, so that a matrix product reads wherever the register points.
    """
    unset, seen = set(), set()
    for line in code.splitlines():
        registers = re.findall(r"\bUR\d+\b", line)
        first = next(iter(registers), "")
        if re.search(r"\bUIADD3\b", line) and first in registers[1:] and first not in seen:
            unset.add(first)
        # A wide operation sets the registers after the named one, too.
        width = 4 if ".128" in line else 2 if ".64" in line or "WIDE" in line else 1
        seen.update(f"UR{int(first[2:]) + further}" for further in range(width) if first)
    return unset


class OnGPU(torch.Tensor):
    """A CPU tensor that an operation takes for one on a GPU; so are those made of it."""

    is_cuda = True


def pretend(capability: int) -> None:
    """For the rest of this process, there is such a GPU, with TF32 allowed."""
    version = divmod(capability, 10)
    common._capability = lambda *_: f"sm_{capability}"
    torch.cuda.get_device_capability = lambda *_: version
    attention_launch.has_mma_layout = lambda _: capability == 90
    torch.backends.cuda.matmul.allow_tf32 = True


@dataclass(frozen=True)
class Case:
    """A call of an operation, forward and backward, on sequences of given lengths; and lengths to call it with, of
    which the first are what is compiled."""

    call: Callable[[torch.Tensor], None]
    lengths: tuple[tuple[int, ...], ...]

    def launches(self, lengths: tuple[int, ...]) -> list[Launch]:
        with recorded() as launches:
            self.call(torch.tensor(lengths))
        return launches


# A length or a batch of 1 is what a kernel may be specialised for, as are counts that 16 divides. Rows of up to 256
# tokens and longer ones have tables of their own.
_SHORT = ((160, 160), (1,), (7, 0, 211))
_LONG = ((320, 320), (301,), (7, 0, 515))
_LONGER = ((2048, 2048), (1501,), (7, 0, 3000))


class Masks(NamedTuple):
    """Numbers of `hstu_attention`'s mask, and whether rows have a target each, keys of their own number, and every
    query an N."""

    numbers: dict[str, Any]
    targets: bool = False
    keys: bool = False
    scales: bool = False


_NO_MASKS = Masks({})


def _attention(
    dtype: torch.dtype, heads: int, dim: int, lengths: tuple[tuple[int, ...], ...], bias: str = "both",
    softmax: bool = False, masks: Masks = _NO_MASKS, deterministic: bool = False, dv: int | None = None,
) -> Case:  # fmt: skip
    def call(lengths: torch.Tensor) -> None:
        of_keys = lengths + 7 if masks.keys else lengths
        inputs = attention_inputs(of_keys, heads, dim, dv or dim, dtype, bias) | {"softmax": softmax}
        inputs |= {"min_full_attn_seq_len": 0, "num_sink_tokens": 0, "causal": True, "target_group_size": 1}
        inputs |= {"key_offsets": None, "query_scale": None}  # all there are, in their order
        inputs |= masks.numbers
        tokens = int(lengths.sum())
        if masks != _NO_MASKS:
            inputs["attention_scale"] = None
        if masks.targets:
            inputs["num_targets"] = torch.ones_like(lengths)
        if masks.keys:
            inputs |= {"key_offsets": inputs["offsets"], "offsets": torch.nn.functional.pad(lengths.cumsum(0), (1, 0))}
            inputs["q"] = inputs["q"][:tokens]
            if inputs["query_time"] is not None:
                inputs["query_time"] = inputs["query_time"][:tokens]
        if masks.scales:
            inputs["query_scale"] = torch.ones(tokens)
        inputs = _on_gpu(inputs)
        outputs = hstu_attention.attention(**inputs)
        hstu_attention.gradients(torch.empty_like(outputs[0]), outputs, list(inputs.values()), deterministic)

    return Case(call, lengths)


def _cached_attention(
    dtype: torch.dtype, heads: int, dim: int, lengths: tuple[tuple[int, ...], ...], softmax: bool = False,
    window: bool = True, masks: bool = False,
) -> Case:  # fmt: skip
    """window: without one, programs share the keys of longer rows. masks: also groups, first tokens, and an N for each
    query."""

    def call(lengths: torch.Tensor) -> None:
        stored, new = (attention_inputs(n, heads, dim, dim, dtype, "both") for n in (lengths, lengths // 8 + 1))
        names = ("q", "k", "v", "offsets", "max_len", "alpha", "attention_scale", "time_bias")
        inputs = {name: new[name] for name in names} | {"softmax": softmax, "max_attn_len": 64 * window}
        inputs |= {f"cached_{name}": stored[name] for name in ("k", "v", "offsets")}
        inputs |= {"position_bias": stored["position_bias"], "max_cached_len": stored["max_len"]}
        if masks:
            inputs |= {"num_sink_tokens": 5, "target_group_size": 3, "attention_scale": None}
            inputs["query_scale"] = torch.ones(len(inputs["q"]))
        asked = new["query_time"][: len(lengths)]
        times = [time.as_subclass(OnGPU) for time in (asked, asked, stored["key_time"])]
        cached.cached_attention(**_on_gpu(inputs), times=times)

    return Case(call, lengths)


def _appended_attention(
    dtype: torch.dtype, heads: int, dim: int, lengths: tuple[tuple[int, ...], ...], softmax: bool = False,
    window: bool = False, bias: str = "both",
) -> Case:  # fmt: skip
    def call(lengths: torch.Tensor) -> None:
        stored = attention_inputs(lengths, heads, dim, dim, dtype, bias)
        names = ("k", "v", "max_len", "alpha", "attention_scale", "position_bias", "time_bias", "key_time")
        inputs = {name: stored[name] for name in names}
        more = (lengths // 8).clamp(min=1)
        tokens = int(more.sum())
        inputs |= {"q": stored["q"][:tokens], "key_offsets": stored["offsets"], "max_new": int(more.max())}
        inputs |= {"offsets": torch.nn.functional.pad(more.cumsum(0), (1, 0)), "softmax": softmax}
        inputs |= {"query_time": None if stored["query_time"] is None else stored["query_time"][:tokens].clone()}
        inputs |= {"max_attn_len": 64 * window, "num_sink_tokens": 5 * window}
        appended.appended_attention(**_on_gpu(inputs))

    return Case(call, lengths)


def _mma_layout(dtype: torch.dtype, rows: int, columns: int, warps: int, rows_are_queries: bool) -> Case:
    tile = mma_layout.Tile(torch.device("cpu"), dtype, rows, columns, warps, rows_are_queries)
    return Case(lambda _: mma_layout.wrong_elements(tile, inline_asm=True), _SHORT)


def _on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.as_subclass(OnGPU) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def _sampled_softmax(dtype: torch.dtype, dim: int, corrected: bool) -> Case:
    def call(lengths: torch.Tensor) -> None:
        tokens, items = int(lengths.sum()), 1000
        states, table = (torch.randn(n, dim).to(dtype).requires_grad_() for n in (tokens, items))
        positives, negatives = torch.randint(items, (tokens,)), torch.randint(items, (tokens, 128))
        frequency = torch.zeros(items) if corrected else None
        sampled_softmax.sampled_softmax(states, table, positives, negatives, 0.05, frequency).sum().backward()

    return Case(call, _SHORT)


def _linear_cross_entropy(dtype: torch.dtype, dim: int, items: int, biased: bool = True) -> Case:
    """items: few, so that programs share rows; or many."""

    def call(lengths: torch.Tensor) -> None:
        rows = int(lengths.sum())
        states, table = (torch.randn(n, dim).to(dtype).requires_grad_() for n in (rows, items))
        bias = torch.randn(items).to(dtype).requires_grad_() if biased else None
        linear_cross_entropy.linear_cross_entropy(states, table, torch.randint(items, (rows,)), bias).backward()

    return Case(call, _SHORT)


def _norm_gate(
    dtype: torch.dtype, width: int, dropout: float, entries: int = 0, heads: int | None = None, concat_ux: bool = False
) -> Case:
    """entries: of weight and bias, where there are any."""

    def call(lengths: torch.Tensor) -> None:
        mixed = torch.randn(int(lengths.sum()), 4 * width, dtype=dtype, requires_grad=True)  # U and what else UVQK is
        attended = torch.randn(len(mixed), width, dtype=dtype, requires_grad=True)
        affine = [torch.randn(entries, dtype=dtype, requires_grad=True) if entries else None for _ in range(2)]
        norm_gate.norm_gate(mixed[:, :width], attended, dropout, True, *affine, heads, concat_ux).sum().backward()

    return Case(call, _SHORT)


def _layer_norm(dtype: torch.dtype, width: int) -> Case:
    def call(lengths: torch.Tensor) -> None:
        x = torch.randn(int(lengths.sum()), width, dtype=dtype, requires_grad=True)
        parameters = [torch.randn(width, dtype=dtype, requires_grad=True) for _ in range(2)]
        layer_norm.layer_norm(x, 1e-6, *parameters).sum().backward()

    return Case(call, _SHORT)


def _projection(dtype: torch.dtype, width: int, ranking: bool = False) -> Case:
    """ranking: with bias, an affine norm, and silu for U alone."""

    def call(lengths: torch.Tensor) -> None:
        x, weight = (torch.randn(n, m, dtype=dtype, requires_grad=True) for n, m in
                     ((int(lengths.sum()), width), (width, 4 * width)))  # fmt: skip
        vectors = [torch.randn(n, dtype=dtype, requires_grad=True) for n in (4 * width, width, width)]
        options = [*vectors, width] if ranking else []
        projection.projection(x, weight, *options).sum().backward()

    return Case(call, _SHORT)


def _rowwise_table(dtype: torch.dtype, width: int, repeated: bool = False) -> Case:
    def call(lengths: torch.Tensor) -> None:
        rows = torch.arange(int(lengths.sum()))
        table, gradient = torch.empty(1000, width, dtype=dtype), torch.empty(len(rows), width)
        update = rowwise_table.update_repeated if repeated else rowwise_table.update
        update(table, torch.zeros(1000), rows, gradient, 0.1, 1e-8)

    return Case(call, _SHORT)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_WINDOW = {"max_attn_len": 64, "contextual_seq_len": 8}
_ALL_MASKS = Masks(_WINDOW | {"min_full_attn_seq_len": 9, "num_sink_tokens": 5, "target_group_size": 3}, targets=True)
_SEMI_LOCAL = {"max_attn_len": 64, "num_sink_tokens": 70}
_BOTH_WAYS = {"causal": False, "max_attn_len": 64, "num_sink_tokens": 5}
CASES = {
    "attention d 64": _attention(_BF16, 4, 64, _LONG),
    "attention d 64, no bias": _attention(_BF16, 4, 64, _LONG, bias="none"),
    "attention d 64, positions": _attention(_BF16, 4, 64, _LONG, bias="position"),
    "attention d 32, no bias": _attention(_BF16, 4, 32, _LONG, bias="none"),
    "attention d 64, deterministic": _attention(_BF16, 4, 64, _LONG, deterministic=True),
    "attention d 64, softmax": _attention(_BF16, 4, 64, _LONG, softmax=True),
    "attention d 64, masks": _attention(_BF16, 4, 64, _LONG, masks=Masks(_WINDOW, targets=True)),
    "attention d 64, semi-local, no bias": _attention(_BF16, 4, 64, _LONG, bias="none", masks=Masks(_SEMI_LOCAL)),
    "attention d 64, all masks": _attention(_BF16, 4, 64, _LONG, masks=_ALL_MASKS),
    "attention d 64, both ways": _attention(_BF16, 4, 64, _LONG, masks=Masks(_BOTH_WAYS, targets=True)),
    "attention d 64, keys": _attention(_BF16, 4, 64, _LONG, masks=_ALL_MASKS._replace(keys=True, scales=True)),
    "attention d 64, keys, softmax, deterministic": _attention(
        _BF16, 4, 64, _LONG, softmax=True, masks=Masks({}, keys=True), deterministic=True
    ),
    "attention d 256, fp32, both ways, deterministic": _attention(
        _FP32, 2, 256, _LONG, masks=Masks(_BOTH_WAYS, targets=True, scales=True), deterministic=True
    ),
    "attention d 64, fp16": _attention(_FP16, 4, 64, _LONG),
    "attention d 25, short": _attention(_BF16, 2, 25, _SHORT),
    "attention d 73 and 8": _attention(_BF16, 2, 73, _LONG, dv=8),
    "attention d 32, short": _attention(_BF16, 8, 32, _SHORT),
    "attention d 50, short, fp32": _attention(_FP32, 1, 50, _SHORT),
    "attention d 128": _attention(_BF16, 2, 128, _LONG),
    "attention d 256": _attention(_BF16, 2, 256, _LONG),
    "attention d 256, fp32": _attention(_FP32, 2, 256, _LONG),
    "attention d 256, fp32, deterministic": _attention(_FP32, 2, 256, _LONG, softmax=True, deterministic=True),
    "attention d 256, deterministic": _attention(_BF16, 2, 256, _LONG, deterministic=True),
    "cached attention d 64": _cached_attention(_BF16, 4, 64, _LONG),
    "cached attention d 64, shared keys": _cached_attention(_BF16, 4, 64, _LONGER, window=False),
    "cached attention d 64, shared keys, softmax": _cached_attention(_BF16, 4, 64, _LONGER, softmax=True, window=False),
    "cached attention d 128, shared keys": _cached_attention(_BF16, 4, 128, _LONGER, window=False),
    "cached attention d 64, groups": _cached_attention(_BF16, 4, 64, _LONG, masks=True),
    "cached attention d 25, short, softmax": _cached_attention(_BF16, 2, 25, _SHORT, softmax=True),
    "cached attention d 256": _cached_attention(_BF16, 2, 256, _LONG),
    "appended attention d 64": _appended_attention(_BF16, 4, 64, _LONGER),
    "appended attention d 64, semi-local, softmax": _appended_attention(_BF16, 4, 64, _LONG, softmax=True, window=True),
    "appended attention d 128": _appended_attention(_BF16, 4, 128, _LONGER),
    "appended attention d 128, fp32": _appended_attention(_FP32, 2, 128, _LONG),
    "appended attention d 128, no bias": _appended_attention(_BF16, 4, 128, _LONGER, bias="none"),
    "layout of tensor cores": _mma_layout(_BF16, 64, 64, 4, True),
    "layout of tensor cores, keys": _mma_layout(_FP16, 64, 32, 4, False),
    "layout of tensor cores, fp32": _mma_layout(_FP32, 32, 32, 2, True),
    "sampled softmax d 50, fp32": _sampled_softmax(_FP32, 50, True),
    "sampled softmax d 256": _sampled_softmax(_BF16, 256, False),
    "linear cross-entropy d 50, fp32": _linear_cross_entropy(_FP32, 50, 1000),
    "linear cross-entropy d 64": _linear_cross_entropy(_BF16, 64, 1000),
    "linear cross-entropy d 128, no bias, fp32": _linear_cross_entropy(_FP32, 128, 40_000, biased=False),
    "linear cross-entropy d 128": _linear_cross_entropy(_BF16, 128, 40_000),
    "linear cross-entropy d 256, fp32": _linear_cross_entropy(_FP32, 256, 1000),
    "linear cross-entropy d 256, no bias": _linear_cross_entropy(_BF16, 256, 1000, biased=False),
    "norm gate D 50, fp32": _norm_gate(_FP32, 50, 0.2),
    "norm gate D 256": _norm_gate(_BF16, 256, 0.2),
    "norm gate D 512, no dropout": _norm_gate(_BF16, 512, 0.0),
    "norm gate D 8192": _norm_gate(_BF16, 8192, 0.2),
    "norm gate D 512, affine, concatenated": _norm_gate(_BF16, 512, 0.2, 512, concat_ux=True),
    "norm gate D 8192, affine, concatenated": _norm_gate(_BF16, 8192, 0.2, 8192, concat_ux=True),
    "norm gate of 4 heads of 128, affine, concatenated": _norm_gate(_BF16, 512, 0.2, 4, 4, concat_ux=True),
    "norm gate of 2 heads of 25, fp32": _norm_gate(_FP32, 50, 0.0, heads=2),
    "layer norm D 50, fp32": _layer_norm(_FP32, 50),
    "layer norm D 1024": _layer_norm(_BF16, 1024),
    "projection d 50, fp32": _projection(_FP32, 50),
    "projection d 256": _projection(_BF16, 256),
    "projection d 512": _projection(_BF16, 512),
    "projection d 50, ranking, fp32": _projection(_FP32, 50, ranking=True),
    "projection d 64, ranking": _projection(_BF16, 64, ranking=True),
    "projection d 512, ranking": _projection(_BF16, 512, ranking=True),
    "rowwise table d 50": _rowwise_table(_FP16, 50),
    "rowwise table d 50, fp32, repeated": _rowwise_table(_FP32, 50, repeated=True),
    "rowwise table d 256": _rowwise_table(_FP16, 256),
    "rowwise table d 256, repeated": _rowwise_table(_FP16, 256, repeated=True),
    "rowwise table d 8192, repeated": _rowwise_table(_FP16, 8192, repeated=True),
    "rowwise table d 8192, fp32": _rowwise_table(_FP32, 8192),
}


def _compile(name: str, capability: int, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """The kernels of a case but those already done."""
    case = CASES[name]
    for launch in case.launches(case.lengths[0]):
        identity = launch.name, str(specialise(launch, capability)[0])
        if identity not in done:
            done.add(identity)
            print(name, launch.name, file=sys.stderr, flush=True)  # read where the compiler ends the process
            try:
                found: dict[str, Any] = compile_launch(launch, capability)
            except Exception as error:  # whatever the compiler raises
                found = {"error": f"{type(error).__name__}: {error} {error.__cause__ or ''}"}
            yield {"case": name, "kernel": launch.name, **found}


def _keys(name: str, capability: int) -> Iterator[dict[str, Any]]:
    case = CASES[name]
    for lengths in case.lengths:
        for place, launch in enumerate(case.launches(lengths)):
            key, _, _ = specialise(launch, capability)
            yield {"case": name, "kernel": launch.name, "launch": place, "lengths": lengths, "key": key}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, help="80, 90 or 100")
    parser.add_argument("cases", nargs="*", default=list(CASES), help="names of CASES; all, without any")
    parser.add_argument("--keys", action="store_true", help="do not compile")
    args = parser.parse_args()
    pretend(args.capability)
    torch.manual_seed(0)
    done: set[tuple[str, str]] = set()
    for name in args.cases:
        lines = _keys(name, args.capability) if args.keys else _compile(name, args.capability, done)
        for line in lines:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
