"""The tiny experiment at the IPC of its argument ("ipc2"), with fewer epochs."""

from ml_collections import ConfigDict

from configs import tiny


def get_config(arg: str = "ipc2") -> ConfigDict:
    c = tiny.get_config()
    c.recover.ipc = int(arg.removeprefix("ipc"))
    c.relabel.epochs = c.validate.epochs = 3
    return c
