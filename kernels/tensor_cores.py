"""What the kernels do to operands of matrix products."""
# A kernel's arguments have no Python types.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def operand(tile, dtype, PRECISION):
    """A tile as the tensor cores shall read it: in the type of the other operand; float32 rounded to TF32; they
    would cut off, which doubles the error and leans all products to one side."""
    if dtype == tl.float32:
        if PRECISION == "tf32":
            tile = ((tile.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    else:
        tile = tile.to(dtype)
    return tile
