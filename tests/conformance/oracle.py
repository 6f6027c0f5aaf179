"""The model output of one step at a chosen point, by the pipeline's own untouched loop: what any engine must agree with.

The point takes the place of the sample that the step before returned; timesteps, loop counter and everything else of the run are
its own. Costs a whole run for one point, and cannot choose the point of the first step.
"""

import inspect

import torch


def own_loop_output(pipe, arguments, position, point, seed=0):
    """The model output that the scheduler is given at ``position`` > 0, counted in steps made, when the sample is ``point``."""
    original, calls, given = pipe.scheduler.step, [], []
    names = list(inspect.signature(original).parameters)

    def step(*args, **kwargs):
        named = dict(zip(names, args, strict=False)) | kwargs
        if len(calls) == position:
            given.append((named["model_output"], named["sample"]))
        result = original(*args, **kwargs)
        calls.append(1)
        if len(calls) != position:
            return result
        if isinstance(result, tuple):
            return (point, *result[1:])
        result.prev_sample = point
        return result

    if not position > 0:
        raise ValueError(f"position={position}. Expected a step after the first, whose sample the pipeline draws itself.")
    pipe.scheduler.step = step
    try:
        pipe(**arguments, generator=torch.Generator().manual_seed(seed))
    finally:
        del pipe.scheduler.step
    model_output, sample = given[0]
    if not torch.equal(sample, point):
        raise RuntimeError(f"{type(pipe).__name__} changed the sample between two steps. Expected the point to arrive as it was.")
    return model_output
