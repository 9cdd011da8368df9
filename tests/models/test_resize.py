"""The resampling matrices against torch's recorded operators, and their invariants."""

import json
import pathlib

import numpy as np
import pytest

from argenseg_jax.models.resize import area_matrix, bicubic_matrix

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "C_quant_ops"
SIZES = [
    (int(side), pn) for side, pns in json.loads((GOLDEN / "config.json").read_text())["sets"].items() for pn in pns
]


@pytest.fixture(scope="module")
def io():
    return np.load(GOLDEN / "io.npz")


@pytest.mark.parametrize("side,pn", SIZES)
def test_matrices_equal_torch(io, side, pn):
    np.testing.assert_allclose(area_matrix(side, pn), io[f"areaM_{side}_to_{pn}"], atol=1e-7)
    np.testing.assert_allclose(bicubic_matrix(pn, side), io[f"bicubicM_{pn}_to_{side}"], atol=2e-6)


@pytest.mark.parametrize("side,pn", SIZES)
def test_separable_application_equals_torch(io, side, pn):
    down, up = area_matrix(side, pn), bicubic_matrix(pn, side)
    got = np.einsum("ph,bchw,qw->bcpq", down, io[f"x_{side}"], down)
    np.testing.assert_allclose(got, io[f"area_{side}_to_{pn}"], atol=2e-6)
    got = np.einsum("hp,bcpq,wq->bchw", up, io[f"small_{side}_{pn}"], up)
    np.testing.assert_allclose(got, io[f"bicubic_{pn}_to_{side}"], atol=1e-5)


@pytest.mark.parametrize("n_in,n_out", [(1, 7), (5, 16), (16, 5), (8, 8), (3, 32)])
def test_a_constant_stays_constant(n_in, n_out):
    for make in (area_matrix, bicubic_matrix):
        matrix = make(n_in, n_out)
        assert matrix.dtype == np.float32 and matrix.shape == (n_out, n_in)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)


def test_same_size_is_the_identity():
    for make in (area_matrix, bicubic_matrix):
        np.testing.assert_array_equal(make(6, 6), np.eye(6))
