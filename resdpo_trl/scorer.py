"""Scoring of many rows with a model, in batches of similar length that are distributed over all processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from resdpo_trl.memory import trim_heap

TRIMMED_AFTER = 8  # batches; a trim costs the page faults of the next batch


@torch.no_grad()
def score_rows(
    function: Callable[[Any], Sequence[Tensor]],
    rows: Any,
    collate: Callable[[list[Any]], Any],
    batch_size: int,
    models: Sequence[torch.nn.Module],
    description: str,
    lengths: Sequence[int] | None = None,
    workers: int = 0,
    delay: float = 2.0,
    quiet: bool = False,
) -> list[Tensor]:
    """Apply `function` to every row and return its outputs, each (N, …), on the CPU. Every process must call it.

    Args:
        function: a batch -> tensors with one entry per row.
        rows: N rows, indexed by number.
        collate: a list of rows -> a batch.
        batch_size: the number of rows in a batch of one process.
        models: the models that `function` calls. They are in eval mode until it returns.
        description: the label of the progress bar.
        lengths: N lengths. The longest rows come first, so that a batch that does not fit in memory fails immediately.
            None keeps the order of the rows.
        workers: processes that collate batches.
        delay: seconds before the progress bar appears.
        quiet: show no progress bar.
    """
    state = PartialState()
    order = range(len(rows)) if lengths is None else np.argsort(np.asarray(lengths), kind="stable")[::-1].tolist()
    batches = [list(order[at : at + batch_size]) for at in range(0, len(order), batch_size)]
    # a sharded model needs every process in each forward pass: the last round repeats batches
    rounds = -(-len(batches) // state.num_processes)
    batches = list(itertools.islice(itertools.cycle(batches), rounds * state.num_processes))
    loader: Any = DataLoader(
        rows,
        batch_sampler=batches[state.process_index :: state.num_processes],
        collate_fn=collate,
        num_workers=workers,
        pin_memory=state.device.type == "cuda",
    )
    training = [model.training for model in models]
    for model in models:
        model.eval()
    hidden = quiet or not state.is_main_process or None  # None hides the bar where stderr is not a terminal
    # tqdm calls iter() on its argument twice, and each new iterator of a loader draws from torch's random generator
    bar = tqdm(iter(loader), total=len(loader), desc=description, leave=False, delay=delay, disable=hidden)
    fragments = state.device.type == "cpu" and lengths is not None  # batches of different widths fragment glibc's heap
    parts = []
    for number, batch in enumerate(bar, 1):
        parts.append([values.cpu() for values in function(batch)])
        if fragments and number % TRIMMED_AFTER == 0:
            trim_heap()
    for model, mode in zip(models, training, strict=True):
        model.train(mode)
    columns = [torch.cat(values) for values in zip(*gather_object(parts), strict=True)]
    by_process = [batches[process :: state.num_processes] for process in range(state.num_processes)]
    places = torch.tensor([row for own in by_process for batch in own for row in batch])
    return [column.new_empty(len(rows), *column.shape[1:]).index_copy_(0, places, column) for column in columns]
