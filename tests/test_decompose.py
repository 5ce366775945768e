"""Decompositions of weights: exact, the same everywhere, and kept."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from visadapt.core import decompose
from visadapt.core.decompose import one_core_each, svd
from visadapt.testing import assert_close


def matrix(shape, rank=None, seed=0):
    """Normal random numbers, or a product of that rank."""
    generator = torch.Generator().manual_seed(seed)
    o, i = shape
    if rank is None:
        return torch.randn(o, i, generator=generator)
    return torch.randn(o, rank, generator=generator) @ torch.randn(rank, i, generator=generator)


@pytest.mark.parametrize("rank", [None, 0, 2])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (30, 30), (1, 4)])
def test_decomposition_is_exact_orthonormal_and_signed(shape, rank):
    w = matrix(shape, rank)
    u, s, vt = svd(w)
    one = torch.eye(min(shape))
    assert_close(u * s @ vt, w)
    assert_close(u.T @ u, one)
    assert_close(vt @ vt.T, one)
    assert (s >= 0).all() and (s[:-1] >= s[1:]).all()
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    leading = [u[:, :1], s[:1], vt[:1]]
    assert all(torch.equal(a, b) for a, b in zip(svd(w, 1), leading))


def test_decomposition_separates_neighbours_so_that_the_order_of_rows_does_not_matter():
    """In float32 the vectors of values that differ by 1e-5 are mixed in a way that depends on every detail."""
    q, r = (torch.linalg.qr(matrix((n, 20), seed=n).double()).Q for n in (40, 20))
    w = (q * (1 + 1e-5 * torch.arange(20)) @ r.T).float()
    order = torch.randperm(40)
    (u, s, vt), (shuffled, values, others) = svd(w), svd(w[order])
    for found, expected in ((shuffled, u[order]), (values, s), (others, vt)):
        assert_close(found, expected, tolerance=1e-6)


@pytest.fixture
def three_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_decompositions_of_many_weights_keep_their_order_and_the_number_of_threads(three_threads):
    weights = [matrix((n, 9), seed=n) for n in range(9, 29)]
    found = one_core_each(svd, weights, range(1, 21))
    assert one_core_each(lambda _: torch.get_num_threads(), range(6)) == [1] * 6
    with pytest.raises(ZeroDivisionError):
        one_core_each(lambda n: 1 / n, range(2))
    with ThreadPoolExecutor() as later:
        assert {torch.get_num_threads(), later.submit(torch.get_num_threads).result()} == {3}
    for n, (w, factors) in enumerate(zip(weights, found), 1):
        assert all(torch.equal(a, b) for a, b in zip(factors, svd(w, n)))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(decompose.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(decompose, "WORTH_KEEPING", 8)
    return tmp_path / "cache" / "svd"


def test_large_decompositions_are_read_back_bit_for_bit(cache, monkeypatch):
    w = matrix((12, 9))
    cold = svd(w)
    monkeypatch.setattr(decompose, "_svd", None)  # nothing is computed from here on
    assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(cold, svd(w)))
    leading = cold[0][:, :3], cold[1][:3], cold[2][:3]
    assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(leading, svd(w, 3)))
    assert len(list(cache.iterdir())) == 1


def test_equal_weights_are_kept_once_without_a_clash(cache, three_threads, monkeypatch, recwarn):
    def slowly(tensors, path):
        save_file(tensors, path)
        time.sleep(0.02)

    monkeypatch.setattr(decompose, "save_file", slowly)
    found = one_core_each(svd, [matrix((12, 9))] * 6)
    assert all(torch.equal(a, b) for other in found for a, b in zip(other, found[0]))
    assert len(list(cache.iterdir())) == 1 and not recwarn


def test_small_and_passing_decompositions_are_not_kept(cache):
    svd(matrix((100, 7)))
    svd(matrix((12, 9)), keep=False)
    assert not cache.exists()


def test_kept_decompositions_that_were_not_used_for_longest_go_first(cache, monkeypatch):
    weights = [matrix((12, 9), seed=n) for n in range(3)]
    files = []
    for n, w in enumerate(weights[:2]):
        svd(w)
        (new,) = set(cache.iterdir()) - set(files)
        os.utime(new, (n, n))
        files.append(new)
    svd(weights[0])  # used again
    monkeypatch.setattr(decompose, "LIMIT", 2.5 * files[0].stat().st_size)
    svd(weights[2])
    assert files[0].exists() and not files[1].exists() and len(list(cache.iterdir())) == 2


def test_a_damaged_file_is_replaced_and_a_folder_that_cannot_be_written_is_reported(cache, monkeypatch):
    w = matrix((12, 9))
    cold = svd(w)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert all(torch.equal(a, b) for a, b in zip(cold, svd(w)))
    assert kept.stat().st_size > 100
    monkeypatch.setenv(decompose.CACHE, str(kept))  # a file where the folder should be
    with pytest.warns(UserWarning, match=decompose.CACHE):
        assert all(torch.equal(a, b) for a, b in zip(cold, svd(w)))
