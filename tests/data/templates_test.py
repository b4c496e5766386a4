"""Chat templates: which file counts, thoughts, and templates that don't end or lose the text."""

import json
import shutil
import sys
import threading

import pytest

from caprl_jax.data.tokens import Tokenizer
from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.hf import download as sources

POLICY, JUDGE = sources.fetch("asset:tiny/policy"), sources.fetch("asset:tiny/judge")
IMAGE = "{% if messages[0].content is not string %}<|image_pad|>{% endif %}"
TEXT = IMAGE + (
    "{% if messages[0].content is string %}{{ messages[0].content }}"
    "{% else %}{{ messages[0].content[1].text }}{% endif %}"
)


def read(tmp_path, files, of=POLICY):
    """Tokenizer of a copy of a directory with these files instead of its own template."""
    directory = tmp_path / "model"
    shutil.copytree(of, directory)
    (directory / "chat_template.jinja").unlink()
    for name, content in files.items():
        path = directory / name
        if name.endswith(".json"):
            before = json.loads(path.read_text()) if path.is_file() else {}
            content = json.dumps(before | {"chat_template": content})
        path.write_text(content)
    return Tokenizer.from_pretrained(directory, 512)


FILES = {
    "tokenizer_config.json": "config " + TEXT,
    "chat_template.jinja": "jinja " + TEXT,
    "chat_template.json": "json " + TEXT,
    "processor_config.json": "processor " + TEXT,
}


@pytest.mark.parametrize("count", range(1, len(FILES) + 1))
def test_a_policys_template_is_the_one_of_transformers_processor(tmp_path, count):
    names = list(FILES)[:count]
    tokenizer = read(tmp_path, {name: FILES[name] for name in names})
    assert tokenizer.chat("Look.").split()[0] in names[-1]
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor

    theirs = AutoTokenizer.from_pretrained(tokenizer.directory)
    found, _ = Qwen2_5_VLProcessor.get_processor_dict(tokenizer.directory)

    assert tokenizer.inner.chat_template == found.get("chat_template", theirs.chat_template)


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["chat_template.json"], "json"),
        (["chat_template.json", "tokenizer_config.json"], "config"),
        (["chat_template.json", "tokenizer_config.json", "chat_template.jinja"], "jinja"),
    ],
)
def test_a_judges_template_is_its_tokenizers_or_else_the_only_one(tmp_path, names, counts):
    tokenizer = read(tmp_path, {name: FILES[name] for name in names}, JUDGE)
    assert tokenizer.chat("Look.").split()[0] == counts


@pytest.mark.parametrize("end", ["<think>", "<think>\n", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("image", [False, True])
def test_a_thought_that_the_template_opens_is_closed(tmp_path, end, image):
    tokenizer = read(tmp_path, {"chat_template.jinja": TEXT + "assistant\n" + repr_of(end)})
    assert tokenizer.chat("Look.", image).endswith("Look.assistant\n<think>\n\n</think>\n\n")


def repr_of(text):
    """The text as an expression, whose line ends no template strips."""
    return "{{ " + json.dumps(text) + " }}"


def test_a_thought_that_has_begun_is_refused(tmp_path):
    tokenizer = read(tmp_path, {"chat_template.jinja": TEXT + "<think>Okay, so"})
    with pytest.raises(ModelDirectoryError, match="begins the assistant's thoughts"):
        tokenizer.chat("Look.")


def test_the_bound_leaves_other_threads_and_a_debugger_alone(tmp_path):
    """tests/hostile has the templates that are refused."""
    loop = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    tokenizer, seen = read(tmp_path, {"chat_template.jinja": loop}), []

    def debugger(frame, event, argument):
        return None

    def work():
        sys.settrace(debugger)
        with pytest.raises(ModelDirectoryError):
            tokenizer.chat("Look.")
        seen.append(sys.gettrace())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [debugger]
