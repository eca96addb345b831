"""What a run is called; options that came later do not rename runs that were made before them."""

from typing import Annotated

import yaml

from permlab.config import identity, schema
from permlab.config.compose import resolve_train
from permlab.option import AddedLater, Option
from permlab.record.stored import read_plan


def test_an_option_added_later_leaves_runs_their_names_and_their_files_readable(monkeypatch, tmp_path):
    before, _ = resolve_train([f"paths.runs={tmp_path}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dict(before.config)))

    added = {"num_moons": Option(Annotated[int, AddedLater(1)], 1)}
    options = schema.component_options
    monkeypatch.setattr(
        schema, "component_options", lambda group, name: options(group, name) | (added if group == "model" else {})
    )
    now = read_plan(tmp_path)
    assert now.config["model"]["num_moons"] == 1
    assert now.digest == before.digest
    other = {**now.config, "model": {**now.config["model"], "num_moons": 2}}
    assert identity.digest(other) != before.digest
