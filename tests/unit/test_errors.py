"""UserError and the suggestions in it."""

from __future__ import annotations

import pickle

from xar_cli.errors import UserError, did_you_mean, nearest


def test_user_error_survives_a_process_border():
    error = UserError("The cache is empty.", "Make it again.", exit_code=1)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.next_step, copy.exit_code) == ("The cache is empty.", "Make it again.", 1)
    assert str(copy) == "The cache is empty. Make it again."


def test_nearest_offers_only_what_is_near():
    assert nearest("hug", ["base", "huge"]) == "huge"
    assert nearest("zebra", ["base", "huge"]) is None


def test_did_you_mean_lists_all_when_nothing_is_near():
    assert did_you_mean("hug", ["base", "huge"]) == "Did you mean 'huge'?"
    assert did_you_mean("zebra", ["base", "huge"]) == "Choose one of: base, huge."
