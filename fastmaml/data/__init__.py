"""Tasks and where they come from."""

from fastmaml.data import samplers, task_dataset, transforms, utils
from fastmaml.data.episodes import EpisodeSampler
from fastmaml.data.few_shot import (
    aircraft,
    cifarfs,
    cub,
    fc100,
    flowers,
    fungi,
    mini_imagenet,
    omniglot,
    quickdraw,
    textures,
    tiered_imagenet,
)
from fastmaml.data.meta_dataset import FilteredMetaDataset, MetaDataset, UnionMetaDataset
from fastmaml.data.packed import PackedImages, pack
from fastmaml.data.samplers import TasksetSampler
from fastmaml.data.task_batch import TaskBatch
from fastmaml.data.task_generator import LabelEncoder, SampleDataset, TaskGenerator
from fastmaml.data.taskset import TaskDataset, Taskset
from fastmaml.data.toy import Harmonic, Sinusoid, SinusoidAndLine
from fastmaml.data.transforms import DataDescription
from fastmaml.data.utils import InfiniteIterator, OnDeviceDataset, partition_task

__all__ = [
    "DataDescription",
    "EpisodeSampler",
    "FilteredMetaDataset",
    "Harmonic",
    "InfiniteIterator",
    "LabelEncoder",
    "MetaDataset",
    "OnDeviceDataset",
    "PackedImages",
    "SampleDataset",
    "Sinusoid",
    "SinusoidAndLine",
    "TaskBatch",
    "TaskDataset",
    "TaskGenerator",
    "Taskset",
    "TasksetSampler",
    "UnionMetaDataset",
    "aircraft",
    "cifarfs",
    "cub",
    "fc100",
    "flowers",
    "fungi",
    "mini_imagenet",
    "omniglot",
    "pack",
    "partition_task",
    "quickdraw",
    "samplers",
    "task_dataset",
    "textures",
    "tiered_imagenet",
    "transforms",
    "utils",
]
