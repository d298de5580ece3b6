"""Every Triton kernel, compiled for a Hopper GPU that isn't there, as TritonKernels would launch it at DeepSeek-V3's
real shapes.

The host code runs on meta tensors with a launcher that records; what it would have launched is compiled, specialised as
Triton's own launcher would specialise it (multiples of 16, ones, nones). Held to: shared memory within what one block
may have, no spilled register in any kernel, and matrix products on the tensor core's wgmma alone
(kernels/triton/__init__.py says why no other instruction may be among them).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from isotherm.kernels import triton as triton_package
from isotherm.kernels.cache_rows import fp8_row_bytes
from isotherm.kernels.formats.fp8 import Fp8Weight
from isotherm.kernels.formats.grouped import GroupedWeight, Int4Weight, Int8Weight
from isotherm.kernels.formats.stored import PlainWeight
from isotherm.kernels.ops import Router
from isotherm.kernels.triton.backend import TritonKernels
from isotherm.kernels.triton.launch import OPTIONS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TARGET = GPUTarget("cuda", 90, 32)
# CUDA C Programming Guide, compute capability 9.0: maximum shared memory per thread block, opt-in
SHARED_LIMIT = 227 * 1024
BF16, FP8, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
POINTERS = {
    BF16: "*bf16",
    FP8: "*fp8e4nv",
    F32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# DeepSeek-V3's config.json
HIDDEN, HEADS, LATENT, ROPE, NOPE, VALUE, Q_RANK = 7168, 128, 512, 64, 128, 128, 1536
EXPERTS, GROUPS, KEPT, TOP, INNER, DENSE_INNER, VOCAB = 256, 8, 4, 8, 2048, 18432, 129280
BLOCK_SIZES = (64, 16)  # tokens per cache block: one that a key tile divides, and one that it doesn't


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def fp8(outputs: int, inputs: int) -> Fp8Weight:
    return Fp8Weight(meta(outputs, inputs, dtype=FP8), meta(-(-outputs // 128), -(-inputs // 128), dtype=F32))


def integers(outputs: int, inputs: int, kind: str) -> GroupedWeight:
    """Real ones, for it is looked at which dtype has their scales: some outputs stand for all, whose number no kernel
    is compiled for."""
    group = {"int4": 32, "int4 gptq": 128, "int4 zeros": 128, "int8": 32}[kind]
    scales = torch.full((outputs, -(-inputs // group)), {32: 1.0, 128: 1 + 2**-9}[group])
    if kind == "int8":
        return Int8Weight(torch.zeros(outputs, inputs, dtype=torch.int8), scales, group)
    zeros = torch.ones_like(scales, dtype=torch.uint8) if kind == "int4 zeros" else None
    return Int4Weight(torch.zeros(outputs, inputs // 2, dtype=torch.uint8), scales, zeros, group)


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be compiled: `types` of its arguments, `constants`, which arguments are multiples of 16,
    and the options."""

    label: str
    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int


def specialised(label: str, kernel: Any, arguments: dict[str, Any], warps: int, stages: int) -> Launch:
    types, constants, aligned = [], [], []
    assert set(arguments) == {p.name for p in kernel.params}, set(arguments) ^ {p.name for p in kernel.params}
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        ):
            types.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, Tensor):
            types.append((name, POINTERS[value.dtype]))
            if value.storage_offset() * value.itemsize % 16 == 0:
                aligned.append(name)
        elif type(value) is int:
            types.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(name)
        else:
            assert type(value) is float, (name, value)
            types.append((name, "fp32"))
    return Launch(label, kernel, tuple(types), tuple(constants), tuple(aligned), warps, stages)


class Recorder:
    def __init__(self) -> None:
        self.label = ""
        self.seen: dict[Any, Launch] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int, stages: int) -> None:
        assert all(g > 0 for g in grid) and all(g < 65536 for g in grid[1:]), grid
        launch = specialised(self.label, kernel, arguments, warps, stages)
        self.seen.setdefault((kernel, launch.types, launch.constants, launch.aligned, warps, stages), launch)


