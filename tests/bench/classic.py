"""DeepCluster the straightforward way: what training/pretrain.py is held against.

In: PNG files, a torchvision network in colour. Out: features, epochs. The loop of the paper (Caron et al., ECCV 2018) as one
writes it from the libraries' examples: every picture is decoded in each pass by two workers, in three channels, float32, the
default memory layout; faiss does PCA and k-means. Nothing here is slowed down on purpose. Crops show as much as Osteon's do: what
differs is the way of computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from training.recipe import Pretraining

WORKERS = 2
NORMALISE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Files(Dataset[tuple[torch.Tensor, int]]):
    """PNG files as a network in colour wants them, each with its position."""

    def __init__(self, files: Sequence[Path], transform: transforms.Compose) -> None:
        self._files, self._transform = files, transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        with Image.open(self._files[position]) as image:
            return self._transform(image.convert("RGB")), position


class Classic:
    """The loop, an epoch at a time."""

    def __init__(self, backbone: nn.Module, width: int, files: Sequence[Path], size_px: int, how: Pretraining, seed: int) -> None:
        """`backbone` gives features (B, width)."""
        self._backbone, self._width, self._how = backbone, width, how
        crop = transforms.RandomResizedCrop(size_px, scale=(how.views.scale_min, how.views.scale_max))
        seen = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALISE]
        whole = [transforms.Resize(size_px * 8 // 7), transforms.CenterCrop(size_px), transforms.ToTensor(), NORMALISE]
        self._files, self._train, self._whole = files, Files(files, transforms.Compose(seen)), transforms.Compose(whole)
        self._chance = np.random.default_rng(seed)
        self._optimiser = torch.optim.SGD(backbone.parameters(), how.lr, momentum=how.momentum, weight_decay=how.weight_decay)

    def epoch(self) -> float:
        """Cluster everything, then train on the cluster numbers; give the mean loss."""
        how = self._how
        labels = self._clusters()
        head = nn.Linear(self._width, how.clusters)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        optimiser = torch.optim.SGD(head.parameters(), how.lr, weight_decay=how.weight_decay)
        targets = torch.from_numpy(labels)
        order = self._evenly(labels)
        self._backbone.train()
        total = 0.0
        for images, positions in DataLoader(self._train, how.batch, sampler=order, num_workers=WORKERS):
            loss = functional.cross_entropy(head(self._backbone(images)), targets[positions])
            self._optimiser.zero_grad()
            optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
            optimiser.step()
            total += loss.item() * len(positions)
        return total / len(order)

    def features(self, files: Sequence[Path]) -> NDArray[np.float32]:
        """Give the features of these pictures in eval mode."""
        self._backbone.eval()
        with torch.no_grad():
            batches = DataLoader(Files(files, self._whole), self._how.batch, num_workers=WORKERS)
            return np.concatenate([self._backbone(images).numpy() for images, _ in batches])

    def _clusters(self) -> NDArray[np.int64]:
        rows = self.features(self._files)
        whitening = faiss.PCAMatrix(self._width, min(self._how.dims, self._width, len(rows) - 1), -0.5)
        whitening.train(rows)
        rows = whitening.apply(rows)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        clustering = faiss.Clustering(rows.shape[1], self._how.clusters)
        clustering.niter, clustering.seed = self._how.iterations, int(self._chance.integers(2**31))
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(rows)
        index = faiss.IndexFlatL2(rows.shape[1])
        clustering.train(rows, index)
        return np.asarray(index.search(rows, 1)[1][:, 0], np.int64)

    def _evenly(self, labels: NDArray[np.int64]) -> list[int]:
        """Draw as many pictures as there are, equally many of each cluster."""
        members = [np.flatnonzero(labels == one) for one in np.unique(labels)]
        each = len(labels) // len(members) + 1
        drawn = np.concatenate([self._chance.choice(some, each, replace=len(some) < each) for some in members])
        return [int(one) for one in self._chance.permutation(drawn)[: len(labels)]]
