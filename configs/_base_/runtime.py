"""What every run shares. A method's own config holds everything a reader would change."""

from mmengine.hooks import LoggerHook
from mmengine.visualization import TensorboardVisBackend, Visualizer

from visadapt.hooks.files import AdapterFiles, Checkpoints

default_hooks = dict(
    checkpoint=dict(type=Checkpoints, interval=1, by_epoch=True, keep=2),
    logger=dict(type=LoggerHook, interval=10),
)
custom_hooks = [dict(type=AdapterFiles, monitor="top1")]
visualizer = dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])
randomness = dict(seed=0)
