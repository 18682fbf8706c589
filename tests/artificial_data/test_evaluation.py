from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score
from torch import Tensor, nn

import src.evaluation
from tangent_arithmetic.arithmetic.task_vectors import LinearizedTaskVector, TaskVector
from tangent_arithmetic.artificial_data import evaluation
from tangent_arithmetic.artificial_data.edits import Edits
from tangent_arithmetic.artificial_data.evaluation import accuracy, eval_single_dataset, finite
from tangent_arithmetic.artificial_data.experiment import Study, prepare
from tangent_arithmetic.artificial_data.presets import Preset
from tangent_arithmetic.artificial_data.workspace import Workspace
from tangent_arithmetic.encoders.mlp import BackBone, Head
from tangent_arithmetic.runtime.errors import MissingFileError
from tangent_arithmetic.tangent.linearized import LinearizedModel


@pytest.fixture(scope="module")
def made(tiny: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where data and models were made."""
    folder = tmp_path_factory.mktemp("made")
    prepare(Workspace(folder))
    return folder


@pytest.fixture
def study(made: Path, workspace: Workspace) -> Study:
    """The study of a copy of them."""
    shutil.copytree(made, workspace.root, dirs_exist_ok=True)
    return Study(workspace)


def test_accuracy_counts_rows_that_are_not_finite_as_wrong() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [float("nan"), 9.0], [float("inf"), 0.0]])
    assert accuracy(logits, torch.tensor([0, 0, 0, 0])) == 0.25
    assert accuracy(logits[:3], torch.tensor([0, 0, 0])) == 1 / 3  # not to float32 alone
    assert finite(logits).tolist() == [True, True, False, False]


def test_one_data_set(workspace: Workspace, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = BackBone.load(workspace.backbone("dataset2"))
    head = Head.load(workspace.head("dataset2"))
    for split in ("train", "val", "test"):
        x, y = workspace.data("dataset2", split)
        expected = accuracy_score(y, head(backbone(x)).argmax(1))
        found = eval_single_dataset(backbone, "dataset2", split=split, workspace=workspace)
        assert isinstance(found, float) and found == pytest.approx(expected, abs=1e-6)
    assert found > 0.5  # guessing: 1/3
    monkeypatch.chdir(workspace.root)  # as in the public README
    monkeypatch.setattr(evaluation, "ROWS", 7)
    assert src.evaluation.eval_single_dataset(backbone, "dataset2", "cpu") == found
    other = eval_single_dataset(backbone, "dataset2", "cpu", head=Head(6, 3))
    assert 0 <= other <= 1


def test_what_is_missing_names_the_command(workspace: Workspace, study: Study) -> None:
    workspace.head("dataset2").unlink()
    with pytest.raises(MissingFileError, match=r"Make it with: .*finetune --dataset=dataset2"):
        eval_single_dataset(study.base, "dataset2", workspace=workspace)


@pytest.mark.parametrize("mode", ["standard", "posthoc", "linear"])
def test_edits_are_what_the_vectors_give(study: Study, mode: str) -> None:
    edits = study.edits(mode)
    coefs = {"dataset2": 0.7, "dataset3": -0.4}
    found = edits.accuracies(coefs, ["dataset2", "dataset1"], ["val", "test"])
    tau = 0.7 * edits.vectors["dataset2"] - 0.4 * edits.vectors["dataset3"]
    apply = tau.apply_to if mode == "standard" else tau.apply_to_linear
    model = apply(study.workspace.backbone())
    assert isinstance(model, BackBone if mode == "standard" else LinearizedModel)
    for (dataset, split), value in found.items():
        expected = eval_single_dataset(
            model, dataset, head=study.head(dataset, mode), split=split, workspace=study.workspace
        )
        rows = len(study.data(dataset, split)[1])
        assert value == pytest.approx(expected, abs=1.5 / rows)  # sums in another order: one row


def test_linear_models_pass_over_the_data_once(study: Study) -> None:
    edits = study.edits("linear")
    before = edits.accuracies({"dataset2": 1.0}, ["dataset2"], ["test"])
    edits.data = lambda dataset, split: (torch.empty(0), study.data(dataset, split)[1])
    assert edits.accuracies({"dataset2": 1.0}, ["dataset2"], ["test"]) == before
    assert edits.accuracies({}, ["dataset2"], ["test"]) != before


def test_edits_of_a_model_whose_expansion_is_known() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.w**2 * x

    x = torch.tensor([[1.0], [1.0]])
    seen: list[Tensor] = []

    def head(_: str) -> nn.Module:
        class Spy(nn.Module):
            def forward(self, features: Tensor) -> Tensor:
                seen.append(features)
                return torch.cat([features, -features], dim=1)

        return Spy()

    vectors = {
        name: TaskVector(vector={"w": torch.tensor([value])})
        for name, value in {"a": 1.0, "b": -2.0}.items()
    }
    for linear, expected in ((False, (3 + 2 - 1) ** 2), (True, 9 + 2 * 3 * (2 - 1))):
        edits = Edits(Square(), vectors, linear, head, lambda *_: (x, torch.tensor([0, 1])))
        assert edits.accuracies({"a": 2.0, "b": 0.5}, ["d"], ["test"]) == {("d", "test"): 0.5}
        assert seen[-1].tolist() == [[expected], [expected]]


def test_vectors_of_backbones(study: Study, tmp_path: Path) -> None:
    """Paths, modules, state dicts and linear models are the same vector."""
    workspace = study.workspace
    paths = workspace.backbone(), workspace.backbone("dataset2", "linear")
    theta0, theta = BackBone.load(paths[0]), BackBone.load(paths[1])
    linear = LinearizedModel(theta, theta0)
    vector = TaskVector(*paths)
    for other in (
        TaskVector(theta0, theta),
        TaskVector(theta0.state_dict(), theta.state_dict()),
        TaskVector(str(paths[0].with_suffix(".pth")), linear),
    ):
        assert (other - vector).norm() == 0
        assert other.base_hash == vector.base_hash
    x = workspace.data("dataset2", "test")[0]
    tangent = LinearizedTaskVector(*paths).apply_to(paths[0], scaling_coef=1.0)
    again = vector.apply_to_linear(theta0)
    with torch.no_grad():
        torch.testing.assert_close(tangent(x), linear(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again(x), linear(x), rtol=1e-4, atol=1e-5)
        moved = (0.5 * vector).apply_to_linear(linear)  # from theta, expanded at theta0
        f0, d = linear.primal_and_tangent(x)
        torch.testing.assert_close(moved(x), f0 + 1.5 * d, rtol=1e-4, atol=1e-4)
        standard = vector.apply_to(linear, -1.0)  # theta - tau = theta0, not linearised
        torch.testing.assert_close(standard(x), theta0(x), rtol=1e-4, atol=1e-5)
    assert isinstance(standard, BackBone) and standard.transition.weight.requires_grad


def test_public_checkpoints_are_read(study: Study, tmp_path: Path) -> None:
    """Their format: the backbone's weights, the head's, the optimizer's and settings."""
    theta0, head = study.base, nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3))
    for name, module in (("mlp_model", theta0), ("mlp_model_dataset2", BackBone(12))):
        content = {
            "state_dict": module.state_dict(),
            "head_state_dict": head.state_dict(),
            "optimizer_state_dict": torch.optim.Adam(module.parameters()).state_dict(),
            "model_config": {"input_dim": 12, "output_dim": 3},
            "training_config": {"learning_rate": 1e-4, "batch_size": 32, "num_epochs": 50},
            "training_history": {"loss": [1.0]},
        }
        torch.save(content, tmp_path / f"{name}.pth")
    vector = TaskVector(tmp_path / "mlp_model.pth", tmp_path / "mlp_model_dataset2.pth")
    moved = vector.apply_to(tmp_path / "mlp_model.pth", 0.0)
    assert isinstance(moved, BackBone) and vector.norm() > 0
    x = study.data("dataset2", "test")[0]
    assert torch.equal(moved(x), theta0(x))
