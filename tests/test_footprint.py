"""Which bytes two operands have in common: the search by itself against the bytes one by one."""

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import compiled

UNLIMITED = 2**31 - 1
MAX_RANK = 6

SOURCE = """
#include "core/footprint.h"

using namespace merge_attn_states;

struct View {
  const void* data;
  int64_t sizes[kMaxRank], strides[kMaxRank];
  int rank, element_bytes;
};

static Footprint of(const View& view) {
  Extent extent;
  find_extent(view.data, view.sizes, view.strides, view.rank, view.element_bytes, extent);
  return footprint(extent, view.sizes, view.strides, view.rank, view.element_bytes);
}

static_assert(kMaxRank == MAX_RANK);
extern "C" int search_budget() { return kSearchBudget; }
extern "C" bool views_overlap(const View& a, const View& b, int budget) {
  return overlaps(of(a), of(b), budget);
}
extern "C" bool view_overlaps_itself(const View& a, int budget) {
  return overlaps_itself(of(a), budget);
}
"""


class View(ctypes.Structure):
    """Elements `at` bytes behind a border in the middle of the address space."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * MAX_RANK),
        ("strides", ctypes.c_int64 * MAX_RANK),
        ("rank", ctypes.c_int),
        ("element_bytes", ctypes.c_int),
    )

    def __init__(self, at, sizes, strides, element_bytes):
        array = ctypes.c_int64 * MAX_RANK
        super().__init__(2**40 + at, array(*sizes), array(*strides), len(sizes), element_bytes)

    def touched(self):
        """The address of every byte of every element."""
        steps = zip(self.sizes[: self.rank], self.strides[: self.rank], strict=True)
        elements = np.array([self.data])
        for size, stride in steps:
            offsets = np.arange(size) * stride * self.element_bytes
            elements = (elements[:, None] + offsets).reshape(-1)
        return (elements[:, None] + np.arange(self.element_bytes)).reshape(-1)


@pytest.fixture(scope="module")
def footprints(tmp_path_factory):
    source = f"#define MAX_RANK {MAX_RANK}\n{SOURCE}"
    functions = compiled(tmp_path_factory.mktemp("footprint"), source, "core/footprint.cpp")
    functions.views_overlap.argtypes = [ctypes.POINTER(View)] * 2 + [ctypes.c_int]
    functions.view_overlaps_itself.argtypes = [ctypes.POINTER(View), ctypes.c_int]
    functions.views_overlap.restype = functions.view_overlaps_itself.restype = ctypes.c_bool
    return functions


@st.composite
def views(draw):
    """Dimensions whose strides nest in no order; begins near the others."""
    sizes = [draw(st.integers(1, 40)) for _ in range(draw(st.integers(2, MAX_RANK)))]
    while np.prod(sizes) > 3000:
        sizes[int(np.argmax(sizes))] //= 2
    largest = draw(st.sampled_from([12, 300, 3000]))
    strides = [draw(st.integers(-largest, largest)) for _ in sizes]
    return View(
        draw(st.integers(-largest, largest)), sizes, strides, draw(st.sampled_from([1, 2, 4]))
    )


@given(a=views(), b=views())
def test_an_overlap_is_claimed_where_there_is_one(a, b, footprints):
    """By the search, and run by run where it was ended, soon or at once."""
    common = bool(np.intersect1d(a.touched(), b.touched()).size)
    for budget in (UNLIMITED, footprints.search_budget(), 0):
        assert footprints.views_overlap(a, b, budget) == common


@given(a=views())
def test_an_overlap_with_itself_is_claimed_where_there_is_one(a, footprints):
    touched = a.touched()
    common = len(np.unique(touched)) < len(touched)
    for budget in (UNLIMITED, footprints.search_budget(), 0):
        assert footprints.view_overlaps_itself(a, budget) == common


SIZES = (5, 15, 38)
STRIDES = ((1189, 1352, 1054), (2531, 877, 1934))


def test_a_search_that_takes_too_long_is_ended(footprints):
    """What README's limits say: an overlap of such strides, over many elements, may not be seen."""
    sizes = (17, 31, 37)
    a, b = View(0, sizes, (4100, 7662, 3516), 4), View(58916, sizes, (5089, 3965, 7058), 4)
    assert np.intersect1d(a.touched(), b.touched()).size
    assert footprints.views_overlap(a, b, UNLIMITED)
    assert not footprints.views_overlap(a, b, footprints.search_budget())


@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1)], ids=str)
@pytest.mark.parametrize("end", ["first", "last"])
def test_one_byte_at_an_end_is_enough(end, signs, footprints):
    """Where the lowest bytes of both are one, or the highest, nothing is searched."""
    a, b = (
        View(0, SIZES, [sign * stride for stride in strides], 4)
        for sign, strides in zip(signs, STRIDES, strict=True)
    )
    pick = min if end == "first" else max
    b.data += int(pick(a.touched()) - pick(b.touched()))
    assert footprints.views_overlap(a, b, 0)
