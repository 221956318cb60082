"""The tensors of a model on both sides: what to expect, and converting between them, one group of tensors at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.exchange.architecture import Architecture, Link
from pretrain.exchange.weights import READABLE_DTYPES, ForeignWeights
from pretrain.models.hybrid.config import HybridConfig
from pretrain.models.hybrid.model import HybridLM
from pretrain.parallel.canonical import canonical_parameters
from pretrain.parallel.layers import TorchLayers


def meta_model(config: HybridConfig) -> HybridLM:
    """The whole model without memory, for names and shapes."""
    with torch.device("meta"):
        return config.build(TorchLayers())


@dataclass(frozen=True)
class Plan:
    """How the tensors of one model correspond.

    ``shapes``: of ours by canonical name. ``links`` cover each of ours once. ``expected``: shape of each of theirs.
    """

    architecture: Architecture
    config: HybridConfig
    shapes: Mapping[str, tuple[int, ...]]
    links: Sequence[Link]
    expected: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, architecture: Architecture, config: HybridConfig) -> Plan:
        """The plan for ``config``, which ``architecture`` can express."""
        model = meta_model(config)
        shapes = {part.name: part.shape for p in canonical_parameters(model) for part in p.parts}
        links = [Link((architecture.embedding,), ("embedding.weight",)), *architecture.links(config)]
        if not config.tied_embeddings:
            links.append(Link((architecture.head,), ("head.weight",)))
        covered = sorted(name for group in links for name in group.ours)
        assert covered == sorted(shapes), f"{architecture.model_type}: {set(covered) ^ set(shapes)}"
        expected = {name: group.their_shape(shapes) for group in links for name in group.theirs}
        expected |= architecture.zeros(config)
        return cls(architecture, config, shapes, links, expected)

    @property
    def copied_head(self) -> bool:
        """Whether the head is written as a copy of the embedding."""
        return self.config.tied_embeddings and not self.architecture.ties

    def own_name(self, name: str) -> str:
        """A name of theirs with the prefix that the plan uses."""
        first, *others = self.architecture.prefixes
        for prefix in others:
            if name.startswith(prefix):
                return first + name.removeprefix(prefix)
        return name

    def stored_names(self, weights: ForeignWeights) -> dict[str, str]:
        """Name in the files of each tensor, by the name in the plan; tensors that are not read are left out."""
        return {self.own_name(name): name for name in weights.shapes if not self.architecture.absent(name)}

    def faults(self, weights: ForeignWeights) -> list[str]:
        """Every tensor that is missing, not expected, of another shape or type, or not what it must equal."""
        stored = self.stored_names(weights)
        found = {name: weights.shapes[place] for name, place in stored.items()}
        tied = {self.architecture.head} if self.config.tied_embeddings else set()
        known = self.expected.keys() | tied
        both = sorted(found.keys() & self.expected.keys())
        faults = [
            *(
                f"{name}: missing, expected shape {list(self.expected[name])}"
                for name in sorted(self.expected.keys() - found.keys())
            ),
            *(
                f"{name}: not in {self.architecture.class_name} with these settings"
                for name in sorted(found.keys() - known)
            ),
            *(
                f"{name}: shape {list(found[name])}, expected {list(self.expected[name])}"
                for name in both
                if found[name] != self.expected[name]
            ),
        ]
        for name in sorted(found.keys() & known):
            if (dtype := weights.dtypes[stored[name]]) not in READABLE_DTYPES:
                faults.append(f"{name}: {dtype}, expected one of {', '.join(READABLE_DTYPES)}")
        return faults or [*self._value_faults(weights, stored)]

    def _value_faults(self, weights: ForeignWeights, stored: Mapping[str, str]) -> Iterator[str]:
        head, embedding = self.architecture.head, self.architecture.embedding
        is_given = self.config.tied_embeddings and head in stored
        if is_given and not torch.equal(weights.read(stored[head]), weights.read(stored[embedding])):
            yield f"{head}: differs from {embedding}, though config.json says tie_word_embeddings"
        for name in self.architecture.zeros(self.config):
            if weights.read(stored[name]).any():
                yield f"{name}: not zero; routing by a balancing bias is not supported"

    def to_ours(self, group: Link, weights: ForeignWeights, stored: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Our tensors of one group, FP32, in their logical shape."""
        theirs = [weights.read(stored[name]).to(torch.float32) for name in group.theirs]
        if group.kind == "stack":
            yield group.ours[0], torch.stack(theirs)
            return
        flat, start = theirs[0].reshape(-1), 0
        for name in group.ours:
            shape = self.shapes[name]
            stop = start + torch.Size(shape).numel()
            yield name, flat[start:stop].view(shape)
            start = stop

    def to_theirs(self, group: Link, ours: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Their tensors of one group, in the dtype of ours."""
        if group.kind == "stack":
            yield from zip(group.theirs, ours[0], strict=True)
            return
        packed = ours[0] if len(ours) == 1 else torch.cat(list(ours))
        yield group.theirs[0], packed.reshape(group.their_shape(self.shapes))
