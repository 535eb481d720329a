"""What the benchmarks' client sees of an answer."""

from benchmarks.workload import Answer


def test_a_stall_is_the_longest_time_between_two_pieces() -> None:
    assert Answer(0.0, [5.0, 5.5, 7.5, 8.0], 4).longest_gap_s == 2.0


def test_one_piece_has_no_gap() -> None:
    assert Answer(0.0, [5.0], 4).longest_gap_s == 0.0
