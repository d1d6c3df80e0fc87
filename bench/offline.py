"""What every Triton kernel takes of a GPU that need not be there: compiled for sm_80 and sm_90, printed as a table.

``python -m bench.offline`` from a checkout, or ``make kernels-offline``. Ends with 1 where a kernel would not fit: more
shared memory than a block may have, or registers spilled to memory at a size where they must suffice.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdiffclip.kernels.triton.launch import OfflineCase

SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes that one block may have
REGISTER_LIMIT = 255  # per thread; the compiler spills beyond
OPS = ("visible_noise", "masked_mse", "contrastive", "short_attention")


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one architecture; ``local_bytes`` is what a thread spills."""

    op: str
    case: str
    kernel: str
    arch: int
    registers: int
    local_bytes: int
    shared_bytes: int
    threads: int
    problem: str


def cases(op: str) -> list[OfflineCase]:
    """The cases of one op's Triton file."""
    import importlib

    listed: list[OfflineCase] = importlib.import_module(f"fastdiffclip.kernels.triton.{op}").offline_cases()
    return listed


def compile_case(op: str, case: OfflineCase, arch: int) -> Usage:
    """Compile one case for ``sm_<arch>`` and read registers, spills and shared memory from the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = case.launch
    names = launch.kernel.arg_names
    signature = {name: "constexpr" if name in launch.constants else case.types[name] for name in names}
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    # torch allocates at multiples of 512 bytes: the launcher's pointers are known to be aligned, its integers are not.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(launch.kernel, signature, constants, aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, local_bytes = _resources(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    problem = ""
    if shared > SHARED_LIMIT[arch]:
        problem = f"{shared} bytes of shared memory, a block may have {SHARED_LIMIT[arch]}"
    elif local_bytes and not case.may_spill:
        problem = f"spills {local_bytes} bytes a thread"
    name = launch.kernel.fn.__name__.lstrip("_")
    return Usage(op, case.name, name, arch, registers, local_bytes, shared, 32 * launch.num_warps, problem)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of each thread, as NVIDIA's own tool reads them from the machine code."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", listed.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {listed.stdout!r}")
    return int(found[1]), max(int(found[2]), int(found[3]))


def table(usages: Iterable[Usage]) -> str:
    """The usages as Markdown, one row per kernel and case, both architectures side by side."""
    rows: dict[tuple[str, str, str], dict[int, Usage]] = {}
    for usage in usages:
        rows.setdefault((usage.op, usage.case, usage.kernel), {})[usage.arch] = usage
    archs = sorted({arch for row in rows.values() for arch in row})
    titles = [f"sm_{arch} {what}" for arch in archs for what in ("registers", "spilled B", "shared B")]
    lines = ["| op | case | kernel | threads | " + " | ".join(titles) + " |", "|---" * (4 + len(titles)) + "|"]
    for (op, case, kernel), row in rows.items():
        used = [row[arch] for arch in archs]
        numbers = [f"{n}" for usage in used for n in (usage.registers, usage.local_bytes, usage.shared_bytes)]
        threads = next(iter(row.values())).threads
        lines.append(f"| {op} | {case} | {kernel} | {threads} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main() -> int:
    """Compile everything, print the table and what does not fit."""
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel has nothing to compile
    wanted = sys.argv[1:] or OPS
    usages = [compile_case(op, case, arch) for op in wanted for case in cases(op) for arch in SHARED_LIMIT]
    print(table(usages))
    problems = [f"{u.op}, {u.case}, {u.kernel}, sm_{u.arch}: {u.problem}" for u in usages if u.problem]
    for problem in problems:
        print(f"does not fit: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
