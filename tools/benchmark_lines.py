"""What BENCHMARKS.md says of one row: lines of a table, a cell per column.

A function per tool that writes rows. A cell is a field of the row, at most rounded; nothing is
computed over several rows. Faults are described in the present words of tools/fault_table.py.
"""

import statistics
from collections.abc import Iterator
from typing import Any

from tools.fault_table import FAULTS

Row = dict[str, Any]
Line = dict[str, str]


def _yes(row: Row) -> str:
    return "yes" if row["passed"] else "**no**"


def _between(row: Row, name: str, digits: int = 2) -> str:
    """A ratio with its 95% interval."""
    low, high = row[f"{name}_95"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _one(**cells: Any) -> list[Line]:
    """A single line; in a name `_` means a space, `__` a hyphen."""
    return [{name.replace("__", "-").replace("_", " "): str(cell) for name, cell in cells.items()}]


def gpu_step(row: Row) -> list[Line]:
    """A side of tools/gpu_step_time.py."""
    if "absent" in row:
        return _one(side=row["side"], tokens_per_second=f"absent: {row['absent']}")
    return _one(
        side=row["side"],
        layers=row["num_layers"],
        row_of_tokens=f"{row['row_tokens']:,}",
        tokens_per_second=f"{row['tokens_per_second']:,}",
        MFU=f"{row['mfu']:.3f}",
        median_step_ms=f"{statistics.median(row['step_ms']):.1f}",
        peak_GiB=row["peak_gib"],
        GPU=row["device"],
    )


def gpu_engine(row: Row) -> list[Line]:
    """A case of tools/gpu_engine.py: the CPU's losses are the expected ones."""
    return _one(
        case=row["case"],
        steps=len(row["losses"]),
        largest_relative_difference_of_a_loss=f"{row['largest_relative_error']:.1e}",
        allowed=row["tolerance"],
        passed=_yes(row),
        GPU=row["device"],
    )


def step_time(row: Row) -> list[Line]:
    """tools/step_time.py."""
    return _one(
        documents_per_row=row["documents_per_row"],
        key__value_heads=row["num_key_value_heads"],
        time_over_transformers=_between(row, "ratio"),
        engine_ms=row["engine_ms"],
        transformers_ms=row["transformers_ms"],
        pairs=row["pairs"],
    )


def step_time_before(row: Row) -> list[Line]:
    """tools/step_time_before.py."""
    return _one(
        before=row["before"],
        after=row.get("after", row["commit"]),
        dtype=row.get("dtype", ""),
        tensor_ranks=row.get("tensor", ""),
        time_after_over_before=_between(row, "ratio", 3),
        CPU_time_after_over_before=_between(row, "cpu_ratio", 3),
        pairs=row["pairs"],
    )


def parity(row: Row) -> list[Line]:
    """`phi4 verify parity`."""
    return _one(
        layouts=len(row["layouts"]),
        steps=row["steps"],
        worst_relative_error_of_a_loss=f"{row['worst_loss_error']:.1e}",
        worst_relative_error_of_a_weight=f"{row['worst_parameter_error']:.1e}",
        where=row["worst_parameter"],
        passed=_yes(row),
    )


def fp8(row: Row) -> list[Line]:
    """tools/prove_fp8.py."""
    return _one(
        recipe=row["fp8_recipe"],
        steps=row["steps"],
        loss_in_fp8_by_seed=", ".join(f"{x:.4f}" for x in row["loss"]),
        in_bf16=", ".join(f"{x:.4f}" for x in row["bf16_loss"]),
        relative_difference=", ".join(f"{x:.5f}" for x in row["difference"]),
        resumes_to_equal_bits="yes" if row["resumes_bitwise"] else "**no**",
        passed=_yes(row),
    )


def fp8_canary(row: Row) -> list[Line]:
    """tools/fp8_canary.py: a healthy run, a harmed one, or the cost."""
    if row["case"] == "cost":
        found = (
            f"a check takes {_between(row, 'check_over_step')} of a step, every {row['every']} "
            f"steps: {row['share_of_training']:.2%} of training"
        )
        return _one(case="cost", found=found, passed=_yes(row))
    layers = [f"layer {layer} at step {step}: {why}" for step, layer, why in row["fallbacks"]]
    return _one(
        case=row["case"],
        recipe=row["fp8_recipe"],
        choices=row.get("choices", ""),
        seed=row["seed"],
        steps=row["steps"],
        final_loss=row["final_loss"],
        without_FP8=row.get("final_loss_without_fp8", ""),
        without_canary=row.get("final_loss_without_canary", ""),
        found="; ".join(layers) or "no layer left FP8",
        passed=_yes(row),
    )


def guard(row: Row) -> list[Line]:
    """tools/guard_cost.py."""
    return _one(
        model=row["model"],
        guards_share_of_a_step=f"{row['guard_share']:.2%}",
        step_time_with_over_without=_between(row, "ratio", 3),
        pairs=row["pairs"],
    )


def async_save(row: Row) -> list[Line]:
    """tools/async_save.py."""
    stall = row["stall_seconds"]
    return _one(
        stall_waited_s=f"{stall['waited']:.2f}",
        stall_asynchronous_s=f"{stall['asynchronous']:.2f}",
        ratio=f"{row['ratio']:.3f}",
        limit=row["limit"],
        checkpoint_MB=f"{row['bytes']['waited'] / 1e6:.0f}",
        pairs=row["pairs"],
        passed=_yes(row),
    )


def fuzz(row: Row) -> list[Line]:
    """tools/checkpoint_fuzz.py."""
    return _one(
        damaged_checkpoints=row["mutants"],
        that_executed_something=row["executed"],
        that_ended_in_more_than_one_line=row["not_one_line"],
        loaded_unharmed=row["outcomes"].get("loaded", 0),
        seconds=row["seconds"],
    )


def host_time(row: Row) -> Iterator[Line]:
    """tools/host_time.py, a line per call."""
    for name, call in row["calls"].items():
        yield from _one(
            call=name,
            ours_us=call["us"],
            torch_us=call["torch_us"],
            ratio=f"{call['ratio']:.2f}",
            at_most=row["limit"],
            within="**no**" if name in row["over"] else "yes",
        )


def one_forward(row: Row) -> list[Line]:
    """tools/dpo_one_forward.py."""
    return _one(
        pivots_per_trajectory=row["pivots_per_trajectory"],
        time_over_two_sequences_per_pivot=_between(row, "ratio"),
        one_forward_ms=row["one_forward_ms"],
        two_sequences_ms=row["two_sequences_ms"],
        limit=row["limit"],
        pairs=row["pairs"],
    )


def _share(estimate: Row) -> str:
    return f"{estimate['mean']:.3f} ± {estimate['standard_error']:.3f}"


def post_training(row: Row) -> Iterator[Line]:
    """tools/post_training.py, a line per stage."""
    if row["measured"] != "chain":
        where = {
            "full_pairs_equal_pairs": "DPO on pairs of whole answers, as many pairs",
            "full_pairs_equal_completions": "DPO on pairs of whole answers, as many completions",
        }[row["measured"]]
        stages = {where: row}
    else:
        stages = row["stages"]
    for name, found in stages.items():
        yield from _one(
            task=row["task"],
            seed=row["seed"],
            after=name,
            right_when_sampled=_share(found["sampled"]),
            right_when_greedy=_share(found["greedy"]),
            passed=_yes(row) if "passed" in row else "",
        )


def pts(row: Row) -> list[Line]:
    """tools/pts_simulation.py."""
    return _one(
        regime=row["regime"],
        search=row["method"],
        answers=row["answers"],
        pivots=row["pivots"],
        false_share=row["false"],
        wrong_sign=row["wrong_sign"],
        recall=row["recall"],
        completions_per_answer=f"{row['completions']:.0f}",
    )


def startup(row: Row) -> list[Line]:
    """tools/data_startup.py."""
    if "tokens_per_second" in row:
        rate = f"{row['tokens_per_second'] / 1e6:.0f}M by the clock, "
        return _one(
            what=row["what"],
            tokens_per_second=rate + f"{row['tokens_per_cpu_second'] / 1e6:.0f}M per CPU second",
        )
    return _one(
        what=row["what"],
        seconds_to_the_first_batch=f"{row['seconds']:.3f}",
        MB_above_the_imports=f"{row['resident_mb']:.1f}",
    )


def tokenize(row: Row) -> list[Line]:
    """tools/tokenize_speed.py."""
    others = ("bare", "megatron", "datatrove")
    ratios = {
        f"over_{name}": _between(row, f"phi4_over_{name}")
        for name in others
        if f"phi4_over_{name}" in row
    }
    return _one(
        cores=row["cores_used"],
        MB=row["megabytes"],
        tokens_per_second=f"{row['phi4_tokens_per_second']:,}",
        **ratios,
        rounds=row["rounds"],
    )


def generation(row: Row) -> Iterator[Line]:
    """tools/generation_time.py."""
    for batch, step in row["step"].items():
        yield from _one(
            what=f"a decode step at batch {batch}, CPU time over transformers' `generate`",
            result=_between(step, "cpu_ratio"),
        )
    for num_new, case in row["samples"].items():
        yield from _one(
            what=f"{row['num_samples']} samples of a {row['prefix_tokens']}-token prompt, "
            f"{num_new} new tokens each: times faster in CPU time",
            result=_between(case, "cpu_speedup", 1),
        )


def serve(row: Row) -> list[Line]:
    """tools/serve_load.py."""
    patient, rude = row["patient"], row["rude"]
    first, gap = patient["first_token_ms"], patient["between_tokens_ms"]
    return _one(
        streams=row["streams"],
        requests=patient["requests"],
        tokens_per_second=patient["tokens_per_second"],
        first_token_ms=f"{first['p50']:.0f}, p99 {first['p99']:.0f}",
        between_tokens_ms=f"{gap['p50']:.0f}, p99 {gap['p99']:.0f}",
        ill__behaved_clients=f"{rude['requests']}, growth of memory {rude['growth']:.2%}",
        passed=_yes(row),
    )


def demo(row: Row) -> list[Line]:
    """`make demo`."""
    return _one(
        seconds=row["seconds"],
        steps=row["steps"],
        held__out_loss_below_the_unigram_entropy=f"{row['held_out_nats_below_unigram']} nats",
    )


def fresh(row: Row) -> Iterator[Line]:
    """tools/prove_fresh.py, a line per command."""
    for command, done in row["commands"].items():
        yield from _one(
            debian=row["debian"],
            command=f"`{command}`",
            seconds=done["seconds"],
            exit_status=done["exit_status"],
        )


def fault(row: Row) -> list[Line]:
    """tools/fault_table.py."""
    return _one(
        fault=FAULTS[row["fault"]].text,
        exit_code=row["exit_code"],
        steps_lost=row["steps_lost"],
        resumed_from_step="" if row["resumed_from"] is None else row["resumed_from"],
    )


def slurm(row: Row) -> list[Line]:
    """tools/slurm_cases.py."""
    return _one(
        case=row["case"],
        state=row["state"],
        restarts=row["restarts"],
        steps_lost=row["steps_lost"],
        seconds_to_the_end=row["seconds_to_end"],
        passed=_yes(row),
    )


def tracking(row: Row) -> Iterator[Line]:
    """tools/prove_tracking.py, of the costs a line per server."""
    if row["case"] == "cost":
        for server in ("answers", "slow_9", "dead"):
            yield from _one(
                case=f"cost, server {server}",
                share_of_the_training_thread=f"{row[server]['tracker_share']:.2%}",
                step_time_over_untracked=_between(row[server], "ratio", digits=3),
                passed=_yes(row),
            )
        return
    yield from _one(
        case=row["case"],
        runs_on_the_server=row["runs"],
        differences_from_the_local_record=len(row["differences"]),
        exit_code=row["exit_code"],
        passed=_yes(row),
    )


def sweep(row: Row) -> Iterator[Line]:
    """tools/sweep_proof.py, a line per scale."""
    for scale, found in row["scales"].items():
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in found["loss"].items())
        yield from _one(
            sweep=row["sweep"],
            scale=scale,
            runs_in_all=row["num_runs"],
            final_loss_by_mixture=losses,
            rank_correlation_of_the_scales=f"{row['spearman'][0]:.2f} "
            f"({row['spearman'][1]:.2f} to {row['spearman'][2]:.2f})",
            passed=_yes(row),
        )


def proof(row: Row) -> list[Line]:
    """tools/prove.py."""
    return _one(
        proof=row["proof"],
        command=f"`{row['command']}`",
        passed=_yes(row),
        seconds=row["seconds"],
        CPU_seconds=row["cpu_seconds"],
    )
