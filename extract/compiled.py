"""The U-Net compiled, with its taps inside.

Hooks that write beside a compiled graph may be dropped by the compiler, or keep writing to what was there
when it was traced. Here the tapped outputs are results of the compiled function itself, the whole of it must
be one graph, and before the first tile each layer is compared with the network as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from satdifuser.errors import BackboneError, DeviceError
from satdifuser.extract.layers import as_map, tapped
from satdifuser.extract.unet import Conditions
from satdifuser.store.device import first_sentence, is_out_of_memory
from satdifuser.store.schema import LayerInfo

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}  # of a layer's largest value


class CompiledTaps:
    """As `Taps`, with two compiled graphs: one whose results are the maps alone, one with the output too.

    Of the first the compiler itself leaves out whatever comes after the last tapped layer. The hooks stay on
    the network, since a graph remembers them from when it was traced.

    Each graph is of one number of images; fewer are filled up with copies of the last one, to the whole
    number or a half, a quarter … of it.

    Args:
        unet: The network.
        layers: Its tapped layers.
        images: The most images of a call.
        backend: Of `torch.compile`.
    """

    def __init__(
        self, unet: nn.Module, layers: Sequence[LayerInfo], images: int, backend: str = "inductor"
    ) -> None:
        self._unet, self._layers, self._images = unet, layers, images
        self._outputs: dict[str, Tensor] = {}
        self._kept: list[Tensor] = []
        for layer in layers:
            unet.get_submodule(layer.name).register_forward_hook(self._keep(layer.name))
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
        self._maps = torch.compile(self._run_for_maps, **options)
        self._all = torch.compile(self._run_for_all, **options)

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self._outputs[name] = output

        return hook

    def _run_for_all(
        self, x: Tensor, t: Tensor, prompt: Tensor, metadata: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        output = self._unet(x, t, **Conditions(prompt, metadata).keywords()).sample
        return output, [as_map(self._outputs[layer.name], layer) for layer in self._layers]

    def _run_for_maps(self, x: Tensor, t: Tensor, prompt: Tensor, metadata: Tensor | None) -> list[Tensor]:
        return self._run_for_all(x, t, prompt, metadata)[1]

    def output(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Run the whole network: (B, c, h, w) latents to its output of the same shape."""
        output, maps = self._all(*self._filled(x, t, conditions))
        self._outputs.clear()
        self._kept = [values[: len(x)] for values in maps]
        result: Tensor = output[: len(x)]
        return result

    def features_only(self, x: Tensor, t: Tensor, conditions: Conditions) -> list[Tensor]:
        """Run the network up to the last tapped layer and return the maps, see `features`."""
        maps = self._maps(*self._filled(x, t, conditions))
        self._outputs.clear()
        return [values[: len(x)] for values in maps]

    def _filled(self, x: Tensor, t: Tensor, conditions: Conditions) -> list[Any]:
        """The inputs of a graph, with as many images as it takes."""
        size = self._images
        while size // 2 >= len(x):
            size //= 2
        rows = torch.arange(size, device=x.device).clamp(max=len(x) - 1)
        parts = (x, t, conditions.prompt, conditions.metadata)
        return [part if part is None or len(part) == size else part[rows] for part in parts]

    def features(self) -> list[Tensor]:
        """Maps of the last `output`, in layer order: (B, C, H, W)."""
        return self._kept

    @torch.no_grad()
    def check(self, x: Tensor, t: Tensor, conditions: Conditions) -> None:
        """Refuse a compiled network whose tapped layers are not those of the network as it is.

        Args:
            x: Latents to compare with (B, c, h, w), as many as a batch sends through the network.
            t: Their timesteps (B,).
            conditions: What the network is told beside them.

        Raises:
            BackboneError: it cannot be compiled, or a layer differs.
            DeviceError: the device has no memory for both.
        """
        try:
            found = self._run_compiled(x, t, conditions)
            with tapped(self._unet, self._layers) as plain:
                expected = plain.features_only(x, t, conditions)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceError(
                "extract.compile: no memory to compare the compiled U-Net with itself as it is, in a batch "
                f"of {len(x)} ({first_sentence(error)}); set a smaller extract.batch_size, or "
                "extract.compile: false"
            ) from error
        for layer, ours, theirs in zip(self._layers, found, expected, strict=True):
            difference = float((ours - theirs).abs().max() / theirs.abs().max())
            if not difference <= TOLERANCES[x.dtype]:
                raise BackboneError(
                    f"extract.compile: layer {layer.name} of the compiled U-Net differs by {difference:.2g} "
                    f"of its largest value, expected at most {TOLERANCES[x.dtype]:g}; set extract.compile: "
                    "false"
                )

    def _run_compiled(self, x: Tensor, t: Tensor, conditions: Conditions) -> list[Tensor]:
        try:
            return self.features_only(x, t, conditions)
        except RuntimeError as error:  # those of the compiler, too
            if is_out_of_memory(error):
                raise
            raise BackboneError(
                f"extract.compile: the U-Net cannot be compiled here: {error}; install a C++ compiler (for "
                "the CPU) or Triton (for a GPU), or set extract.compile: false"
            ) from error
