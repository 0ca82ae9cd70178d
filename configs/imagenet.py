"""PRISM on ImageNet-1K, shared by imagenet_ipc{1,10,50,100}.py.

Arguments after the colon, separated by commas:
  smoke      10 classes, 20 iterations, 2 epochs: runs on your real paths in minutes
  official   the preset `prism_official`: the released code instead of the paper
  folder     images that somebody else made, in --config.recover.initialise_from=DIR

Paper: ResNet-18, IPC 10: 45.7 % top-1 (supplement, table 3).
"""

from ml_collections import ConfigDict

from configs import base

# torchvision's files, by the names under which it publishes them (IMAGENET1K_V1).
CHECKPOINTS = {
    "resnet18": "resnet18-f37072fd.pth",
    "mobilenet_v2": "mobilenet_v2-b0353104.pth",
    "efficientnet_b0": "efficientnet_b0_rwightman-7f5810bc.pth",
    "shufflenet_v2_x0_5": "shufflenetv2_x0.5-f707e7126e.pth",
    "alexnet": "alexnet-owt-7be5be79.pth",
}


def config(ipc: int, arg: str) -> ConfigDict:
    words = base.words(arg, "smoke", "official", "folder")
    c = base.get_config()
    c.name = f"imagenet_ipc{ipc}"
    c.dataset.path = "data/imagenet"  # train/<wnid>/*.JPEG and val/<wnid>/*.JPEG
    # The test images are 7.5 and 100 a class 15: else decoded anew in every test and every epoch.
    c.dataset.cache_gigabytes = 16.0 if ipc > 50 else 8.0
    c.recover.ipc = ipc
    c.recover.batch_size = 100
    # Supplement, table 1a: batch 50 at IPC 10, 100 at IPC 50 and 100.
    c.relabel.batch_size = c.validate.batch_size = 100 if ipc >= 50 else 50
    c.validate.controls = ("random_real", "random_real_hard")
    if "official" in words:
        c = base.official(c)
        c.name += "_official"
    for name in c.squeeze.teachers:
        c.networks[name] = base.network(
            architecture=name, checkpoint=f"data/teachers/{CHECKPOINTS[name]}"
        )
    if "smoke" in words:
        c.name += "_smoke"
        c.dataset.num_classes = 10
        c.recover.iterations = 20
        c.recover.batch_size = 10
        c.recover.ipc = min(ipc, 2)
        c.recover.budget = "constant"
        c.recover.steps_per_dispatch = 5
        c.relabel.epochs = c.validate.epochs = 2
        c.relabel.batch_size = c.validate.batch_size = 10
        for name in c.squeeze.teachers:
            c.networks[name].head_classes = 1000  # cut to the classes that the data has
    return base.folder(c) if "folder" in words else c
