#!/usr/bin/env bash
# ptxas 12.8.93 and 12.9.86, of triton's wheels, and 13.0.88: wrong code for a loop of two products on Hopper.
#
# The first `wgmma` of the loop reads its first operand from registers, which are loaded before the loop and stay the
# same. The second one's are packed in the loop from the first one's result. If there is a branch between the first
# product and the second, and nothing but the first product reads the loaded registers, both operands get the same
# machine registers, and the pack overwrites what the next pass needs. From the second pass on the first product is
# taken of the wrong operand, without a message: 80 to 93 % of a Gluon attention kernel's output was wrong. The branch
# may be an `if` around a mask, or only a wait for an `mbarrier`. 12.3.107, 12.4.131 and 12.6.85 are wrong too, 13.1.80,
# 13.4.59 and 13.5.37 right, at -O1 to -O3. Triton 3.6.0 and 3.7.1 take 12.8.93 for Hopper, 3.9.0 takes 13.4.59.
#
# The PTX below follows the manual: a fence before each product, a wait after it, no write to the operand that stays. It
# comes out right without the branch; and with it if the operand is read again after the loop. In Gluon the latter is
# `tile.store(operand)` there, back to the shared memory that it was loaded from.
#
# Seen: ptxas 12.8.93, 12.9.86, 13.0.88: branch: reads R40-R43, then R40-R43; packs into R40-R43: wrong
#           straight, and branch with a read after the loop: reads R40-R43, then R24-R27; packs into R24-R27: right
#       ptxas 13.1.80, 13.4.59: all three: reads R40-R43, then R24-R27; packs into R24-R27: right
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment --no-deps triton==3.7.1 nvidia-cuda-nvcc==13.0.88
cat >operands.py <<'PYTHON'
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGES = Path(sysconfig.get_path("purelib"))
TRITON = PACKAGES / "triton/backends/nvidia/bin"
TOOLS = {name: TRITON / name for name in ("ptxas", "ptxas-blackwell")} | {"cuda": PACKAGES / "nvidia/cu13/bin/ptxas"}


def each(count, line):
    return "\n".join(line.format(i, 2 * i, 2 * i + 1) for i in range(count))


def product(result, operand, accumulates):
    results = ", ".join(f"%{result}{i}" for i in range(8))
    operands = ", ".join(f"%{operand}{i}" for i in range(4))
    return f"""
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {{{results}}}, {{{operands}}}, %tile, {accumulates}, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;"""


def kernel(branch, read_after):
    """sum = 0; for each step: x = a @ tile; if not the last step: x = x * x; sum += bf16(x) @ tile."""
    return f""".version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 p_from, .param .u64 p_to, .param .u32 p_steps) .reqntid 128
{{
    .shared .align 128 .b8 memory[512];
    .reg .b64 %from, %to, %tile;
    .reg .b32 %thread, %place, %steps, %a<4>, %w<4>;
    .reg .f32 %x<8>, %sum<8>;
    .reg .pred %last, %more, %no, %yes;
    ld.param.u64 %from, [p_from];
    ld.param.u64 %to, [p_to];
    ld.param.u32 %steps, [p_steps];
    mov.u32 %thread, %tid.x;
    mad.wide.u32 %from, %thread, 16, %from;
    mad.wide.u32 %to, %thread, 48, %to;
    ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%from];
    setp.ne.u32 %no, 0, 0;
    setp.eq.u32 %yes, 0, 0;
    // A tile of 16 x 16 ones, which both products read, and its descriptor: groups of 8 x 8, 128 and 256 bytes apart.
    mov.u32 %place, memory;
    cvt.u64.u32 %tile, %place;
    shr.u64 %tile, %tile, 4;
    or.b64 %tile, %tile, 0x0000001000080000;
    mad.lo.u32 %place, %thread, 4, %place;
    st.shared.b32 [%place], 0x3f803f80;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    {each(8, "mov.f32 %sum{0}, 0f00000000;")}
    .pragma "nounroll";
LOOP:
    {product("x", "a", "%no")}
    {"setp.eq.u32 %last, %steps, 1;" * branch}
    {"@%last bra.uni PACK;" * branch}
    {each(8, "mul.f32 %x{0}, %x{0}, %x{0};")}
PACK:
    {each(4, "cvt.rn.bf16x2.f32 %w{0}, %x{2}, %x{1};")}
    {product("sum", "w", "%yes")}
    sub.u32 %steps, %steps, 1;
    setp.ne.u32 %more, %steps, 0;
    @%more bra.uni LOOP;
    {each(8, "st.global.f32 [%to + 4 * {0}], %sum{0};")}
    {"st.global.v4.b32 [%to + 32], {%a0, %a1, %a2, %a3};" * read_after}
    ret;
}}
"""


