"""The page shows samples with images, rates and reasons; it stays small, and runs nothing."""

import json
import time

import pytest

from caprl_jax.caption import pictures
from caprl_jax.curate import filter as filtering
from caprl_jax.curate import folder, generate, parse, report, trials
from caprl_jax.endpoint import Endpoint, Limits
from caprl_jax.errors import ConfigError

from ..endpoint_server import serving
from . import filter_test, scripted

QUICK = Limits(concurrency=16, timeout=5.0, tries=2)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs")
    scripted.photographs(path)
    (path / "torn.jpg").write_bytes((path / "china.jpg").read_bytes()[:99])
    return path


def written(photographs, out, answer):
    place = folder.open_folder(str(out), generate.ROWS, 0, 1)
    with serving(answer) as server:
        model = Endpoint(server.url, limits=QUICK)
        found = pictures.find(str(photographs))
        assert generate.generate(model, found, generate.Settings(), place)
    return report.write(out).read_text()


def test_the_page_of_generate(photographs, tmp_path):
    text = scripted.GOOD.replace("door", "<script>door").replace("Answer: D", "")
    page = written(photographs, tmp_path, lambda _: text)
    assert page.count("data:image/jpeg;base64,") == 3 and "china.jpg" in page
    assert "&lt;script&gt;door" in page and "<script" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert parse.NO_ANSWER in page and "80.0%" in page  # 12 of 15 are accepted
    assert "torn.jpg" in page and "can&#39;t be decoded" in page
    assert "3 of 3 rows are shown" in page


def test_the_page_of_filter_and_what_is_no_jobs_folder(photographs, tmp_path):
    kinds = list(filter_test.KINDS)
    rows = [
        {
            "id": name,
            "image": str(photographs / f"{name}.jpg"),
            "questions": [filter_test.question(kind, i) for kind in kinds[:5]],
        }
        for i, name in enumerate(("china", "flower", "grace_hopper", "torn"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = folder.open_folder(str(tmp_path / "out"), filtering.KEPT, 0, 1)
    with serving(filter_test.answers) as server:
        model = Endpoint(server.url, limits=QUICK)
        found = pictures.find(str(tmp_path / "rows.jsonl"), str(photographs))
        assert filtering.filter_questions(model, found, filtering.Settings(), place)
    page = report.write(tmp_path / "out").read_text()
    assert "15.0%" in page  # 3 of 20 are kept
    # With the image 2 of 5 kinds are right, without it 2 of 5: guessed and backwards.
    assert page.count("40.0%") == 2 and "chance is 25.0%" in page
    for why in (trials.WRONG, trials.BLIND, trials.BOTH):
        assert why in page
    assert page.count("data:image/jpeg;base64,") == 6  # kept and dropped
    with pytest.raises(ConfigError, match="holds no finished job"):
        report.write(photographs)


def test_ten_thousand_rows_make_a_small_page(photographs, tmp_path):
    written(photographs, tmp_path, lambda _: scripted.GOOD)
    for name, count in ((generate.ROWS, 10_000), (generate.REJECTS, 0), (generate.FAILED, 10_000)):
        lines = (tmp_path / name).read_text().splitlines()
        own = [json.loads(lines[i % len(lines)]) | {"id": f"row-{i:05d}"} for i in range(count)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in own))
    began = time.process_time()
    page = report.write(tmp_path).read_text()
    assert time.process_time() - began < 10
    assert len(page) < 2_000_000 and page.count("data:image/jpeg;base64,") == 24
    assert "24 of 10000 rows are shown, spread evenly" in page
    assert "row-00000" in page and "row-09583" in page
    assert "50 of 10000 are shown" in page
