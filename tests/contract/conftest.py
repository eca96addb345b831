"""Where to read on, below every failure of a battery."""

from collections.abc import Generator

import pytest

PAGES = {
    "test_method": "CONTRIBUTING.md, `A method`; Method in src/permlab/method/base.py; docs/concepts.md",
    "test_model": "CONTRIBUTING.md, `A backbone`; Backbone in src/permlab/model/base.py",
    "test_data": "CONTRIBUTING.md, `A data set`; DataSpec in src/permlab/data/spec.py; docs/own_data.md",
    "test_task": "CONTRIBUTING.md, `A task`; Task and Learner in src/permlab/task; tests/toy has one to copy from",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    page = PAGES.get(item.path.stem)
    if report.failed and page:
        report.sections.append(("read on", page))
    return report
