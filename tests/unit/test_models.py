"""Models by name: their sizes, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedmpi.core.vector import flatten, num_trainable
from fedmpi.errors import ConfigError, ModelError
from fedmpi.models import MODELS, build_model, check_model_name

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "count"), [("2nn", 199_210), ("cnn", 1_663_370), ("cnn_fedlab", 582_026), ("logistic", 7_850)]
)
def test_parameter_counts_on_mnist(name: str, count: int) -> None:
    assert num_trainable(build_model(name, MNIST, 10)) == count


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [MNIST, CIFAR, (1, 16, 20)])
def test_models_take_the_pictures_they_were_built_for(name: str, shape: tuple[int, ...]) -> None:
    model = build_model(name, shape, 7)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("name", "shape", "smallest"),
    [
        ("cnn", (784,), 4), ("cnn", (28, 28), 4), ("cnn", (1, 3, 28), 4), ("cnn_fedlab", (1, 8, 8), 16),
        ("cnn_fedlab", (64,), 16), ("cnn", (28, 28, 1), 4), ("cnn_fedlab", (1, 28, 15), 16),
    ],
)  # fmt: skip
def test_pictures_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], smallest: int) -> None:
    with pytest.raises(ModelError) as caught:
        build_model(name, shape, 10)
    assert str(caught.value) == (
        f"--model {name} wants images (channels, height, width) of at least {smallest}x{smallest}, got samples of shape"
        f" {shape}; 2nn and logistic fit any shape"
    )


@pytest.mark.parametrize(("name", "smallest"), [("cnn", 4), ("cnn_fedlab", 16)])
def test_the_smallest_picture_works(name: str, smallest: int) -> None:
    shape = (1, smallest, smallest)
    assert build_model(name, shape, 3)(torch.zeros(1, *shape)).shape == (1, 3)


@pytest.mark.parametrize("name", ["2nn", "logistic"])
def test_flat_samples_fit_the_dense_models(name: str) -> None:
    assert build_model(name, (30,), 4)(torch.zeros(5, 30)).shape == (5, 4)


@pytest.mark.parametrize("name", ["resnet", "", ":net", "my_module:", "cnn "])
def test_unknown_names_are_refused_without_importing(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_model_name(name)
    assert str(caught.value) == f"--model must be 2nn, cnn, cnn_fedlab, logistic or module:function, got {name}"


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the working folder."""
    name = f"own_models_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n"
        "def net(input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], num_classes))\n"
        "def wrong(input_shape, num_classes):\n"
        "    return [1]\n"
        "size = 3\n"
        "def needs_a_width(width=16):\n"
        "    return nn.Linear(width, width)\n"
        "def two_defaults(width=16, depth=2):\n"
        "    return nn.Linear(width, width)\n"
        "def defaults(input_shape=(3,), num_classes=2, bias=True):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], num_classes, bias))\n"
        "made = defaults()\n"
        "class Fits(nn.Linear):\n"
        "    def __init__(self, input_shape, num_classes):\n"
        "        super().__init__(input_shape[0], num_classes)\n"
        "class Unfit(nn.Module):\n"
        "    pass\n"
        "def shared(input_shape, num_classes):\n"
        "    return made\n"
    )
    (tmp_path / f"{name}_needy.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return name


def test_a_users_function_is_found_in_the_working_folder(own_module: str) -> None:
    model = build_model(f"{own_module}:net", (6,), 3)
    assert isinstance(model, nn.Sequential)
    assert num_trainable(model) == 21


def test_what_is_wrong_with_a_users_function_is_said(own_module: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--model {own_module}:nett: module '{own_module}' has no 'nett'$"):
        build_model(f"{own_module}:nett", (6,), 3)
    with pytest.raises(ConfigError, match=r"^--model .*:size: 'size' is not a function \(input_shape, num_classes\)"):
        build_model(f"{own_module}:size", (6,), 3)
    with pytest.raises(ModelError, match=r"^--model .*:wrong must return a torch.nn.Module, got a list$"):
        build_model(f"{own_module}:wrong", (6,), 3)
    for missing in ("not_here", f"{own_module}.deeper"):
        with pytest.raises(
            ConfigError, match=rf"^--model {missing}:net: there is no module '{missing}' here or in PYTHONPATH$"
        ):
            build_model(f"{missing}:net", (6,), 3)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        build_model(f"{own_module}_needy:net", (6,), 3)


def test_a_class_a_callable_with_defaults_and_a_file_are_functions_too(own_module: str, tmp_path: Path) -> None:
    for name in (
        f"{own_module}:Fits",
        f"{own_module}:defaults",
        f"./{own_module}.py:net",
        f"{tmp_path}/{own_module}.py:net",
    ):
        assert num_trainable(build_model(name, (6,), 3)) == 21, name


def test_a_file_below_home_is_found(own_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert num_trainable(build_model(f"~/{own_module}.py:net", (6,), 3)) == 21


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("Unfit", r": Unfit\(\(6,\), 3\) fails: TypeError: .*takes 1 positional argument but 3 were given$"),
        ("needs_a_width", r"must take \(input_shape, num_classes\): .*too many positional arguments"),
        ("two_defaults", r": two_defaults\(\(6,\), 3\) fails: TypeError: .*\(own_models.*\.py, line \d+\)$"),
        ("made", r": 'made' is not a function \(input_shape, num_classes\) -> Module but a Sequential$"),
    ],
)
def test_a_callable_that_does_not_fit_is_one_line(own_module: str, function: str, said: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=f"^--model {own_module}:{function}.*{said}") as caught:
        build_model(f"{own_module}:{function}", (6,), 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^--model \./nowhere\.py:net: there is no file /"):
        build_model("./nowhere.py:net", (6,), 3)


def test_a_function_that_returns_one_module_twice_is_found(own_module: str) -> None:
    """On a lone rank the server and the trainer would have one model between them."""
    flatten(build_model(f"{own_module}:shared", (6,), 3))
    twin = nn.Sequential(build_model(f"{own_module}:shared", (6,), 3), nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"'0\.1\.weight' is part of two models"):
        flatten(twin)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_ours_are_float32_on_cpu_whatever_the_defaults(name: str) -> None:
    torch.manual_seed(0)
    usual = build_model(name, MNIST, 10)
    torch.manual_seed(0)
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            model = build_model(name, MNIST, 10)
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), usual.parameters(), strict=True))
