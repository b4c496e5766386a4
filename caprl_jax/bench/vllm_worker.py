"""vLLM's side of a comparison: a program for vLLM's own environment, which lacks this project.

The first line of its input is a setup, each other line a request, each answered by a line of JSON
on standard output. It needs vLLM and the standard library only. Everything that vLLM prints goes to
standard error.
"""

import json
import os
import sys
import time
from typing import Any, TextIO

import PIL.Image
import vllm


class Engine:
    """vLLM with a policy's weights, and one prompt of each picture."""

    def __init__(self, setup: dict[str, Any]):
        """Reads the weights and pictures.

        Args:
          setup: "model" (its directory), "pictures" (paths), "text" (the prompt with one
            placeholder of the image), "group" (captions of each picture), "image" (the largest
            size of a picture), "tokens" (most tokens of prompt and caption) and "memory" (bytes of
            its cache).
        """
        self._group = setup["group"]
        self._prompts = []
        for path in setup["pictures"]:
            with PIL.Image.open(path) as picture:
                image = picture.convert("RGB")
            self._prompts.append({"prompt": setup["text"], "multi_modal_data": {"image": image}})
        self._llm = vllm.LLM(
            model=setup["model"],
            dtype="float32",
            max_model_len=setup["tokens"],
            max_num_seqs=len(self._prompts) * self._group,
            kv_cache_memory_bytes=setup["memory"],
            limit_mm_per_prompt={"image": setup["image"], "video": 0},
            enable_prefix_caching=True,
        )

    def draw(self, request: dict[str, Any]) -> dict[str, Any]:
        """Draws captions of given lengths, and reads every picture and prompt anew.

        Args:
          request: "lengths" [b][g], "temperature", "logprobs" (how many likeliest tokens' are
            returned for each token beside its own; None for no log-probabilities), and "details",
            which asks for tokens.

        Returns:
          "seconds", "tokens" drawn of each caption [b][g]; with details also "ids" [b][g][t],
          "prompts" [b][p] and "likeliest" [b], the first token's log-probabilities by id.
        """
        prompts, settings = [], []
        for prompt, lengths in zip(self._prompts, request["lengths"], strict=True):
            for length in lengths:
                prompts.append(prompt)
                settings.append(
                    vllm.SamplingParams(
                        temperature=request["temperature"],
                        max_tokens=length,
                        ignore_eos=True,
                        logprobs=request["logprobs"],
                        detokenize=False,
                    )
                )
        self._forget()
        began = time.perf_counter()
        drawn = self._llm.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - began
        rows = [drawn[i : i + self._group] for i in range(0, len(drawn), self._group)]
        found = {
            "seconds": seconds,
            "tokens": [[len(one.outputs[0].token_ids) for one in row] for row in rows],
        }
        return found | (self._details(rows) if request["details"] else {})

    def _details(self, rows: list[list[Any]]) -> dict[str, Any]:
        first = [row[0].outputs[0].logprobs for row in rows]
        return {
            "ids": [[list(one.outputs[0].token_ids) for one in row] for row in rows],
            "prompts": [list(row[0].prompt_token_ids) for row in rows],
            "likeliest": [
                {str(token): value.logprob for token, value in tokens[0].items()} if tokens else {}
                for tokens in first
            ],
        }

    def _forget(self) -> None:
        """Drops everything that earlier calls have left: pictures, features, keys and values."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache")
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()


def facts() -> dict[str, Any]:
    """Returns facts of this environment."""
    import torch
    import transformers

    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def serve(answers: TextIO) -> None:
    """Answers the requests of standard input."""
    engine = Engine(json.loads(sys.stdin.readline()))
    print(json.dumps(facts()), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(engine.draw(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM and its processes print
    serve(own)
