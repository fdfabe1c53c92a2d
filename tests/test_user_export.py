"""A user's own network with an involution, our models and timm's under torch's own exporters and tracers.

No call of this project: ``torch.onnx.export`` of both kinds, ``torch.fx``, torchvision's feature extraction, FX
quantisation and ``torch.jit.trace``, each for other batches and sizes than the example's.
"""

import copy
import io
from collections.abc import Callable

import pytest
import timm
import torch
from models_common import fitted
from torch import Tensor, fx, nn

import involution
from involution import Involution2d

SIZES = [(3, 3, 32, 32), (1, 3, 45, 38)]


def own(**options: object) -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Involution2d(16, 3, 2, **options)]
    return nn.Sequential(*layers, nn.Conv2d(16, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def cut(create: Callable[..., nn.Module]) -> nn.Module:
    """A RedNet of stem and first stage: involutions of both kinds, few nodes."""
    model = create("rednet26", num_classes=4, kernel_size=3)
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(256, 4)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "own": own,
    "create_model": lambda: cut(involution.create_model),
    "timm": lambda: cut(timm.create_model),
    "folded": lambda: involution.fold(fitted(cut(involution.create_model), 32)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = MODELS[request.param]()
    return made if request.param == "folded" else fitted(made, 32)


def assert_same(program: Callable[[Tensor], Tensor], model: nn.Module) -> None:
    for size in SIZES:
        images = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-4)


def exported(model: nn.Module, dynamo: bool) -> Callable[[Tensor], Tensor]:
    """The model in onnxruntime, exported for any batch and size."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
    pytest.importorskip("onnxscript", reason="needs the export extra")
    any_size = torch.export.Dim.DYNAMIC
    options = (
        {"dynamic_shapes": ({0: any_size, 2: any_size, 3: any_size},)}
        if dynamo
        else {"input_names": ["images"], "dynamic_axes": {"images": {0: "batch", 2: "height", 3: "width"}}}
    )
    file = io.BytesIO()
    torch.onnx.export(model, (torch.randn(2, 3, 33, 41),), file, dynamo=dynamo, verbose=False, **options)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_onnx_by_the_older_exporter(model):
    assert_same(exported(model, dynamo=False), model)


@pytest.mark.parametrize("model", ["own", "create_model"], indirect=True)
def test_onnx(model):
    assert_same(exported(model, dynamo=True), model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_and_loaded_again_but_not_scripted(model):
    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, torch.randn(2, 3, 33, 41)), file)
    file.seek(0)
    assert_same(torch.jit.load(file), model)
    with pytest.raises(NotImplementedError, match=r"cannot be scripted; torch\.export"):
        torch.jit.script(model)


def test_symbolic_trace_and_torchvision_features(model):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    graph = fx.symbolic_trace(copy.deepcopy(model))
    assert_same(graph, model)
    last = get_graph_node_names(model)[1][-1]
    assert_same(lambda images: create_feature_extractor(model, [last])(images)[last], model)
    images = torch.randn(2, 3, 32, 32)
    graph.train()(images).square().sum().backward()
    assert all(p.grad is not None for p in graph.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_fx_quantisation(model):
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx", reason="torch.ao has gone to torchao")
    mapping = torch.ao.quantization.get_default_qconfig_mapping()
    images = torch.randn(8, 3, 33, 41)
    observed = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (images,))
    with torch.no_grad():
        observed(images)
        quantised = quantize_fx.convert_fx(observed)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        in_integers = [m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.Conv2d)]
        assert len(in_integers) == len(convolutions)  # those of kernel generations too
        for size in SIZES:
            images = torch.randn(size)
            expected = model(images)
            assert (quantised(images) - expected).norm() < 0.25 * expected.norm()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_generation": "linear", "dilation": 2},
        {"kernel_generation": "attention"},
        {"kernel_generation": "position"},
        {"kernel_activation": "softmax"},
    ],
    ids=str,
)
def test_other_kernel_generations(options):
    torch.manual_seed(0)
    model = fitted(own(**options), 32)
    assert_same(fx.symbolic_trace(model), model)
    assert_same(exported(model, dynamo=False), model)
