"""The detectors: what the paper's differ in from torchvision's, images without objects, precision, sizes."""

import pytest
import torch
from torch.nn.functional import grid_sample
from torchvision.ops import MultiScaleRoIAlign, roi_align

from involution import create_model
from involution.dense.anchors import Anchors, LowQualityMatcher
from involution.dense.images import Preparation
from involution.dense.masks import mask_targets, paste_masks
from involution.dense.proposals import SIZES, STRIDES
from involution.dense.roi_align import RoIAlign

CONVOLUTION, INVOLUTION = {"neck": "convolution"}, {"neck": "involution", "head": "involution"}


def detector(name, backbone="rednet26", small=True, **options):
    """A small one with fewer samples an image, for speed alone."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, backbone={"name": backbone}, min_size=96, max_size=160, **options)
    if small and name != "retinanet":
        model.proposals._pre_nms_top_n = model.proposals._post_nms_top_n = {"training": 40, "testing": 40}
        model.regions.fg_bg_sampler.batch_size_per_image = 24
    return model.train()


def target(boxes, size=(72, 100)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": boxes, "labels": torch.arange(len(boxes)), "masks": masks}


IMAGES = [torch.randint(256, (3, 72, 100), dtype=torch.uint8), torch.rand(3, 101, 75)]
NOTHING = [target([]), target([], (101, 75))]
OBJECTS = [target([[10, 10, 60, 70], [20.0, 30, 20, 40]]), target([], (101, 75))]  # the second box has no area


@pytest.mark.parametrize(
    ("name", "options"),
    [("retinanet", {"neck": "involution"}), ("faster_rcnn", CONVOLUTION), ("mask_rcnn", INVOLUTION)],
)
def test_losses_gradients_and_results(name, options):
    """Complaints 4 (odd sizes), 7 (a box without area), 8 (no objects: finite losses, gradients for all parameters)."""
    model = detector(name, **options)
    for targets in (NOTHING, OBJECTS):
        losses = model(IMAGES, targets)
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        assert (losses["loss_box_reg"] > 0) == (targets is OBJECTS)
        model.zero_grad()
        sum(losses.values()).backward()
        lost = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert lost == []
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.inference_mode():
        results = model.eval()(IMAGES)
    for image, result in zip(IMAGES, results):
        height, width = image.shape[1:]
        assert result["boxes"].shape == (len(result["scores"]), 4)
        assert (result["boxes"] >= 0).all()
        assert (result["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert set(result["labels"].tolist()) <= set(range(7))
        assert (result["scores"].diff() <= 0).all()
        if name == "mask_rcnn":
            assert len(result["scores"])  # untrained, and so unsure
            assert result["masks"].shape == (len(result["scores"]), 28, 28)


def test_nothing_at_all_proposed():
    """Proposals may all be empty: then there is nothing to average over."""
    model = detector("mask_rcnn", **INVOLUTION)
    model.proposals.min_size = 1e9
    losses = model(IMAGES, NOTHING)
    assert losses["loss_classifier"] == losses["loss_mask"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert [len(result["boxes"]) for result in model.eval()(IMAGES)] == [0, 0]


def test_autocast_leaves_boxes_in_float32():
    seen = {}
    model = detector("faster_rcnn", **INVOLUTION)
    model.proposals.register_forward_hook(lambda module, args, out: seen.update(features=args[1], boxes=out[0]))
    model.proposals.anchor_generator.register_forward_hook(lambda module, args, out: seen.update(anchors=out))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(IMAGES, OBJECTS)
    assert seen["features"]["P2"].dtype == torch.bfloat16
    assert {x.dtype for x in (*seen["boxes"], *seen["anchors"], *losses.values())} == {torch.float32}


def test_anchors_have_exact_strides_and_sizes():
    """At 800 pixels torchvision puts P6's anchors 61 pixels apart, and rounds them."""
    anchors = Anchors(SIZES, STRIDES)
    grid = anchors.grid([torch.empty(1, 1, -(-800 // s), -(-1344 // s), dtype=torch.bfloat16) for s in STRIDES])
    for boxes, stride, (size,) in zip(grid, STRIDES, SIZES):
        boxes = boxes.view(-(-800 // stride), -(-1344 // stride), 3, 4)
        assert (boxes[1:, :, :, 1] - boxes[:-1, :, :, 1] - stride).abs().max() < 1e-3
        assert (boxes[:, 1:, :, 0] - boxes[:, :-1, :, 0] - stride).abs().max() < 1e-3
        width, height = (boxes[0, 0, :, 2:] - boxes[0, 0, :, :2]).T
        assert torch.allclose((width * height).sqrt(), torch.full((3,), float(size)))
        assert torch.allclose(height / width, torch.tensor([0.5, 1, 2]))


def test_anchors_of_retinanet_follow_their_scale():
    models = [create_model("retinanet", backbone="rednet26", **options) for options in ({}, {"anchor_scale": 2})]
    paper, half = (model.retina.anchors.cells for model in models)
    assert torch.equal(paper, 2 * half)
    width, height = (paper[0, :, 2:] - paper[0, :, :2]).T  # of the finest level: 32 pixels and thirds of an octave more
    sizes = (width * height).sqrt().view(3, 3)  # ratios, sizes
    assert torch.allclose(sizes, (32 * 2 ** (torch.arange(3) / 3)).expand(3, 3))


def test_regions_are_pooled_at_the_strides_of_their_levels_for_any_image():
    """torchvision's pooling infers scales from its first images: wrong ones from 33 pixels, and keeps them."""
    pool = RoIAlign(7)
    small = {f"P{i}": torch.randn(1, 256, 64 >> i, 64 >> i) for i in range(2, 6)}
    pool(small, [torch.tensor([[1.0, 1, 20, 30]])])
    levels = {f"P{i}": torch.randn(1, 256, 512 >> i, 512 >> i) for i in range(2, 6)}
    boxes = torch.tensor([[10.0, 20, 90, 100], [0, 0, 500, 480], [30, 30, 250, 290]])
    found = pool(levels, [boxes])
    for box, level, got in zip(boxes, ("P2", "P5", "P4"), found):
        rois = torch.cat([torch.zeros(1), box])[None]
        wanted = roi_align(levels[level], rois, (7, 7), 1 / 2 ** int(level[1]), 0, aligned=True)
        assert torch.equal(got, wanted[0])
    theirs = MultiScaleRoIAlign(list(levels), 7, 2)(levels, [boxes], [(512, 512)])
    assert torch.equal(RoIAlign(7, aligned=False, samples=2)(levels, [boxes]), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("channels", "n"), [(20, 30), (2, 30), (20, 0)])
def test_regions_and_their_gradients_are_the_same_bits_on_all_cores(dtype, channels, n):
    torch.manual_seed(0)
    levels = {f"P{i}": torch.randn(2, channels, 128 >> i, 192 >> i, dtype=dtype) for i in range(2, 6)}
    corners = torch.rand(2, n, 2) * 120
    boxes = list(torch.cat([corners, corners + torch.rand(2, n, 2) ** 3 * 400], 2))

    def results(threads):
        torch.set_num_threads(threads)
        inputs = {name: x.to(memory_format=torch.channels_last).requires_grad_() for name, x in levels.items()}
        pooled = RoIAlign(7)(inputs, boxes)
        assert pooled.dtype == dtype
        assert torch.get_num_threads() == threads
        return pooled.detach(), *torch.autograd.grad(pooled.square().sum(), list(inputs.values()))

    wanted = results(1)
    for found in results(3), results(2):
        assert all(map(torch.equal, found, wanted))
    with torch.inference_mode():
        assert torch.equal(RoIAlign(7)(levels, boxes), wanted[0])


def test_regions_compile_in_one_graph():
    torch.set_num_threads(2)
    x, rois = torch.randn(1, 4, 20, 20), torch.tensor([[0.0, 2, 3, 15, 17]])
    compiled = torch.compile(RoIAlign(7)._pool, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, rois, 0.5), RoIAlign(7)._pool(x, rois, 0.5))


def test_low_quality_matches_need_an_overlap():
    overlaps = torch.tensor([[0.1, 0.35, 0.0], [0.0, 0.2, 0.25], [0.0, 0.0, 0.0]])
    assert LowQualityMatcher(0.7, 0.3, lowest=0.3)(overlaps.clone()).tolist() == [-1, 0, -1]
    assert LowQualityMatcher(0.7, 0.3, lowest=0)(overlaps.clone()).tolist() == [-1, 0, 1]
    shared = torch.tensor([[0.8, 0.1, 0.6], [0.0, 0.0, 0.45]])  # the second box has the last candidate, or none
    assert LowQualityMatcher(0.7, 0.3, lowest=0.3)(shared.clone()).tolist() == [0, -1, 1]


def test_losses_of_retinanet_are_divided_by_the_positives_of_the_batch():
    model = detector("retinanet", neck="convolution")
    both = [target([[10, 10, 60, 70]]), target([[5, 5, 70, 90], [8, 40, 40, 90]], (101, 75))]
    batch = model.preparation(IMAGES)
    levels = model.neck(model.backbone(batch.tensors)[1:])
    scaled = [model._scaled(t, s) for t, s in zip(both, batch.scales)]
    whole = model.losses(levels, batch, scaled)["loss_classifier"]
    anchors = torch.cat(model.retina.anchors.grid(levels))
    positives = [int((model.retina._match(t["boxes"], anchors) >= 0).sum()) for t in scaled]
    alone = [model.losses([x[i : i + 1] for x in levels], batch, scaled[i : i + 1])["loss_classifier"] for i in (0, 1)]
    assert positives[0] != positives[1]
    assert whole.item() == pytest.approx(sum(n * x.item() for n, x in zip(positives, alone)) / sum(positives), rel=1e-4)
    model.retina.normalizer = "image"  # torchvision's
    theirs = model.losses(levels, batch, scaled)["loss_classifier"]
    assert theirs.item() == pytest.approx(sum(x.item() for x in alone) / 2, rel=1e-4)


def test_what_a_narrow_pyramid_and_torchvisions_loss_change():
    narrow = detector("faster_rcnn", pyramid_width=64, **CONVOLUTION)
    assert {len(layer.weight) for layer in (*narrow.neck.lateral, *narrow.neck.output, narrow.proposals.head.conv)} == {
        64
    }
    with torch.no_grad():
        ours, theirs = {}, {}
        for beta, losses in ((0.0, ours), (1 / 9, theirs)):
            narrow.proposals.box_loss_beta = narrow.regions.box_loss_beta = beta
            torch.manual_seed(1)  # of what is sampled
            losses.update(narrow(IMAGES, OBJECTS))
    assert theirs["loss_classifier"] == ours["loss_classifier"]
    for name in ("loss_box_reg", "loss_rpn_box_reg"):
        assert 0 < theirs[name] < ours[name]


def test_images_are_resized_as_the_release_does():
    prepare = Preparation(800, 1333, (0.5, 0.5, 0.5), (1, 1, 1))
    assert prepare.size(480, 640) == (800, 1067)
    assert prepare.size(640, 427) == (1199, 800)
    assert prepare.size(300, 1000) == (400, 1333)
    prepare.min_size, prepare.max_size = 64, 100
    batch = prepare([torch.full((3, 64, 90), 255, dtype=torch.uint8), torch.rand(3, 20, 20)])
    assert batch.tensors.shape == (2, 3, 64, 96)
    assert batch.image_sizes == [(64, 90), (64, 64)]
    assert (batch.tensors[0, :, :, :90] == 0.5).all()
    assert (batch.tensors[0, :, :, 90:] == 0).all()
    assert torch.allclose(batch.scales, torch.tensor([[1.0] * 4, [3.2] * 4]))


def test_masks_of_large_pictures_are_cut_in_parts_with_the_same_bits(monkeypatch):
    torch.manual_seed(0)
    masks, matched = (torch.rand(5, 40, 50) > 0.5).byte(), torch.tensor([4, 0, 2, 2, 3, 0])
    corners = torch.rand(6, 2) * 20
    boxes = torch.cat([corners, corners + 5 + 15 * torch.rand(6, 2)], 1)
    whole = mask_targets(masks, boxes, matched, 14)
    monkeypatch.setattr("involution.dense.masks.AT_ONCE", 2 * 40 * 50)
    assert torch.equal(mask_targets(masks, boxes, matched, 14), whole)


def test_masks_are_cut_and_pasted_back():
    mask = torch.zeros(1, 60, 80, dtype=torch.uint8)
    mask[0, 10:40, 20:50] = 1
    boxes = torch.tensor([[10.0, 5, 60, 50], [-5, -5, 30, 30]])
    cut = mask_targets(mask, boxes, torch.tensor([0, 0]), 28)
    assert set(cut.unique().tolist()) == {0, 1}
    for pasted, box in zip(paste_masks(cut, boxes, (60, 80)), boxes):
        x1, y1, x2, y2 = box.clamp(min=0).int().tolist()
        wanted = torch.zeros_like(pasted)
        wanted[y1:y2, x1:x2] = mask[0, y1:y2, x1:x2].bool()
        assert (pasted != wanted).float().mean() < 0.03
        # as the release pastes, every pixel of the image at once
        x, y = ((torch.arange(n) + 0.5 - a) / (b - a) * 2 - 1 for n, a, b in zip((80, 60), box[:2], box[2:]))
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], 2)
        whole = grid_sample(cut[(boxes == box).all(1)][None], grid[None], align_corners=False)[0, 0] >= 0.5
        assert torch.equal(pasted, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "retinanet", "head": "involution"}, "convolutions alone"),
        ({"name": "faster_rcnn", "head": "linear"}, "head is 'linear'"),
        ({"name": "faster_rcnn", "plugin": "nll"}, "did you mean 'nl'"),
        ({"name": "faster_rcnn", "plugin": "dcn"}, "ResNet"),
        ({"name": "mask_rcnn", "min_size": 2000}, "max_size"),
        ({"name": "mask_rcnn", "num_classes": 0}, "num_classes"),
        ({"name": "mask_rcnn", "pyramid_width": 40}, "multiple of the 16"),
        ({"name": "retinanet", "normalizer": "mean"}, "normalizer is 'mean'"),
        ({"name": "retinanet", "anchor_scale": 0}, "anchor_scale is 0"),
        ({"name": "retinanet", "stacked_convs": 5}, "stacked_convs is 5"),
    ],
)
def test_wrong_options(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_model(**options)


def test_wrong_input():
    model = detector("retinanet")
    with pytest.raises(ValueError, match="needs targets"):
        model(IMAGES)
    with pytest.raises(ValueError, match=r"\(4, 8, 8\)"):
        model([torch.rand(4, 8, 8)], NOTHING[:1])
    with pytest.raises(ValueError, match="no images"):
        model([], [])
