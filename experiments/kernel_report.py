"""Registers, spills and instructions of the Triton kernel, compiled ahead of time: needs no GPU.

    python experiments/kernel_report.py --capability 90 --vocabulary 151936

Prints a line for every dtype of the logits: registers of a thread, bytes it spills, and of the loop
over the row what one pass of a thread executes: logits, instructions (and how many more in the one
block that holds the target), exponentials, loads, barriers and shuffles. Needs the package
``triton``, whose wheel brings the assembler and disassembler.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from wapo_analysis.stats import triton_kernel  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
COUNTED = ("MUFU.EX2", "LDG", "BAR", "SHFL")


def build(dtype: str, vocabulary: int, capability: int) -> bytes:
    """Machine code for contiguous logits, aligned if V allows it."""
    constants = {
        "stride": 1,
        "VOCABULARY": vocabulary,
        "ALIGNED": 16 if vocabulary % 16 == 0 else 1,
        "BLOCK": triton_kernel.BLOCK,
    }
    signature = {"logits": TYPES[dtype], "offsets": "*i64", "targets": "*i64", "out": "*fp32"}
    signature |= {"scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in triton_kernel.reduce_kernel.arg_names}
    pointers = {(place,): [["tt.divisibility", 16]] for place in range(4)}
    source = ASTSource(triton_kernel.reduce_kernel, ordered, constants, pointers)
    options = {"num_warps": triton_kernel.WARPS}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return bytes(kernel.asm["cubin"])


def tool(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(TOOLS / name), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout


def loops(code: str) -> Iterator[tuple[list[str], int]]:
    """Instructions of every loop, with how many of them a forward jump inside it passes over."""
    lines = re.findall(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4}\*/\s+(.+?) *;", code, re.MULTILINE)
    labels = {label: place for place, (label, _) in enumerate(lines) if label}
    for end, (_, text) in enumerate(lines):
        start = _jump(text, labels)
        if start is not None and start < end:
            inside = range(start, end + 1)
            rare = sum(
                target - place - 1
                for place in inside
                if (target := _jump(lines[place][1], labels)) is not None and place < target <= end
            )
            yield [lines[place][1] for place in inside if lines[place][1]], rare


def _jump(text: str, labels: dict[str, int]) -> int | None:
    found = re.search(r"BRA .*?(\.L_x_\d+)", text)
    return labels.get(found[1]) if found else None


def describe(cubin: Path) -> str:
    usage = dict(
        re.findall(r"(REG|STACK|SHARED):(\d+)", tool("cuobjdump", "-res-usage", str(cubin)))
    )
    sweeps = [loop for loop in loops(tool("nvdisasm", str(cubin))) if "MUFU.EX2" in str(loop[0])]
    if not sweeps:
        raise SystemExit("no loop with an exponential in the machine code")
    code, rare = sweeps[0]
    counts = {name: sum(name in line for line in code) for name in COUNTED}
    logits = triton_kernel.BLOCK // (32 * triton_kernel.WARPS)
    common = len(code) - rare
    return (
        f"{usage['REG']} registers, {usage['STACK']} bytes spilled, {usage['SHARED']} shared; "
        f"{logits} logits: {common} instructions ({common / logits:.1f} a logit, {rare} more at "
        "the target), " + ", ".join(f"{count} {name}" for name, count in counts.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    options = parser.parse_args()
    print(f"triton {triton.__version__}, sm_{options.capability}, V = {options.vocabulary}")
    with tempfile.TemporaryDirectory() as folder:
        for dtype in TYPES:
            cubin = Path(folder) / f"{dtype}.cubin"
            cubin.write_bytes(build(dtype, options.vocabulary, options.capability))
            print(f"{dtype:>9}: {describe(cubin)}")


if __name__ == "__main__":
    main()
