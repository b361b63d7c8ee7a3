import pytest

from fedlscl.report import runs


@pytest.fixture(autouse=True)
def only_paths(monkeypatch):
    """Results are not read; the seed of a run is the number in its folder's name."""

    def read(path):
        return runs.Run(path, {"seed": int(path.resolve().parent.name.partition("seed_")[2] or 0)}, {}, None)

    monkeypatch.setattr(runs, "read_run", read)


def find_results(paths):
    return [run.path for run in runs.read_runs(paths)]


@pytest.fixture
def folder(tmp_path):
    """A run with versions, two copied runs, and one copied per seed."""
    for place in ("A/version_9", "A/version_10", "kept/B", "kept/C", "kept/D/seed_1", "kept/D/seed_2"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "results.json").write_text("{}")
    return tmp_path


def names(files):
    return [runs.run_folder(file).name for file in files]


def test_every_kind_of_path_leads_to_its_runs(folder):
    assert find_results([folder / "A" / "version_9"]) == [folder / "A" / "version_9" / "results.json"]
    assert find_results([folder / "A"]) == [folder / "A" / "version_10" / "results.json"]
    assert find_results([folder / "kept" / "B"]) == [folder / "kept" / "B" / "results.json"]
    assert find_results([folder / "kept" / "B" / "results.json"]) == [folder / "kept" / "B" / "results.json"]
    assert names(find_results([folder / "kept"])) == ["B", "C", "D", "D"]
    assert names(find_results([folder])) == ["A", "B", "C", "D", "D"]


def test_a_run_named_twice_counts_once(folder, monkeypatch):
    monkeypatch.chdir(folder / "kept")
    assert len(find_results([folder / "kept" / "B", folder / "kept", folder.joinpath("kept", "..", "kept", "C")])) == 4


def test_a_run_is_named_by_its_folder_wherever_one_stands(folder, monkeypatch):
    monkeypatch.chdir(folder / "A" / "version_9")
    assert names(find_results([type(folder)(".")])) == ["A"]


@pytest.mark.parametrize(("place", "reason"), [("nowhere", "does not exist"), (".", "holds no results.json")])
def test_a_path_without_results_is_refused(tmp_path, place, reason):
    with pytest.raises(ValueError, match=reason):
        find_results([tmp_path / place])
