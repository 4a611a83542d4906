"""Tasks and where they come from."""

from fastmaml.data import samplers, transforms, utils
from fastmaml.data.episodes import EpisodeSampler
from fastmaml.data.meta_dataset import FilteredMetaDataset, MetaDataset, UnionMetaDataset
from fastmaml.data.packed import PackedImages, pack
from fastmaml.data.samplers import TasksetSampler
from fastmaml.data.task_batch import TaskBatch
from fastmaml.data.task_generator import LabelEncoder, SampleDataset, TaskGenerator
from fastmaml.data.taskset import TaskDataset, Taskset
from fastmaml.data.transforms import DataDescription
from fastmaml.data.utils import InfiniteIterator, OnDeviceDataset, partition_task

__all__ = [
    "DataDescription",
    "EpisodeSampler",
    "FilteredMetaDataset",
    "InfiniteIterator",
    "LabelEncoder",
    "MetaDataset",
    "OnDeviceDataset",
    "PackedImages",
    "SampleDataset",
    "TaskBatch",
    "TaskDataset",
    "TaskGenerator",
    "Taskset",
    "TasksetSampler",
    "UnionMetaDataset",
    "pack",
    "partition_task",
    "samplers",
    "transforms",
    "utils",
]
