"""Numbers as keys of JSON objects."""

from __future__ import annotations

import json

import pytest

from samv2.common.json_keys import number_keys, text_keys


def test_keys_survive_json_and_rise() -> None:
    values = {10: [1, 2], 2: [], 2**63: [3]}
    text = json.dumps(text_keys(values))
    assert list(json.loads(text)) == ["2", "10", str(2**63)]
    assert number_keys(json.loads(text)) == values


def test_other_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="one"):
        number_keys({"one": 1})
