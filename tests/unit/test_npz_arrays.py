"""Arrays in .npz files: memory-mapped if possible, loaded otherwise, never unpickled."""
import numpy as np
import pytest

from common.errors import UserError
from common.files import read_npz_array
from run_files import Payload

ARRAY = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)


def test_uncompressed_arrays_are_memory_mapped(tmp_path):
    path = str(tmp_path / "a.npz")
    np.savez(path, arr_0=ARRAY, more=np.ones(3))
    array = read_npz_array(path, "arr_0")
    assert isinstance(array, np.memmap) and np.array_equal(array, ARRAY)
    assert np.array_equal(read_npz_array(path, "more"), np.ones(3))


@pytest.mark.parametrize("save, array", [(np.savez_compressed, ARRAY), (np.savez, np.asfortranarray(ARRAY))],
                         ids=["compressed", "Fortran's order"])
def test_other_arrays_are_loaded(tmp_path, save, array):
    save(tmp_path / "a.npz", arr_0=array)
    assert np.array_equal(read_npz_array(str(tmp_path / "a.npz"), "arr_0"), ARRAY)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_python_objects_are_refused_and_not_unpickled(tmp_path, save):
    save(tmp_path / "a.npz", arr_0=np.array([Payload(str(tmp_path / "written"))], dtype=object))
    with pytest.raises(UserError, match=r"a\.npz: arr_0 is not a plain array"):
        read_npz_array(str(tmp_path / "a.npz"), "arr_0")
    assert not (tmp_path / "written").exists()


def test_missing_arrays_and_other_files_are_named_in_the_error(tmp_path):
    np.savez(tmp_path / "a.npz", other=ARRAY)
    with pytest.raises(UserError, match=r"a\.npz is damaged, or is not an \.npz with arr_0"):
        read_npz_array(str(tmp_path / "a.npz"), "arr_0")
    (tmp_path / "b.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"b\.npz is damaged, or is not an \.npz"):
        read_npz_array(str(tmp_path / "b.npz"), "arr_0")
