"""Values that the properties share: hostile texts, JSON, damaged bytes."""

import json

from hypothesis import settings
from hypothesis import strategies as st

few = settings(max_examples=max(settings().max_examples // 5, 1))  # where one takes 0.1 s
rare = settings(max_examples=max(settings().max_examples // 10, 1))  # where one takes 0.2 s

CONTROL = ("<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|endoftext|>", "<think>", "</think>")
# Text that can be encoded; whitespace, signs and control tokens come up often.
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
        st.sampled_from([*CONTROL, " ", "\n", "\n\n", "\0", "\u2028", "\xa0", "A) ", "é", "👍🏽"]),
    ),
    max_size=6,
).map("".join)
halves = st.sampled_from(["\ud83d", "a\udc00b", "\udcff"])  # of surrogate pairs
any_texts = st.one_of(texts, texts, halves)
numbers = st.one_of(
    st.integers(-10, 10),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 2**53 + 1, 1e39, 1e-50]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, any_texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(any_texts, inner, max_size=4)
    ),
    max_leaves=12,
)
deep = st.sampled_from(["[" * 100_000, '{"a":' * 50_000, "[" * 2000 + "]" * 2000])


def json_texts(inner=values):
    """JSON texts of values, and texts that are nearly JSON."""
    whole = inner.map(json.dumps)
    return st.one_of(whole, whole, whole.map(lambda t: t[:-1]), any_texts, deep)


def damaged(content: bytes, most: int = 4):
    """Copies of content with a few bytes changed, cut, doubled or put in."""
    place = st.integers(0, max(len(content) - 1, 0))

    def apply(edits):
        out = content
        for kind, at, new in edits:
            at = min(at, len(out))
            if kind == "set":
                out = out[:at] + new[: len(out) - at] + out[at + len(new) :]
            elif kind == "insert":
                out = out[:at] + new + out[at:]
            elif kind == "cut":
                out = out[:at]
            elif kind == "remove":
                out = out[:at] + out[at + max(len(new), 1) :]
            else:
                out = out[:at] + out[at : at + 64] + out[at:]
        return out

    kinds = st.sampled_from(["set", "set", "set", "insert", "remove", "double", "cut"])
    new = st.one_of(
        st.binary(min_size=1, max_size=8),
        st.sampled_from([b"\x00" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\x80"]),
    )
    return st.lists(st.tuples(kinds, place, new), min_size=1, max_size=most).map(apply)
