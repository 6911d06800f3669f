"""Weights and runs of strangers are read or refused, whatever is in them: `harness.Format`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.harness import Format, check, found_before, read_or_refused
from tests.fuzz.weights import FORMATS


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_changed_file_is_read_or_refused(form: Format, tmp_path: Path) -> None:
    check(form, tmp_path)


@pytest.mark.parametrize(
    ("form", "found"),
    [pytest.param(form, found, id=found.name) for form in FORMATS for found in found_before(form)],
)
def test_what_was_found_once_is_read_or_refused(form: Format, found: Path, tmp_path: Path) -> None:
    form.make(tmp_path)
    (tmp_path / form.file).write_bytes(found.read_bytes())
    read_or_refused(lambda: form.read(tmp_path))
