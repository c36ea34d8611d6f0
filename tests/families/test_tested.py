"""`flashserve models` and docs/models.md say what the tests show, and no more."""

from __future__ import annotations

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from typer.testing import CliRunner

from model.targets import families as served
from model.targets.checkpoint import REFUSED
from service.cli import app
from tests.families import tested
from tests.families.zoo import families

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of its own deprecations


def test_what_counts_as_tested_is_what_is_tested() -> None:
    """If it fails: python -m tests.families.tested --docs"""
    known = served.tested()
    assert known == tested.describe(list(families()))
    assert len(known) >= 30
    assert not known.keys() & REFUSED.keys()


def test_the_documentation_has_the_same_table() -> None:
    """If it fails: python -m tests.families.tested --docs"""
    _, _, rest = tested.DOCS.read_text().partition(tested.BEGIN)
    assert rest.partition(tested.END)[0] == served.markdown()


def test_the_command_prints_every_family_once() -> None:
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    assert rows.keys() == {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *REFUSED, *served.tested()}
    assert rows["qwen3_vl"].split()[1:] == ["exact", "several", "images", "video", "native"]
    assert rows["qwen4_exp"].split()[1] == "refused"
    assert rows["qwen4_exp"].endswith(REFUSED["qwen4_exp"])
    assert "encoder-decoder" in rows["florence2"]
    assert "proves itself" in rows["fuyu"]
