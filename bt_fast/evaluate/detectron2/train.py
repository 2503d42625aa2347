"""Detection and segmentation with detectron2, by the protocol of the paper (appendix C.2).

    bt-fast export RUN --to detectron2 --out encoder.pth
    python -m bt_fast.evaluate.detectron2.train --num-gpus 8 --config-file CONFIG \\
        MODEL.WEIGHTS encoder.pth

CONFIG is voc_faster_rcnn_c4_24k.yaml or coco_mask_rcnn_c4_1x.yaml of this folder; the environment
variable DETECTRON2_DATASETS is the path of the data sets. `--resume`, `--eval-only` and KEY VALUE
pairs are detectron2's.

A C4 detector applies res5 to every region. The paper follows MoCo, which fine-tunes all layers with
synchronised batch norm and adds one more norm after res5.
"""

from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.layers import get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads


@ROI_HEADS_REGISTRY.register()
class NormedRes5ROIHeads(Res5ROIHeads):
    """Res5ROIHeads with a norm after res5."""

    @classmethod
    def _build_res5_block(cls, cfg):
        blocks, width = super()._build_res5_block(cfg)
        blocks.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, width))
        return blocks, width


class Trainer(DefaultTrainer):
    """detectron2's default training loop, with the evaluator of each data set."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        if dataset_name.startswith("voc"):
            return PascalVOCDetectionEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)


def main(arguments):
    """Train or evaluate in one process."""
    config = get_cfg()
    config.merge_from_file(arguments.config_file)
    config.merge_from_list(arguments.opts)  # KEY VALUE pairs of the command line
    config.freeze()
    default_setup(config, arguments)
    trainer = Trainer(config)
    trainer.resume_or_load(resume=arguments.resume)
    if arguments.eval_only:
        return Trainer.test(config, trainer.model)
    return trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )
