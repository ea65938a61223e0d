"""Compile every kernel for GPUs that are not here, and print the resources of each as JSON rows.

Run without TRITON_INTERPRET: the interpreter replaces kernels where they are defined."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lossfuse.kernels import (
    devices,
    fused_rows,
    label_rows,
    linear_rows,
    log_softmax_rows,
    row_totals,
    scale_rows,
    soft_target_rows,
    softmax_rows,
)
from lossfuse.kernels.launch import (
    FUSED_TABLES,
    UNFUSED,
    fused_plan,
    grad_blocks,
    row_blocks,
    stats_blocks,
)

DEVICES = {
    "sm_80": devices.A100,
    "sm_90": devices.H100,
    "sm_100": devices.B200,
    "gfx942": devices.MI300X,
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# dtypes of logits and of their gradient
DTYPES = {
    "bf16": ("*bf16", "*bf16"),
    "fp16": ("*fp16", "*fp16"),
    "fp32": ("*fp32", "*fp32"),
    "fp32 to bf16": ("*fp32", "*bf16"),
}
# a vocabulary with blocks of full width
V = 128256
# vocabularies that together choose every launch of the tables of the fused kernels, aligned or not
FUSED_V = (8192, 16384, 32768, 50257, 128256, 151643)

SOFTMAX = ("scale", "softcap", "smoothing", "lse_square_scale")
OPTION_SETS = {
    "plain": (),
    "every option": ("class_weight_ptr", "class_weight_sum_ptr", "smooth_words_ptr", *SOFTMAX),
}
# outputs beside the loss, and their upstream gradients
STATISTICS = (
    "lse_ptr",
    "logprob_ptr",
    "entropy_ptr",
    "argmax_ptr",
    "dlse_ptr",
    "dlogprob_ptr",
    "dentropy_ptr",
)
# arguments of a shard, and arguments that it does not have
SHARD = ("first_class", "num_classes")
SHARD_SETS = {"shard": (), "shard, every option": ("class_weight_ptr", *SOFTMAX, *STATISTICS)}
SHARD_ABSENT = ("loss_ptr", "lse_ptr", "lse_square_scale")
# a tile of the product fills the registers of a program, so each option matters
TILE_OPTION_SETS = {
    "plain": (),
    "bias": ("bias_ptr",),
    "softcap": ("softcap",),
    "every option": ("bias_ptr", "scale", "softcap"),
}
# entropy and argmax with the option that leaves the fewest registers, and with every option
TILE_STATISTICS = ("spreads_ptr", "firsts_ptr")
TILE_OPTION_SETS |= {
    f"{name}, statistics": (*TILE_OPTION_SETS[name], *TILE_STATISTICS)
    for name in ("bias", "every option")
}
ROW_STATISTICS = (*TILE_STATISTICS, "lse_ptr", "target_logprob_ptr", "entropy_ptr", "argmax_ptr")
MERGE_OPTION_SETS = OPTION_SETS | {
    "every option, statistics": (*OPTION_SETS["every option"], *ROW_STATISTICS)
}
OPTIONAL = (
    *OPTION_SETS["every option"],
    "bias_ptr",
    *ROW_STATISTICS,
    *STATISTICS,
    *SHARD,
    "shard_ptr",
)
LABEL_WEIGHTS = ("weight_ptr", "pos_weight_ptr", "stride_weight_v", "stride_pos_weight_v")
LOGITS = (
    "logits_ptr",
    "dlogits_ptr",
    "dtarget_ptr",
    "t_ptr",
    "hidden_ptr",
    "weight_ptr",
    "logp_ptr",
    "dlogp_ptr",
)
# multiples of 16 where rows are wide
SIZES = (
    "V",
    "D",
    "n",
    *(
        f"stride_{name}"
        for name in (
            "logits_n",
            "dlogits_n",
            "target_n",
            "dtarget_n",
            "hidden_n",
            "weight_v",
            "weight_n",
            "pos_weight_n",
        )
    ),
    *(f"stride_{name}" for name in ("logp_n", "dlogp_n")),
)
POINTERS = {
    "ids_ptr": "*i64",
    "target_ptr": "*i64",
    "words_ptr": "*i64",
    "smooth_words_ptr": "*i64",
    "firsts_ptr": "*i32",
    "groups_ptr": "*i32",
    "argmax_ptr": "*i64",
}


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments that its launcher sets."""

    kernel: Any
    num_warps: int
    constants: dict[str, object]
    # rows start at multiples of 16 elements
    wide: bool = True
    options: dict[str, object] = field(default_factory=lambda: dict(UNFUSED))

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def stats_launches(dtype: str, given: tuple[str, ...], absent: Any = ()) -> Iterator[Launch]:
    """Kernels of statistics: against ids, of aligned rows and others, and against probabilities."""
    shaping = bool({"softcap", "smoothing"} & set(given))
    ids, blocks = stats_blocks(V, shaping=shaping), row_blocks(V)
    shape = {"BLOCK_V": ids.block_v, "GROUP": 16 // (4 if dtype == "fp32" else 2)}
    nones = dict.fromkeys(absent)
    for edges in (False, True):
        constants = shape | {"EDGES": edges, **nones}
        yield Launch(softmax_rows.row_loss_kernel, ids.num_warps, constants, wide=not edges)
    parts = {"PARTS": 4, "SPREAD": "entropy_ptr" in given, "FIRST": "argmax_ptr" in given}
    constants = shape | parts | {"EDGES": True}
    yield Launch(softmax_rows.row_parts_kernel, ids.num_warps, constants, wide=False)
    constants = {"GROUP": shape["GROUP"], "PARTS": 4, **nones}
    yield Launch(softmax_rows.merge_parts_kernel, 1, constants)
    constants = {"BLOCK_V": blocks.block_v, **nones}
    yield Launch(soft_target_rows.soft_row_loss_kernel, blocks.num_warps, constants)


def grads_launches(dtype: str, given: tuple[str, ...]) -> Iterator[Launch]:
    narrower = "to" in dtype
    shaping = bool({"softcap", "smoothing", "dentropy_ptr"} & set(given))
    ids, blocks = grad_blocks(V, shaping=shaping), row_blocks(V)
    constants = {"BLOCK_V": ids.block_v, "GROUP": 16 // (4 if "fp32" in dtype else 2)}
    for edges in (False,) if narrower else (False, True):
        more = {"EDGES": edges, "WHOLE_ROW": narrower}
        kernel = softmax_rows.row_grads_kernel
        yield Launch(kernel, ids.num_warps, constants | more, wide=not edges)
    constants = {"BLOCK_V": blocks.block_v, "WHOLE_ROW": narrower}
    yield Launch(soft_target_rows.soft_row_grads_kernel, blocks.num_warps, constants)


def sweeps(dtype: str) -> Iterator[tuple[str, tuple[str, ...], Launch]]:
    """(options, arguments given, launch). A narrower gradient has no loss kernel of its own."""
    with_statistics = {
        "entropy and argmax": STATISTICS,
        "statistics": (*OPTION_SETS["every option"], *STATISTICS),
    }
    for options, given in (OPTION_SETS | with_statistics).items():
        if "to" not in dtype:
            for launch in stats_launches(dtype, given):
                yield options, given, launch
        for launch in grads_launches(dtype, given):
            yield options, given, launch
    for options, given in SHARD_SETS.items():
        if "to" not in dtype:
            for launch in stats_launches(dtype, given, SHARD_ABSENT):
                yield options, (*given, *SHARD, "shard_ptr"), launch
        for launch in grads_launches(dtype, given):
            yield options, (*given, *SHARD), launch


def fused_launches(target: str, itemsize: int, shaping: bool) -> Iterator[Launch]:
    block = scale_rows.SCALE_BLOCK
    yield Launch(
        scale_rows.scale_rows_kernel, block.num_warps, {"BLOCK": block.block_v}, options={}
    )
    block = row_totals.BLOCK
    for kernel in (row_totals.prepare_rows_kernel, row_totals.total_kernel):
        yield Launch(kernel, block.num_warps, {"BLOCK": block.block_v}, options={})
    group = 16 // itemsize
    seen = set()
    for v in FUSED_V:
        wide = v % 16 == 0
        plan = fused_plan(
            DEVICES[target],
            v,
            itemsize,
            wide=wide,
            most_lead=0 if wide else group - 1,
            shaping=shaping,
        )
        if plan.kind == "sweeps" or (plan.kind, plan.block_v) in seen:
            continue
        seen.add((plan.kind, plan.block_v))
        if plan.kind == "whole":
            yield Launch(
                fused_rows.whole_row_kernel, plan.num_warps, {"BLOCK_V": plan.block_v}, wide
            )
        else:
            constants = {
                "SLICE": plan.block_v,
                "K_BLOCK": fused_rows.words_block(plan.slices, 32),
                "GROUP": group,
                "PHASE": 0,
            }
            options = {"launch_cooperative_grid": True, **UNFUSED}
            if plan.most_registers is not None:
                options["maxnreg"] = plan.most_registers
            # compiled for rows of any alignment
            yield Launch(fused_rows.split_row_kernel, plan.num_warps, constants, False, options)


def linear_launches(target: str, dtype: str) -> Iterator[tuple[str, tuple[str, ...], Launch]]:
    """(options, arguments given, launch), for the targets that ``linear_rows.obstacle`` accepts."""
    if target not in ("sm_90", "sm_100") or dtype.startswith("fp32"):
        return
    tile = linear_rows.TILE
    blocks = {
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "GROUP": tile.group,
    }
    stages = {"num_stages": tile.num_stages, **UNFUSED}
    product = Launch(linear_rows.tile_stats_kernel, tile.num_warps, blocks, options=stages)
    blocks = {"BLOCK_N": linear_rows.MERGE_ROWS, "BLOCK_T": linear_rows.MERGE_TILES}
    merge = Launch(linear_rows.merge_tiles_kernel, linear_rows.MERGE_WARPS, blocks)
    for options, given in TILE_OPTION_SETS.items():
        yield options, given, product
    for options, given in MERGE_OPTION_SETS.items():
        yield options, given, merge


# a dense target or ids, with and without weights
LABEL_OPTION_SETS = {
    "numbers": ("target_ptr", "dtarget_ptr"),
    "numbers, weights": ("target_ptr", "dtarget_ptr", *LABEL_WEIGHTS),
    "ids": ("ids_ptr",),
    "ids, weights": ("ids_ptr", *LABEL_WEIGHTS),
}


def label_launches() -> Iterator[tuple[str, tuple[str, ...], Launch]]:
    """Sums of losses and gradients in one launch, with one upstream gradient per row."""
    blocks = row_blocks(V)
    for options, given in LABEL_OPTION_SETS.items():
        absent = {"target_ptr", "ids_ptr", "dtarget_ptr", "loss_ptr", "stride_dloss_v"}
        constants = dict.fromkeys((absent | set(LABEL_WEIGHTS)) - set(given))
        constants |= {"BLOCK_V": blocks.block_v, "BLOCK_P": 64}
        constants |= {name: 1 for name in given if name.startswith("stride")}
        launch = Launch(label_rows.label_rows_kernel, blocks.num_warps, constants, options={})
        yield options, given, launch


def log_softmax_launches(
    target: str, itemsize: int
) -> Iterator[tuple[str, tuple[str, ...], Launch]]:
    """Each width of a whole row in the tables, and a longer row."""
    for kernel, two in (
        (log_softmax_rows.log_softmax_kernel, False),
        (log_softmax_rows.log_softmax_grad_kernel, True),
    ):
        configs = {(c, True) for c in FUSED_TABLES[DEVICES[target].family, itemsize, two].rows} | {
            (row_blocks(V), False)
        }
        for config, whole in sorted(configs, key=str):
            constants: dict[str, object] = {"BLOCK_V": config.block_v, "WHOLE_ROW": whole}
            yield "plain", (), Launch(kernel, config.num_warps, constants, options={})


def source(launch: Launch, logits: str, dlogits: str, given: tuple[str, ...]) -> ASTSource:
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for i, name in enumerate(launch.kernel.arg_names):
        labels = launch.kernel is label_rows.label_rows_kernel
        rows = (name in LOGITS and not (labels and name in LABEL_WEIGHTS)) or (
            name == "target_ptr" and (labels or "soft" in launch.name)
        )
        if name in launch.constants or (name in OPTIONAL and not labels and name not in given):
            types[name], constants[i,] = "constexpr", launch.constants.get(name)
        elif rows:
            types[name] = dlogits if name == "dlogits_ptr" else logits
        elif name.endswith("_ptr"):
            types[name] = POINTERS.get(name, "*fp32")
        else:
            types[name] = "fp32" if name in SOFTMAX else "i32"
        # Triton specializes on these
        aligned = name.endswith("_ptr") if not rows else launch.wide
        if aligned or (launch.wide and name in SIZES):
            attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, types, constants, attributes)


def resources(compiled: Any, target: GPUTarget) -> dict[str, int]:
    if target.backend == "hip":
        asm = compiled.asm["amdgcn"]
        spilled = [int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", asm)]
        assert spilled
        return {
            "registers": max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", asm)),
            "spills": sum(spilled),
        }
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [tool, "-sass", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")
    )
    wide = len(re.findall(r"\b(?:LDG|STG|LDGSTS)\S*\.128", sass))
    narrow = len(re.findall(r"\b(?:LDG|STG)\S*\.[US]?(?:8|16)\b", sass))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    fused = compiled.asm["ptx"].count("fma.rn.f32")
    found = {
        "registers": registers,
        "instructions": hot_instructions(sass),
        "spills": stack + local + spills,
        "wide": wide,
        "narrow": narrow,
        "fused": fused,
    }
    # copies by descriptor, and products of tiles
    tma, mma = (
        len(re.findall(r"\bUTMALDG\b", sass)),
        len(re.findall(r"\b(?:HGMMA|UTCHMMA)\b", sass)),
    )
    return (
        found | {"tma": tma, "mma": mma, "shared": compiled.metadata.shared}
        if tma or mma
        else found
    )


def hot_instructions(sass: str) -> int:
    """Instructions of the longest loop, or of the whole kernel if it has none."""
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(\S+)([^;]*);", sass)
    code = [(int(at, 16), op) for at, op, _ in lines if not op.startswith("NOP")]
    loops = [(0, code[-1][0])]
    for at, op, operands in lines:
        to = re.search(r"0x([0-9a-f]+)", operands)
        if op.startswith("BRA") and to is not None and int(to[1], 16) < int(at, 16):
            loops.append((int(to[1], 16), int(at, 16)))
    # a jump back from a rare branch behind the end of the kernel is no loop
    end = next((at for at, op in code if op.startswith("EXIT")), code[-1][0])
    inner = [loop for loop in loops[1:] if loop[1] <= end] or loops[:1]
    first, last = max(inner, key=lambda loop: loop[1] - loop[0])
    return sum(first <= at <= last for at, _ in code)


def main(targets: list[str], dtypes: list[str]) -> None:
    for target in targets:
        for dtype in dtypes:
            itemsize = 4 if dtype.startswith("fp32") else 2
            cases = [
                (options, given, launch)
                for options, given in OPTION_SETS.items()
                for launch in fused_launches(target, itemsize, bool(given))
            ]
            others = [
                *linear_launches(target, dtype),
                *label_launches(),
                *log_softmax_launches(target, itemsize),
            ]
            if "to" in dtype:
                # written over the logits; with a softcap no row is split then
                narrowing = {"whole_row_kernel": set(), "split_row_kernel": {"softcap"}}
                cases = [
                    (options, tuple(g for g in given if g not in narrowing[launch.name]), launch)
                    for options, given, launch in cases
                    if launch.name in narrowing
                ]
                others = []
            for options, given, launch in [*sweeps(dtype), *cases, *others]:
                compiled = triton.compile(
                    source(launch, *DTYPES[dtype], given),
                    target=TARGETS[target],
                    options={"num_warps": launch.num_warps, **launch.options},
                )
                row = {
                    "kernel": launch.name,
                    "target": target,
                    "dtype": dtype,
                    "options": options,
                    "warps": launch.num_warps,
                    # registers are limited, to hold one more program an SM
                    "limited": "maxnreg" in launch.options,
                }
                row |= {k.lower(): v for k, v in launch.constants.items() if k.isupper()}
                print(json.dumps(row | resources(compiled, TARGETS[target])), flush=True)


if __name__ == "__main__":
    named = set(sys.argv[1:])
    main(
        [t for t in TARGETS if t in named] or list(TARGETS),
        [d for d in DTYPES if d in named] or list(DTYPES),
    )
