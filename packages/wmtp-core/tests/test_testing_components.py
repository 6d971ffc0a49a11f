"""Our own components pass the suites that plugins inherit."""

import gzip
import json

import pytest
import torch

from wmtp.data.config import CodeContests, Jsonl, Mbpp, PythonSource, TextFiles
from wmtp.launchers.config import LocalLauncher
from wmtp.models.config import HfModel, ScratchModel
from wmtp.storage.config import FileStorage
from wmtp.testing import DataLoaderTests, LauncherTests, ModelLoaderTests, StorageTests, TrackerTests
from wmtp.tracking.config import JsonlTracker, MLflowTracker

LLAMA = ScratchModel(vocab_size=61, hidden_size=16, layers=2, attention_heads=2, intermediate_size=24, max_positions=32)


class TestFileStorage(StorageTests):
    config = FileStorage()


class TestLocalLauncher(LauncherTests):
    config = LocalLauncher(processes=2)


class TestJsonlTracker(TrackerTests):
    config = JsonlTracker()


class TestMLflowTracker(TrackerTests):
    config = MLflowTracker(experiment="suite")

    def steps(self, run, metric):
        from mlflow import MlflowClient

        facts = json.loads((run.run_dir / "mlflow.json").read_text())
        return [point.step for point in MlflowClient(facts["tracking_uri"]).get_metric_history(facts["run_id"], metric)]

    @pytest.fixture(scope="class")
    def empty_database(self, tmp_path_factory):
        mlflow = pytest.importorskip("mlflow")
        file = tmp_path_factory.mktemp("empty") / "mlflow.db"
        mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
        return file

    @pytest.fixture(autouse=True)
    def database(self, tmp_path, empty_database):
        """MLflow takes seconds to make one."""
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "mlflow.db").write_bytes(empty_database.read_bytes())


class TestScratchLlama(ModelLoaderTests):
    config = LLAMA


class TestScratchGpt2(ModelLoaderTests):
    config = ScratchModel(architecture="gpt2", vocab_size=61, hidden_size=16, layers=2, attention_heads=2, max_positions=32)


class TestHfFolder(ModelLoaderTests):
    config = HfModel(uri="models/x", attn_implementation="eager")

    @pytest.fixture
    def path(self, tmp_path):
        LLAMA.build().load(None, dtype=torch.float32, seed=0).model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"


class TestJsonl(DataLoaderTests):
    config = Jsonl(uri="data/x.jsonl", keys={"prompt": "question"})
    rows = ({"question": "a", "completion": "b"}, {"text": "c", "is_correct": True, "reward": 0.5}, {"text": "d"})

    @pytest.fixture
    def path(self, tmp_path):
        with gzip.open(tmp_path / "good.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        return tmp_path / "good.jsonl.gz"

    @pytest.fixture
    def bad_path(self, tmp_path):
        (tmp_path / "bad.jsonl").write_text(json.dumps(self.rows[0]) + "\n{garbage\n" + json.dumps(self.rows[1]) + "\n")
        return tmp_path / "bad.jsonl"


class TestMbpp(DataLoaderTests):
    config = Mbpp(uri="mbpp", split="validation")

    @pytest.fixture
    def path(self, tmp_path):
        rows = [{"task_id": n, "text": "Add.", "code": "def f(a): ...", "test_list": ["assert f(1)"]} for n in (1, 2)]
        (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path


class TestCodeContests(DataLoaderTests):
    config = CodeContests(uri="contests", languages=("python3", "cpp"), max_solutions=3)

    @pytest.fixture
    def path(self, tmp_path):
        solutions = {"language": [3, 2, 4], "solution": ["print(1)", "int main() {}", "class A {}"]}
        row = {"name": "1_A", "description": "Print.", "solutions": solutions, "incorrect_solutions": solutions}
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "name": "2_B"}) + "\n")
        return tmp_path


class TestText(DataLoaderTests):
    config = TextFiles(uri="data", document_separator="\n\n")

    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo ü\n\nthree")
        return tmp_path


class TestPythonSource(DataLoaderTests):
    config = PythonSource(max_functions=20)

    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / "b.py").write_text('def f(x):\n    """Adds one."""\n    return x + 1\n')
        return tmp_path

    @pytest.fixture
    def bad_path(self, tmp_path):
        good = 'def f(x):\n    """Adds one."""\n    return x + 1\n'
        folder = tmp_path / "bad"
        folder.mkdir()
        for name, text in {"a.py": good, "bad.py": "def (:\n", "c.py": good}.items():
            (folder / name).write_text(text)
        return folder