def looked_at(ptxas, **options):
    """Which registers the machine code's loop packs, what its products read, and whether the first one's are kept."""
    Path("kernel.ptx").write_text(kernel(**options))
    said = subprocess.run([ptxas, "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"], check=True, capture_output=True)
    assert not said.stdout + said.stderr, said
    command = [TRITON / "nvdisasm", "-c", "-ndf", "kernel.cubin"]
    code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^(\.L\w+):|/\*[0-9a-f]{4}\*/ +(?:@!?U?P\d+ +)?(.+?) *;", code, re.MULTILINE)
    labels = {label: index for index, (label, _) in enumerate(lines)}
    products = [index for index, (_, line) in enumerate(lines) if line.startswith("HGMMA")]
    first, second = (int(re.search(r", R(\d+), gdesc", lines[index][1])[1]) for index in products)
    jumps = [(re.search(r"^BRA.*`\((\.L\w+)\)", line), index) for index, (_, line) in enumerate(lines)]
    loops = [(labels[to[1]], index) for to, index in jumps if to and labels[to[1]] < products[0] < products[1] < index]
    ((begin, end),) = loops
    written = [(re.match(r"(\S+) R(\d+),", lines[index][1]), index) for index in range(begin, end)]
    written = [(to[1], int(to[2]), index) for to, index in written if to and index not in products]
    packed = sorted(register for operation, register, _ in written if operation.startswith("F2FP"))
    assert packed == list(range(second, second + 4)), packed
    changes = [index for _, register, index in written if first <= register < first + 4]
    assert not changes or min(changes) > products[0], "the operand is restored"
    reads = f"reads R{first}-R{first + 3}, then R{second}-R{second + 3}"
    return f"{reads}; packs into R{packed[0]}-R{packed[-1]}", bool(changes)


for name in sys.argv[1:]:
    tool, release, faulty = name.split("|")
    version = subprocess.run([TOOLS[tool], "--version"], check=True, capture_output=True, text=True).stdout
    assert f"V{release}\n" in version, version
    for label, options in {
        "branch": {"branch": True, "read_after": False},
        "straight": {"branch": False, "read_after": False},
        "branch with a read after the loop": {"branch": True, "read_after": True},
    }.items():
        seen, wrong = looked_at(TOOLS[tool], **options)
        print(f"ptxas {release}: {label}: {seen}: {'wrong' if wrong else 'right'}")
        assert wrong == (faulty == "wrong" and label == "branch"), "changed"
PYTHON
hopper() {
    local release
    release=$(python -c 'from triton.backends.nvidia.compiler import get_ptxas; print(get_ptxas(90).version)')
    echo "triton $1 takes ptxas $release for Hopper"
    [ "$release" = "$2" ]
}
hopper 3.7.1 12.8
python operands.py "ptxas|12.8.93|wrong" "cuda|13.0.88|wrong" "ptxas-blackwell|13.1.80|right"
python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.9.0
hopper 3.9.0 13.4
python operands.py "ptxas|12.9.86|wrong" "ptxas-blackwell|13.4.59|right"
