"""Hostile chat templates, which are programs that come with a model."""

import json
import shutil
from pathlib import Path

import pytest

from caprl_jax.data.tokens import Tokenizer
from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.hf import download as sources

from .case import Case, Gives, Refused, check

KIND = "chat template"
IMAGE = "{% if messages[0].content is not string %}<|image_pad|>{% endif %}"
TEXT = IMAGE + (
    "{% if messages[0].content is string %}{{ messages[0].content }}"
    "{% else %}{{ messages[0].content[1].text }}{% endif %}"
)
LOOP = "{% for a in range(9999) %}{% for b in range(9999) %}BODY{% endfor %}{% endfor %}"


def tokenizer(folder: Path, template: object) -> Tokenizer:
    """The tiny policy's, with another template: text, or JSON of tokenizer_config.json."""
    own = sources.fetch("asset:tiny/policy")
    skipped = shutil.ignore_patterns("*.safetensors", "chat_template.jinja")
    directory = Path(shutil.copytree(own, folder / "model", ignore=skipped))
    if isinstance(template, str | bytes):
        content = (
            template.encode("utf-8", "surrogatepass") if isinstance(template, str) else template
        )
        (directory / "chat_template.jinja").write_bytes(content)
    else:
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return Tokenizer.from_pretrained(directory, 512)


def chat(template, image=False):
    def run(folder):
        try:
            return tokenizer(folder, template).chat("Look.", image)
        except ModelDirectoryError as e:
            assert str(folder) in str(e)
            raise

    return run


UNBOUNDED = "which could make a text of any size"
SPIES = "can't be rendered: SecurityError"
REFUSED = {
    "cut short": ("{% for x in", "can't be rendered: TemplateSyntaxError"),
    "of bytes": (b"\xff\xfe\x00", "tokenizer can't be read"),
    "empty": ("", "no chat template"),
    "a number": (7, "not text"),
    "a list of numbers": ([1, 2], "tokenizer can't be read"),
    "of 2 million characters": ("x" * 2_000_000, "more than 1000000 characters"),
    "a silent loop": (LOOP.replace("BODY", ""), "doesn't end"),
    "a loop that writes": (LOOP.replace("BODY", "x" * 9999), "doesn't end"),
    "a loop in a macro": (
        "{% macro m() %}" + LOOP.replace("BODY", "{% set c = b %}") + "{% endmacro %}{{ m() }}",
        "doesn't end",
    ),
    "a text that doubles": (
        "{% set n = namespace(x='x') %}{% for a in range(60) %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}",
        "doesn't end",
    ),
    "a recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "a text times 10^9": ("{{ 'a' * 1000000000 }}", UNBOUNDED),
    "a text times a variable": ("{% set n = 99999 %}{{ 'a' * n }}", UNBOUNDED),
    "a list times 10^9": ("{{ [0] * 1000000000 }}", UNBOUNDED),
    "a power of a power": ("{{ 10 ** 10 ** 10 }}", UNBOUNDED),
    "a range of 10^9": ("{{ range(1000000000) | list }}", UNBOUNDED),
    "a range of 10^9, in small numbers": (
        "{% set n = 999999 %}{{ range(n + n) | list }}",
        "can't be rendered: OverflowError",
    ),
    "a width of 10^9": ("{{ 'a'.center(1000000000) }}", UNBOUNDED),
    "a filter's width": ("{{ 'a' | center(999999) }}", UNBOUNDED),
    "a format's width": ("{{ '{:>9999999}'.format(1) }}", UNBOUNDED),
    "a percent format's width": ("{{ '%9999999d' % 1 }}", UNBOUNDED),
    "10^9 paragraphs of lipsum": ("{{ lipsum(n=999999) }}", UNBOUNDED),
    "a hexadecimal number": ("{{ range(0xFFFFFFFF) }}", UNBOUNDED),
    "without the text": ("{{ messages[0].role }}", "renders the message's text 0 times"),
    "the text twice": (TEXT + TEXT, "renders the message's text 2 times"),
    "an error of its own": ("{{ raise_exception('no') }}", "can't be rendered: TemplateError: no"),
    "a division by zero": ("{{ 1 / 0 }}", "can't be rendered: ZeroDivisionError"),
    "an unknown filter": ("{{ 'a' | no_such }}", "can't be rendered: Template"),
    "a field of nothing": ("{{ no.such.field }}", "can't be rendered: UndefinedError"),
    "code by its classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", SPIES),
    "code by a macro's globals": (
        "{% macro m() %}{% endmacro %}{{ m.__globals__['os'].system('touch ran') }}",
        "can't be rendered: UndefinedError",
    ),
    "code by cycler": ("{{ cycler.__init__.__globals__.os.system('touch ran') }}", SPIES),
    "code by __import__": ("{{ __import__('os').system('touch ran') }}", "UndefinedError"),
    "open()": ("{{ open('/etc/passwd').read() }}", "can't be rendered: UndefinedError"),
    "an include of a file": ("{% include '/etc/passwd' %}", "can't be rendered: TypeError"),
    "an import of a file": ("{% import '/etc/passwd' as x %}{{ x }}", "can't be rendered"),
    "a list that it changes": ("{{ messages.append(1) }}", SPIES),
    "a thought that has begun": (TEXT + "<think>Okay, so", "begins the assistant's thoughts"),
}
IMAGES = {
    "no image": ("{{ messages[0].content[1].text }}", "renders an image as 0"),
    "the image twice": (IMAGE + TEXT, "renders an image as 2"),
    "two images a text names": (TEXT + "<|image_pad|>", "renders an image as 2"),
}
CASES = [
    *(
        Case(KIND, n, Refused(p, ModelDirectoryError), chat(template))
        for n, (template, p) in REFUSED.items()
    ),
    *(
        Case(KIND, n, Refused(p, ModelDirectoryError), chat(template, image=True))
        for n, (template, p) in IMAGES.items()
    ),
    Case(
        KIND,
        "a thought that it opens",
        Gives("the thought is closed", "Look.<think>\n\n</think>\n\n"),
        chat(TEXT + "<think>"),
    ),
    Case(
        KIND,
        "remainders, and stars in its text",
        Gives("it renders", "**1** Look."),
        chat("**{{ 7 % 2 }}** " + TEXT),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}: {c.name}")
def test_it_ends_as_promised(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where code in a template would leave its mark
    check(case, tmp_path)
