import torch


def enable_compiled_autograd():
    torch._dynamo.config.compiled_autograd = True
    torch._dynamo.config.optimize_ddp = "python_reducer"
