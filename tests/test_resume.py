"""The one format of states: what it keeps, and what it refuses."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.runs import resume
from jaxmem.runs.identity import differences

ARRAYS = {
    "basis": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.asarray([1.5, -2], jnp.bfloat16),
    "steps": 3,
    "product": np.asarray([1.0, 2.0, 3.0]),
}
IDENTITY = {"seed": [0, 1], "rtol": 0.5, "sigma": None}


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "new" / "state.npz"
    resume.save(path, ARRAYS, IDENTITY)
    return path


def test_a_state_comes_back(state):
    found = resume.load(state, ["basis", "half", "steps"], ARRAYS["product"], 1e-9, IDENTITY | {"seed": (0, 1)})
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == np.asarray(array).dtype
    assert [path.name for path in state.parent.iterdir()] == ["state.npz"]


@pytest.mark.parametrize(
    ("names", "identity", "match"),
    [
        (ARRAYS, IDENTITY | {"rtol": 0.25}, r"another one \(rtol: there 0\.5, now 0\.25\); choose another folder"),
        (ARRAYS, IDENTITY | {"block": 2}, r"another one \(block: there nothing, now 2\)"),
        (ARRAYS, {"seed": [0, 1], "rtol": 0.5}, r"another one \(sigma: there null, now nothing\)"),
        (["basis"], IDENTITY, r'another one \(arrays: there \["basis", "half", .*\], now \["basis"\]\)'),
    ],
)
def test_another_call_is_named(state, names, identity, match):
    with pytest.raises(ValueError, match=r"state\.npz: expected the state of the same call, got " + match):
        resume.read(state, list(names), identity)


@pytest.mark.parametrize("product", [[1.0, 2.0, 3.1], [1.0, 2.0, np.nan]])
def test_another_operator_is_told_by_a_product(state, product):
    with pytest.raises(ValueError, match="expected the state of the same operator, got one whose product differs by"):
        resume.load(state, ["basis", "half", "steps"], np.asarray(product), 0.05, IDENTITY)


def test_a_state_of_the_version_before_is_refused(tmp_path):
    path = tmp_path / "count.npz"
    np.savez(path, product=np.ones(3), options=np.asarray(json.dumps({"seed": 1})))
    with pytest.raises(ValueError, match=r"count\.npz: expected a state of this version .*another version; delete it"):
        resume.load(path, [], np.ones(3), 1.0, {"seed": 1})


def test_no_damaged_byte_changes_what_is_read(state):
    # The zip format has fields that nobody reads, such as dates: a flip there may pass, but then all is as it was.
    content, refused = state.read_bytes(), 0
    for position in range(len(content)):
        state.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        try:
            found = resume.read(state, list(ARRAYS), IDENTITY)
        except ValueError as error:
            assert "state.npz: expected " in str(error)  # noqa: PT017
            refused += 1
            continue
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array)
    assert refused > sum(np.asarray(array).nbytes for array in ARRAYS.values())


def test_of_many_differences_the_first_are_shown():
    there, now = {f"field-{i}": i for i in range(20)}, {f"field-{i}": -i for i in range(20)}
    text = differences(there, now)
    assert text.startswith("field-1: there 1, now -1; field-2: there 2, now -2; ")
    assert text.endswith("field-8: there 8, now -8; and 11 more")
    assert differences(there, dict(there)) == ""
