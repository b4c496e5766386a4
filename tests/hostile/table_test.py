"""TABLE.md lists the cases that the tests beside it assert."""

from . import table


def test_the_table_is_the_one_of_these_cases():
    found = table.cases()
    names = [(case.kind, case.name) for case in found]
    assert len(set(names)) == len(names) >= 300
    assert table.FILE.read_text() == table.render(found), (
        "the cases have changed: make the table anew with `python -m tests.hostile.table`"
    )


def test_every_file_of_cases_is_listed():
    there = {f.stem.removesuffix("_test") for f in table.FILE.parent.glob("*_test.py")}
    assert there - {"table"} == set(table.MODULES)
