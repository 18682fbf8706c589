"""The code blocks of the public projects' READMEs, with placeholders filled in, run as written.

`from task_vectors import ...` is spelt `from src.task_vectors import ...`; `...`, paths, data sets
and the model are those of a small run on the embedded suite. Names come from
mlfoundations/task_vectors and gortizji/tangent_task_arithmetic.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from src import finetune
from src.linearize import LinearizedImageEncoder
from src.modeling import ImageEncoder
from src.task_vectors import LinearizedTaskVector, NonLinearTaskVector, TaskVector
from tests.small_suite import flags, small_config, small_suite


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """checkpoints/ViT-Nano-8 with two tasks fine-tuned in both modes."""
    root = tmp_path_factory.mktemp("readme")
    save = f"--save={root / 'checkpoints' / 'ViT-Nano-8'}"
    with pytest.MonkeyPatch.context() as monkeypatch, small_suite(monkeypatch):
        for mode in ("standard", "linear"):
            assert finetune.main([f"--finetuning-mode={mode}", *flags(root), save]) == 0
        monkeypatch.chdir(root)
        monkeypatch.setattr("sys.argv", ["example.py", f"--cache-dir={root / 'cache'}"])
        yield root


def execute(block: str, **names: Any) -> dict[str, Any]:
    scope = dict(names)
    exec(textwrap.dedent(block), scope)
    return scope


def test_create_a_task_vector(run: Path) -> None:
    scope = execute(
        """
        from src.task_vectors import TaskVector
        task_vector = TaskVector(pretrained_checkpoint, finetuned_checkpoint)
        """,
        pretrained_checkpoint="checkpoints/ViT-Nano-8/zeroshot.pt",
        finetuned_checkpoint="checkpoints/ViT-Nano-8/Emoji/finetuned.pt",
    )
    assert scope["task_vector"].norm() > 0


def test_operators() -> None:
    a, b, c = (TaskVector(vector={"w": torch.tensor([float(i), 1.0])}) for i in (1, 2, 5))
    scope = execute(
        """
        new_task_vector = -task_vector
        negated = new_task_vector
        new_task_vector = task_vector_A + task_vector_B
        added = new_task_vector
        new_task_vector = sum(list_of_task_vectors)
        summed = new_task_vector
        new_task_vector = task_vector_C + task_vector_B - task_vector_A
        """,
        task_vector=a,
        task_vector_A=a,
        task_vector_B=b,
        task_vector_C=c,
        list_of_task_vectors=[a, b, c],
    )
    expected = {"negated": [-1, -1], "added": [3, 2], "summed": [8, 3], "new_task_vector": [6, 1]}
    for name, values in expected.items():
        assert scope[name].vector["w"].tolist() == values


def test_negation_example(run: Path) -> None:
    scope = execute(
        """
        import torch
        from src.task_vectors import TaskVector
        from src.eval import eval_single_dataset
        from src.args import parse_arguments

        # Config
        dataset = 'Emoji'
        model = 'ViT-Nano-8'
        args = parse_arguments()
        args.data_location = '/path/to/data'
        args.model = model
        args.save = f'checkpoints/{model}'
        pretrained_checkpoint = f'checkpoints/{model}/zeroshot.pt'
        finetuned_checkpoint = f'checkpoints/{model}/{dataset}/finetuned.pt'


        # Create the task vector
        task_vector = TaskVector(pretrained_checkpoint, finetuned_checkpoint)
        # Negate the task vector
        neg_task_vector = -task_vector
        # Apply the task vector
        image_encoder = neg_task_vector.apply_to(pretrained_checkpoint, scaling_coef=0.5)
        # Evaluate
        first = eval_single_dataset(image_encoder, dataset, args)
        second = eval_single_dataset(image_encoder, 'Shapes', args)
        """
    )
    assert 0 <= scope["first"]["top1"] <= 1 and 0 <= scope["second"]["top1"] <= 1
    assert isinstance(scope["image_encoder"], ImageEncoder)


def test_addition_example(run: Path) -> None:
    scope = execute(
        """
        import torch
        from src.task_vectors import TaskVector
        from src.eval import eval_single_dataset
        from src.args import parse_arguments

        # Config
        datasets = ['Emoji', 'FashionMNIST']
        model = 'ViT-Nano-8'
        args = parse_arguments()
        args.data_location = '/path/to/data'
        args.model = model
        args.save = f'checkpoints/{model}'
        pretrained_checkpoint = f'checkpoints/{model}/zeroshot.pt'

        # Create the task vectors
        task_vectors = [
            TaskVector(pretrained_checkpoint, f'checkpoints/{model}/{dataset}/finetuned.pt')
            for dataset in datasets
        ]
        # Sum the task vectors
        task_vector_sum = sum(task_vectors)
        # Apply the resulting task vector
        image_encoder = task_vector_sum.apply_to(pretrained_checkpoint, scaling_coef=0.8)
        # Evaluate
        for dataset in datasets:
            print(eval_single_dataset(image_encoder, dataset, args))
        """
    )
    expected = TaskVector(scope["pretrained_checkpoint"], scope["image_encoder"])
    moved = 0.8 * scope["task_vector_sum"]
    assert (expected - moved).norm() < 1e-4 * moved.norm()


def test_tangent_task_vectors(run: Path) -> None:
    folder = "checkpoints/ViT-Nano-8"
    scope = execute(
        f"""
        from src.task_vectors import NonLinearTaskVector, LinearizedTaskVector

        # Non-linear task vector.
        zeroshot_checkpoint = '{folder}/EmojiVal/zeroshot.pt'
        finetuned_checkpoint = '{folder}/EmojiVal/finetuned.pt'

        nonlinear_task_vector = NonLinearTaskVector(zeroshot_checkpoint, finetuned_checkpoint)

        # Tangent task vector.
        linear_zeroshot_checkpoint = '{folder}/EmojiVal/linear_zeroshot.pt'
        linear_finetuned_checkpoint = '{folder}/EmojiVal/linear_finetuned.pt'

        linear_task_vector = LinearizedTaskVector(linear_zeroshot_checkpoint, linear_finetuned_checkpoint)

        task_vector, task_vector_1, task_vector_2 = linear_task_vector, linear_task_vector, linear_task_vector
        pretrained_checkpoint = linear_zeroshot_checkpoint
        linear_pretrained_encoder = linear_zeroshot_checkpoint

        negated_task_vector = -task_vector # Negating a task vector.
        multi_task_vector = 0.5 * task_vector_1 + 0.7 * task_vector_2 # Adding two vectors.
        edited_encoder = task_vector.apply_to(pretrained_checkpoint, scaling_coef=0.8)
        linear_edited_encoder = nonlinear_task_vector.apply_to_linear(linear_pretrained_encoder, scaling_coef=0.8)
        """  # noqa: E501 - as in the README
    )
    assert isinstance(scope["nonlinear_task_vector"], NonLinearTaskVector)
    assert isinstance(scope["multi_task_vector"], LinearizedTaskVector)
    for name in ("edited_encoder", "linear_edited_encoder"):
        assert isinstance(scope[name], LinearizedImageEncoder)
    ratio = scope["multi_task_vector"].norm() / scope["linear_task_vector"].norm()
    assert ratio == pytest.approx(1.2, rel=1e-5)


def test_linearize_any_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    scope = execute(
        """
        from src.linearize import LinearizedModel

        linear_model = LinearizedModel(model) # This object can be treated as any other `nn.Module`.
        """,
        model=model,
    )
    x = torch.randn(5, 3)
    assert torch.allclose(scope["linear_model"](x), model(x), atol=1e-6)


def test_linear_clip(run: Path) -> None:
    args = small_config(run)
    scope = execute(
        """
        from src.linearize import LinearizedImageEncoder
        from src.heads import get_classification_head
        from src.modeling import ImageClassifier

        linear_encoder = LinearizedImageEncoder(args, keep_lang=False) # This object can be treated as any other `ImageEncoder`.

        classification_head = get_classification_head(args, train_dataset)

        linear_clip = ImageClassifier(linear_encoder, classification_head)
        """,  # noqa: E501 - as in the README, whose last line says `image_encoder` for the encoder
        args=args,
        train_dataset="Emoji",
    )
    assert scope["linear_clip"](torch.randn(2, 3, 32, 32)).shape == (2, 9)


def test_our_own_readme_on_task_vectors(run: Path) -> None:
    from tests.test_readme import python_blocks

    scope = execute(python_blocks()[1].replace("MNIST", "Emoji"))
    assert isinstance(scope["encoder"], ImageEncoder)
    assert isinstance(scope["posthoc"], LinearizedImageEncoder)
