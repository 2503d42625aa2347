"""The backbone in torchvision's detectors, and the facts of the detectron2 configurations."""

import importlib.resources

import pytest
import torch

from bt_fast.evaluate.detection import c4_detector
from bt_fast.models.networks import build_encoder


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_encoder("resnet18").eval()


@torch.no_grad()
def test_a_detector_sees_the_encoders_features(encoder):
    detector = c4_detector(encoder, 21).eval()
    images = torch.rand(2, 3, 64, 96)
    normalised = torch.stack([detector.transform.normalize(image) for image in images])
    pooled = detector.roi_heads.box_head(detector.backbone(normalised))
    assert torch.allclose(pooled, encoder(normalised), atol=1e-5)
    assert pooled.std() > 1e-3


@pytest.mark.parametrize("masks", [False, True])
def test_it_trains_every_layer_and_predicts(encoder, masks):
    detector = c4_detector(encoder, 5, masks=masks).train()
    detector.transform.min_size, detector.transform.max_size = (64,), 128
    target = {"boxes": torch.tensor([[8.0, 8, 50, 60]]), "labels": torch.tensor([3])}
    if masks:
        target["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
        target["masks"][:, 8:60, 8:50] = 1
    losses = detector([torch.rand(3, 64, 64)] * 2, [target] * 2)
    assert ("loss_mask" in losses) is masks
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in encoder.parameters())
    with torch.no_grad():
        found = detector.eval()([torch.rand(3, 64, 64)])[0]
    assert {"boxes", "labels", "scores"} <= found.keys() and ("masks" in found) is masks


def test_the_cifar_stem_is_refused():
    with pytest.raises(ValueError, match="CIFAR"):
        c4_detector(build_encoder("resnet18", small_images=True), 21)


def test_the_configurations_are_the_papers():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    folder = importlib.resources.files("bt_fast.evaluate") / "detectron2"
    voc, coco = (
        yaml.safe_load((folder / name).read_text())
        for name in ("voc_faster_rcnn_c4_24k.yaml", "coco_mask_rcnn_c4_1x.yaml")
    )
    for settings in (voc, coco):
        solver, model = settings["SOLVER"], settings["MODEL"]
        assert (solver["IMS_PER_BATCH"], solver["GAMMA"]) == (16, 0.1)
        assert (solver["WARMUP_FACTOR"], solver["WARMUP_ITERS"]) == (0.333, 1000)
        assert model["BACKBONE"]["FREEZE_AT"] == 0 and not model["RESNETS"]["STRIDE_IN_1X1"]
        assert settings["INPUT"]["FORMAT"] == "RGB"
    assert (voc["SOLVER"]["MAX_ITER"], voc["SOLVER"]["STEPS"]) == (24000, [18000, 22000])
    assert (voc["SOLVER"]["BASE_LR"], coco["SOLVER"]["BASE_LR"]) == (0.1, 0.03)
    assert coco["SOLVER"]["MAX_ITER"] == 90000 and coco["MODEL"]["MASK_ON"]
    assert voc["DATASETS"]["TRAIN"] == ["voc_2007_trainval", "voc_2012_trainval"]
