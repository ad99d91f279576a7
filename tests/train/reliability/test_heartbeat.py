"""Who is silent, whether anybody goes on, and who is behind: numbers in, names out."""

import msgspec

from phi4.train.reliability.heartbeat import Beat, Silence, Stall, behind, describe_ranks


def beats(*counts: int, **fields: object) -> dict[int, Beat]:
    return {r: Beat(r, f"h{r // 2}", 100 + r, count, **fields) for r, count in enumerate(counts)}


def names(found: list[Beat]) -> list[int]:
    return [beat.rank for beat in found]


def test_rank_whose_heartbeat_stands_still_is_silent_and_no_other() -> None:
    silence = Silence([0, 1, 2], 45.0, now=0.0)
    assert silence.silent(beats(1, 1, 1), 1.0) == []
    assert silence.silent(beats(9, 1, 9), 45.0) == []
    assert names(silence.silent(beats(20, 1, 20), 46.5)) == [1]


def test_slow_save_is_not_silence() -> None:
    silence, stall = Silence([0, 1], 45.0, now=0.0), Stall(0.0)
    for second in range(0, 120, 3):
        now = beats(second, second, phase="save", ticks=7)
        assert silence.silent(now, float(second)) == []
        stalled = stall.seconds(now, float(second))
    assert stalled == 117.0


def test_ranks_of_a_lost_host_are_named_together() -> None:
    silence = Silence([1, 2, 3], 45.0, now=0.0)
    silence.silent(beats(0, 1, 1, 1), 0.0)
    silence.silent(beats(0, 2, 1, 2), 2.0)
    assert names(silence.silent(beats(0, 20, 1, 2), 45.5)) == [2, 3]


def test_rank_that_never_came_to_life_is_silent_and_one_that_left_is_not() -> None:
    silence = Silence([1, 2], 45.0, now=0.0)
    known = {1: Beat(1, "h1"), 2: Beat(2, "h2", 7, 3, left=True)}
    silence.silent(known, 0.0)
    (never,) = silence.silent(known, 50.0)
    assert never.describe() == "rank 1 on h1, before its first heartbeat"


def test_any_tick_of_any_rank_ends_a_stall_and_so_does_a_rank_that_left() -> None:
    stall = Stall(0.0)
    still, one_went_on = beats(1, 1), beats(2, 2)
    one_went_on[1] = msgspec.structs.replace(one_went_on[1], ticks=1)
    assert stall.seconds(still, 1.0) == 0.0
    assert stall.seconds(still, 601.0) == 600.0
    assert stall.seconds(one_went_on, 602.0) == 0.0
    assert stall.seconds(beats(3, 3, left=True), 900.0) == 0.0


def test_rank_behind_is_the_one_in_an_earlier_step_another_phase_or_with_fewer_ticks() -> None:
    def at(rank: int, step: int, phase: str, ticks: int) -> Beat:
        return Beat(rank, "h", 1, 1, phase, step, ticks)

    assert behind([at(0, 5, "step", 9), at(1, 5, "step", 9)]) == []
    assert names(behind([at(0, 5, "step", 9), at(1, 4, "save", 8), at(2, 5, "step", 9)])) == [1]
    hooks = [at(0, 5, "step", 9), at(1, 5, "hooks", 9), at(2, 5, "step", 7)]
    assert names(behind(hooks)) == [1]
    assert names(behind([at(0, 5, "step", 9), at(1, 5, "step", 8)])) == [1]


def test_message_names_host_process_phase_and_step_and_does_not_list_a_thousand() -> None:
    one = Beat(3, "n7", 41, 1, "save", 20, seconds=2.0)
    assert one.describe() == "rank 3 on n7 (pid 41), last heard 2.0 s into phase save after step 20"
    assert describe_ranks([one] * 1000).endswith("; and 992 more")
