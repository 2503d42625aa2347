"""Settings of the detectron2 configurations."""

import importlib.resources

import pytest


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
