"""Length buckets: the padded lengths that programs are compiled for."""


def bucket(length: int) -> int:
    """Returns the padded length for `length` tokens: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..

    There are two buckets for each power of 2, so that few programs are compiled and at most a third
    of a bucket is padding.
    """
    power = 1 << max((length - 1).bit_length() - 1, 0)
    return next(b for b in (power, power + power // 2, 2 * power) if b >= length)


def even_buckets(longest: int, count: int) -> list[int]:
    """Returns `count` lengths in even steps up to `longest`; fewer if steps are not whole."""
    return sorted({-(-longest * (i + 1) // count) for i in range(count)})
