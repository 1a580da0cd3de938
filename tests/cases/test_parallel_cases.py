"""Situations of parallel training, as they should go."""

from tests.cases.parallel_runs import largest_move_of_rows_kept_by_a_hook


def test_a_gradient_mask_by_hook_holds_on_one_rank():
    """Rows that a hook on the parameter keeps do not move."""
    assert largest_move_of_rows_kept_by_a_hook(parallel=False) == 0.0


def test_a_gradient_mask_by_hook_holds_on_two_ranks(ranks):
    """Rows that a hook on the parameter keeps do not move on several ranks either."""
    assert ranks(2, largest_move_of_rows_kept_by_a_hook, parallel=True) == [0.0, 0.0]
