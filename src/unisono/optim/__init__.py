"""Optimizers with hyperparameters per member: training an ensemble equals N solo trainings."""

from unisono.optim.algorithms import SGD, Adam, AdamW, RMSprop
from unisono.optim.optimizer import MemberOptimizer

__all__ = ["SGD", "Adam", "AdamW", "MemberOptimizer", "RMSprop"]
