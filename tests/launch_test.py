"""The launch scripts start again where that helps: with stand-ins for gcloud, srun and Python."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOSTS = 2
# main.py ends with the next of its host's codes; venv and pip do what they are asked for.
PYTHON = """#!/bin/bash
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip "*) exit "$(cat "$STUB/pip")" ;;
  "-m caprl_jax.main"*)
    codes="$STUB/codes-${HOST:-$SLURM_PROCID}"
    code="$(head -1 "$codes")"; sed -i 1d "$codes"; echo "$*" >> "$STUB/mains"
    if [ "$code" = gone ]; then kill -KILL $PPID; exit; fi
    exit "$code" ;;
esac
"""
GCLOUD = f"""#!/bin/bash
case "$*" in
  *" describe "*)
    state="$(head -1 "$STUB/states")"
    [ "$(wc -l < "$STUB/states")" -le 1 ] || sed -i 1d "$STUB/states"
    if [ "$state" = NONE ]; then echo "ERROR: NOT_FOUND: no resource" >&2; exit 1; fi
    if [ "$state" = OUTAGE ]; then echo "ERROR: network" >&2; exit 1; fi
    echo "$state" ;;
  *queued-resources*) echo "$3 $4" | cut -d" " -f2 >> "$STUB/asked" ;;
  *" scp "*) for i in $(seq 0 {HOSTS - 1}); do cp "$5" "$STUB/host-$i/caprl.tgz"; done ;;
  *" ssh "*)
    for last; do :; done; failed=0
    for i in $(seq 0 {HOSTS - 1}); do
      (cd "$STUB/host-$i" && HOST=$i bash -c "${{last#--command=}}") || failed=1
    done
    exit $failed ;;  # which doesn't tell the code
esac
"""
SRUN = f"""#!/bin/bash
shift; most=0
for i in $(seq 0 {HOSTS - 1}); do
  code=0; SLURM_PROCID=$i "$@" || code=$?
  [ $code -le $most ] || most=$code
done
exit $most
"""
NOTHING = "#!/bin/bash\n"


@pytest.fixture(name="stub")
def _stub(tmp_path):
    (tmp_path / "bin").mkdir()
    scripts = {"python": PYTHON, "gcloud": GCLOUD, "srun": SRUN, "pkill": NOTHING}
    scripts["scontrol"] = NOTHING + 'echo "$*" >> "$STUB/requeued"\n'
    for name, text in scripts.items():
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    for i in range(HOSTS):
        (tmp_path / f"host-{i}").mkdir()
    (tmp_path / "pip").write_text("0")
    (tmp_path / "states").write_text("ACTIVE\n")
    return tmp_path


def codes(stub, *of_hosts):
    for i, host in enumerate(of_hosts):
        (stub / f"codes-{i}").write_text("".join(f"{c}\n" for c in host))


def told(stub, name):
    return (stub / name).read_text().split() if (stub / name).exists() else []


def script(stub, name, *arguments, cwd=ROOT, **variables):
    environment = (
        os.environ
        | {
            "PATH": f"{stub / 'bin'}:{os.environ['PATH']}",
            "STUB": str(stub),
            "POLL": "0",
            "ZONE": "z",
            "TYPE": "v6e-16",
            "PYTHON": str(stub / "bin" / "python"),
            "VENV": ".venv",
        }
        | variables
    )
    return subprocess.run(
        ["bash", str(ROOT / "launch" / name), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def pod(stub, **variables):
    return script(stub, "tpu_pod.sh", "run", "pod", "--workdir=a b", **variables)


@pytest.mark.parametrize(
    ("states", "asked"),
    [
        ("ACTIVE", []),
        ("ACCEPTED WAITING_FOR_RESOURCES OUTAGE PROVISIONING CREATING ACTIVE", []),
        ("NONE ACCEPTED ACTIVE", ["create"]),
        ("SUSPENDED ACCEPTED ACTIVE", ["delete", "create"]),
        ("FAILED ACCEPTED ACTIVE", ["delete", "create"]),
    ],
)
def test_a_slice_in_the_queue_is_waited_for(stub, states, asked):
    (stub / "states").write_text("\n".join(states.split()) + "\n")
    codes(stub, [0], [0])
    found = pod(stub)
    assert found.returncode == 0, found.stderr
    assert told(stub, "asked") == asked
    assert told(stub, "mains") == ["-m", "caprl_jax.main", "--workdir=a", "b"] * HOSTS


def test_a_slice_that_cannot_be_had_is_asked_for_once(stub):
    (stub / "states").write_text("NONE\nFAILED\n")
    found = pod(stub)
    assert found.returncode == 1 and "no slice: FAILED" in found.stderr
    assert told(stub, "asked") == ["create"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0], [0], 0),
        ([134, 0], [1], 1),  # the second host's own error ended the first
        ([134, 0], ["gone", 0], 0),  # a host is gone
        ([76, 75, 75, 0], [134, 75, 75, 0], 0),  # lost once, stopped twice: that doesn't count
        ([76, 76, 0], [134, 134, 0], 76),  # RESTARTS=1
        ([2], [2], 2),
    ],
)
def test_the_pod_goes_by_each_hosts_own_code(stub, first, second, expected):
    codes(stub, first, second)
    found = pod(stub, RESTARTS="1")
    assert found.returncode == expected, found.stderr


def test_a_failed_install_is_no_error_of_the_run(stub):
    (stub / "pip").write_text("1")
    found = pod(stub, RESTARTS="2")
    assert found.returncode == 76 and not told(stub, "mains"), found.stderr


def slurm(stub, **variables):
    values = {"SLURM_SUBMIT_DIR": str(stub), "SLURM_JOB_ID": "7"} | variables
    return script(stub, "slurm.sh", "--workdir=a b", cwd=stub, **values)


@pytest.mark.parametrize(
    ("first", "second", "requeued"),
    [
        (0, 0, False),
        (1, 137, False),  # its own error, for which the step killed the other
        (143, 2, False),
        (75, 143, True),  # stopped with a checkpoint
        (134, "gone", True),
        (76, 134, True),
    ],
)
def test_slurm_goes_by_each_tasks_own_code(stub, first, second, requeued):
    (stub / "launch").symlink_to(ROOT / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        (stub / name).symlink_to(ROOT / name)
    codes(stub, [first], [second])
    found = slurm(stub)
    assert told(stub, "requeued") == (["requeue", "7"] if requeued else []), found
    assert (stub / "caprl-7.state").exists() == requeued
    if not requeued:
        assert found.returncode == min(first, second)


def test_slurm_counts_lost_nodes_alone(stub):
    (stub / "launch").symlink_to(ROOT / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        (stub / name).symlink_to(ROOT / name)
    codes(stub, [75, 134, 75, 76], [75, "gone", 75, 134])
    ended = [slurm(stub, RESTARTS="1", SLURM_RESTART_COUNT=str(i)).returncode for i in range(4)]
    assert ended == [0, 0, 0, 76] and told(stub, "requeued") == ["requeue", "7"] * 3
