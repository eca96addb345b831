"""A method for every weight site of a model, behaving as one."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from permlab.method.base import Method, Phase
from permlab.permutation import PermutationSample
from permlab.sparsity.site import WeightSite


class SiteMethods(nn.Module):
    """One method for each site, in the coordinates of the order that its search, if any, has found.

    A site's order is `base[order of its method]`: the method starts at the identity, `base` is the
    starting order of the configuration until `rebase` replaces it.

    Args:
        sites: of the model.
        bases: starting order of every site.
        num_groups: groups of every site.
        make: builds a site's method from the site and its number of groups; it has to start at the identity.
        left_out: names of sites that were selected and have no method, as they do not fit.
    """

    needs_items = False  # a method reads statistics of its channels, which do not change with the input

    def __init__(
        self,
        sites: Sequence[WeightSite],
        bases: Sequence[Int64[Tensor, " _"]],
        num_groups: Sequence[int],
        make: Callable[[WeightSite, int], Method],
        *,
        left_out: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.left_out = tuple(left_out)
        self.sites = list(sites)
        self.num_groups = {site.name: count for site, count in zip(sites, num_groups, strict=True)}
        self.methods = nn.ModuleDict({_key(s.name): make(s, c) for s, c in zip(sites, num_groups, strict=True)})
        for site, base in zip(sites, bases, strict=True):
            self.register_buffer(_base(site.name), base.clone())
            self.register_buffer(_base(site.name) + "_features", torch.zeros(0), persistent=False)

    def __getitem__(self, name: str) -> Method:
        method = self.methods[_key(name)]
        assert isinstance(method, Method)
        return method

    def _all(self) -> list[Method]:
        return [self[site.name] for site in self.sites]

    # What a task and its callbacks ask of a method

    @property
    def phase(self) -> Phase:
        return self._all()[0].phase

    @property
    def temperature(self) -> float:
        return self._all()[0].temperature

    @property
    def lr(self) -> float:
        return self._all()[0].lr

    @property
    def num_descent_steps(self) -> int:
        return self._all()[0].num_descent_steps

    @property
    def swap_share(self) -> float:
        return self._all()[0].swap_share

    @property
    def num_polish_steps(self) -> int:
        return self._all()[0].num_polish_steps

    def advance(self, step: int, num_steps: int) -> None:
        """Set phase and temperature of every method."""
        for method in self._all():
            method.advance(step, num_steps)

    @torch.no_grad()
    def statistics(self, items: Tensor | None = None) -> dict[str, Tensor]:
        """Means over the sites of what every method reports; `items` are not looked at."""
        tables = [self[site.name].statistics(self.features(site.name)) for site in self.sites]
        return {key: torch.stack([table[key].cpu() for table in tables]).mean() for key in tables[0]}

    # Orders

    def base(self, name: str) -> Int64[Tensor, " k"]:
        return self.get_buffer(_base(name))

    def rebase(self, name: str, order: Int64[Tensor, " k"]) -> None:
        """Make this order the one that the site's method starts from."""
        self.base(name).copy_(order)

    def features(self, name: str) -> Tensor | None:
        """Statistics of the site's channels in its base order; None before `set_features`."""
        features = self.get_buffer(_base(name) + "_features")
        return features if len(features) else None

    def set_features(self, name: str, features: Tensor) -> None:
        """Statistics of the site's channels, in their original order."""
        setattr(self, _base(name) + "_features", features[self.base(name).to(features.device)].float())

    def sample(self, generator: torch.Generator | None) -> dict[str, PermutationSample]:
        """A draw for every site, over channels in base order."""
        return {s.name: self[s.name](self.features(s.name), generator=generator) for s in self.sites}

    @torch.no_grad()
    def orders(self) -> dict[str, Int64[Tensor, " k"]]:
        """The deterministic order of every site, over channels in original order."""
        return {s.name: self.base(s.name)[self[s.name].best(self.features(s.name))] for s in self.sites}

    def bases(self) -> dict[str, Int64[Tensor, " k"]]:
        """The order that every site's method started from."""
        return {site.name: self.base(site.name).clone() for site in self.sites}


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's name holds no dot


def _base(name: str) -> str:
    return f"base_{_key(name)}"