def record() -> list[Launch]:
    """One decode-sized and one prefill-sized use of every operation, and the row counts between them where the tile
    differs."""
    recorder = Recorder()
    k = TritonKernels(BF16, "meta", recorder)
    plain = PlainWeight(meta(VOCAB, HIDDEN))
    weights = {
        "o fp8": k.pack_linear([fp8(HIDDEN, HEADS * VALUE)]),
        "kv_a fp8": k.pack_linear([fp8(LATENT + ROPE, HIDDEN)]),
        "head bf16": k.pack_linear([plain]),
        "q_a bf16": k.pack_linear([PlainWeight(meta(Q_RANK, HIDDEN))]),
    }
    for name, weight in weights.items():
        for rows in {"o fp8": (1, 32, 64, 4096), "head bf16": (1, 64, 4096)}.get(name, (1, 4096)):
            recorder.label = f"linear {name} {rows} rows"
            k.linear(meta(rows, weight.in_features), weight, F32 if name.startswith("head") else None)
    recorder.label = "head_linear k_absorb"
    q = meta(64, HEADS, NOPE + ROPE)
    k.head_linear(q[..., :NOPE], k.pack_heads([PlainWeight(meta(LATENT, NOPE)) for _ in range(HEADS)]))
    for kind in ("fp8", "bf16"):
        make = fp8 if kind == "fp8" else lambda n, m: PlainWeight(meta(n, m))
        gate_up, down = (
            k.pack_linear([make(DENSE_INNER, HIDDEN), make(DENSE_INNER, HIDDEN)]),
            k.pack_linear([make(HIDDEN, DENSE_INNER)]),
        )
        bank = k.expert_bank(EXPERTS, HIDDEN, INNER)
        bank.load(0, make(INNER, HIDDEN), make(INNER, HIDDEN), make(HIDDEN, INNER))
        for rows in (1, 64, 4096):
            recorder.label = f"mlp {kind} {rows} rows"
            k.mlp(meta(rows, HIDDEN), gate_up, down)
            recorder.label = f"experts {kind} {rows} rows each"
            active = TOP if rows == 1 else EXPERTS
            ids = meta(active, dtype=torch.int32)
            k.experts(
                meta(4096, HIDDEN),
                bank,
                meta(active * rows, dtype=torch.int32),
                ids,
                meta(active + 1, dtype=torch.int32),
            )
    record_integers(k, recorder)
    router = Router(meta(EXPERTS, HIDDEN, dtype=F32), meta(EXPERTS, dtype=F32), GROUPS, KEPT, TOP, True, 2.5)
    for rows in (1, 4096):
        recorder.label = f"route {rows} rows"
        k.route(meta(rows, HIDDEN), router)
    recorder.label = "rms_norm"
    for width in (HIDDEN, LATENT):
        k.rms_norm(meta(64, width), meta(width), 1e-6)
    k.add_rms_norm(meta(64, HIDDEN), meta(64, HIDDEN), meta(HIDDEN), 1e-6)
    recorder.label = "rope"
    for heads in (HEADS, 1):
        k.rope(meta(64, heads, ROPE), meta(64, ROPE // 2, dtype=F32), meta(64, ROPE // 2, dtype=F32))
    recorder.label = "combine"
    k.combine(meta(64 * TOP, HIDDEN), meta(64, TOP, dtype=torch.int64), meta(64, TOP, dtype=F32))
    cache = meta(4096, BLOCK_SIZES[0], LATENT + ROPE)
    recorder.label = "write_cache"
    k.write_cache(meta(64, LATENT), meta(64, LATENT + ROPE)[:, LATENT:], cache, meta(64, dtype=torch.int64))
    indices = meta(64, dtype=torch.int32)
    for size in BLOCK_SIZES:
        for length in (1024, 65536):
            recorder.label = f"mla_decode {size} a block, to {length}"
            blocks = meta(4096, size, LATENT + ROPE), meta(64, length // size, dtype=torch.int32)
            k.mla_decode(meta(64, HEADS, LATENT), q[..., NOPE:], *blocks, indices, indices, 0.1)
            recorder.label = f"mla_decode fp8 {size} a block, to {length}"
            coded = meta(4096, size, fp8_row_bytes(LATENT, ROPE, 2), dtype=torch.uint8), blocks[1]
            k.mla_decode(meta(64, HEADS, LATENT), q[..., NOPE:], *coded, indices, indices, 0.1)
    recorder.label = "fp8 cache"
    k.write_cache(meta(64, LATENT), meta(64, LATENT + ROPE)[:, LATENT:], coded[0], meta(64, dtype=torch.int64))
    kv_b = k.pack_linear([fp8(HEADS * (NOPE + VALUE), LATENT)])
    k.mla_prefill(meta(64, HEADS, NOPE + ROPE), coded[0], meta(1024, dtype=torch.int32), 0, kv_b, VALUE, 0.1)
    for start in (0, 8192):
        recorder.label = f"mla_prefill from {start}"
        k.mla_prefill(meta(2048, HEADS, NOPE + ROPE), cache, meta(1024, dtype=torch.int32), start, kv_b, VALUE, 0.1)
    recorder.label = "sample"
    parameters = (
        torch.tensor([0.0, 1.0]).double(),
        torch.tensor([1.0, 0.9]).double(),
        torch.tensor([0, 50]),
        torch.zeros(2, dtype=torch.int64),
    )
    k.sample(meta(2, VOCAB, dtype=F32), *parameters, torch.zeros(2, dtype=torch.int64))
    return list(recorder.seen.values())


def record_integers(k: TritonKernels, recorder: Recorder) -> None:
    """As quantisers publish them: int4 in groups of 32 with bfloat16 scales; in groups of 128 with float16 ones, with
    and without zero points; and an int8 head. The K of a kv_a is split."""
    for kind, counts in (("int4", (1, 64, 4096)), ("int4 zeros", (1, 4096)), ("int4 gptq", (4096,))):
        up, down = integers(INNER, HIDDEN, kind), integers(HIDDEN, INNER, kind)
        gate_up, packed_down = k.pack_linear([up, up]), k.pack_linear([down])
        bank = k.expert_bank(EXPERTS, HIDDEN, INNER)
        bank.load(0, up, up, down)
        kv_a = k.pack_linear([integers(LATENT + ROPE, HIDDEN, kind)])
        for rows in counts:
            recorder.label = f"{kind} {rows} rows"
            k.mlp(meta(rows, HIDDEN), gate_up, packed_down)
            k.linear(meta(rows, HIDDEN), kv_a)
            active = TOP if rows == 1 else EXPERTS
            ids = (meta(n, dtype=torch.int32) for n in (active * rows, active, active + 1))
            k.experts(meta(4096, HIDDEN), bank, *ids)
    head = k.pack_linear([integers(132 * 64, HIDDEN, "int8")])
    for rows in (1, 4096):
        recorder.label = f"int8 head {rows} rows"
        k.linear(meta(rows, HIDDEN), head, F32)


@dataclass(frozen=True)
class Compiled:
    launch: Launch
    shared: int
    registers: int
    spilled: int  # bytes, stores and loads
    wgmma: bool
    other_mma: bool

    def row(self) -> str:
        numbers = (
            f"{self.launch.warps:>3} warps{self.shared:>8} B shared{self.registers:>5} registers"
            f"{self.spilled:>6} B spilled"
        )
        return f"{self.launch.kernel.__name__:24}{self.launch.label:34}{numbers}"


def assemble(ptx: str) -> tuple[int, int]:
    """(registers per thread, bytes spilled) as ptxas reports them, with the options that Triton gives it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            "--fmad=false",
            "--regAllocOptLevel=2",
            "--gpu-name=sm_90a",
            str(source),
            "-o",
            os.devnull,
        ]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return int(re.findall(r"Used (\d+) registers", log)[0]), spilled


def compile_one(launch: Launch) -> Compiled:
    names = launch.kernel.arg_names
    source = ASTSource(
        launch.kernel, dict(launch.types), {(names.index(n),): v for n, v in launch.constants},
        {(names.index(n),): [["tt.divisibility", 16]] for n in launch.aligned},
    )  # fmt: skip
    built = triton.compile(
        source, target=TARGET, options={"num_warps": launch.warps, "num_stages": launch.stages, **OPTIONS}
    )
    ptx = built.asm["ptx"]
    registers, spilled = assemble(ptx)
    return Compiled(
        launch,
        built.metadata.shared,
        registers,
        spilled,
        "wgmma.mma_async" in ptx,
        re.search(r"\bmma\.sync", ptx) is not None,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Compiled]]:
    assert not triton.knobs.runtime.interpret, "unset TRITON_INTERPRET: interpreted kernels cannot be compiled"
    parsing, parse = threading.Lock(), triton.JITFunction.parse

    def parse_alone(function: Any) -> Any:
        with parsing:  # two threads in `ast.parse` may each take the other's depth for its own (CPython issue 106905)
            return parse(function)

    with triton.knobs.cache.scope(), pytest.MonkeyPatch.context() as patch:
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        patch.setattr(triton.JITFunction, "parse", parse_alone)
        launches = record()
        with ThreadPoolExecutor(2) as pool:  # ptxas is a process of its own, and most of the time
            yield list(pool.map(compile_one, launches))


def test_every_kernel_fits_a_hopper_gpu(compiled: list[Compiled]) -> None:
    print("\n" + "\n".join(c.row() for c in compiled))
    too_large = [c.row() for c in compiled if c.shared > SHARED_LIMIT]
    assert not too_large, "\n".join(["more shared memory than a block may have:", *too_large])
    spilling = [c.row() for c in compiled if c.spilled]
    assert not spilling, "\n".join(["registers spill:", *spilling])


def test_products_use_one_instruction_family(compiled: list[Compiled]) -> None:
    products = {"linear_kernel", "gate_up_kernel", "expert_gate_up_kernel", "expert_down_kernel", "route_scores_kernel",
                "mla_decode_kernel", "mla_prefill_kernel"}  # fmt: skip
    others = [c.row() for c in compiled if c.other_mma or c.wgmma != (c.launch.kernel.__name__ in products)]
    assert not others, "\n".join(["not wgmma alone:", *others])


def test_no_kernel_is_left_out(compiled: list[Compiled]) -> None:
    """Every @triton.jit function that is launched, by its name: *_kernel."""
    folder = Path(triton_package.__file__).parent
    written = {
        name for path in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert {c.launch.kernel.__name__ for c in compiled} == written
