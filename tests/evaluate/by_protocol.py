"""The flags of caprl_jax.evaluate, for both protocols that protocols.py serves."""

import json
import types

from caprl_jax import protocols


def evaluate(protocol, folder, url, **changes):
    """results.json of a protocol on a folder's data and captions."""
    given = {
        "protocol": protocol,
        "judge": url,
        "judge_model": "",
        "captions": str(folder / "captions.jsonl"),
        "model": "",
        "out": str(folder / "out"),
        "against": [],
        "as_released": False,
        "scorer": "",
        "split": "",
        "batch": 4,
    }
    protocols.evaluate(types.SimpleNamespace(**(given | changes)))
    return json.loads((folder / "out" / "results.json").read_text())
