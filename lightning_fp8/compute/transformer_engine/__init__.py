"""Transformer Engine as a backend: its layers over the model's own parameters, under this library's recipes.

Its modules own their parameters, put a pickled `_extra_state` into the state dict and know nothing of what was there
before them. Here a layer becomes one of them *in place*: it takes on the class and the attributes of a Transformer
Engine module and keeps its identity and its Parameter objects. So tied weights stay tied, an optimizer built earlier
stays valid, hooks and `requires_grad` stay, the root of a model can be converted too, and the state dict is that of
the unconverted model, key for key.

    recipe   a `Recipe` as Transformer Engine's own, or the reason why it has none
    layers   what a converted layer does otherwise than either of its two classes
    convert  which layers, and the context in which they run in FP8

`fp8_autocast`, `end_step`, `fp8_state_dict` and `load_fp8_state_dict` work on these layers as on the others. Besides
the kernels, two things differ. Norms are converted as well. And delayed scaling is Transformer Engine's: the first step
uses scales of 1; the histories of all models in the process advance with every forward and backward pass, not with the
optimizer's step; of a layer that is called twice in a pass, the later call may hide the earlier one.
"""
