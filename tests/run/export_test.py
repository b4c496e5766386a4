"""An export is replaced only by the same run's export of the same step."""

import pytest

from caprl_jax.config import complete, default
from caprl_jax.errors import UserError
from caprl_jax.models.hf import download as sources
from caprl_jax.models.hf import files as hf
from caprl_jax.models.hf import save as saving
from caprl_jax.run import export, load

POLICY = "asset:tiny/policy"


def _card(step=2, **changes):
    config = default()
    config.policy.path = POLICY
    config.update_from_flattened_dict(changes)
    return export.model_card(complete(config), step, {"accuracy": 0.5})


@pytest.fixture(scope="module")
def model():
    policy, directory = load.read_model(POLICY, "", "float32")
    return export.Trained(policy, hf.load_params(directory, policy), directory)


def test_the_same_runs_export_is_replaced_whole(model, tmp_path):
    out = tmp_path / "2"
    export.export(out, model, "float32", _card())
    (out / "model.safetensors").write_bytes(b"torn")
    export.export(out, model, "float32", _card(log_every=7))  # a resumed run may change it
    assert hf.load_params(out, model.policy)
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


@pytest.mark.parametrize(
    "readme",
    [None, "", "# another model", _card(seed=5), _card(step=3), _card().replace('"seed": 0', "[")],
    ids=["none", "empty", "another", "another run", "another step", "broken"],
)
def test_a_strange_directory_is_refused_and_kept(readme, model, tmp_path):
    out = tmp_path / "2"
    out.mkdir()
    (out / "precious").write_text("kept")
    if readme is not None:
        (out / "README.md").write_text(readme)
    with pytest.raises(UserError, match="is no export of this run at this step"):
        export.export(out, model, "float32", _card())
    assert (out / "precious").read_text() == "kept"


def test_links_out_of_a_model_are_not_exported(model, tmp_path):
    source, secret = tmp_path / "source", tmp_path / "secret"
    source.mkdir()
    secret.write_text("secret")
    for file in sources.fetch(POLICY).iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    for name in ("judge_prompt.txt", "id_rsa", "LICENSE"):
        (source / name).symlink_to(secret)
    (source / "NOTICE").symlink_to("config.json")
    (source / "notes.txt").write_text("notes")
    target = tmp_path / "target"
    target.mkdir()
    saving.copy_companions(source, target)
    copied = {p.name for p in target.iterdir()}
    assert {"tokenizer.json", "preprocessor_config.json", "config.json", "NOTICE"} <= copied
    assert not {"judge_prompt.txt", "id_rsa", "LICENSE", "notes.txt"} & copied


def test_files_of_the_hubs_cache_are_exported(tmp_path):
    cache, target = tmp_path / "models--a--b", tmp_path / "target"
    snapshot = cache / "snapshots" / "abc"
    for directory in (snapshot, cache / "blobs", target):
        directory.mkdir(parents=True)
    (cache / "blobs" / "123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    saving.copy_companions(snapshot, target)
    assert (target / "tokenizer.json").read_text() == "{}" and not target.is_symlink()


def test_a_replacement_that_a_kill_cut_short_is_undone_or_finished(tmp_path):
    """Killed between the renames, an export comes back; killed after them, the old one goes."""
    for name in ("2.old", "2.partial", "3", "3.old", "4.partial", "notes.old", "5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    export.repair(tmp_path)
    left = {d.name: (d / "content").read_text() for d in tmp_path.iterdir()}
    assert left == {"2": "2.old", "3": "3", "5": "5", "notes.old": "notes.old"}
    export.repair(tmp_path / "never exported")


def test_an_export_that_can_not_be_written_leaves_no_process_waiting(model, tmp_path, monkeypatch):
    """The others gather every tensor with the first process, also those it has no room for."""
    gathered = []
    whole = saving._on_host

    def counted(*arguments):
        for name, tensor in whole(*arguments):
            gathered.append(name)
            yield name, tensor

    monkeypatch.setattr(saving, "_on_host", counted)
    export.export(tmp_path / "1", model, "float32", _card(step=1))
    names, gathered[:] = list(gathered), []
    (tmp_path / "2.partial").write_text("in the way")  # a file is not deleted
    monkeypatch.setattr(saving.jax, "process_count", lambda: 2)
    with pytest.raises(FileExistsError):
        saving.save(saving.Target(tmp_path / "2"), model.policy, model.params, model.source)
    assert gathered == names and len(names) > 10
