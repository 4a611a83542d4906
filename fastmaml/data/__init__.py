"""Tasks and where they come from."""

from fastmaml.data.episodes import EpisodeSampler
from fastmaml.data.meta_dataset import FilteredMetaDataset, MetaDataset, UnionMetaDataset
from fastmaml.data.packed import PackedImages, pack
from fastmaml.data.task_batch import TaskBatch
from fastmaml.data.task_generator import LabelEncoder, SampleDataset, TaskGenerator

__all__ = [
    "EpisodeSampler",
    "FilteredMetaDataset",
    "LabelEncoder",
    "MetaDataset",
    "PackedImages",
    "SampleDataset",
    "TaskBatch",
    "TaskGenerator",
    "UnionMetaDataset",
    "pack",
]
