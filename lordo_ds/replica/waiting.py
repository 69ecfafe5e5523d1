"""What a step sets aside for the end of the same attempted step, where the replicas may talk."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lordo_ds.core.inner import StepSettings


@dataclass(slots=True)
class Waiting:
    """Of one fragment; nothing of it is saved, and nothing is left of it when the attempt has ended.

    gradient, settings: the step sets both where a basis is missing that all replicas give; `Bases.first` reads the
        gradient, the deferred update takes them.
    gradient: alone, where the sync refreshes the basis from it; the sync reads it, and forgets it when it has ended.
    gradient_square: the step sets it where a parameter has copies in the replica; their check takes it.
    energies: the inner step measures them in a step that syncs, inside the basis and in all; the report takes them.
    own_pseudo_gradient: a sync sets and reads it where each replica has a basis of its own, and forgets it.
    """

    gradient: Tensor | None = None
    settings: StepSettings | None = None
    gradient_square: Tensor | None = None
    energies: tuple[Tensor, Tensor] | None = None
    own_pseudo_gradient: Tensor | None = None

    def defer(self, gradient: Tensor, settings: StepSettings) -> None:
        """Let the whole update wait for a basis; the gradient must outlive `step()`."""
        self.gradient, self.settings = gradient, settings

    def take_update(self, keep_gradient: bool) -> tuple[Tensor, StepSettings] | None:
        """The update that waited for a basis, if one did.

        Args:
            keep_gradient: the sync that follows needs it too.
        """
        if self.settings is None:
            return None
        assert self.gradient is not None
        update = self.gradient, self.settings
        self.settings = None
        if not keep_gradient:
            self.gradient = None
        return update

    def take_gradient_square(self) -> float:
        """Squared norm of the gradient; 0 if there was none."""
        square, self.gradient_square = self.gradient_square, None
        return 0.0 if square is None else float(square)

    def take_energies(self) -> tuple[Tensor, Tensor] | None:
        energies, self.energies = self.energies, None
        return energies

    def forget_gradients(self) -> None:
        """The bases are refreshed, or the weights that the gradients belong to are no more."""
        self.gradient = self.settings = self.own_pseudo_gradient = None

    def copy(self) -> Waiting:
        """To come back to: the tensors are shared, nobody writes to them."""
        return replace(self)
