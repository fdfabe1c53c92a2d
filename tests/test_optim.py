"""Schedules as the paper and the released configuration give them; parameter groups; skipped steps."""

import copy
import math
from functools import partial

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from data import Batch
from involution import create_model
from involution.engine import graphs
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.learner import Learner
from involution.engine.optim import Update, build_schedule, exponential_average, parameter_groups, timm_optimizer
from involution.engine.options import TrainOptions
from involution.engine.tasks.classification import Classification
from involution.weights.run_file import digest

EPOCHS, STEPS = 130, 626  # ImageNet: ceil(1281167 / 2048) steps an epoch


def test_poly_falls_by_a_power_of_what_is_left():
    lr = build_schedule(0.01, 80_000, 372, name="poly", power=0.9, min_lr=1e-4, warmup_epochs=0, warmup_start=0.25)
    assert [lr(0), lr(80_000)] == [0.01, 1e-4]
    assert lr(40_000) == pytest.approx(1e-4 + 0.0099 * 0.5**0.9)


def test_paper_schedule_is_half_a_cosine_from_0_8_to_0():
    lr = build_schedule(0.8, EPOCHS * STEPS, STEPS, name="cosine", warmup_epochs=0, warmup_start=0.25)
    total = EPOCHS * STEPS
    assert lr(0) == 0.8
    assert lr(total // 2) == pytest.approx(0.4)
    assert lr(total // 4) == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)))
    assert lr(total) == pytest.approx(0.0, abs=1e-12)


def test_released_schedule_warms_up_from_a_quarter_for_3130_steps():
    lr = build_schedule(0.8, EPOCHS * STEPS, STEPS, name="cosine", warmup_epochs=5, warmup_start=0.25)
    cosine = build_schedule(0.8, EPOCHS * STEPS, STEPS, name="cosine", warmup_epochs=0, warmup_start=0.25)
    assert lr(0) == pytest.approx(0.25 * 0.8)
    assert lr(3129) < cosine(3129)
    assert lr(3130) == cosine(3130)
    assert all(lr(step) < lr(step + 1) for step in range(0, 3000, 100))


def test_staircase():
    lr = build_schedule(1.0, 120, 10, name="step", warmup_epochs=0, warmup_start=0.1, milestones=[8, 11], gamma=0.1)
    assert [lr(0), lr(79), lr(80), lr(110)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_unknown_schedule():
    with pytest.raises(ValueError, match="'cosine', 'poly' or 'step'"):
        build_schedule(0.1, 20, 10, name="cos", warmup_epochs=0, warmup_start=0.25)
    for wrong in ("abc", ["a"], 3):
        with pytest.raises(ValueError, match=r"schedule\.milestones is .* a list of epochs"):
            build_schedule(0.1, 20, 10, name="step", warmup_epochs=0, warmup_start=0.25, milestones=wrong)


def test_norms_and_biases_are_found_by_their_dimensions():
    model = create_model("rednet26", num_classes=10)
    assert len(parameter_groups(model)) == 1
    decayed, spared = parameter_groups(model, "norm_and_bias")
    assert spared["weight_decay"] == 0
    expected = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {id(p) for p in decayed["params"]} == expected
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_layers_learn_at_rates_by_their_depth():
    model = create_model("rednet26", num_classes=10)
    groups = parameter_groups(model, "norm_and_bias", layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scales) == len(names)
    blocks = [
        f"layer{stage}.{block}.conv1.weight" for stage, count in enumerate((1, 2, 4, 1), 1) for block in range(count)
    ]
    rates = [scales[name] for name in (*blocks, "fc.weight")]
    assert rates == [0.5**i for i in reversed(range(len(rates)))]
    assert scales["fc.bias"] == 1
    theirs = timm.create_model("resnet18")
    ours = {
        names: group["lr_scale"] for group in parameter_groups(theirs, layer_decay=0.5) for names in group["params"]
    }
    expected = {
        p: group["lr_scale"] for group in param_groups_layer_decay(theirs, layer_decay=0.5) for p in group["params"]
    }
    assert ours == expected


OPTIMIZERS = {
    "fused SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "fused AdamW": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.9),
    "timm's lamb": partial(timm_optimizer, name="lamb", lr=0.1, weight_decay=0.1),
    "timm's lion": partial(timm_optimizer, name="lion", lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_weights_and_state_alone(name):
    build = OPTIMIZERS[name]
    parameter, reference = (nn.Parameter(torch.ones(1000)) for _ in range(2))
    update = Update(build([{"params": [parameter]}]))
    plain = build([{"params": [reference]}])
    for value in (float("nan"), 2.0, float("inf"), -1.0):
        parameter.grad = torch.full((1000,), value)
        update(~torch.isfinite(parameter.grad).all())
        if math.isfinite(value):
            reference.grad = torch.full((1000,), value)
            plain.step()
    torch.testing.assert_close(parameter, reference)


@pytest.mark.parametrize("name", ["RMSprop", "timm's lion"])
def test_what_a_gpu_puts_back_after_a_skipped_step(name):
    torch.manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.ones(3)),
    ]
    optimizer = OPTIMIZERS[name]([{"params": parameters}])
    update = Update(optimizer)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = copy.deepcopy([*parameters, optimizer.state_dict()["state"]])
    update.masked(torch.tensor(False))
    after = copy.deepcopy([*parameters, optimizer.state_dict()["state"]])
    assert not torch.equal(before[0], after[0])
    for parameter in parameters:
        parameter.grad.fill_(float("nan"))
    update.masked(torch.tensor(True))
    for state in (after[2], optimizer.state_dict()["state"]):
        for values in state.values():
            values.pop("step", None)  # kept on the CPU: it counts on
    torch.testing.assert_close([*parameters, optimizer.state_dict()["state"]], after, rtol=0, atol=0)


def test_optimizers_that_timm_lacks_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"optimizer\.name=lamp is no optimizer of timm; nearest: lamb"):
        timm_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], name="lamp")
    with pytest.raises(ValueError, match=r"optimizer\.name=adahessian needs second derivatives"):
        timm_optimizer([{"params": [nn.Parameter(torch.ones(1))]}], name="adahessian")


