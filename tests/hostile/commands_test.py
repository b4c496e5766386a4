"""Hostile command lines: flags and files of every command."""

import json
import os
import subprocess
import sys

import pytest

from .case import ROOT, Case, Refused, check
from .command_line import command

TINY = "--config=configs/tiny.py"
DATA = "--config.data.data_dir={}"
SCORE = ("--clip=asset:tiny/clip", "--out={}/out")
# name: (command, arguments with {} for the case's folder, part of the error)
LINES = {
    "main": {
        "no --config": ([], "--config is missing"),
        "--config of no file": (["--config=no/such.py"], "is no file"),
        "a word": ([TINY, "5"], "'5' is no flag"),
        "an unknown flag": ([TINY, "--workdri=x"], "Unknown command line flag 'workdri'"),
        "an unknown key": ([TINY, "--config.caprl.gruop=4"], "did you mean 'group'"),
        "an unknown section": ([TINY, "--config.evil.images=4"], "did you mean 'eval'"),
        "a word for a number": ([TINY, "--config.steps=many"], "--config.steps=many"),
        "a word for a truth value": ([TINY, "--config.data.replacement=maybe"], "maybe"),
        "a key without a value": ([TINY, "--config.steps"], "steps"),
        "a section for a key": ([TINY, "--config.caprl=4"], "caprl"),
        "code for a list": (
            [
                TINY,
                "--workdir={}/run",
                "--config.data.extras=__import__('os').system('touch {}/ran')",
                "--config.steps=-1",
            ],
            "config.steps=-1",
        ),
        "code for a dict": (
            [TINY, "--config.caprl.rewards.accuracy.weight=__import__('os')"],
            "weight",
        ),
        "--replay without --workdir": ([TINY, "--replay=x.npz"], "--replay needs the run's"),
        "--process alone": ([TINY, "--process=1"], "--coordinator and --processes missing"),
        "--process beyond --processes": (
            [TINY, "--coordinator=a:1", "--processes=2", "--process=2"],
            "--process=2 is none of --processes=2",
        ),
        "--coordinator without a port": (
            [TINY, "--coordinator=a", "--processes=2", "--process=0"],
            "is not host:port",
        ),
        "--processes a word": ([TINY, "--processes=two"], "two"),
        "steps below zero": ([TINY, "--workdir={}/run", "--config.steps=-1"], "config.steps=-1"),
        "a policy that is not there": (
            [TINY, "--workdir={}/run", "--config.policy.path={}/none", DATA],
            "is not a model directory",
        ),
        "an asset that does not ship": (
            [TINY, "--workdir={}/run", "--config.policy.path=asset:../../../etc", DATA],
            "asset:",
        ),
        "data of no path": ([TINY, "--workdir={}/run", "--config.data.source=files"], "names no"),
    },
    "fit": {
        "devices of no kind": ([TINY, "--devices=h1000:8"], "'h1000:8' describes no devices"),
        "no devices": ([TINY, "--devices=h100:0"], "the number is 0"),
        "devices below zero": ([TINY, "--devices=cpu:-8"], "describes no devices"),
        "10^12 devices": ([TINY, "--devices=v5e:1000000x1000000"], "describes"),
        "a batch that does not divide": (
            [TINY, "--devices=cpu:8", "--config.data.batch=7", "--config.caprl.micro_batches=2"],
            "config.data.batch=7",
        ),
    },
    "plan": {
        "a topology of no kind": ([TINY, "--topology=v9:4x4"], "'v9:4x4' describes no devices"),
        "a topology without a size": ([TINY, "--topology=v5e"], "'v5e' describes no devices"),
        "a topology of words": ([TINY, "--topology=cpu:many"], "'cpu:many' describes no devices"),
        "steps of 0": ([TINY, "--topology=local", "--config.steps=0"], "config.steps=0"),
    },
    "bench": {
        "a phase that is none": ([TINY, "--phases=rollout"], "--phases: rollout is none of"),
        "a sweep that is none": ([TINY, "--scaling=time"], "--scaling: time is none of"),
        "no repeats": ([TINY, "--repeats=0"], "repeats"),
        "lengths of no kind": ([TINY, "--lengths=short"], "lengths"),
        "a peer that is none": ([TINY, "--peer=vllm"], "peer"),
    },
    "convert": {
        "no --out": (["--model=x"], "out"),
        "neither --checkpoint nor --model": (["--out={}/out"], "give either --checkpoint"),
        "both": (["--out={}/out", "--model=x", "--checkpoint=y"], "give either --checkpoint"),
        "--out that is there": (["--out={}", "--model=x"], "exists already"),
        "--out below a file": (
            ["--out={}/file/out", "--model=asset:tiny/judge"],
            "file/out",
        ),
        "a workdir without checkpoints": (["--out={}/out", "--checkpoint={}"], "has none"),
        "a workdir that is a file": (["--out={}/out", "--checkpoint={}/file"], "has none"),
        "a model that is not there": (["--out={}/out", "--model={}/none"], "not a model directory"),
        "a dtype that is none": (["--out={}/out", "--model=x", "--dtype=int4"], "dtype"),
    },
    "checkup": {
        "no --model": ([], "model"),
        "a model that is not there": (["--model={}/none"], "is not a model directory"),
        "a judge": (["--model=asset:tiny/judge"], "a model without vision"),
        "--export that is there": (["--model=x", "--export={}"], "exists already"),
        "an image that is not there": (
            ["--model=asset:tiny/policy", "--image={}/none.png"],
            "can't be read: No such file",
        ),
        "an image that is a text": (
            ["--model=asset:tiny/policy", "--image={}/file"],
            "can't be decoded",
        ),
        "no tokens": (["--model=asset:tiny/policy", "--max_tokens=0"], "max_tokens=0"),
        "a dtype that is none": (["--model=asset:tiny/policy", "--dtype=float9"], "float9"),
        "a dtype of whole numbers": (["--model=asset:tiny/policy", "--dtype=int8"], "int8"),
        "a side below zero": (["--model=asset:tiny/policy", "--side=-1"], "side"),
    },
    "random_model": {
        "no --size": (["--out={}/out"], "size"),
        "a size that is none": (["--out={}/out", "--size=900b"], "size"),
        "--out that is there": (["--out={}", "--size=qwen3-0.6b"], "exists already"),
        "an unknown name": (["--out={}/out", "--size=qwen3-0.6b", "--set=heads=2"], "--set=heads"),
        "a name below a number": (
            ["--out={}/out", "--size=qwen3-0.6b", "--set=hidden_size.x=2"],
            "--set=hidden_size.x=2",
        ),
        "a value that is a word": (
            ["--out={}/out", "--size=qwen3-0.6b", "--set=head_dim=wide"],
            "--set=head_dim=wide",
        ),
        "a value that is 0": (
            ["--out={}/out", "--size=qwen3-0.6b", "--set=head_dim=0"],
            "head_dim is 0",
        ),
        "no value": (["--out={}/out", "--size=qwen3-0.6b", "--set=head_dim"], "--set=head_dim"),
        "a seed below zero": (
            ["--out={}/out", "--size=qwen3-0.6b", "--seed=-1", "--set=num_hidden_layers=1"],
            "seed",
        ),
    },
    "tiny_models": {
        "no --out": ([], "out"),
        "--out that is a file": (["--out={}/file"], "file"),
    },
    "tiny_clip": {
        "no --out": ([], "out"),
        "--out that is a file": (["--out={}/file"], "can't write --out="),
        "a policy that is not there": (
            ["--out={}/out", "--policy={}/none"],
            "is not a model directory",
        ),
        "a model without vision": (
            ["--out={}/out", "--policy=asset:tiny/judge"],
            "preprocessor_config.json",
        ),
        "no steps": (["--out={}/out", "--steps=0"], "steps"),
    },
    "similarity": {
        "no --captions": (["--clip=x", "--out={}/out"], "captions"),
        "captions that are not there": ([*SCORE, "--captions={}/none"], "can't be read: No such"),
        "captions of a text": ([*SCORE, "--captions={}/file"], "file, line 1: "),
        "captions of a list": ([*SCORE, "--captions={}/list.json"], "it is no JSON object"),
        "an image outside of the folder": (
            [*SCORE, "--captions={}/captions.jsonl"],
            "--root the folder",
        ),
        "images that are not there": (
            [*SCORE, "--captions={}/captions.jsonl", "--images={}/none"],
            "--images names no picture",
        ),
        "a policy for a CLIP": (
            [*SCORE, "--captions={}/captions.jsonl", "--clip=asset:tiny/policy"],
            "not 'clip'",
        ),
        "--out below a file": (
            ["--clip=x", "--captions={}/captions.jsonl", "--out={}/file/out"],
            "its folder must be there",
        ),
        "a process beyond --processes": (
            [*SCORE, "--captions={}/captions.jsonl", "--process=1"],
            "--process=1 is none of --processes=1",
        ),
        "a batch of 0": ([*SCORE, "--captions={}/captions.jsonl", "--batch=0"], "batch"),
    },
    "plan_table": {
        "a plan that is not there": (["{}/none.json"], "none.json"),
        "a plan that is a text": (["{}/file"], "file is not what caprl_jax.plan"),
        "a plan of another kind": (["{}/list.json"], "list.json is not what caprl_jax.plan"),
        "a folder": (["{}"], "is not what caprl_jax.plan"),
        "--scaling of one plan": (["--scaling", "{}/list.json"], "--scaling takes two plans"),
    },
    "picture": {
        "no --workdir": (["--out={}/x.png"], "workdir"),
        "a workdir that is not there": (["--workdir={}/none", "--out={}/x.png"], "samples.json"),
        "a run of damaged samples": (["--workdir={}/bad", "--out={}/x.png"], "samples.json"),
        "a run of other JSON": (["--workdir={}/other", "--out={}/x.png"], "samples.json"),
    },
    "bench.picture": {
        "nothing to draw": (["--out={}/out"], "nothing to draw"),
        "phases that are not there": (
            ["--out={}/out", "--phases={}/none"],
            "not what the bench",
        ),
        "phases of a text": (["--out={}/out", "--phases={}/file"], "is not what the bench writes"),
        "phases of a list": (["--out={}/out", "--phases={}/list.json"], "not what the bench"),
        "phases of other numbers": (
            ["--out={}/out", "--phases={}/phases.json"],
            "not what the bench",
        ),
    },
}


