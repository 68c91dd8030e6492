"""The shape-tracing forward: what it records, that it leaves the model alone, and what it does when a forward fails."""

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from siman_convert.errors import InputError
from siman_convert.trace import Trace, image_readers, shortcut_convs, trace


class InPlace(nn.Module):
    """Writes through views, so that the producer of a tensor changes after the fact."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 4, *x.shape[2:], device=x.device)
        out[:, :2] = self.a(x)[:, :2]
        out.relu_()
        return self.b(out)


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.sum()) == 0 else x


class Caches(nn.Module):
    """Keeps a table on itself, as attention with position biases does; a stand-in there would poison the model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.tables: dict[str, Tensor] = {}
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.tables["bias"] = self.conv.weight.sum(dim=(1, 2, 3))
        return self.conv(x) + self.last.view(-1, 1, 1)


def kinds(graph: Trace) -> list[str]:
    return [node.kind for node in graph.nodes]


def test_shapes_and_calls() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), shared, nn.MaxPool2d(2), shared)
    graph = trace(model, (3, 32, 48))
    assert [(c.input_shape, c.output_shape) for c in graph.calls["0"]] == [((1, 3, 32, 48), (1, 8, 16, 24))]
    assert [c.input_shape for c in graph.calls["2"]] == [(1, 8, 16, 24), (1, 8, 8, 12)]
    assert kinds(graph) == ["input", "conv", "activation", "conv", "pool", "conv"]
    assert [node.inputs for node in graph.nodes] == [(), (0,), (1,), (2,), (3,), (4,)]
    assert [node.module for node in graph.nodes] == ["", "0", "1", "2", "3", "2"]
    assert graph.nodes[1].macs == 8 * 16 * 24 * 27


def test_resnet18_graph_has_its_parts() -> None:
    found = kinds(trace(timm.create_model("resnet18"), (3, 224, 224)))
    assert [found.count(kind) for kind in ("conv", "norm", "activation", "add", "linear")] == [20, 20, 17, 8, 1]


def test_writes_through_views_are_followed() -> None:
    graph = trace(InPlace(), (3, 8, 8))
    last = graph.nodes[-1]
    assert (last.kind, last.module) == ("conv", "b")
    assert graph.nodes[last.inputs[0]].op == "relu_"
    assert image_readers(graph) == {"a"}  # b depends on the image only through a


@pytest.mark.parametrize("training", [True, False])
def test_model_is_untouched(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), Caches())
    model[3].conv = nn.Conv2d(8, 4, 3)
    model.train(training)
    model[1].eval()
    tensors = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = [{k: v for k, v in vars(m).items() if not isinstance(v, dict)} for m in model.modules()]
    trace(model, (3, 16, 16))
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is tensors[name][0]
        assert torch.equal(tensor, tensors[name][1])
    assert [{k: v for k, v in vars(m).items() if not isinstance(v, dict)} for m in model.modules()] == attributes
    assert model[3].tables == {}
    assert model[3].last is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_forward_that_looks_at_values_runs_for_real() -> None:
    graph = trace(LooksAtValues(), (3, 8, 8))
    assert graph.calls["conv"][0].output_shape == (1, 4, 6, 6)
    with torch.device("meta"), pytest.raises(InputError, match="LooksAtValues cannot run on an image of 3x8x8"):
        trace(LooksAtValues(), (3, 8, 8))  # no real weights, nothing to fall back on


def test_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert trace(model, (3, 8, 8)).calls["0"][0].output_shape == (1, 4, 6, 6)


def test_half_precision_model() -> None:
    assert trace(nn.Conv2d(3, 4, 3).to(torch.bfloat16), (3, 8, 8)).calls[""][0].output_shape == (1, 4, 6, 6)


@pytest.mark.parametrize("size", [(3, 4, 4), (1, 32, 32)])
def test_wrong_input_size_is_one_line(size: tuple[int, int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten(), nn.Linear(4 * 28 * 28, 2))
    with pytest.raises(InputError, match="Sequential cannot run on an image of") as caught:
        trace(model, size)
    assert "\n" not in str(caught.value)


def test_parameters_read_outside() -> None:
    class Borrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.conv(x), self.conv.weight)

    assert trace(Borrows(), (3, 4, 4)).read_outside == {"conv"}
    assert trace(timm.create_model("resnet18"), (3, 64, 64)).read_outside == frozenset()


def test_shortcut_needs_fork_convolution_and_nonlinearity() -> None:
    class Two(nn.Module):
        def __init__(self, *main: nn.Module) -> None:
            super().__init__()
            self.stem, self.main, self.side = nn.Conv2d(3, 4, 1), nn.Sequential(*main), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.main(x) + self.side(x)

    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert shortcut_convs(trace(Two(conv, nn.ReLU(), nn.Conv2d(4, 4, 1)), (3, 8, 8))) == {"side"}
    assert shortcut_convs(trace(Two(conv), (3, 8, 8))) == frozenset()  # parallel linear branches
    assert shortcut_convs(trace(Two(nn.ReLU()), (3, 8, 8))) == frozenset()  # nothing learned beside it
    assert shortcut_convs(trace(Two(), (3, 8, 8))) == frozenset()  # an identity beside a convolution


def test_recurrent_layer_is_not_unrolled() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm = nn.Conv2d(3, 4, 1), nn.LSTM(64, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.lstm(self.conv(x).flatten(2))[0]
            return result

    assert len(trace(Recurrent(), (3, 8, 8)).nodes) < 20
