"""Bad model directories and images each end in the promised error or result."""

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

import caprl_jax
from caprl_jax.data.images import ImageProcessor, UnreadableImage, decode_image
from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.hf import download as sources

POLICY = sources.fetch("asset:tiny/policy")


def _json(name, **changes):
    """Edit of a JSON file; __ in names goes down a level, and None removes a key."""

    def edit(directory: Path):
        path = directory / name
        content = json.loads(path.read_text())
        for key, value in changes.items():
            *parents, last = key.split("__")
            part = content
            for parent in parents:
                part = part[parent]
            if value is None:
                del part[last]
            else:
                part[last] = value
        path.write_text(json.dumps(content))

    return edit


def _config(**changes):
    return _json("config.json", **changes)


def _file(name, content: bytes | None):
    def edit(directory: Path):
        path = directory / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)

    return edit


def _tensors(change):
    def edit(directory: Path):
        path = directory / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path)

    return edit


def _all(*edits):
    def edit(directory: Path):
        for e in edits:
            e(directory)

    return edit


def _cut(bytes_kept):
    def edit(directory: Path):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:bytes_kept])

    return edit


def _emptied(directory: Path):
    shutil.rmtree(directory)
    directory.mkdir()


def _as_file(directory: Path):
    shutil.rmtree(directory)
    directory.write_text("a file")


def _twice(directory: Path):
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    shutil.copy(directory / "weights.safetensors", directory / "again.safetensors")


def _pickle(directory: Path):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _index(directory: Path):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")


def _index_only(content: bytes):
    def edit(directory: Path):
        (directory / "model.safetensors").rename(directory / "model-1.safetensors")
        (directory / "model.safetensors.index.json").write_bytes(content)

    return edit


