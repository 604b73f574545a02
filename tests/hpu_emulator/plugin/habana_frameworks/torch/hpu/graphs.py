"""HPU graphs are not emulated: their names are here in lazy mode, as in the real one."""


def _missing(*args, **kwargs):
    raise NotImplementedError("the emulated device has no HPU graphs")


HPUGraph = ModuleCacher = graph = make_graphed_callables = wrap_in_hpu_graph = _missing