def files(folder):
    """Files that the command lines name."""
    (folder / "file").write_text("a text")
    (folder / "list.json").write_text("[1]")
    (folder / "captions.jsonl").write_text('{"id": "a", "image": "../x.png", "caption": "x"}')
    (folder / "phases.json").write_text(json.dumps({"decode": {"roofline": 3}}))
    for name, content in (("bad", "{"), ("other", "[3]")):
        (folder / name).mkdir()
        (folder / name / "samples.json").write_text(content)
        (folder / name / "summary.json").write_text("{}")


def line(name, arguments):
    def run(folder):
        files(folder)
        return command(name, *(a.replace("{}", str(folder)) for a in arguments))

    return run


CASES = [
    Case(f"command line: {name}", what, Refused(phrase), line(name, arguments))
    for name, lines in LINES.items()
    for what, (arguments, phrase) in lines.items()
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}: {c.name}")
def test_it_ends_as_promised(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("main", "an unknown key"),
        ("convert", "--out below a file"),  # a thread that still waits would keep it from ending
        ("plan_table", "a plan that is a text"),
    ],
)
def test_a_process_of_its_own_says_the_same(name, what, tmp_path):
    files(tmp_path)
    arguments, _ = LINES[name][what]
    arguments = [a.replace("{}", str(tmp_path)) for a in arguments]
    with pytest.raises(SystemExit) as e:
        command(name, *arguments)
    found = subprocess.run(
        [sys.executable, "-m", f"caprl_jax.{name}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert (found.returncode, found.stdout, found.stderr) == (1, "", f"{e.value.code}\n")