def test_average_follows_weights_and_statistics_with_timms_warm_up():
    model = nn.BatchNorm1d(1)
    average = exponential_average(model, 0.7)
    expected = None
    for step in range(1, 12):
        with torch.no_grad():
            model.weight.fill_(step)
            model.running_mean.fill_(-step)
        average.update(model, step)
        decay = min(0.7, 1 - step ** (-2 / 3))  # 0 at the first step: the random start counts for nothing
        expected = step if expected is None else decay * expected + (1 - decay) * step
        assert average.module.weight.item() == pytest.approx(expected)
        assert average.module.running_mean.item() == pytest.approx(-expected)
    assert 1 - 11 ** (-2 / 3) > 0.7, "the decay that was asked for has been reached"


def learner(schedule) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    options = TrainOptions(
        precision="fp32", compile=False, cuda_graphs=False, clip_grad_norm=None, ema_decay=0.9999, max_bad_steps=2
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=schedule(0), momentum=0.9, fused=True)
    return Learner(model, Classification(), optimizer, schedule, options, World(0, 1, torch.device("cpu")))


def test_a_run_resumed_after_its_last_step_saves_what_it_loaded():
    """Stopped between the last step and its evaluation: the learning rate of that step stays, the average goes on."""
    cosine = build_schedule(0.1, 1, 4, name="cosine", warmup_epochs=0, warmup_start=0.25)
    batch = Batch(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 1, 0]), 4)
    untouched = learner(cosine)
    for step in range(4):
        if step == 3:
            between = copy.deepcopy(untouched.state_dict())
        untouched.step(step, [batch], 1, 4)
    last = untouched.state_dict()
    assert [group["lr"] for group in last["optimizer"]["param_groups"]] == [cosine(3)]
    resumed = learner(cosine)
    resumed.load_state_dict(between)
    resumed.step(3, [batch], 1, 4)
    evaluated = learner(cosine)
    evaluated.load_state_dict(copy.deepcopy(last))
    assert digest(resumed.state_dict()) == digest(evaluated.state_dict()) == digest(last)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_momenta_lie_in_memory_as_their_weights_do_now(optimizer):
    """Saved in channels_last, loaded without: fused optimizers would mix up their places, and on GPUs refuse them."""
    arguments = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}

    def run(formats):
        torch.manual_seed(0)
        model, state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), None
        images = torch.randn(3, 4, 3, 8, 8)
        for step, form in enumerate(formats):
            model = copy.deepcopy(model).to(memory_format=form)
            options = TrainOptions(
                precision="fp32", compile=False, cuda_graphs=False, clip_grad_norm=None, ema_decay=None, max_bad_steps=2
            )
            made = optimizer(model.parameters(), lr=0.1, fused=True, **arguments)
            world = World(0, 1, torch.device("cpu"))
            one = Learner(model, Classification(), made, lambda _: 0.1, options, world)
            if state is not None:
                one.load_state_dict(state)
            one.step(step, [Batch(images[step], torch.tensor([0, 1, 1, 0]), 4)], 1, 4)
            state = copy.deepcopy(one.state_dict())
        return [p.detach().contiguous() for p in model.parameters()]

    last, first = torch.channels_last, torch.contiguous_format
    torch.testing.assert_close(run([last, first, last]), run([first, first, first]), rtol=1e-5, atol=1e-6)


