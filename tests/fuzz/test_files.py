"""Files of strangers are read or refused, whatever is in them: `harness.Format`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.files import FORMATS
from tests.fuzz.harness import EDITS, Format, changed, read_or_refused

FOUND = Path(__file__).parents[1] / "data" / "fuzz"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_changed_file_is_read_or_refused(form: Format, shelf: Path) -> None:
    folder = shelf / form.name
    folder.mkdir()
    form.make(folder)
    file = folder / form.file
    valid = file.read_bytes()
    form.read(folder)  # as it is it must be read

    @settings(max_examples=form.examples, suppress_health_check=list(HealthCheck))
    @given(EDITS)
    def once(edits: list[tuple[int, int, int, bytes]]) -> None:
        file.write_bytes(changed(form, valid, edits))
        read_or_refused(lambda: form.read(folder))

    once()
