"""Compile Triton kernels ahead of time, for GPUs that are not there, and read what the compiler made of them.

`compile_kernel` compiles for any target; the assembler, disassembler and resource printer that come with Triton then
tell registers, spills, shared memory and, instruction by instruction, what a thread executes. Budgets on these are
tests that need no GPU.

    compiled = compile_kernel(kernel, {"x_ptr": "*fp16", "n": "i32"}, {"BLOCK": 128}, TARGETS["sm_90"], num_warps=4)
    assert compiled.spills == 0 and compiled.instructions("HMMA")

A kernel's arguments that are pointers, and integers named in `divisible`, count as multiples of 16: without that the
compiler could not use wide loads.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

#: What a bare build of Triton knows how to compile for, by the name of its architecture.
TARGET_NAMES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")

#: Shared memory a block may have, bytes (CUDA C++ programming guide, technical specifications; CDNA 3 ISA, LDS).
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}

_SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]+)([^;]*);", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Instruction(NamedTuple):
    """One machine instruction."""

    address: int
    name: str
    operands: str
    predicate: str


@dataclass(frozen=True)
class Loop:
    """A backward branch: the instructions from its target to it."""

    body: tuple[Instruction, ...]

    def count(self, prefix: str = "") -> int:
        """Return how many instructions have names that begin with `prefix`."""
        return sum(one.name.startswith(prefix) for one in self.body)


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel compiled for one architecture.

    Args:
        arch: its name.
        num_warps: warps of a block.
        shared_bytes: shared memory of a block.
        registers: of a thread.
        spills: bytes a thread spills.
        assembly: PTX, or AMD's assembly.
        code: machine instructions in order; empty for AMD.
    """

    arch: str
    num_warps: int
    shared_bytes: int
    registers: int
    spills: int
    assembly: str = field(repr=False)
    code: tuple[Instruction, ...] = field(repr=False)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.num_warps * (64 if self.arch.startswith("gfx") else 32)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The loops, longest first."""
        found = []
        for one in self.code:
            if one.name.startswith("BRA"):
                target = re.findall(r"0x([0-9a-f]+)", one.operands)
                if target and (start := int(target[-1], 16)) < one.address:
                    found.append(Loop(tuple(x for x in self.code if start <= x.address <= one.address)))
        return tuple(sorted(found, key=lambda loop: -len(loop.body)))

    @property
    def hot_loop(self) -> Loop:
        """The longest loop.

        Raises:
            LookupError: if there is none.
        """
        if not self.loops:
            raise LookupError("the kernel has no loop")
        return self.loops[0]

    def count(self, prefix: str = "") -> int:
        """Return how many instructions have names that begin with `prefix`; loops count once."""
        return sum(one.name.startswith(prefix) for one in self.code)

    def executed(self, trips: int, prefix: str = "") -> int:
        """Return the instructions a thread executes when the hot loop runs `trips` times and all else once."""
        total = self.count(prefix)
        return total + (trips - 1) * self.hot_loop.count(prefix) if self.loops else total

    def occurrences(self, pattern: str) -> int:
        """Return how often a regular expression matches in the assembly."""
        return len(re.findall(pattern, self.assembly))


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: str,
    *,
    num_warps: int,
    num_stages: int = 1,
    divisible: Collection[str] = (),
) -> CompiledKernel:
    """Compile `kernel` for `arch`.

    Args:
        kernel: a `triton.jit` function.
        types: Triton's names of the types of all arguments that are no constants, as `"*fp16"` or `"i32"`.
        constants: values of the others; an integer that a launch would find to be 1 is one.
        arch: one of `TARGET_NAMES`.
        num_warps: warps of a block.
        num_stages: pipeline stages.
        divisible: integer arguments that are multiples of 16.

    Raises:
        Exception: what the compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in divisible
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    # Contraction to fma is what a launch does too; naming it keeps the figures when its default changes.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    if arch.startswith("gfx"):
        return _read_amd(arch, compiled)
    return _read_nvidia(arch, compiled)


def _read_nvidia(arch: str, compiled: Any) -> CompiledKernel:
    disassembly, resources = _dump(compiled.asm["cubin"], "-sass"), _dump(compiled.asm["cubin"], "-res-usage")
    found = _RESOURCES.search(resources)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources:\n{resources}")
    code = tuple(
        Instruction(int(address, 16), name, operands, predicate)
        for address, predicate, name, operands in _SASS_LINE.findall(disassembly)
    )
    return CompiledKernel(
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        registers=int(found[1]),
        # What is spilled lies on the stack; ptxas puts it there or, of old, in local memory.
        spills=int(found[2]) + int(found[4]),
        assembly=compiled.asm["ptx"],
        code=code,
    )


def _read_amd(arch: str, compiled: Any) -> CompiledKernel:
    assembly = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return CompiledKernel(
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        registers=number("vgpr_count"),
        spills=4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        assembly=assembly,
        code=(),
    )


def _dump(cubin: bytes, option: str) -> str:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        # nvdisasm, which it calls, lies beside it.
        environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        done = subprocess.run([tool, option, file], capture_output=True, text=True, env=environment, check=True)
    return done.stdout + done.stderr