def learner_with(momentum: float = 0.9, lr: float = 0.1, **changed) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    values = {"precision": "fp32", "compile": False, "cuda_graphs": False}
    values |= {"clip_grad_norm": None, "ema_decay": None, "max_bad_steps": 9}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, fused=True)
    world = World(0, 1, torch.device("cpu"))
    return Learner(model, Classification(), optimizer, lambda _: lr, TrainOptions(**values | changed), world)


def steps_of(one: Learner, numbers: range, scale: float = 1.0) -> list[float]:
    """The losses of steps, each on images of its own."""
    losses = []
    for step in numbers:
        torch.manual_seed(100 + step)
        batch = Batch(scale * torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]), 4)
        losses.append(one.step(step, [batch], 1, 4)[0][0].item())
    return losses


def test_precision_is_the_autocast_of_a_step():
    exact, half = (steps_of(learner_with(precision=precision), range(2)) for precision in ("fp32", "bf16"))
    assert exact != half
    assert exact == pytest.approx(half, rel=2e-2)


def test_a_clipped_step_is_no_longer_than_the_limit():
    free, clipped = learner_with(momentum=0, lr=1), learner_with(momentum=0, lr=1, clip_grad_norm=0.01)
    before = [p.detach().clone() for p in free.parameters]
    for one in (free, clipped):
        steps_of(one, range(1), scale=10)
    free, clipped = (
        torch.cat([(p - q).flatten() for p, q in zip(one.parameters, before)]).norm().item() for one in (free, clipped)
    )
    assert free > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_a_resumed_step_in_fp16_has_the_loss_scale_that_was_saved():
    untouched = learner_with(precision="fp16")
    untouched.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    steps_of(untouched, range(2))
    resumed = learner_with(precision="fp16")
    resumed.load_state_dict(copy.deepcopy(untouched.state_dict()))
    assert resumed.scaler.get_scale() == 2.0**10
    for one in (untouched, resumed):
        steps_of(one, range(2, 4))
    assert untouched.scaler.get_scale() == 2.0**11, "it has grown, by the count that was saved too"
    assert digest(resumed.state_dict()) == digest(untouched.state_dict())


