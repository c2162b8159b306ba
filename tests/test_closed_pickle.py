"""The closed unpickler: what it admits, what it refuses, and that nothing it refuses has run."""

from __future__ import annotations

import collections
import os
import pickle
import subprocess
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from satdifuser.errors import SourceError
from satdifuser.extract.sources.closed_pickle import ADMITTED, StandIn, load_closed, to_array

FILE = Path("task_specs.pkl")


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def load(value: Any, protocol: int = 4) -> Any:
    return load_closed(pickle.dumps(value, protocol=protocol), FILE)


def test_plain_values_and_dates_come_back() -> None:
    value = {
        "list": [1, 2.5, "text", None, b"raw", (True,)],
        "dates": [date(2018, 6, 1), datetime(2018, 6, 1, 12, tzinfo=UTC)],
        "ordered": collections.OrderedDict(a=1),
    }
    assert load(value) == value


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
@given(
    array=nps.arrays(
        st.sampled_from(["i1", "<i8", ">i4", "u1", "?", "<f4", "<f8"]),
        nps.array_shapes(max_dims=2, max_side=4),
    ),
    fortran=st.booleans(),
)
def test_arrays_and_scalars_come_back(array: np.ndarray, fortran: bool, protocol: int) -> None:
    array = np.asfortranarray(array) if fortran else array
    np.testing.assert_array_equal(to_array(load(array, protocol)), array)
    scalar = array.flat[0]
    np.testing.assert_array_equal(to_array(load(scalar, protocol)), scalar)


def test_arrays_of_anything_but_numbers_are_not_built() -> None:
    with pytest.raises(ValueError, match=r"array of dtype \|O8, expected numbers"):
        to_array(load(np.array([{}], object)))
    with pytest.raises(ValueError, match="dtype is not a number or an array"):
        to_array(load(np.dtype("i8")))


def test_numpy_itself_is_never_called() -> None:
    assert {type(kind) for kind in ADMITTED.values()} == {type}
    ours = {kind for kind in ADMITTED.values() if not issubclass(kind, StandIn)}
    assert {kind.__name__ for kind in ours} == {"date", "datetime", "timedelta", "timezone", "dict"}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system" if os.name == "posix" else "nt.system"),
        (subprocess.check_call, "subprocess.check_call"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (np.load, "numpy.load"),
        (Path, "pathlib"),
    ],
)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_other_names_are_refused_by_file_and_name(function: Any, name: str, protocol: int) -> None:
    with pytest.raises(
        SourceError, match=rf"task_specs.pkl: refused, its pickle asks for .*{name.split('.')[-1]}"
    ):
        load({"label": Call(function, "x")}, protocol)


def test_a_command_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    attack = pickle.dumps(Call(os.system, f"touch {mark}"))
    with pytest.raises(SourceError, match=r"system, which no GEO-Bench file needs; nothing of it was run"):
        load_closed(attack, FILE)
    assert not mark.exists()
    pickle.loads(attack)
    assert mark.exists()  # so the test can tell


def test_a_dotted_name_does_not_lead_out_of_an_admitted_module() -> None:
    attack = b"\x80\x04\x8c\x08datetime\x8c\x0dsys.modules.x\x93."
    with pytest.raises(SourceError, match=r"asks for datetime\.sys\.modules\.x"):
        load_closed(attack, FILE)


def test_a_stand_in_class_cannot_be_altered() -> None:
    # pushes the class itself, then BUILDs it with a state of attributes to set
    attack = b"\x80\x04\x8c\x06affine\x8c\x06Affine\x93}\x8c\x0b__setstate__\x8c\x01xsb."
    with pytest.raises(ValueError, match="its pickle is damaged"):
        load_closed(attack, FILE)
    assert ADMITTED["affine", "Affine"].__setstate__ is StandIn.__setstate__


@given(st.integers(0, 200))
def test_a_truncated_pickle_is_damaged(length: int) -> None:
    raw = pickle.dumps({"label": np.arange(43), "name": "x" * 200}, protocol=4)
    with pytest.raises(ValueError, match="its pickle is damaged: "):
        load_closed(raw[:length], FILE)
