"""Arrays are read as numpy reads them, by many threads at once, and damaged ones are refused."""

import gc
import io
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dlrm.data.arrays import NpzFile, load_array, read_array

DTYPES = st.sampled_from(["<i4", ">i8", "<f8", "|u1", "?", "<U5"])


@settings(deadline=None, max_examples=100)
@given(st.data(), st.booleans())
def test_arrays_are_read_as_numpy_reads_them(data, transposed):
    array = data.draw(npst.arrays(data.draw(DTYPES), npst.array_shapes(min_dims=0, min_side=0, max_side=5)))
    file = io.BytesIO()
    np.save(file, array.T if transposed else array)
    file.seek(0)
    found = read_array(file)
    file.seek(0)
    expected = np.load(file)
    assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_larger_than_a_read_come_out_of_a_zip_file(save, tmp_path):
    array = np.random.default_rng(0).integers(0, 9, (300_000, 3), dtype=np.int16)
    save(tmp_path / "a.npz", a=array, b=array.T, c=np.int64(7))
    with NpzFile(tmp_path / "a.npz") as arrays:
        assert arrays.header("b").shape == (3, 300_000)
        np.testing.assert_array_equal(arrays["a"], array)
        np.testing.assert_array_equal(arrays["b"], array.T)
        assert arrays["c"] == 7
        with pytest.raises(ValueError, match="there is no array d in it"):
            arrays["d"]


def test_an_array_that_is_cut_off_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="the array is cut off"):
        load_array(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(content[:6] + b"\x03" + content[7:])
    with pytest.raises(ValueError, match=r"\.npy format 3\.0; expected 1\.0"):
        load_array(tmp_path / "a.npy")


@pytest.fixture
def hurried_threads():
    """Threads take turns, and garbage is collected by Python code, as often as can be."""
    callback, threshold, interval = (lambda *_: sum(range(100))), gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(callback)
    gc.set_threshold(50)
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)
    gc.callbacks.remove(callback)


def test_threads_that_read_headers_at_once_do_not_disturb_each_other(hurried_threads):
    file = io.BytesIO()
    np.save(file, np.arange(6).reshape(2, 3))
    content, failures, end = file.getvalue(), [], time.monotonic() + 2

    def read_at_depth(depth: int) -> None:
        if depth:
            return read_at_depth(depth - 1)
        try:
            while time.monotonic() < end:
                read_array(io.BytesIO(content))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=read_at_depth, args=(depth,)) for depth in (0, 3, 6, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
