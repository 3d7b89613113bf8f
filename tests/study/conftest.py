"""A data set, and one tiny study of it carried through, for all tests of this folder."""

import pytest
from studies import tiny

from sage_ext.data.synthetic import write_dataset
from sage_ext.study import report
from sage_ext.study.run import compare


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("study") / "data"
    write_dataset(root, seed=5, train=6, validation=4, test=5, frames=(90, 200), modalities={"audio": 12, "visual": 16})
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data):
    """A study carried through, and its tables. Copy it to change it."""
    out = tmp_path_factory.mktemp("study") / "study"
    return out, compare(tiny(data), out, processes=2, draws=200, quiet=True)


@pytest.fixture
def undrawn(monkeypatch):
    """No pictures: they take longer than a tiny study."""
    monkeypatch.setattr(report, "pictures", lambda scores: [])
