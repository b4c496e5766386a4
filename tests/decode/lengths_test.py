"""Padded lengths that programs are compiled for."""

from caprl_jax.decode.lengths import bucket, even_buckets


def test_even_buckets_go_up_to_the_longest():
    assert even_buckets(1024, 4) == [256, 512, 768, 1024]
    assert even_buckets(6, 4) == [2, 3, 5, 6]
    assert even_buckets(3, 8) == [1, 2, 3] and even_buckets(7, 1) == [7]


def test_a_bucket_holds_its_length_and_wastes_at_most_a_third():
    found = [bucket(n) for n in range(1, 2000)]
    assert sorted(set(found))[:8] == [1, 2, 3, 4, 6, 8, 12, 16]
    assert all(n <= b and 3 * (b - n) <= b for n, b in enumerate(found, start=1))
    assert bucket(0) == 1
