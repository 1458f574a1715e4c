"""Settings in and out: TOML, overrides, flat keys."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samv2.common.config import (
    describe_settings,
    field_kinds,
    flatten,
    load_settings,
    settings_from_flat,
    to_flat,
    to_toml,
)
from samv2.common.errors import ConfigError
from samv2.common.settings import Settings

NAMES = st.text("abcdefgh-./=é", min_size=1, max_size=8)


@st.composite
def some_settings(draw: st.DrawFn) -> Settings:
    """Valid settings that differ from the defaults in fields of every type."""
    return settings_from_flat(
        {
            "seed": draw(st.integers(0, 2**32 - 1)),
            "model.path": draw(st.text(max_size=20)),
            "experts.chains": draw(st.booleans()),
            "experts.num_experts": draw(st.integers(9, 64)),
            "adapter.scale": draw(st.floats(allow_nan=False, allow_infinity=False)),
            "train.learning_rate": draw(st.floats(1e-300, 1e300)),
            "data.domains": tuple(draw(st.lists(NAMES, min_size=1, unique=True))),
            "experts.other_k": tuple(draw(st.lists(st.integers(2, 9), max_size=4))),
        }
    )


@given(some_settings())
def test_settings_survive_toml(settings: Settings) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(to_toml(settings), encoding="utf-8")
        assert load_settings(path) == settings


@given(some_settings())
def test_settings_survive_flat_keys(settings: Settings) -> None:
    flat = to_flat(settings)
    assert all(isinstance(value, (str, int, float, bool)) for value in flat.values())
    assert settings_from_flat(flat) == settings
    as_text = {key: str(value) for key, value in flat.items()}
    assert settings_from_flat(as_text) == settings


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_beat_the_file_which_beats_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "[federation]\nrounds = 5\nclients = 6\n")
    settings = load_settings(
        path,
        ["federation.rounds = 7", "data.domains=a, b ,c", "train.train_mix=True"],
        defaults={"federation.clients": 9, "federation.workers": 2},
    )
    federation = settings.federation
    assert (federation.rounds, federation.clients, federation.workers) == (7, 6, 2)
    assert settings.data.domains == ("a", "b", "c")
    assert settings.train.train_mix is True
    assert load_settings() == Settings()


def test_an_override_may_hold_an_equals_sign() -> None:
    settings = load_settings(None, ["data.domains=law=/a=b.txt"])
    assert settings.data.domains == ("law=/a=b.txt",)


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("seed", "1_000", 1000),
        ("adapter.scale", 3, 3.0),
        ("adapter.scale", "1e-3", 0.001),
        ("experts.chains", "FALSE", False),
        ("data.domains", ["a", "b"], ("a", "b")),
        ("data.domains", "a,,b,", ("a", "b")),
        ("experts.other_k", "2, 4,,16", (2, 4, 16)),
        ("experts.other_k", "4", (4,)),
        ("experts.other_k", "", ()),
        ("experts.other_k", [2, 4], (2, 4)),
        ("experts.other_k", ["2", 4], (2, 4)),
        ("experts.other_k", (), ()),
    ],
)
def test_values_are_read_as_their_fields_type(
    key: str, value: object, expected: object
) -> None:
    found = settings_from_flat({key: value})
    section, _, name = key.rpartition(".")
    got = getattr(getattr(found, section) if section else found, name)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    "key, value, remedy",
    [
        ("seed", "x", "write a whole number"),
        ("seed", 1.5, "write a whole number"),
        ("seed", "1.0", "write a whole number"),
        ("seed", True, "write a whole number"),
        ("adapter.scale", "x", "write a number"),
        ("adapter.scale", True, "write a number"),
        ("adapter.scale", [1.0], "write a number"),
        ("train.learning_rate", "nan", "write a finite number"),
        ("train.learning_rate", float("inf"), "write a finite number"),
        ("experts.chains", 1, "write true or false"),
        ("experts.chains", "yes", "write true or false"),
        ("model.path", 3, "write a string"),
        ("data.domains", 3, "write a list of strings"),
        ("data.domains", ["a", 1], "write a list of strings"),
        ("experts.other_k", 4, "write a list of whole numbers"),
        ("experts.other_k", "2,x", "write a whole number"),
        ("experts.other_k", [2, 1.5], "write a whole number"),
        ("experts.other_k", [True], "write a whole number"),
        ("experts.other_k", [[2]], "write a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(
    key: str, value: object, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_from_flat({key: value})
    assert caught.value.faults == (f"{key} is {value!r}; {remedy}",)


def test_every_kind_of_fault_is_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "experts = 3\n[federation]\nruonds = 2\nclients = 'x'\n")
    overrides = ["adapter.rank=0", "rounds", "edits.momentum=2"]
    with pytest.raises(ConfigError) as caught:
        load_settings(path, overrides)
    assert sorted(caught.value.faults) == [
        "--set 'rounds' has no '='; write key=value",
        "adapter.rank is 0; use at least 1",
        "edits.momentum is 2.0; use a share in 0..1, below 1",
        "federation.clients is 'x'; write a whole number",
        "there is no setting 'experts'; did you mean experts.gate?",
        "there is no setting 'federation.ruonds'; did you mean federation.rounds?",
    ]


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "cannot read .*config.toml: No such file"),
        (b"[federation\n", "config.toml is not valid TOML"),
        (b"seed = '\xff'\n", "config.toml is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, data: bytes | None, message: str
) -> None:
    path = tmp_path / "config.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load_settings(path)


def test_flatten_joins_tables_with_dots() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": 2}, "e": 3}) == {
        "a.b.c": 1,
        "a.d": 2,
        "e": 3,
    }


def test_settings_are_described_in_order_with_defaults_and_types() -> None:
    rows = describe_settings()
    assert [key for key, _, _ in rows] == list(to_flat(Settings()))
    assert {key for key, _, _ in rows} == set(field_kinds())
    assert rows[0] == ("seed", 0, "int")
    table = {key: (default, kind) for key, default, kind in rows}
    assert table["data.domains"] == ("legal,bible,biomed,python", "list")
    assert table["experts.chains"] == (False, "bool")
    assert table["experts.other_k"] == ("", "list")


def test_lists_of_numbers_are_written_and_read_as_such(tmp_path: Path) -> None:
    path = write(tmp_path, "[experts]\nother_k = [2, 4]\n")
    settings = load_settings(path)
    assert settings.experts.other_k == (2, 4)
    assert to_flat(settings)["experts.other_k"] == "2,4"
    assert load_settings(path, ["experts.other_k=3"]).experts.other_k == (3,)
    assert load_settings(path, ["experts.other_k="]).experts.other_k == ()
    with pytest.raises(ConfigError, match=r"other_k names 17; K must lie in 2..16"):
        load_settings(path, ["experts.other_k=2,17"])