def test_the_configuration_has_precedence_over_the_saved_optimizer_and_an_average_has_to_be_there():
    saved = learner_with(momentum=0.9)
    steps_of(saved, range(2))
    resumed = learner_with(momentum=0.5)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert resumed.optimizer.param_groups[0]["momentum"] == 0.5
    kept = [saved.optimizer.state[p]["momentum_buffer"] for p in saved.parameters]
    assert all(torch.equal(resumed.optimizer.state[p]["momentum_buffer"], k) for p, k in zip(resumed.parameters, kept))
    with pytest.raises(UserError, match=r"train\.ema_decay is set, but the checkpoint to resume has no average"):
        learner_with(ema_decay=0.99).load_state_dict(saved.state_dict())


def test_gradients_that_a_replay_would_overwrite_are_kept():
    """A CUDA graph's gradients lie where the next replay writes; two parameters may be given the same."""
    one = learner_with()
    weight, bias = one.parameters
    static = torch.ones_like(weight), torch.ones_like(bias)
    weight.grad, bias.grad = (gradient.detach() for gradient in static)
    one._keep_gradients(1)
    assert weight.grad.data_ptr() == static[0].data_ptr()  # alone and apart: used and gone before the next
    one._keep_gradients(2)
    assert weight.grad.data_ptr() != static[0].data_ptr()
    same = nn.Parameter(torch.zeros_like(weight))
    one.parameters, weight.grad, same.grad = [weight, same], static[0].detach(), static[0].detach()
    one._keep_gradients(1)
    assert weight.grad.data_ptr() != same.grad.data_ptr()


@pytest.fixture
def capture(monkeypatch):
    """`graphs._Capture` without a GPU: torch's own part in it does nothing, or fails as where a capture is broken."""
    whole = torch.cuda.graph
    monkeypatch.setattr(whole, "__init__", lambda self, graph, **options: vars(self).update(options))
    monkeypatch.setattr(whole, "__enter__", lambda self: self)

    def end(self, *_):
        if self.broken:
            raise RuntimeError("capture ended before")

    monkeypatch.setattr(whole, "__exit__", end)
    return lambda broken: graphs._Capture(None, broken=broken)


@pytest.mark.parametrize("broken", [True, False])
@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (
            RuntimeError("not while capturing\nsee above"),
            UserError,
            r"captured \(not while capturing\); set it to false",
        ),
        (AssertionError(), UserError, r"captured \(AssertionError\)"),
        (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError, "no room"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_a_capture_is_told(capture, broken, raised, expected, message):
    def interrupted():
        with capture(broken):
            try:
                {}["cache"]
            except KeyError:  # handled, and not why
                raise raised  # noqa: B904

    with pytest.raises(expected, match=message):
        interrupted()


def test_a_capture_that_is_broken_unseen_is_told(capture):
    with pytest.raises(UserError, match="capture ended before"), capture(True):
        pass
    with capture(False):
        pass


def test_a_captured_backward_is_outside_of_autocast(monkeypatch):
    """As without graphs: what a model computes in fp32 within autocast has its gradients in fp32."""

    class Island(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    captures, x = [], torch.randn(8, 64)

    def captured(called, images, allow_unused_input):
        assert not torch.is_autocast_enabled("cpu")
        captures.append([g.clone() for g in torch.autograd.grad(called(*images).sum(), list(called.parameters()))])
        return called

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", captured)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    model = nn.Sequential(Island(64, 64), nn.Linear(64, 64))
    replayed = graphs.Captured(model)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [model(x), replayed(x), replayed(x), replayed(x[:4])]
    assert len(captures) == 2, "one for each shape"
    assert [out.dtype for out in outputs] == 4 * [torch.bfloat16]
    gradients = torch.autograd.grad(outputs[0].sum(), list(model.parameters()))
    for one, other in zip(gradients, captures[0], strict=True):
        assert torch.equal(one, other)


def test_a_capture_leaves_other_threads_alone(monkeypatch):
    whole = torch.cuda.graph
    monkeypatch.setattr(whole, "__init__", lambda self, graph, **options: vars(self).update(options))  # wants a GPU

    def interrupted():
        with graphs._others_go_on():
            assert torch.cuda.graph(None, pool=1, capture_error_mode="global").capture_error_mode == "thread_local"
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert torch.cuda.graph is whole
