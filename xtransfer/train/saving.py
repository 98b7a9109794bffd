"""What a checkpoint holds of a training state: the weights that are used, and what training needs to resume.

Usually the weights are the parameters, and the rest is the optimizer state. Three settings change this:

- With a moving average, the weights are the average. The parameters that training moves are in the item `resume`.
- With LoRA, the weights are those of the merged model, so whoever reads a checkpoint needs to know nothing about LoRA.
  The item `resume` has the adapters, the head, and their optimizer state, and it is small. The frozen rest is read from
  the base checkpoint again, whose fingerprint the experiment checks.
- With both, `resume` has the average of adapters and head too.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from xtransfer.runtime.sharding import laid_out
from xtransfer.train.state import TrainState, overlay, select

_OPTIMIZER, _TRAINED, _AVERAGE = "optimizer", "trained", "average"


def _unchanged(state: TrainState) -> TrainState:
    return state


@dataclass(frozen=True)
class Saving:
    """How a state is saved and restored. A saved state has the weights as its parameters, and no moving average.

    Attributes:
      saved: from the state to what is scored and saved.
      restored: the inverse.
      abstract: from the abstract state to the abstract saved state.
    """

    saved: Callable[[TrainState], TrainState] = _unchanged
    restored: Callable[[TrainState], TrainState] = _unchanged
    abstract: Callable[[TrainState], TrainState] = _unchanged


WHOLE = Saving()


def of_average(abstract: TrainState, trained: Collection[str]) -> Saving:
    """Return the saving of a state with a moving average.

    Args:
      abstract: the abstract state.
      trained: the names of the averaged parameters. The others are frozen.
    """
    averages = {name: leaf.sharding for name, leaf in abstract.ema.items()}
    params = {name: leaf.sharding for name, leaf in select(abstract.params, trained).items()}

    def saved(state: TrainState) -> TrainState:
        resume = {_OPTIMIZER: state.opt_state, _TRAINED: select(state.params, trained)}
        return TrainState(state.step, overlay(state.params, laid_out(state.ema, params)), resume)

    def restored(state: TrainState) -> TrainState:
        ema = laid_out(select(state.params, trained), averages)
        resume = state.opt_state
        return TrainState(state.step, overlay(state.params, resume[_TRAINED]), resume[_OPTIMIZER], ema)

    def abstract_of(state: TrainState) -> TrainState:
        resume = {_OPTIMIZER: state.opt_state, _TRAINED: select(state.params, trained)}
        return TrainState(state.step, state.params, resume)

    return Saving(saved, restored, abstract_of)


def of_adapters(
    trained: Collection[str],
    abstract_weights: Any,
    merge: Callable[[Any], Any],
    base: Callable[[], Any],
) -> Saving:
    """Return the saving of a state with adapters, with or without a moving average.

    Args:
      trained: the names of the parameters that are trained: adapters and head.
      abstract_weights: the merged parameters, abstract.
      merge: from parameters with adapters to merged ones.
      base: returns the parameters with adapters before training, for what is frozen.
    """

    def resume_of(state: TrainState) -> dict[str, Any]:
        average = {} if state.ema is None else {_AVERAGE: state.ema}
        return {_OPTIMIZER: state.opt_state, _TRAINED: select(state.params, trained), **average}

    def saved(state: TrainState) -> TrainState:
        params = state.params
        if state.ema is not None:
            layout = {name: leaf.sharding for name, leaf in select(params, state.ema).items()}
            params = overlay(params, laid_out(state.ema, layout))
        return TrainState(state.step, merge(params), resume_of(state))

    def restored(state: TrainState) -> TrainState:
        resume = state.opt_state
        params = overlay(base(), resume[_TRAINED])
        return TrainState(state.step, params, resume[_OPTIMIZER], resume.get(_AVERAGE))

    def abstract_of(state: TrainState) -> TrainState:
        return TrainState(state.step, abstract_weights, resume_of(state))

    return Saving(saved, restored, abstract_of)
