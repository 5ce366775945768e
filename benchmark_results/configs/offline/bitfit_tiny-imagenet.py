model = {'type': 'ImageClassifier',
 'backbone': {'type': 'TimmViT', 'name': 'vit_small_patch14_dinov2', 'weights': 'dinov2_vits14_focus'},
 'adapters': {'main': {'type': 'BitFit', 'targets': ['all-linear']}},
 'head': {'type': 'LinearHead', 'num_classes': 50}}
train_dataloader = {'batch_size': 32,
 'num_workers': 0,
 'drop_last': True,
 'dataset': {'type': 'TinyImageNet',
             'split': 'train800val200',
             'training': True,
             'transform': [{'type': 'BicubicResize', 'height': 56, 'width': 56}]},
 'sampler': {'type': 'visadapt.datasets.sampler.EpochSampler', 'shuffle': True, 'round_up': True},
 'collate_fn': {'type': 'visadapt.datasets.base.collate'}}
val_dataloader = {'batch_size': 50,
 'num_workers': 0,
 'drop_last': False,
 'dataset': {'type': 'TinyImageNet',
             'split': 'test',
             'training': False,
             'transform': [{'type': 'BicubicResize', 'height': 56, 'width': 56}]},
 'sampler': {'type': 'visadapt.datasets.sampler.EpochSampler', 'shuffle': False, 'round_up': False},
 'collate_fn': {'type': 'visadapt.datasets.base.collate'}}
val_evaluator = {'type': 'ClassificationMetric'}
train_cfg = {'by_epoch': True, 'max_epochs': 8, 'val_interval': 8}
val_cfg = {}
optim_wrapper = {'type': 'visadapt.optim.wrapper.AutocastOptimWrapper',
 'constructor': 'visadapt.optim.groups.TrainableGroups',
 'optimizer': {'type': 'AdamW', 'lr': 0.001, 'weight_decay': 0.05},
 'paramwise_cfg': {'head_lr_mult': 1.0, 'decay_vectors': True}}
param_scheduler = {'type': 'CosineAnnealingLR', 'T_max': 8, 'by_epoch': True, 'convert_to_iter_based': True}
default_hooks = {'checkpoint': None, 'logger': {'type': 'LoggerHook', 'interval': 10}}
custom_hooks = [{'type': 'visadapt.hooks.files.AdapterFiles', 'monitor': 'top1'}]
randomness = {'seed': 0}
