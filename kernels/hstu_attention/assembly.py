"""Table lookups and a logarithm in assembly, each beside what it stands for.

`position_diagonals` and `add_to_entries` build on how Hopper's tensor cores lay a tile out over threads, which Triton
does not promise: `mma_layout` tries them once a device.
"""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def entries(base, index, INLINE_ASM):
    """Entries of a small table, float32, int32 or int64, for a whole tile of indices.

    In assembly, because tl.load would stage the tile through shared memory, as it does operands of a product:
    68 KiB more for a (128, 64) tile in three stages.
    """
    ELEMENT: tl.constexpr = base.dtype.element_ty
    if not INLINE_ASM:
        values = tl.load(base + index)
    elif tl.float32 == ELEMENT:
        values = tl.inline_asm_elementwise(
            "{ .reg .u64 address; mad.wide.s32 address, $2, 4, $1; ld.global.nc.f32 $0, [address]; }",
            "=f,l,r", [base.to(tl.int64), index], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    elif tl.int32 == ELEMENT:
        values = tl.inline_asm_elementwise(
            "{ .reg .u64 address; mad.wide.s32 address, $2, 4, $1; ld.global.nc.s32 $0, [address]; }",
            "=r,l,r", [base.to(tl.int64), index], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        tl.static_assert(tl.int64 == ELEMENT)
        values = tl.inline_asm_elementwise(
            "{ .reg .u64 address; mad.wide.s32 address, $2, 8, $1; ld.global.nc.s64 $0, [address]; }",
            "=l,l,r", [base.to(tl.int64), index], dtype=tl.int64, is_pure=True, pack=1,
        )  # fmt: skip
    return values


@triton.jit
def add_to_entries(base, index, value, mask, INLINE_ASM):
    """base[index] += value for a whole tile, atomically, in no fixed order. INLINE_ASM: one address after the other,
    because all of a tile's at once take 64 registers of every thread; only for layouts that hold each element once."""
    if INLINE_ASM:
        tl.inline_asm_elementwise(
            """{
            .reg .u64 address;
            .reg .pred some;
            mad.wide.s32 address, $2, 4, $1;
            setp.ne.f32 some, $3, 0f00000000;
            @some red.relaxed.gpu.global.add.f32 [address], $3;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,f",
            [base.to(tl.int64), index, tl.where(mask, value, 0.0)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_add(base + index, value, mask=mask, sem="relaxed")


@triton.jit
def approximate_bucket(seconds, INLINE_ASM):
    """Bucket 0..128 of float32 seconds, as int32; within 1e-5 of a bucket's edge, either side.

    One special-function call: the logarithm is taken times 1/0.301 onto 2^23, rounding down, where the lowest bits
    of the sum are the bucket.
    """
    if INLINE_ASM:
        bucket = tl.inline_asm_elementwise(
            """{
            .reg .f32 s;
            abs.f32 s, $1;
            max.f32 s, s, 0f3F800000;
            lg2.approx.ftz.f32 s, s;
            fma.rm.f32 s, s, 0f40136150, 0f4B000000;
            mov.b32 $0, s;
            and.b32 $0, $0, 255;
            min.s32 $0, $0, 128;
            }""",
            "=r,f",
            [seconds],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        steps = tl.log2(tl.maximum(tl.abs(seconds), 1.0)) * 2.3028145
        bucket = tl.minimum(tl.floor(steps).to(tl.int32), 128)
    return bucket


def _diagonal_loads(columns: int, elsewhere: str = "0") -> str:
    """Assembly for `position_diagonals`: the values of 4 * columns / 8 tile elements that one thread holds.

    They are columns c, c + 1 of rows r and r + 8, then the same eight columns on, and so on. On a diagonal row r + 8
    has what row r has eight columns before, so `columns / 8 + 1` loads of two entries serve them all, at constant
    distances from one address. A thread that finds another order reads address `elsewhere`: 0 stops the program (a trap
    would keep the compiler from overlapping the matrix products), though `mma_layout` should have seen it before.
    """
    groups = columns // 8
    elements = 4 * groups
    lines = [
        "{ .reg .u64 address, below; .reg .s32 last; .reg .pred good; .reg .f32 "
        + ", ".join(f"x{t}, y{t}" for t in range(groups + 1))
        + ";",
        f"add.s32 last, ${2 * elements}, {columns - 7};",
        f"add.u64 below, ${elements}, -32;",
        f"setp.eq.s32 good, last, ${3 * elements - 1};",
        f"setp.eq.and.u64 good, below, ${elements + 2}, good;",
        f"mad.wide.s32 address, ${2 * elements}, 4, ${elements};",
        f"selp.b64 address, address, {elsewhere}, good;",
    ]
    lines += [f"ld.global.nc.v2.f32 {{x{t}, y{t}}}, [address+{32 * (t - 1)}];" for t in range(groups + 1)]
    for t in range(groups):
        values = (f"x{t + 1}", f"y{t + 1}", f"x{t}", f"y{t}")
        lines += [f"mov.f32 ${4 * t + element}, {value};" for element, value in enumerate(values)]
    return "\n".join([*lines, "}"])


def _constraints(columns: int) -> str:
    elements = columns // 2
    return ",".join(["=f"] * elements + ["l"] * elements + ["r"] * elements)


_LOADS_64 = tl.constexpr(_diagonal_loads(64))
_LOADS_32 = tl.constexpr(_diagonal_loads(32))
# On trial, another order of elements reads its own row, which is there, and whose values are wrong.
_TRIAL_64 = tl.constexpr(_diagonal_loads(64, f"${64 // 2}"))
_TRIAL_32 = tl.constexpr(_diagonal_loads(32, f"${32 // 2}"))
_CONSTRAINTS_64 = tl.constexpr(_constraints(64))
_CONSTRAINTS_32 = tl.constexpr(_constraints(32))


@triton.jit
def diagonal_entries(base, column, COLUMNS, INLINE_ASM, TRIAL):
    """base + column read, for the pointers `base` (rows, 1) and indices `column` (1, COLUMNS) of `position_diagonals`.
    TRIAL: where the layout is not Hopper's, wrong values instead of an end of the program."""
    if not INLINE_ASM:
        values = tl.load(base + column)
    elif COLUMNS == 32:
        LOADS_32: tl.constexpr = _TRIAL_32 if TRIAL else _LOADS_32
        values = tl.inline_asm_elementwise(
            LOADS_32, _CONSTRAINTS_32, [base.to(tl.int64), column], dtype=tl.float32, is_pure=True, pack=16
        )
    else:
        LOADS_64: tl.constexpr = _TRIAL_64 if TRIAL else _LOADS_64
        values = tl.inline_asm_elementwise(
            LOADS_64, _CONSTRAINTS_64, [base.to(tl.int64), column], dtype=tl.float32, is_pure=True, pack=32
        )
    return values