def _strays(directory: Path):
    """Adds files of an adapter and an optimizer beside an index."""
    names = safetensors.numpy.load_file(directory / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    _index_only(json.dumps(index).encode())(directory)
    for name in ("adapter_model", "consolidated", "optimizer"):
        safetensors.numpy.save_file({"x": np.ones(3)}, directory / f"{name}.safetensors")


def _fifo(name):
    def edit(directory: Path):
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return edit


def _device(name):
    def edit(directory: Path):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to("/dev/zero")

    return edit


def _header(**changes):
    """Edit of one entry of the header of the weights, which then lies."""

    def edit(directory: Path):
        path = directory / "model.safetensors"
        content = path.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        header[NORM] |= changes
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return edit


def _poison(value):
    def edit(tensors):
        tensors[NORM] = tensors[NORM].copy()
        tensors[NORM][3:5] = value

    return edit


DEEP = b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HALF = b'{"x": "\\ud83d"}'


def _float16(tensors):
    for name, value in tensors.items():
        tensors[name] = value.astype(np.float16)


def _int8(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)


def _head_again(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()


def _linked(directory: Path):
    real = directory.with_name("real")
    directory.rename(real)
    directory.symlink_to(real)


def _company(directory: Path):
    (directory / "original").mkdir()
    (directory / ".gitattributes").write_text("*.safetensors lfs")
    (directory / "notes.md").write_text("notes")


NORM = "model.norm.weight"
VISION = "vision_config__"
# name: (edit of a copy of the shipped policy, part of the error; None if it must load)
DIRECTORIES = {
    "empty": (_emptied, "is not a model directory"),
    "a file": (_as_file, "is not a model directory"),
    "no config": (_file("config.json", None), "is not a model directory"),
    "config cut short": (_file("config.json", b'{"model_type": "qw'), "is not valid JSON"),
    "config of bytes": (_file("config.json", b"\xff\xfe\x00\x81"), "is not valid JSON"),
    "config empty": (_file("config.json", b""), "is not valid JSON"),
    "config a list": (_file("config.json", b"[]"), "holds a list, not a JSON object"),
    "no model_type": (_config(model_type=None), "model_type None"),
    "another family": (_config(model_type="llava"), "'llava': supported are 'qwen2'"),
    "experts": (_config(model_type="qwen3_vl_moe"), "mixtures of experts"),
    "quantised": (_config(quantization_config={"quant_method": "gptq"}), "'gptq'"),
    "no width": (_config(hidden_size=None), "lacks 'hidden_size'"),
    "width a text": (_config(hidden_size="128"), "hidden_size is '128', not a positive"),
    "width zero": (_config(hidden_size=0), "not a positive whole number"),
    "layers negative": (_config(num_hidden_layers=-3), "num_hidden_layers is -3"),
    "width a fraction": (_config(intermediate_size=1.5), "intermediate_size is 1.5"),
    "heads unequal": (_config(num_key_value_heads=3), "not a multiple of num_key_value_heads 3"),
    "no epsilon": (_config(rms_norm_eps=None), "lacks 'rms_norm_eps'"),
    "epsilon a text": (_config(rms_norm_eps="small"), "rms_norm_eps is 'small'"),
    "no theta": (_config(rope_theta=None), "lacks 'rope_theta'"),
    "yarn": (_config(rope_scaling={"type": "yarn", "factor": 4}), "'yarn' is not supported"),
    "no sections": (_config(rope_scaling={"type": "mrope"}), "lacks 'rope_scaling.mrope_section'"),
    "sections short": (_config(rope_scaling__mrope_section=[4, 6, 7]), "does not add up"),
    "sections none": (_config(rope_scaling__mrope_section=7), "mrope_section"),
    "window in use": (
        _config(use_sliding_window=True, max_window_layers=1),
        "sliding-window attention is in use",
    ),
    "window in no layer": (_config(use_sliding_window=True, max_window_layers=3), None),
    "another activation": (_config(hidden_act="gelu"), "hidden_act 'gelu'"),
    "no tower": (_config(vision_config=None), "lacks 'vision_config'"),
    "tower a list": (_config(vision_config=[1]), "vision_config"),
    "tower without depth": (_config(**{VISION + "depth": None}), "missing visual.blocks.10"),
    "tower's width a text": (_config(**{VISION + "hidden_size": "96"}), "vision_config"),
    "tower's activation": (_config(**{VISION + "hidden_act": "relu"}), "hidden_act 'relu'"),
    "tower's heads": (_config(**{VISION + "num_heads": 5}), "not a multiple of num_heads 5"),
    "tower's output": (_config(**{VISION + "out_hidden_size": 64}), "differs from hidden_size"),
    "windows of part patches": (_config(**{VISION + "window_size": 42}), "whole merged patches"),
    "a full block too far": (_config(**{VISION + "fullatt_block_indexes": [2]}), "block 2 of 2"),
    "no weights": (_file("model.safetensors", None), r"holds no \*\.safetensors file"),
    "weights pickled": (_pickle, "pytorch_model.bin is of another format"),
    "weights empty": (_file("model.safetensors", b""), "is not a readable safetensors file"),
    "weights a page": (_file("model.safetensors", b"<html>" * 99), "is not a readable safetensors"),
    "weights a pointer": (
        _file("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "is not a readable safetensors file",
    ),
    "header too long": (
        _file("model.safetensors", struct.pack("<Q", 1 << 40)),
        "is not a readable safetensors",
    ),
    "weights cut in the header": (_cut(500), "is cut short"),
    "weights cut in a tensor": (_cut(1_000_000), "is cut short"),
    "weights twice": (_twice, "is in again.safetensors and in weights.safetensors"),
    "a shard missing": (_index, "names 2 of 2 files that are not there, first model-2"),
    "an index cut short": (
        _index_only(b"{"),
        "index.json is not valid JSON",
    ),
    "a tensor missing": (_tensors(lambda t: t.pop(NORM)), f"missing {NORM}"),
    "a tensor left over": (
        _tensors(lambda t: t.update(adapter=np.ones(3, np.float32))),
        "left over adapter",
    ),
    "a tensor of another shape": (
        _tensors(lambda t: t.update({NORM: np.ones(3, np.float32)})),
        r"shape \(3,\)",
    ),
    "a tensor of small integers": (_tensors(_int8), "lm_head.weight is of type I8"),
    "another vocabulary": (_config(vocab_size=600), "config.json says"),
    "half precision": (_tensors(_float16), None),
    "a tied head again": (_all(_tensors(_head_again), _config(tie_word_embeddings=True)), None),
    "a link": (_linked, None),
    "company": (_company, None),
    "no tokenizer": (_file("tokenizer.json", None), "has no tokenizer"),
    "a tokenizer cut short": (_file("tokenizer.json", b'{"model": {'), "tokenizer can't be read"),
    "a tokenizer of another kind": (_file("tokenizer.json", b"{}"), "tokenizer can't be read"),
    "no chat template": (_file("chat_template.jinja", None), "no chat template"),
    "a template cut short": (_file("chat_template.jinja", b"{% for x in"), "chat template"),
    "a template without images": (
        _file("chat_template.jinja", b"{{ messages[0].role }}"),
        "renders an image as 0",
    ),
    "no processor": (_file("preprocessor_config.json", None), "does not exist"),
    "processor cut short": (_file("preprocessor_config.json", b"{"), "is not valid JSON"),
    "processor a list": (_file("preprocessor_config.json", b"[]"), "not a JSON object"),
    "processor without resizing": (
        _json("preprocessor_config.json", do_resize=False),
        "do_resize=false",
    ),
    "other patches": (_json("preprocessor_config.json", patch_size=16), "makes patches of 1536"),
    "patch size a text": (_json("preprocessor_config.json", patch_size="14"), "patch_size"),
    "deviation zero": (_json("preprocessor_config.json", image_std=[0, 1, 1]), "image_std"),
    "two channels": (_json("preprocessor_config.json", image_mean=[0, 0]), "image_mean"),
    "size a number": (_json("preprocessor_config.json", size=224), "size can't be 224"),
    "a filter that is none": (_json("preprocessor_config.json", resample=[]), "resample"),
    "rope a word": (_config(rope_scaling="linear"), "rope_scaling is 'linear'"),
    "text config a list": (_config(text_config=[1]), "text_config"),
    "quantised by a word": (_config(quantization_config="awq"), "quantised weights"),
    "model_type a list": (_config(model_type=["qwen2"]), "model_type"),
    "layer types a number": (_config(layer_types=3), "layer_types"),
    "window without its layers": (
        _config(use_sliding_window=True, max_window_layers=[]),
        "sliding-window",
    ),
    "an index of nothing": (
        _index_only(b'{"weight_map": null}'),
        "has no weight_map",
    ),
    "a tied head that is trained": (_config(tie_word_embeddings=True), "is not the embedding"),
    "generation config cut short": (_file("generation_config.json", b"{"), "is not valid JSON"),
    "stop token a text": (
        _json("generation_config.json", eos_token_id="<|im_end|>"),
        "eos_token_id",
    ),
    "window by default": (_config(**{VISION + "window_size": None}), None),
    "strays beside an index": (_strays, None),
    "an index that leads out": (
        _index_only(b'{"weight_map": {"a": "../model.safetensors"}}'),
        "outside the directory",
    ),
    "rope's buffers": (
        _tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": t[NORM]})),
        None,
    ),
    "nan": (_tensors(_poison(np.nan)), rf"2 values .* in 1 tensors: {NORM} \(2 values\)"),
    "inf": (_tensors(_poison(-np.inf)), rf"2 values .* in 1 tensors: {NORM} \(2 values\)"),
    "too large for float32": (
        _tensors(lambda t: t.update({NORM: np.full_like(t[NORM], 1e39, np.float64)})),
        "NaN or infinite in float32",
    ),
    "weights a fifo": (_fifo("model.safetensors"), "is not a regular file"),
    "config a fifo": (_fifo("config.json"), "is not a model directory"),
    "tokenizer's config a fifo": (_fifo("tokenizer_config.json"), "is not a regular file"),
    "tokenizer a device": (_device("tokenizer.json"), "is not a regular file"),
    "processor a device": (_device("preprocessor_config.json"), "is not a regular file"),
    "prompt a device": (_device("judge_prompt.txt"), "is not a regular file"),
    "a billion layers": (_config(num_hidden_layers=10**9), "at most 1024"),
    "a billion blocks": (_config(**{VISION + "depth": 10**9}), "at most 1024"),
    "a billion wide": (_config(hidden_size=10**9), "hidden_size is 1000000000, not at most"),
    "header of more rows": (_header(shape=[10**9]), "is not a readable safetensors"),
    "header beyond the end": (_header(data_offsets=[0, 10**15]), "is not a readable safetensors"),
    "config deep": (_file("config.json", DEEP), "nested too deeply"),
    "generation config deep": (_file("generation_config.json", DEEP), "nested too deeply"),
    "processor deep": (_file("preprocessor_config.json", DEEP), "nested too deeply"),
    "tokenizer's config deep": (_file("tokenizer_config.json", DEEP), "nested too deeply"),
    "tokenizer deep": (_file("tokenizer.json", DEEP), "tokenizer can't be read"),
    "half a surrogate": (_file("generation_config.json", HALF), "is not valid JSON"),
    "index deep": (_index_only(DEEP), "nested too deeply"),
    "stop token outside": (_json("generation_config.json", eos_token_id=9999), "eos_token_id"),
}


@pytest.mark.parametrize(("edit", "message"), DIRECTORIES.values(), ids=DIRECTORIES)
def test_hostile_directory_ends_as_promised(edit, message, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(POLICY, directory)
    edit(directory)
    if message is None:
        policy = caprl_jax.load_policy(directory)
        assert policy.inputs([np.zeros((84, 84, 3), np.uint8)])
        return
    with pytest.raises(ModelDirectoryError, match=message) as e:
        policy = caprl_jax.load_policy(directory)
        policy.inputs([np.zeros((84, 84, 3), np.uint8)])
    assert str(directory) in str(e.value) and "\n\n" not in str(e.value)


def _saved(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def _png(width, height, body=b"", depth=8):
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + _chunk(b"IDAT", zlib.compress(body)) + _chunk(b"IEND", b"")


def _animated(kind):
    frames = [Image.new("RGB", (40, 40), c) for c in ("red", "blue")]
    return _saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


RED = Image.new("RGB", (40, 40), "red")
CLEAR = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
KEYED = Image.new("P", (40, 40), 0)
KEYED.putpalette([255, 0, 0] * 256)
EXIF = Image.Exif()
EXIF[0x0112] = 6
# name: (bytes, part of the error or the colour in the middle)
PICTURES = {
    "nothing": (b"", "can't be decoded"),
    "text": (b"hello", "can't be decoded"),
    "a page": (b"<!DOCTYPE html><html></html>", "can't be decoded"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "can't be decoded"),
    "png cut": (_saved(RED)[:60], "can't be decoded"),
    "jpeg cut": (_saved(RED, "JPEG")[:400], "can't be decoded"),
    "gif cut": (_saved(RED, "GIF")[:30], "can't be decoded"),
    "webp cut": (_saved(RED, "WEBP")[:30], "can't be decoded"),
    "tiff cut": (_saved(RED, "TIFF")[:50], "can't be decoded"),
    "png of no rows": (_png(40, 0), "can't be decoded"),
    "png of garbage": (_png(40, 40, b"\x07" * 10), "can't be decoded"),
    "png of odd depth": (_png(40, 40, b"", depth=77), "can't be decoded"),
    "a bomb": (_png(60_000, 60_000), "can't be decoded.*bomb"),
    "very wide": (_saved(Image.new("RGB", (4020, 20))), "more than 200 times"),
    "very tall": (_saved(Image.new("RGB", (20, 4020))), "more than 200 times"),
    "rgb": (_saved(RED), (255, 0, 0)),
    "one pixel": (_saved(RED.resize((1, 1))), (255, 0, 0)),
    "jpeg": (_saved(RED, "JPEG", quality=100, subsampling=0), (254, 0, 0)),
    "cmyk": (_saved(RED.convert("CMYK"), "JPEG", quality=100, subsampling=0), (255, 0, 0)),
    "grey": (_saved(Image.new("L", (40, 40), 77)), (77, 77, 77)),
    "black and white": (_saved(Image.new("1", (40, 40), 1)), (255, 255, 255)),
    "grey, transparent": (_saved(Image.new("LA", (40, 40), (0, 0))), (255, 255, 255)),
    "transparent": (_saved(CLEAR), (255, 255, 255)),
    "palette": (_saved(KEYED), (255, 0, 0)),
    "palette, transparent": (_saved(KEYED, transparency=0), (255, 255, 255)),
    "colour key": (_saved(RED, transparency=(255, 0, 0)), (255, 255, 255)),
    "16 bits": (_saved(Image.fromarray(np.full((40, 40), 0x8001, np.uint16))), (128, 128, 128)),
    "float": (_saved(Image.fromarray(np.full((40, 40), 99.0, np.float32)), "TIFF"), (99, 99, 99)),
    "gif of frames": (_animated("GIF"), (255, 0, 0)),
    "png of frames": (_animated("PNG"), (255, 0, 0)),
    "webp of frames": (_animated("WEBP"), (255, 0, 0)),
    "bmp": (_saved(RED, "BMP"), (255, 0, 0)),
    "turned": (_saved(RED, exif=EXIF), (255, 0, 0)),
    "bytes after the end": (_saved(RED) + b"\x00" * 99, (255, 0, 0)),
}


@pytest.mark.parametrize(("data", "promised"), PICTURES.values(), ids=PICTURES)
def test_hostile_image_ends_as_promised(data, promised):
    processor = ImageProcessor.from_pretrained(POLICY)
    if isinstance(promised, str):
        with pytest.raises(UnreadableImage, match=promised):
            processor(decode_image(data))
        return
    image = decode_image(data)
    assert image.mode == "RGB"
    assert image.getpixel((image.width // 2, image.height // 2)) == promised
    if data != PICTURES["16 bits"][0]:
        theirs = convert_to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        np.testing.assert_array_equal(image, theirs)
    patches, grid = processor(image)
    assert len(patches) == grid[0] * grid[1] and np.all(np.isfinite(patches))


def test_there_are_at_least_sixty_hostile_cases():
    assert len(DIRECTORIES) + len(PICTURES) >= 60 and len(DIRECTORIES) >= 40
