"""One step of training, as a GPU does it best: recorded once, then replayed.

A step of these small models is some thousand short operations. Launched one by one they take a GPU several
times as long as they last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WARM_UP = 3  # steps before the recording, as torch.cuda.graph asks for


class Optimizer:
    """AdamW whose learning rate may change from step to step, also within a recording.

    Args:
        model: Whose parameters it moves.
        lr: Learning rate, until `set_rate` names another.
        weight_decay: AdamW's.
        device: Where the parameters are.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, device: torch.device) -> None:
        self._model, self._device = model, device
        on_gpu = device.type == "cuda"
        self._rate = torch.tensor(lr, device=device) if on_gpu else lr
        self.adam = torch.optim.AdamW(
            model.parameters(), lr=self._rate, weight_decay=weight_decay, fused=on_gpu, capturable=on_gpu
        )

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a checkpoint."""
        self.adam.load_state_dict(state)
        self.adam.param_groups[0]["lr"] = self._rate  # of the checkpoint's it holds a copy

    def set_rate(self, lr: float) -> None:
        """Set the learning rate of the next steps."""
        if isinstance(self._rate, Tensor):
            self._rate.fill_(lr)
        else:
            self.adam.param_groups[0]["lr"] = lr

    def advance(self, loss: Tensor) -> None:
        """Move the parameters down a loss."""
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self.adam.step()


class Step:
    """A function of tensors that does one step and returns its loss.

    Args:
        function: Draws nothing at random and always gets tensors of the same shapes.
        device: Where it computes; on CPUs it is simply called.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self._function, self._on_gpu = function, device.type == "cuda"
        self._calls = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Do one step; what is returned holds until the next one."""
        if not self._on_gpu:
            return self._function(*inputs).detach()
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._warm_up(inputs)
        if self._calls == WARM_UP + 1:
            self._record(inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._loss

    def _warm_up(self, inputs: tuple[Tensor, ...]) -> Tensor:
        queue, current = torch.cuda.Stream(), torch.cuda.current_stream()
        queue.wait_stream(current)
        with torch.cuda.stream(queue):
            loss = self._function(*inputs).detach()
        current.wait_stream(queue)
        return loss

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._function(*self._inputs).detach()
